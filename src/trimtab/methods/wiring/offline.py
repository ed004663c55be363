"""Norms that do not look at the token."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.wiring.parallel import fewest


def always(knobs: Mapping[str, Any]) -> bool:
    """It is what calibration finds."""
    return True


@method("wiring", of="norm", looks=always, ours="some norms multiply every token by a constant in place of its own size")
def offline(sizes: Tensor, means: Tensor, damage: Tensor, *, share: float = 0.25, by: str = "damage", outlier: float = 5.0) \
        -> tuple[Tensor, Tensor]:
    """Some norms take what calibration found of all tokens for what each one is, and so are a map like any other.

    Which norms, bool [n], and of each [2] what it multiplies by and what it takes off before. `sizes` [n, tokens]: the root mean square
    that each norm divides a token by, `means` the mean that it takes off first; `damage` [n]: how far the hidden states behind the last
    block are off where that norm alone is rewired.

    Formula: w (x - m) / s + b, with s = exp(mean log s_t), the geometric mean over tokens, and m = mean m_t; tokens whose size is above
        `outlier` times the mean do not count
    Source: Unified Normalization, arXiv:2208.01313 (Yang et al. 2022): offline statistics, smoothed, outliers left out
    Deviations: there networks are trained with it, statistics are of a channel and smoothed over iterations, and outliers are found by a
        rule that could not be confirmed; here nothing is trained, a norm has one size for all channels, and the constant joins its weight:
        one product a channel is left, which is not folded into the maps behind, since the plain files keep the norm
    """
    near = sizes <= outlier * sizes.mean(1, keepdim=True)
    count = near.sum(1).clamp_min(1)
    scale = (-(sizes.log() * near).sum(1) / count).exp()
    return fewest(damage, share, by), torch.stack([scale, (means * near).sum(1) / count], 1)
