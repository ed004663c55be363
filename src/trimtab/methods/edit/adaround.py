from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.codes import Codes, Grid, grouped, rounded
from trimtab.methods.solvers import Adam, lower

STRETCH = 0.1            # what the sigmoid reaches beyond 0 and 1 before it is cut off there
FIRST, LAST = 8.0, 2.0   # exponents of the regulariser: the smaller, the more of what lies between 0 and 1 it draws away
WEIGHT = 0.3             # of the regulariser at the end, in costs of a step
FLOOR = 1e-3             # of the cost of a weight's step, as a share of their mean
RATE = 0.1
ROWS = 1024              # outputs that are learned together


@method("edit", joint=("unit", "score", "budget"), drops=False, codes=True)
def adaround(w: Tensor, mask: Tensor, grid: Any, gram: Tensor, *, iters: int = 200) -> Change:
    """Learn for every weight whether it is rounded up or down.

    `w`, `mask` [out, in] (False = dropped by an earlier pass, stays zero), `gram` [in, in]; returns w [out, in] and the parts codes,
    scales, grid and zeros or a table, as `rtn` does. A row is never worse on the calibration data than rounded to nearest.

    Formula: w'(V) = a + h(V) (b - a), a and b the values of the grid below and above w, h = clip(1.2 sigmoid(V) - 0.1, 0, 1), w'(V) = w at
        the start; min over V of (w' - w) G (w' - w)^T + l sum_j c_j (1 - |2 h_j - 1|^beta) for every row, c = (b - a)^2 diag G the cost
        of a step, l from 0 to 0.3, beta from 8 to 2; at the end up where h is 1/2 or more
    Source: Nagel et al. 2020, arXiv:2004.10568, section 3.2; the layer-wise part of Li et al. 2021 (BRECQ), arXiv:2102.05426
    Deviations: formulas as remembered; all calibration tokens at once by their second moment, 200 steps of Adam at a rate of 0.1 where
        the paper takes 10,000 of random batches; the regulariser is in units of what a weight's own step costs and sets in by and by,
        where it has one weight of 0.01 after a warm start of a fifth of the steps, and beta from 20; beta falls by half a cosine; the
        layer's outputs are those of the inputs it has behind the edited blocks, before the function that follows. Recommendations of
        Yvinec et al. 2023, arXiv:2308.07662, beyond the abstract were not found: scales stay as they are fitted
    """
    w0, group = w.float() * mask, grid.group(w)
    near, g = rounded(w0, grid(w0), group), gram.float()
    some = [slice(a, a + ROWS) for a in range(0, len(w), ROWS)]
    codes = torch.cat([learned(w0[r], mask[r], near.codes[r], near.grid.rows(r), group, g, iters) for r in some])
    found = Codes(codes, near.grid, group)
    wins = lower(w, found.weight(), near.weight(), gram)
    new = replace(found, codes=torch.where(wins[:, None], codes, near.codes)).change(None if bool(mask.all()) else mask)
    return replace(new, w=new.w.to(w.dtype))


def learned(w: Tensor, mask: Tensor, near: Tensor, grid: Grid, group: int, gram: Tensor, iters: int) -> Tensor:
    """Codes of w [out, in], uint8, each of the two beside it; `near` where a weight is dropped."""

    def flat(t: Tensor) -> Tensor:
        return t.reshape(len(w), -1)[:, : w.shape[1]]

    low = grid.below(grouped(w, group))
    bottom = grid.values(low)
    gap = flat(grid.values(low + 1) - bottom) * mask
    bottom = flat(bottom) * mask
    share = torch.where(gap > 0, (w - bottom) / gap.clamp_min(1e-30), 0.5).clamp_(0, 1)
    v = torch.logit((share + STRETCH) / (1 + 2 * STRETCH))
    cost = gap.square() * gram.diagonal()
    pull = 2 * gap / cost.maximum(FLOOR * cost.mean(1, keepdim=True)).clamp_min_(1e-30)
    adam = Adam(v, RATE)
    for t in range(iters):
        beta = LAST + (FIRST - LAST) * (1 + math.cos(math.pi * t / iters)) / 2
        s = torch.sigmoid(v)
        h = s * (1 + 2 * STRETCH) - STRETCH
        free = (h > 0) & (h < 1)
        h.clamp_(0, 1)
        side = 2 * h - 1
        slope = torch.addcmul(bottom - w, h, gap) @ gram * pull
        slope -= WEIGHT * t / iters * 2 * beta * side.abs().pow_(beta - 1) * side.sign()
        adam.step(slope * free * s * (1 - s))
    return torch.where(gap > 0, flat(low) + (v >= 0).to(torch.uint8), near)
