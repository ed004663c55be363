from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.codes import rounded


@method("edit", joint=("unit", "score", "budget"), drops=False, codes=True)
def rtn(w: Tensor, mask: Tensor, grid: Any) -> Change:
    """Round every weight to the nearest value of its grid.

    `w` [out, in]; `mask` bool [out, in] (False = dropped by an earlier pass, stays zero); returns w [out, in] and the parts codes
    (uint8 [out, in]), scales ([out, groups]), grid (levels, group) and, where the grid has them, zeros (uint8 [out, groups]) or a table
    (float32 [levels]).

    Formula: q_ij = argmin_q |w_ij - value(q)| on the grid of the group of input j
    Source: common practice; the baseline of Frantar et al. 2022, arXiv:2210.17323
    Deviations: none
    """
    whole = bool(mask.all())
    kept = w if whole else w * mask
    new = rounded(kept, grid(kept), grid.group(w)).change(None if whole else mask)
    return replace(new, w=new.w.to(w.dtype))
