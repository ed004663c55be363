"""Two inputs, of which the second counts, and a grid of -1, 0 and 1 times the larger weight."""
from __future__ import annotations

import torch

from tests.cases import Case
from tests.cases.edit import Whole

ROOT = 10**0.25

CASES = {
    # As it is, 0.3 becomes 0. With a = 1/2, s = (1, sqrt 10) / 10^(1/4): both weights times s are near 0.55, and 0.3 becomes 0.316.
    "rewrite/awq": Case({"w": torch.tensor([[1.0, 0.3]]), "grid": Whole(2), "in_abs": torch.tensor([1.0, 10.0]),
                         "gram": torch.diag(torch.tensor([1.0, 100.0]))}, [1 / ROOT, ROOT], {"steps": 2}),
}
