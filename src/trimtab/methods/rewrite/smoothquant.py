from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method


@method("rewrite", rounded=True)
def smoothquant(w: Tensor, absmax: Tensor, *, alpha: float = 0.5) -> Tensor:
    """A scale for every input that moves the difficulty of rounding it into the weights.

    `w` [out, in]: all sites that read the input; `absmax` [in]; returns the scale [in] that the weights are multiplied by and what makes
    the inputs is divided by.

    Formula: s_j = max |x_j|^alpha / max_i |w_ij|^(1 - alpha)
    Source: Xiao et al. 2022 (SmoothQuant), arXiv:2211.10438, equation 4
    Deviations: every input is scaled that something can take the inverse of, also those behind attention and the MLP's activation, where
        the source leaves these
    """
    s = absmax.clamp_min(1e-5).pow(alpha) / w.float().abs().amax(0).clamp_min(1e-5).pow(1 - alpha)
    return s.clamp(1e-5, 1e5)
