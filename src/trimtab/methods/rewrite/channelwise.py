from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.rounding import range_of


@method("rewrite", rounded=True)
def channelwise(sample: Tensor, *, act_bits: int = 8, clip: str = "max", percentile: float = 0.9999) -> Tensor:
    """Every input gets the same range, so that one step for all is each one's own: steps by the channel, executed before.

    `sample` [tokens, in]; returns the scale [in] that the weights are multiplied by and what makes the inputs is divided by.

    Formula: s_j = d_j / mean d, d_j the range of x_j by `clip`: max, mse or percentile
    Source: Wang et al. 2024 (OutlierTune), arXiv:2406.18832, pre-execution of dequantisation; Li et al. 2024 (RepQuant),
        arXiv:2402.05628, after RepQ-ViT, arXiv:2212.08254 (s / mean s, as in the authors' code)
    Deviations: ranges are symmetric, and nothing is shifted: the norms of language models have no bias that could take it; clips are chosen
        by squared error or a percentile, where RepQuant learns them, a rule that we found described nowhere
    """
    if clip == "max":
        ranges = sample.abs().amax(0)
    else:
        ranges = torch.stack([sample.new_tensor(range_of(x, act_bits, clip, percentile)) for x in sample.T])
    known = ranges > 0
    mean = ranges[known].mean() if bool(known.any()) else ranges.new_ones(())
    return torch.where(known, ranges / mean, 1.0)
