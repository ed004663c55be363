from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.solvers import Settle, sweep


@method("edit", joint=("score", "repair"))
def sparsegpt(w: Tensor, keep: float, mask: Tensor, unit: Any, gram: Tensor, *, damp: float = 0.01,
              block: int = 128) -> Change:
    """Drop weights from left to right and mend each loss in the columns to its right.

    `w`, `mask` [out, in] (False = dropped by an earlier pass, stays zero), `gram` [in, in]; returns w [out, in].

    Formula: H = G + damp * mean(diag G) * I; H^-1 = U^T U; per block of columns keep the best w_ij^2 / U_jj^2; for each
        dropped w_ij, with e = w_ij / U_jj, w_ik -= e * U_jk for k >= j; n:m decides m columns at a time
    Source: Frantar and Alistarh 2023, arXiv:2301.00774, section 3 and algorithm 1
    Deviations: the unit says who competes inside a block (site = the paper's joint choice over all rows); counts are
        exact, the rounding of one block is made good in the next, where the released code drops one weight too many a
        block; an input that is always zero scores 0 and goes first, but keeps its weight if there is room (the released
        code zeroes it); the same updates are computed from H's own triangular factor, without inverting H
    """
    period = unit.period or 1
    block = math.ceil(block / period) * period
    choose = _exact(w, keep, mask, unit) if unit.free else lambda s, a, b: unit(s * mask[:, a:b], keep) & mask[:, a:b]
    live = gram.diagonal() > 0
    kept = torch.empty_like(w.T, dtype=torch.bool)  # [in, out]

    def settle(begin: int, end: int) -> Settle:
        step = (None if unit.free else unit.period) or end - begin

        def column(cur: Tensor, scale: Tensor, j: int) -> Tensor:
            if j % step == 0:
                to = min(j + step, end - begin)
                some = slice(begin + j, begin + to)
                kept[some] = choose((cur[j:to] * scale[j:to]).abs().T * live[some], some.start, some.stop).T
            return cur[j].masked_fill(~kept[begin + j], 0)

        return column

    new = sweep(w, gram, settle, damp=damp, block=block)
    return Change(new.to(w.dtype).contiguous(), mask=kept.T.contiguous())


def _exact(w: Tensor, keep: float, mask: Tensor, unit: Any) -> Callable[[Tensor, int, int], Tensor]:
    """Choose block by block so that the counts add up to what the unit keeps of the whole matrix."""
    goal = int(unit(torch.zeros_like(w, dtype=torch.float32), keep).sum())
    have = 0

    def choose(s: Tensor, begin: int, end: int) -> Tensor:
        nonlocal have
        share = (goal * end / w.shape[1] - have) / s.numel()
        m = unit(s * mask[:, begin:end], min(max(share, 0.0), 1.0))
        have += int(m.sum())
        return m & mask[:, begin:end]

    return choose
