"""Parts of a network so small that what becomes of them can be told by hand."""
from __future__ import annotations

import torch

from tests.cases import Case

ONE = {"up": torch.tensor([[1.0, 2.0]]), "down": torch.tensor([[1.0], [0.0]]), "norm": torch.tensor([2.0, 3.0])}
TWO = {"up": torch.tensor([[4.0, 5.0]]), "down": torch.tensor([[6.0], [7.0]]), "norm": torch.tensor([1.0, 10.0])}

CASES = {
    # The eigenvectors of 3 and of 1, the larger first; of a vector and its negative, the one this gives.
    "wiring/principal": Case({"gram": torch.tensor([[1.0, 0.0], [0.0, 3.0]])}, [[0, 1], [1, 0]]),
    # Columns of what reads the norm take its weight: [1 * 2, 2 * 3] and [4 * 1, 5 * 10].
    "wiring/fusion": Case({"mlps": [ONE, TWO], "apart": torch.zeros(2, 2)}, {
        "norm": [1, 1], "up": [[2, 6], [4, 50]], "down": [[1, 6], [0, 7]]}),
    # Channels first: means 2 and 5.
    "wiring/rms": Case({"writes": torch.tensor([[1.0, 3.0], [3.0, 7.0]])}, [[-1, -2], [1, 2]]),
}
