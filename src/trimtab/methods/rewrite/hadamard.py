from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.basis import Basis, mixed


@method("rewrite", basis=True)
def hadamard(w: Tensor, *, seed: int = 0) -> Basis:
    """Inputs in a randomly signed Hadamard basis: an outlier is spread over all of them.

    `w` [out, in]: all sites that read the input; returns the basis of the inputs.

    Formula: x' = H D x, W' = W D H^T, D random signs, H the Hadamard matrix of Sylvester, entries +-1 / sqrt(n)
    Source: Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 3; Tseng et al. 2024 (QuIP#), arXiv:2402.04396, section 3
    Deviations: where n is no power of two, random orthogonal matrices of its odd factors take the place of Hadamard matrices of those
        sizes; for the inputs of every site, applied as the product of two small matrices (`quarot` leaves most of it to the neighbours)
    """
    return mixed(w.shape[1], seed, w.device)
