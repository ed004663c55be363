from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput
from trimtab.methods.codes import Grid, clipped, steps


@method("grid", zero=False, type=lambda knobs: f"l{knobs['bits']}")
def midrise(w: Tensor, *, bits: int = 2, group: int = 0, clip: str = "mse", percentile: float = 0.999) -> Grid:
    """Equal steps that lie half a step beside zero, as many below it as above.

    `w` [out, in]; returns scales [out, groups], float16, or float32 where `group` is 0, the row, and a table of 2^bits steps from -1 to 1.
    Zero is no value of it. BadInput for other bits than 8, 4, 3 and 2, another way to clip (max, mse, percentile, entropy, rms), a
    negative group, or a weight that is not finite.

    Formula: w' = s (2 q / (2^bits - 1) - 1), s = c max |w|, c = 1 or what `clip` chooses; by rms s = 2.4 rms(w)
    Source: Chee et al. 2023 (QuIP), arXiv:2307.13304, as in the authors' code (qfn b)
    Deviations: one range for a row or a group, where the source has one for the matrix; by mse, not by rms, unless asked for
    """
    if bits not in (8, 4, 3, 2):
        raise BadInput(f"steps beside zero have 8, 4, 3 or 2 bits, not {bits}")
    table = torch.linspace(-1, 1, 1 << bits, device=w.device)
    return clipped(w, group, clip, percentile, lambda c: steps(w, table, group, c))
