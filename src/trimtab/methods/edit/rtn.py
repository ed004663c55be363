from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.codes import nearest


@method("edit", joint=("unit", "score", "budget", "repair"), drops=False, codes=True)
def rtn(w: Tensor, mask: Tensor, *, bits: int = 4, group: int = 128, asymmetric: bool = False, ternary: bool = False) -> Change:
    """Round every weight to the nearest step of a grid.

    `w` [out, in]; `mask` bool [out, in] (False = dropped by an earlier pass, stays zero); returns w [out, in] and the parts codes
    (uint8 [out, in]), scales (float16 [out, groups], or float32 where a group is the row), grid (levels, group) and, asymmetric,
    zeros (uint8 [out, groups]). `group` of 0, or one longer than the row, is the row. `ternary` takes the place of `bits`:
    the steps are -1, 0 and 1, stored five a byte in groups of a multiple of 20 inputs, or rows. BadInput for bits other than 8, 4
    and 2, and for a ternary grid that is asymmetric.

    Formula: w' = s (q - z), q = clip(round(w / s) + z, 0, 2^bits - 1); symmetric: s = max |w| / (2^(bits - 1) - 1), z = 2^(bits - 1);
        asymmetric: s = (max(w, 0) - min(w, 0)) / (2^bits - 1), z = round(-min(w, 0) / s); ternary: s = mean |w|, z = 1, q = 0, 1 or 2
    Source: common practice; the baseline of Frantar et al. 2022, arXiv:2210.17323; ternary: Ma et al. 2024, arXiv:2402.17764, section 2
    Deviations: the scale of a group is rounded to float16 before the weights are; zero is always a step of the grid; the lowest
        code of a symmetric grid is not used; a ternary scale is the mean of a row or a group, not of the matrix
    """
    new = nearest(w * mask, bits, group, asymmetric=asymmetric, ternary=ternary).change(None if bool(mask.all()) else mask)
    return replace(new, w=new.w.to(w.dtype))
