"""One weight of two is gone; the other makes up for it as far as the inputs correlate."""
from __future__ import annotations

import math

import torch

from tests.cases import Case
from tests.cases.edit import Whole
from trimtab.core.types import Change, Loss, Seen, Start, Weight
from trimtab.methods.codes import nearest, rounded


def halved(w: list[list[float]], mask: list[list[int]], gram: list[list[float]]) -> dict:
    t, m = torch.tensor(w), torch.tensor(mask, dtype=torch.bool)
    return {"w": t, "new": Change(t * m, mask=m), "gram": torch.tensor(gram)}


PAIR = halved([[1.0, 2.0], [2.0, 1.0]], [[0, 1], [1, 0]], [[2.0, 1.0], [1.0, 1.0]])
TWO = torch.tensor([[1.4, 2.4]])
EVEN = halved([[1.0, 2.0]], [[0, 1]], [[4.0, 2.0], [2.0, 4.0]])

class Handed:
    """One site and one sequence: what training is handed comes out as the factors, to be seen."""

    def __init__(self, new: Change, seen: Seen):
        self.new, self.seen = new, seen

    def fit(self, start: Start, weight: Weight, loss: Loss, **_: object) -> dict[str, dict[str, torch.Tensor]]:
        own = start(self.new, torch.Generator().manual_seed(0))
        assert torch.equal(weight(self.new, own), self.new.w)  # nothing at first
        own = {"left": torch.full_like(own["left"], float(loss(self.seen))).bfloat16(), "right": torch.tensor([[1.0, 2.0]]).bfloat16()}
        return {"site": own}


# Off by 3 and by 1: 5. Two tokens that are followed by what had a chance of one half and, of the other, one quarter.
NINE = nearest(torch.tensor([[9.0, 4.0]]), 2).change()
SEEN = Seen(torch.tensor([[3.0, 2.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]]), torch.tensor([1, 0]))

CASES = {
    # 2 + 1 * G_12 / G_22 = 3 and 2 + 1 * G_12 / G_11 = 2.5.
    "repair/least_squares": Case(PAIR, [[0, 3], [2.5, 0]], {"damp": 0.0}, differs="repair/obs"),
    # The same to the right of what is gone, nothing to its left.
    "repair/obs": Case(PAIR, [[0, 3], [2, 0]], {"damp": 0.0}, differs="repair/least_squares"),
    # Two bits, one step a row: 4 and 1.4 become 4 and 0, and of 0.55 times the scale 2.2 and 2.2, which the second input likes better.
    "repair/clip": Case({"w": torch.tensor([[4.0, 1.4]]), "new": nearest(torch.tensor([[4.0, 1.4]]), 2).change(),
                         "gram": torch.diag(torch.tensor([0.01, 1.0]))}, [[2.2, 2.2]], differs="repair/obs"),
    # One step is 1, and 1.4 and 2.4 are 1 and 2: off by (-0.4, -0.4), slopes (-1.2, -0.8). The first goes to 1 + 1.2 / 2, nearest 2; then
    # off by (0.6, -0.4) the second has a slope of 0.2, and 2 - 0.2 is nearest 2.
    "repair/greedy": Case({"w": TWO, "new": rounded(TWO, Whole(4, 1.0)(TWO), 2).change(), "gram": torch.tensor([[2.0, 1.0], [1.0, 1.0]])},
                          [[2, 2]], {"damp": 0.0}, differs="repair/clip"),
    # One step towards 2 + 1/2, worked out in edit/admm.
    "repair/admm": Case(EVEN, [[0, 34 / 15]], {"damp": 0.0, "iters": 1, "rho": 1.0}, differs="repair/least_squares"),
    # Two bits, one step of 9: 4 becomes 0, and what is lost is of rank 1.
    "repair/lorc": Case({"w": torch.tensor([[9.0, 4.0]]), "new": nearest(torch.tensor([[9.0, 4.0]]), 2).change(), "gram": torch.eye(2)},
                        [[9, 4]], {"rank": 1}, differs="repair/clip"),
    # Off by (-0.4, -0.4), at means of 2 and 0.5: what the weights take off is 0.8 + 0.2.
    "repair/bias": Case({"w": TWO, "new": rounded(TWO, Whole(4, 1.0)(TWO), 2).change(), "in_mean": torch.tensor([2.0, 0.5])},
                        {"w": [[1, 2]], "bias": [1]}),
    # One step is 1, and 1.4 and 2.4 are 1 and 2: w G w' = 6.2 and w' G w' = 5, so the step becomes 1.24.
    "repair/gain": Case({"w": TWO, "new": rounded(TWO, Whole(4, 1.0)(TWO), 2).change(), "gram": torch.eye(2)}, [[1.24, 2.48]],
                        differs="repair/clip"),
    # (5 + (ln 2 + ln 4) / 2) / 2 = 3.02 is 3.015625 in bfloat16; times [1, 2] beside the codes [9, 0].
    "repair/rilq": Case({"w": torch.tensor([[9.0, 4.0]]), "new": NINE, "gram": torch.eye(2), "net": Handed(NINE, SEEN)},
                        [[9 + 3.015625, 2 * 3.015625]], {"rank": 1}, differs="repair/lorc"),
}
