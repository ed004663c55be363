from __future__ import annotations

from trimtab.core.registry import method
from trimtab.methods.rounding import Rounding


@method("input")
def token(*, act_bits: int = 8) -> Rounding:
    """Every token rounded by its own largest magnitude, as it comes.

    Formula: x_t' = s_t round(x_t / s_t), s_t = max_j |x_tj| / (2^(b - 1) - 1)
    Source: Dettmers et al. 2022, arXiv:2208.07339, section 2 (row-wise scales of the inputs)
    Deviations: none
    """
    return Rounding(act_bits)
