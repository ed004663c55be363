from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.codes import Grid, mean_size, stored


@method("grid", zero=False, type=lambda knobs: "l1")
def sign(w: Tensor, *, group: int = 128) -> Grid:
    """One bit: plus or minus the mean magnitude of a group.

    `w` [out, in]; returns scales [out, groups], float16, or float32 where `group` is 0, the row. Zero is no
    value of it. BadInput for a negative group or a weight that is not finite.

    Formula: w' = s sign(w), s = mean |w|, the scale of the least squared error
    Source: Rastegari et al. 2016 (XNOR-Net), arXiv:1603.05279, section 3.1
    Deviations: the sign of zero is minus; the scale is that of a group
    """
    return Grid(stored(mean_size(w, group), group), 2, table=torch.tensor([-1.0, 1.0], device=w.device))
