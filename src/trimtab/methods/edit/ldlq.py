from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.codes import Codes
from trimtab.methods.solvers import Settle, sweep

BLOCK = 128  # columns that are mended one by one before the rest


@method("edit", joint=("unit", "score", "budget"), drops=False, codes=True)
def ldlq(w: Tensor, mask: Tensor, grid: Any, gram: Tensor, *, damp: float = 0.01) -> Change:
    """Round column after column, each shifted by what the errors so far make of it, on a grid that is there before the first.

    `w`, `mask` [out, in] (False = dropped by an earlier pass, stays zero), `gram` [in, in]; returns w [out, in] and the parts codes,
    scales, grid and zeros or a table, as `rtn` does.

    Formula: H = G + damp * mean(diag G) * I = (L + I) D (L + I)^T, L strictly triangular; w'_j = nearest(w_j + (w - w')_{<j} L_{<j, j})
    Source: Chee et al. 2023 (QuIP), arXiv:2307.13304, section 3; without its incoherence, which is a change of basis
    Deviations: from the first column to the last, where the authors' code goes the other way; the greedy passes after it are the repair
        `greedy`. Codes are those of `gptq` wherever that fits its grid before the sweep, for the two are one algorithm
    """
    w0, group = w * mask, grid.group(w)
    fitted = grid(w0)
    near = [fitted.group(slice(g, g + 1)).column() for g in range(fitted.scales.shape[1])]
    kept, codes = mask.T.contiguous(), torch.empty_like(w.T, dtype=torch.uint8)

    def settle(begin: int, end: int) -> Settle:
        def column(cur: Tensor, scale: Tensor, j: int) -> Tensor:
            i = begin + j
            codes[i], value = near[i // group](cur[j] * kept[i])
            return value

        return column

    sweep(w0, gram, settle, damp=damp, block=BLOCK)
    new = Codes(codes.T.contiguous(), fitted, group).change(None if bool(mask.all()) else mask)
    return replace(new, w=new.w.to(w.dtype))
