"""Four inputs of two tokens, half of them computed: those that pass are 1."""
from __future__ import annotations

import torch

from tests.cases import Case

SEEN = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
X = torch.tensor([[2.5, -3.0, 1.0, 2.0], [0.5, 1.0, -1.5, 2.0]])
W = torch.tensor([[0.0, 3.0, 1.0, 1.5], [1.25, 4.0, 0.0, 1.5]])  # columns of norm 1.25, 5, 1 and 2.1
GATES = {"x": X, "w": W, "keep": 0.5, "sample": SEEN, "hidden_gate": SEEN, "hidden_up": torch.tensor([6.0, 1.0, 1.0, 0.5])}
# Of four inputs one at a time is not zero, and of four neurons the next one is active, a quarter.
ONE = torch.eye(4).repeat(64, 1)
ROUTED = {"x": torch.eye(4), "keep": 0.25, "source": ONE, "fed": 3 * ONE.roll(1, 1), "sample": ONE}
# Of two heads of two inputs each one, as the first input is zero or not: what it gives is longer, though it sums up to nothing.
HEADS = {**ROUTED, "keep": 0.5, "heads": torch.tensor([2, 2]), "fed": torch.tensor([[2.0, -2, 1, 0], [1, 0, 2, -2]])[[0, 1, 1, 1] * 64]}
# Three tokens, the first two of which decide: the core of the first is one of the two above zero, that of the second two of five, which
# makes 2, 0, 0, 1 and 0 tokens.
SENTENCE = {"x": torch.tensor([[3.0, -9.0, 1.0, -2.0, 0.0], [8.0, 1.0, 2.0, 7.0, 1.0], [0.0, 1.0, 1.0, 1.0, 1.0]]), "keep": 0.4,
            "w": torch.ones(1, 5), "firings": torch.tensor([[9.0, 1, 5, 4, 0], [1.0, 9, 0, 4, 5]]), "sample": torch.ones(1, 5)}

CASES = {
    # The lower two magnitudes seen are 1 and 2: what is above 2 passes.
    "gate/gate_magnitude": Case(GATES, [[1, 1, 0, 0], [0, 0, 0, 0]], differs="gate/wina"),
    # 3.1, 15, 1, 4.2 and 0.6, 5, 1.5, 4.2: two of each token. By the largest of each column it would be 3.1, 12, 1, 3.
    "gate/wina": Case(GATES, [[0, 1, 0, 1], [0, 1, 0, 1]], differs="gate/gate_magnitude"),
    "gate/cats": Case(GATES, [[1, 1, 0, 0], [0, 0, 0, 0]], differs="gate/chess"),
    # Seen 6, 2, 3 and 2: what is above 2 passes; here 15, 3, 1, 1 and 3, 1, 1.5, 1.
    "gate/chess": Case(GATES, [[1, 1, 0, 0], [1, 0, 0, 0]], differs="gate/cats"),
    "gate/predictor": Case(ROUTED, torch.eye(4).roll(1, 1).tolist(), {"rank": 4, "epochs": 50}, differs="gate/gate_magnitude"),
    "gate/core": Case(SENTENCE, [[1] * 5, [1] * 5, [1, 0, 0, 1, 0]], {"prompt": 2}, differs="gate/core_similar"),
    # Sentences of two kinds, by neurons 0 and 2, and by 1 and 4; this one, by 0 and 3, is nearer to the first.
    "gate/core_similar": Case(SENTENCE, [[1] * 5, [1] * 5, [1, 0, 1, 0, 0]], {"prompt": 2, "clusters": 2}, differs="gate/core"),
    # A step of two sequences, which need the second neuron and the third.
    "gate/polar": Case({**ROUTED, "x": torch.eye(4)[:2]}, [[0, 1, 1, 0]] * 2, {"rank": 4, "epochs": 50, "batch": 2},
                       differs="gate/predictor"),
    "gate/heads": Case(HEADS, [[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]], {"epochs": 50, "lr": 0.03},
                       differs="gate/gate_magnitude"),
}
