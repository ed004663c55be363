from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.codes import Grid, clipped, integers


@method("grid", type=lambda knobs: f"i{knobs['bits']}")
def int_(w: Tensor, *, bits: int = 4, group: int = 128, asymmetric: bool = False, clip: str = "max", percentile: float = 0.999) -> Grid:
    """Equal steps: codes of 8, 4, 3 or 2 bits, with or without a zero point.

    `w` [out, in]; returns scales [out, groups], float16, or float32 where `group` is 0, the row; asymmetric
    with zero points. `clip`: how much of a group's range is kept: max (all), mse, entropy, percentile (what a share of the weights is
    below), or rms (2.4 root mean squares). BadInput for other bits, another way to clip, a negative group, or a weight that is not finite.

    Formula: w' = s (q - z), q = clip(round(w / s) + z, 0, 2^bits - 1); symmetric: s = c max |w| / (2^(bits - 1) - 1), z = 2^(bits - 1);
        asymmetric: s = c (max(w, 0) - min(w, 0)) / (2^bits - 1), z = round(-c min(w, 0) / s); c = 1, or what `clip` chooses
    Source: common practice; clipping: Nagel et al. 2021, arXiv:2106.08295, section 3.1 (mean squared error); Migacz 2017, 8-bit
        inference with TensorRT (entropy); Chee et al. 2023 (QuIP), arXiv:2307.13304, as in the authors' code (rms)
    Deviations: a scale is rounded to float16 before the weights are; zero is always a step; the lowest code of a symmetric grid is
        met by clipped weights only; by entropy one share is chosen for all groups, of 2048 bins of |w| / max |w|;
        by rms the steps stay those of a grid that has zero, where QuIP's lie half a step beside it
    """
    return clipped(w, group, clip, percentile, lambda c: integers(w, bits, group, asymmetric, c))
