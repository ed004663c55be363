from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.codes import Grid, thirds


@method("grid", type=lambda knobs: "t")
def ternary(w: Tensor, *, group: int = 0) -> Grid:
    """-1, 0 and 1 times the mean magnitude of a group.

    `w` [out, in]; returns scales [out, groups], float16, or float32 where `group` is 0, the row. Kernels
    take groups of a multiple of 20 inputs, or rows. BadInput for a negative group or a weight that is not finite.

    Formula: w' = s q, s = mean |w|, q = clip(round(w / s), -1, 1)
    Source: Ma et al. 2024, arXiv:2402.17764, section 2
    Deviations: the scale is the mean of a row or a group, not of the matrix
    """
    return thirds(w, group)
