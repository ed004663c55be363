from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.rounding import range_of


def middle(sample: Tensor, knobs: Mapping[str, Any]) -> Tensor | None:
    """Half way between the least and the most of each input, [in]."""
    return (sample.amin(0) + sample.amax(0)) / 2 if knobs["centred"] else None


@method("rewrite", rounded=True, centre=middle)
def channelwise(sample: Tensor, *, act_bits: int = 8, clip: str = "max", percentile: float = 0.9999, centred: bool = True) -> Tensor:
    """Every input gets the same range, so that one step for all is each one's own: steps by the channel, executed before.

    `sample` [tokens, in]; returns the scale [in] that the weights are multiplied by and what makes the inputs is divided by. Where a norm
    with a bias makes the inputs, and what reads them has one, they are `centred` around zero first.

    Formula: z_j = (max x_j + min x_j) / 2; s_j = d_j / mean d, d_j the range of x_j - z_j by `clip`: max, mse or percentile
    Source: Wang et al. 2024 (OutlierTune), arXiv:2406.18832, pre-execution of dequantisation and symmetrisation; Li et al. 2024
        (RepQuant), arXiv:2402.05628, after RepQ-ViT, arXiv:2212.08254 (s / mean s and the zero points' shift, as in the authors' code)
    Deviations: norms without a bias, those of Llama, take no shift; clips are symmetric around the middle and chosen by squared error or
        a percentile, where RepQuant learns both ends, by a rule that we found described nowhere
    """
    if clip == "max":
        ranges = sample.abs().amax(0)
    else:
        ranges = torch.stack([sample.new_tensor(range_of(x, act_bits, clip, percentile)) for x in sample.T])
    known = ranges > 0
    mean = ranges[known].mean() if bool(known.any()) else ranges.new_ones(())
    return torch.where(known, ranges / mean, 1.0)
