from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.codes import Codes, Grid, grouped, rounded
from trimtab.methods.solvers import Adam, lower

RATE = 0.01  # of the weights, in steps of the grid, and of the scales, as a share of them; falls to 0
ROWS = 1024  # outputs that are learned together


@method("edit", joint=("unit", "score", "budget"), drops=False, codes=True)
def adaquant(w: Tensor, mask: Tensor, grid: Any, gram: Tensor, *, iters: int = 200) -> Change:
    """Learn what to add to the weights before they are rounded, and the scales of their groups.

    `w`, `mask` [out, in] (False = dropped by an earlier pass, stays zero), `gram` [in, in]; returns w [out, in] and the parts codes,
    scales, grid and zeros or a table, as `rtn` does. A row is never worse on the calibration data than rounded to nearest.

    Formula: min over V and s of tr((Q_s(w + V) - w) G (Q_s(w + V) - w)^T), Q_s the nearest value of the grid of scales s; straight through:
        dQ/dV = 1 inside the range, 0 outside, dQ/ds = (Q - [inside] (w + V)) / s
    Source: Hubara et al. 2020, arXiv:2006.10518, section 3.1, equation 3
    Deviations: weights only; all calibration tokens at once by their second moment, 200 steps of Adam where the authors' code takes 100 of
        batches; rates are shares of a step of the grid and fall to 0, where theirs are 1e-5 for weights and 1e-3 for ranges; of all
        steps the best is kept, row by row; zero points and tables stay. Bits: the budget `knapsack`. Biases and batch norms are not tuned
        by gradient: what they are there for, the repairs `bias` and `gain` have in closed form
    """
    w0, group = w.float() * mask, grid.group(w)
    near, g = rounded(w0, grid(w0), group), gram.float()
    some = [slice(a, a + ROWS) for a in range(0, len(w), ROWS)]
    both = [learned(w0[r], mask[r], near.codes[r], near.grid.rows(r), group, g, iters) for r in some]
    codes, scales = (torch.cat(t) for t in zip(*both, strict=True))
    wins = lower(w, Codes(codes, replace(near.grid, scales=scales), group).weight(), near.weight(), gram)
    codes, scales = torch.where(wins[:, None], codes, near.codes), torch.where(wins[:, None], scales, near.grid.scales)
    new = Codes(codes, replace(near.grid, scales=scales), group).change(None if bool(mask.all()) else mask)
    return replace(new, w=new.w.to(w.dtype))


def learned(w: Tensor, mask: Tensor, near: Tensor, grid: Grid, group: int, gram: Tensor, iters: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [out, in] and scales [out, groups] of w; codes as in `near` where a weight is dropped."""

    def flat(t: Tensor) -> Tensor:
        return t.reshape(len(w), -1)[:, : w.shape[1]]

    first = grid.scales.float()
    step = (first if grid.table is None else first * grid.table.diff().mean())[..., None]
    wide, dropped = flat(step.expand(*first.shape, group)), grouped(near.where(~mask, 0), group)
    pull = 2 / (wide.square() * gram.diagonal()).mean(1, keepdim=True).clamp_min(1e-30)
    more, factor = torch.zeros_like(w), torch.ones_like(first)  # V in steps, and what the scales are multiplied by
    rates = Adam(more, RATE), Adam(factor, RATE)
    least, codes, scales = torch.full_like(w[:, 0], torch.inf), near.clone(), grid.scales.clone()
    for t in range(iters):
        now = replace(grid, scales=(first * factor).to(scales.dtype))
        v = grouped(torch.addcmul(w, more, wide), group)
        q = torch.where(grouped(mask, group), now.codes(v), dropped)
        value = now.values(q)
        off = flat(value) - w
        slope = off @ gram
        cost = (slope * off).sum(1)
        better = cost < least
        least, codes, scales = (torch.where(better.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in (
            (cost, least), (flat(q), codes), (now.scales, scales)))
        slope = grouped(slope * pull, group)
        inside = (v >= now.values(torch.zeros_like(q))) & (v <= now.values(torch.full_like(q, grid.levels - 1)))
        for adam, its in zip(rates, (flat(slope * inside * step), (slope * (value - v * inside)).sum(-1)), strict=True):
            adam.rate = RATE * (1 - t / iters)
            adam.step(its)
    return codes, scales
