from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method


@method("score")
def magnitude(w: Tensor) -> Tensor:
    """Keep the largest weights.

    Formula: S_ij = |W_ij|
    Source: Han et al. 2015, arXiv:1506.02626
    Deviations: none
    """
    return w.float().abs()
