from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.codes import rounded
from trimtab.methods.solvers import errors

ROWS, WEIGHTS = 1024, 1 << 20  # outputs, and weights of them, that the error is measured on


@method("rewrite")
def awq(w: Tensor, grid: Any, in_abs: Tensor, gram: Tensor, *, steps: int = 20) -> Tensor:
    """A scale for every input, by its mean magnitude, under which rounding costs the outputs least.

    `w` [out, in]: all sites that read the input; `in_abs` [in], `gram` [in, in]; returns the scale [in] that the weights are multiplied by
    and what makes the inputs is divided by.

    Formula: s = c^a / sqrt(max c^a min c^a), c = E|x_j|, a of 0, 1 / steps ... 1 - 1 / steps with the least tr(D G D^T), D = Q(w s) / s - w
    Source: Lin et al. 2023, arXiv:2306.00978, section 3.2, equation 4; search and normalisation as in the authors' code
    Deviations: the error is that of the sites' own outputs, where the authors' code takes those of the attention or the MLP they are in; it
        is summed over 1,024 outputs and a million weights at most, evenly spread, where there are more
    """
    rows = min(ROWS, WEIGHTS // w.shape[1])
    some = w if len(w) <= rows else w[torch.linspace(0, len(w) - 1, rows, device=w.device).long()]
    found: tuple[float, Tensor] | None = None
    for k in range(steps):
        s = in_abs.clamp_min(1e-8).pow(k / steps).clamp_min(1e-4)
        s = s / (s.max() * s.min()).sqrt()
        off = float(errors(some, rounded(some * s, grid(some * s), grid.group(some)).weight() / s, gram).sum())
        if found is None or off < found[0]:
            found = (off, s)
    assert found is not None
    return found[1]
