from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.codes import Codes, Grid
from trimtab.methods.solvers import Settle, sweep

BLOCK = 128  # columns that are mended one by one before the rest, whole groups of them


@method("edit", joint=("unit", "score", "budget"), drops=False, codes=True)
def gptq(w: Tensor, mask: Tensor, grid: Any, gram: Tensor, *, damp: float = 0.01, act_order: bool = False) -> Change:
    """Round column after column to the nearest value, and mend what that costs in the columns that are still to come.

    `w`, `mask` [out, in] (False = dropped by an earlier pass, stays zero), `gram` [in, in]; returns w [out, in] and the parts codes,
    scales, grid and zeros or a table, as `rtn` does. `act_order`: inputs of the largest second moment first.

    Formula: H = G + damp * mean(diag G) * I; H^-1 = U^T U; for each column j: q_j = nearest(w_j), e = (w_j - q_j) / U_jj, w_k -= e U_jk for
        k > j; the grid of a group is fitted to its weights when the sweep reaches it, that of a row at the start
    Source: Frantar et al. 2022, arXiv:2210.17323, section 3 and algorithm 1; order and groups as in the authors' code
    Deviations: with act_order, and for a grid that has to see the whole site, groups are fitted before the sweep, so that they stay
        runs of neighbouring inputs; blocks are as long as a group where that is longer; an input that is always zero keeps its
        rounded weight where the authors' code drops it; updates are computed from H's own triangular factor, without inverting H
    """
    group, inputs = grid.group(w), w.shape[1]
    before = act_order or grid.whole or group == inputs
    whole = bool(mask.all())
    fitted: Grid = grid((w if whole else w * mask)[:, : inputs if before else group])  # else of the first group, to know what it is made of
    parts = [fitted.group(slice(g, g + 1)) for g in range(fitted.scales.shape[1])]
    near = {i: p.column() for i, p in enumerate(parts)} if before else {}
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else None
    at = range(inputs) if order is None else order.tolist()
    codes = torch.empty(inputs, len(w), dtype=torch.uint8, device=w.device)
    kept = None if whole else mask.T if order is None else mask.T[order]

    def settle(begin: int, end: int) -> Settle:
        def column(cur: Tensor, scale: Tensor, j: int) -> Tensor:
            i = at[begin + j]
            if not before and i % group == 0:
                n = min(group, inputs - i)
                parts[i // group:] = [grid((cur[j:j + n] if kept is None else cur[j:j + n] * kept[i:i + n]).T)]
                near[i // group] = parts[-1].column()
            codes[i], value = near[i // group](cur[j] if kept is None else cur[j] * kept[begin + j])
            return value

        return column

    block = max(BLOCK // group, 1) * group if group < inputs else BLOCK
    swept, turned = (w, gram) if order is None else (w[:, order], gram[order][:, order])
    sweep(swept, turned, settle, damp=damp, block=block)
    scales = torch.cat([p.scales for p in parts], 1)
    zeros = torch.cat([p.zeros for p in parts if p.zeros is not None], 1) if fitted.zeros is not None else None
    new = Codes(codes.T.contiguous(), replace(fitted, scales=scales, zeros=zeros), group).change(None if whole else mask)
    return replace(new, w=new.w.to(w.dtype))
