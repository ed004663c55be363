from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method


@method("score")
def wanda(w: Tensor, in_sq: Tensor) -> Tensor:
    """Weight times the size of the input it meets.

    Formula: S_ij = |W_ij| * ||X_j||_2
    Source: Sun et al. 2023, arXiv:2306.11695, equation 1
    Deviations: root mean square in place of the norm; the order of the scores is the same
    """
    return w.float().abs() * in_sq.sqrt()
