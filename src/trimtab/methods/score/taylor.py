from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method


@method("score")
def taylor(w: Tensor, grad: Tensor) -> Tensor:
    """The change of the loss when a weight is set to zero, to first order.

    Formula: S_ij = |W_ij * E_n[g_nij]|
    Source: Molchanov et al. 2016, arXiv:1611.06440; Molchanov et al. 2019, arXiv:1906.10771 (per weight)
    Deviations: the magnitude in place of its square, which keeps the order; the gradient is averaged over the whole
        calibration set before the product, where the authors' code of 2019 averages the squares of mini-batches
    """
    return (w.float() * grad).abs()
