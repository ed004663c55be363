"""Two tokens, the second ten times the first, met in three steps: -1, 0 and 1 times a range."""
from __future__ import annotations

import torch

from tests.cases import Case

X = torch.tensor([[1.0, 0.4, -0.6], [10.0, 4.0, -6.0]])

CASES = {
    # Each has a range of its own.
    "input/token": Case({"x": X, "sample": X}, [[1, 0, -1], [10, 0, -10]], {"act_bits": 2}, differs="input/static"),
    # 10 for both: nothing of the first is left.
    "input/static": Case({"x": X, "sample": X}, [[0, 0, 0], [10, 0, -10]], {"act_bits": 2, "clip": "max"}, differs="input/token"),
}
