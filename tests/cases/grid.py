"""One row of four weights, as the nearest values of its grid."""
from __future__ import annotations

import torch

from tests.cases import Case

W = {"w": torch.tensor([[4.0, 1.5, -1.0, 0.6]]), "in_sq": torch.ones(4)}
MEAN = (4 + 1.5 + 1 + 0.6) / 4
PEAKS = {"w": torch.tensor([[4.0, -2.0, 0.0, 1.0, 4.0, -2.0, 0.0, 1.0]]), "in_sq": torch.ones(8)}

CASES = {
    # Groups of two, two bits, symmetric: the scale is the largest of each pair, and what is below half of it is zero.
    "grid/int": Case(W, [[4, 0, -1, 1]], {"bits": 2, "group": 2}, differs="grid/ternary"),
    # The mean magnitude is 1.775: 0.6 is less than half of it.
    "grid/ternary": Case(W, [[MEAN, MEAN, -MEAN, 0]], {"group": 0}, differs="grid/sign"),
    "grid/sign": Case(W, [[MEAN, MEAN, -MEAN, MEAN]], {"group": 0}, differs="grid/ternary"),
    # Quantiles at 1 - d, (1 - d + 1/2) / 2 and 1/2, one below zero: 1.848, 0.6245 and 0, so the steps are -1, 0, 0.338 and 1 times 4.
    "grid/nf": Case(W, [[4, 4 * 0.6245 / 1.8481, 0, 0]], {"bits": 2, "group": 0}, differs="grid/int", tol=1e-3),
    # Two bits of exponent, one of mantissa: 0, 1/2, 1, 3/2, 2, 3, 4 and 6, of which 6 meets the largest.
    "grid/fp": Case({"w": torch.tensor([[6.0, 2.4, -1.1, 0.2]])}, [[6, 2, -1, 0]], {"exponent": 2, "group": 0, "clip": "max"},
                    differs="grid/int"),
    # Four values, four steps, wherever they are; a bin is a thousandth wide.
    "grid/kmeans": Case(PEAKS, [[4, -2, 0, 1, 4, -2, 0, 1]], {"bits": 2, "group": 0}, differs="grid/int", tol=1e-3),
    # Steps of -1, -1/3, 1/3 and 1 times 4: 2.4 times the root mean square of 2.21 would reach beyond the largest.
    "grid/midrise": Case(W, [[4, 4 / 3, -4 / 3, 4 / 3]], {"bits": 2, "group": 0, "clip": "rms"}, differs="grid/nf"),
}
