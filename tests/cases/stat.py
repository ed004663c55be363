"""Two tokens of two channels; sums, not yet divided by the number of tokens."""
from __future__ import annotations

import torch

from tests.cases import Case

X = torch.tensor([[3.0, 0.0], [-4.0, 1.0]])
G = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
TOKENS = {"x": torch.tensor([[1.0, 0.0], [3.0, 4.0]]), "y": torch.tensor([[0.0, 2.0], [4.0, 3.0]])}

CASES = {
    "stat/in_sq": Case({"x": X}, [25, 1], differs="stat/absmax"),
    "stat/sample": Case({"x": X}, [[3, 0], [-4, 1]], differs="stat/gram"),
    "stat/gram": Case({"x": X}, [[25, -4], [-4, 1]], differs="stat/in_sq"),
    "stat/absmax": Case({"x": X}, [4, 1], differs="stat/act_norm"),
    "stat/in_abs": Case({"x": X}, [7, 1], differs="stat/in_sq"),
    "stat/in_mean": Case({"x": X}, [-1, 1], differs="stat/in_abs"),
    # The root of in_sq.
    "stat/act_norm": Case({"x": X}, [5, 1], differs="stat/in_sq"),
    # Of the gates themselves, and of what they multiply the magnitudes.
    "stat/hidden_gate": Case(TOKENS, [[1, 0], [3, 4]], differs="stat/hidden_up"),
    "stat/hidden_up": Case(TOKENS, [4, 5], differs="stat/hidden_gate"),
    "stat/source": Case(TOKENS, [[1, 0], [3, 4]], differs="stat/fed"),
    "stat/fed": Case(TOKENS, [[0, 2], [4, 3]], differs="stat/source"),
    # One of two above zero in the first token, and in the second one of one.
    "stat/firings": Case({"x": torch.tensor([[3.0, 1.0, -5.0], [-1.0, 0.0, 2.0]])}, [[1, 0, 1]], differs="stat/absmax"),
    # At a right angle: 0. Then (3 * 4 + 4 * 3) / (5 * 5).
    "stat/cosine": Case(TOKENS, [0.96], differs="stat/in_sq"),
    "stat/stream_sq": Case(TOKENS, [[10, 16], [16, 13]], differs="stat/cosine"),
    # One token is where its mean is.
    "stat/stream_std": Case({"x": torch.tensor([[3.0, 0.0]]), "y": torch.tensor([[0.5, 1.0]])}, [[0, 0], [0, 0]], differs="stat/stream_sq"),
    "stat/block_cosine": Case(TOKENS, [0.96], differs="stat/in_sq"),
    # Means of the magnitudes of the one sequence: 3.5 and 0.5.
    "stat/sentence_abs": Case({"x": X}, [3.5, 0.5], differs="stat/in_abs"),
    "stat/grad_sq": Case({"g": G}, [[1, 4], [9, 0]], differs="stat/grad"),
    "stat/grad": Case({"g": G}, [[1, -2], [3, 0]], differs="stat/grad_sq"),
    "stat/grads": Case({"g": G}, [[1, -2], [3, 0]], differs="stat/grad_sq"),
}
