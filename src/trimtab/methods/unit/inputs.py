"""Whole inputs of a weight: what all outputs read of one of them stands or falls together."""
from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput
from trimtab.methods.select import top


@method("unit", whole=True)
def inputs(s: Tensor, keep: float) -> Tensor:
    """The inputs of a matrix compete, each with all its weights.

    Formula: the columns of the round(keep * in) inputs with the largest sum of S_ij
    Source: PTQ1.61, arXiv:2502.13179, section 3 (salient channels)
    Deviations: none
    """
    return top(s.float().sum(0, keepdim=True), round(keep * s.shape[1])).expand(s.shape).contiguous()


@method("unit", free=False, whole=True)
def above(s: Tensor, keep: float, *, limit: float = 6.0) -> Tensor:
    """The inputs whose mean score is above a limit, each with all its weights; half of them at most, the best.

    BadInput for a limit below zero.

    Formula: the columns j with mean_i S_ij >= limit
    Source: LLM.int8, arXiv:2208.07339, section 3.2
    Deviations: the inputs are found once, of calibration data, where the source finds them anew in every batch; half at most
    """
    if limit < 0:
        raise BadInput(f"a limit of scores is not below zero: {limit:g}")
    mean = s.float().mean(0, keepdim=True)
    return ((mean >= limit) & top(mean, s.shape[1] // 2)).expand(s.shape).contiguous()
