from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.codes import rounded as on_grid

ROWS, TOKENS = 1024, 256  # outputs and tokens that the error is measured on
LEAST = 0.1               # the smallest range that is tried
MARGIN = 1e-4             # how much less another range has to cost than all of it


@method("rewrite", rounded=True)
def smooth(w: Tensor, grid: Any, sample: Tensor, rounded: Callable[[Tensor], Tensor], *, steps: int = 100) -> Tensor:
    """Inputs that reach beyond a range are scaled down to it, the others left; the range is the one that costs the outputs least.

    `w` [out, in]: all sites that read the input; `sample` [tokens, in]; `rounded`: x as it will be met; returns the scale [in] that the
    weights are multiplied by and what makes the inputs is divided by. Both are rounded as they are tried, inputs and weights.

    Formula: s_j = max(1, max |x_j| / t), t of max |x| ... 0.1 with the least |Q(x / s) Q(w s)^T - x w^T|^2
    Source: Zhang et al. 2024 (QQQ), arXiv:2406.09904, adaptive smoothing; the search of the authors' code, after Outlier
        Suppression+, arXiv:2304.09145
    Deviations: the error is that of the sites' own outputs, where the source takes those of the attention or of the gated MLP; ranges are
        symmetric; 256 tokens and 1,024 outputs, evenly spread, are looked at
    """
    x = sample[:: -(-len(sample) // TOKENS)]
    some = w.float()[:: -(-len(w) // ROWS)]
    most = sample.abs().amax(0)
    want, top = x @ some.T, float(most.max())
    found: tuple[float, Tensor] = (torch.inf, torch.ones_like(most))
    for i in range(steps):
        t = top + (min(LEAST, top) - top) * i / max(1, steps - 1)
        s = (most / t).clamp_min(1) if t > 0 else torch.ones_like(most)
        there = on_grid(some * s, grid(some * s), grid.group(some)).weight()
        off = float((rounded(x / s) @ there.T - want).square().sum())
        if off < found[0] * (1 - MARGIN):
            found = (off, s)
    return found[1]
