"""What the largest inputs say of weights: outliers of single tokens, which a mean does not show."""
from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method


@method("score", xfail={"uses_data": "it is of inputs, whatever the weights", "zero_is_least": "it is of inputs, whatever the weights"})
def peak(w: Tensor, absmax: Tensor) -> Tensor:
    """The largest magnitude of the input, the same for all its weights.

    Formula: S_ij = max_t |x_tj|
    Source: PTQ1.61, arXiv:2502.13179, section 3; LLM.int8, arXiv:2208.07339, section 3.2
    Deviations: none
    """
    return absmax.float().expand(w.shape).contiguous()


@method("score")
def spike(w: Tensor, absmax: Tensor) -> Tensor:
    """The most that a weight adds to its output on any token.

    Formula: S_ij = |W_ij| max_t |x_tj|
    Source: Yu et al. 2024 (The Super Weight), arXiv:2411.07191, section 3.1: the weight at which a spike of the input and one of the
        output meet
    Deviations: a score of all weights at once, where the source removes one and looks again until no output has a spike
    """
    return w.float().abs() * absmax
