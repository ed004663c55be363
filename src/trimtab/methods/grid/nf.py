from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput
from trimtab.methods.codes import Grid, clipped, steps

TAIL = 0.5 * (1 / 32 + 1 / 30)  # what the outermost quantile leaves of a side


def quantiles(bits: int) -> Tensor:
    """Of the normal distribution from -1 to 1, [2^bits] float32: half of them but one below zero, zero itself, the rest above."""
    half = 1 << (bits - 1)
    low = torch.special.ndtri(torch.linspace(1 - TAIL, 0.5, half, dtype=torch.float64, device="cpu"))
    high = torch.special.ndtri(torch.linspace(1 - TAIL, 0.5, half + 1, dtype=torch.float64, device="cpu"))
    both = torch.cat([-low[:-1], high.flip(0)])
    return (both / both.abs().max()).float()


@method("grid", type=lambda knobs: f"l{knobs['bits']}")
def nf(w: Tensor, *, bits: int = 4, group: int = 64, clip: str = "max", percentile: float = 0.999) -> Grid:
    """Steps where the quantiles of a normal distribution are, zero among them: NormalFloat.

    `w` [out, in]; returns scales [out, groups], float16, or float32 where `group` is 0, the row, and a table
    of 2^bits steps from -1 to 1. BadInput for other bits than 8, 4, 3 and 2, another way to clip (max, mse, percentile, entropy,
    rms), a negative group, or a weight that is not finite.

    Formula: w' = s t_q, t the quantiles of N(0, 1) at 2^(bits - 1) even probabilities from d to 1/2 and 2^(bits - 1) + 1 from 1/2 to 1 - d,
        1/2 once, over their largest; d = (1/32 + 1/30) / 2; s = c max |w|, c = 1 or what `clip` chooses
    Source: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, section 3
    Deviations: the same d for every number of bits; one scale, not quantised again
    """
    if bits not in (8, 4, 3, 2):
        raise BadInput(f"a table of quantiles has 8, 4, 3 or 2 bits, not {bits}")
    table = quantiles(bits).to(w.device)
    return clipped(w, group, clip, percentile, lambda c: steps(w, table, group, c))
