from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.codes import Codes, Grid, grouped, rounded
from trimtab.methods.solvers import lower

ROWS = 256  # outputs that are looked at together


@method("repair", keeps=("mask", "codes"))
def clip(w: Tensor, new: Change, gram: Tensor, *, steps: int = 20) -> Change:
    """A smaller scale for the groups whose outputs lose less when their largest weights are cut off.

    `w` [out, in] is the dense weight, `gram` [in, in]; returns `new` with other scales and codes on the same kind of grid. A change
    without codes is left as it is.

    Formula: for each group the c of 1, 1 - 1 / steps ... above 1/2 with the least d G_gg d^T, d = Q_{c s}(w_g) - w_g, G_gg the second
        moment of the group's inputs
    Source: Lin et al. 2023, arXiv:2306.00978, as in the authors' code (auto_clip)
    Deviations: all calibration tokens by their second moment, where the code takes 512; the scale shrinks and the zero point stays; a row
        whose whole error does not fall is left as it was
    """
    codes = Codes.among(new.parts)
    if codes is None:
        return new
    group, kept = codes.group, w.float() if new.mask is None else w * new.mask
    moments = torch.stack([torch.nn.functional.pad(g, (0, group - len(g), 0, group - len(g))) for g in
                           (gram[i:i + group, i:i + group] for i in range(0, w.shape[1], group))])  # [groups, group, group]
    some = [slice(a, a + ROWS) for a in range(0, len(w), ROWS)]
    scales = torch.cat([shrunk(codes.grid.rows(r), grouped(kept[r], group), moments, steps) for r in some])
    found = rounded(kept, replace(codes.grid, scales=scales), group)
    wins = lower(w, found.weight(), new.w, gram)
    merged = Codes(torch.where(wins[:, None], found.codes, codes.codes), replace(
        codes.grid, scales=torch.where(wins[:, None], scales, codes.grid.scales)), group).change(new.mask)
    return replace(merged, w=merged.w.to(new.w.dtype), parts={**new.parts, **merged.parts})


def shrunk(grid: Grid, each: Tensor, moments: Tensor, steps: int) -> Tensor:
    """The scales [out, groups] under which weights `each` [out, groups, group] cost least."""
    turned = each.transpose(0, 1).contiguous()  # [groups, out, group]
    scales, least = grid.scales, torch.full(grid.scales.shape, torch.inf, device=each.device)
    for k in range((steps + 1) // 2):
        tried = replace(grid, scales=(grid.scales.float() * (1 - k / steps)).to(scales.dtype))
        off = tried.values(tried.codes(each)).transpose(0, 1) - turned
        cost = (off @ moments).mul_(off).sum(-1).T
        better = cost < least
        least, scales = torch.where(better, cost, least), torch.where(better, tried.scales, scales)
    return scales
