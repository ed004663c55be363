from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput
from trimtab.methods.codes import Grid, clipped, length, rounded, steps

NOT_FINITE = {(8, 4): 1, (8, 5): 4}  # codes of e4m3 and e5m2, of either sign


def minifloats(bits: int, exponent: int) -> Tensor:
    """All numbers of a sign, `exponent` bits of exponent and the rest of mantissa, both zeros, in order, [2^bits] float32.

    Exponent 0 is subnormal. Of 8 bits the codes that e4m3 and e5m2 keep for infinity and NaN stand for the largest number; no other has
    any. Up to a factor, which the scale takes: the least exponent is 0.
    """
    mantissa = bits - 1 - exponent
    whole = torch.arange(1 << (bits - 1), dtype=torch.float64, device="cpu")
    power, part = (whole / (1 << mantissa)).floor(), (whole % (1 << mantissa)) / (1 << mantissa)
    sizes = torch.where(power > 0, torch.exp2(power - 1) * (1 + part), part)
    sizes = sizes.clamp_max(float(sizes[-1 - NOT_FINITE.get((bits, exponent), 0)]))
    return torch.cat([-sizes.flip(0), sizes]).float()


@method("grid", of=lambda knobs: "site" if knobs["exponent"] < 0 else "group", type=lambda knobs: f"l{knobs['bits']}")
def fp(w: Tensor, *, bits: int = 4, group: int = 128, exponent: int = -1, clip: str = "mse", percentile: float = 0.999) -> Grid:
    """Small floating point numbers: a sign, some bits of exponent, the rest of mantissa.

    `w` [out, in]; `exponent`: its bits, -1 for the number that leaves the least squared error of all of w; returns scales [out,
    groups], float16, or float32 where `group` is 0, the row, and a table of 2^bits steps. BadInput for other
    bits than 8, 4 and 3, an exponent that leaves no room, another way to clip (max, mse, percentile, entropy, rms), a negative
    group, or a weight that is not finite.

    Formula: w' = s t_q, t = (-1)^sign 2^max(e - 1, 0) (m / 2^M + [e > 0]); s = c max |w| / max t, c chosen by `clip`: the real exponent
        bias 2^E - log2(max) + log2(2 - 2^-M) - 1 of the source is a scale
    Source: Liu et al. 2023 (LLM-FP4), arXiv:2310.16836, section 4 (search of the range and the split); Aggarwal et al. 2023,
        arXiv:2311.12359 (3 to 8 bits)
    Deviations: no code for infinity or NaN, but for 8 bits, which are those of hardware (e4m3 ends at 448); the weights' error is
        searched, not the layer's output; 40 shares of the range between 1 and 0.2, not 100 between 0.01 and 1.2
    """
    if bits not in (8, 4, 3) or not -1 <= exponent <= bits - 1 or exponent == 0:
        raise BadInput(f"minifloats have 8, 4 or 3 bits, 1 to one less of them exponent (-1: searched), not {bits} and {exponent}")
    at = length(group, w.shape[1])
    found: tuple[float, Grid | None] = (math.inf, None)
    for e in range(1, bits) if exponent < 0 else (exponent,):
        table = minifloats(bits, e).to(w.device)
        grid = clipped(w, group, clip, percentile, partial(steps, w, table, group))
        if exponent > 0:
            return grid
        off = float((rounded(w, grid, at).weight() - w).square().sum())
        if off < found[0]:
            found = (off, grid)
    assert found[1] is not None
    return found[1]
