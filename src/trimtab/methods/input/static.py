from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.rounding import Rounding, range_of


@method("input")
def static(sample: Tensor, *, act_bits: int = 8, clip: str = "mse", percentile: float = 0.9999) -> Rounding:
    """All tokens rounded by one step, which calibration found.

    `sample` [tokens, in]. What lies beyond the range is clipped.

    Formula: x' = s clip(round(x / s)), s = the range / (2^(b - 1) - 1), the range by `clip`: max, mse or percentile
    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.1 (ranges of activations from data)
    Deviations: symmetric, without a zero point; the range is that of a sample of the calibration tokens
    """
    top = range_of(sample, act_bits, clip, percentile)
    return Rounding(act_bits, sample.new_tensor([max(top, 1e-12) / ((1 << (act_bits - 1)) - 1)]))
