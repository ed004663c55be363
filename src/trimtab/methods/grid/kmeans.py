from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput
from trimtab.methods.codes import Grid, finite, grouped, length, stored

BINS = 4096  # of w / max |w|, whose weighted counts are clustered in place of the weights


@method("grid", of="site", type=lambda knobs: f"l{knobs['bits']}")
def kmeans(w: Tensor, in_sq: Tensor, *, bits: int = 4, group: int = 128, iters: int = 100) -> Grid:
    """Steps where the weights are: k-means over all weights of a site, those of strong inputs counting more.

    `w` [out, in], `in_sq` [in]; returns scales [out, groups], float16, or float32 where `group` is 0, the row,
    and a table of 2^bits steps, one of them zero. BadInput for other bits than 8, 4, 3 and 2, a negative group, or a weight that is
    not finite.

    Formula: over v = w / max |w| of its group with importance h = E[x_j^2] max |w|^2: t_k <- sum h v / sum h over the v nearest to t_k,
        from the quantiles of h; then the step nearest to zero becomes zero
    Source: Lloyd 1982; weighted by sensitivity as Kim et al. 2023 (SqueezeLLM), arXiv:2306.07629, section 4.1
    Deviations: one table a site with a scale a group, where the source has a table a row; the input's power in place of the squared
        gradient; clustered in 4,096 bins
    """
    if bits not in (8, 4, 3, 2):
        raise BadInput(f"a table of clusters has 8, 4, 3 or 2 bits, not {bits}")
    at = length(group, w.shape[1])
    each, power = grouped(finite(w).float(), at), grouped(in_sq.float()[None], at)
    most = each.abs().amax(-1, keepdim=True)
    at_bin = ((each / torch.where(most > 0, most, 1.0) + 1) * (BINS / 2)).long().clamp_max_(BINS - 1)
    mass = torch.zeros(BINS, dtype=torch.float64, device=w.device)
    mass.index_add_(0, at_bin.flatten(), (power * most.square()).expand_as(each).double().flatten())
    mass += 1e-12 * mass.sum().clamp_min(1e-30) / BINS
    middle = (torch.arange(BINS, dtype=torch.float64, device=w.device) + 0.5) * (2 / BINS) - 1
    above, first = mass.cumsum(0), (mass * middle).cumsum(0)
    table = middle[torch.searchsorted(above, above[-1] * (torch.arange(1 << bits, device=w.device) + 0.5) / (1 << bits))]
    for _ in range(iters):
        ends = torch.searchsorted(middle, (table[1:] + table[:-1]) / 2)
        ends = torch.cat([ends, ends.new_tensor([BINS])]) - 1

        def each_cluster(total: Tensor, ends: Tensor = ends) -> Tensor:
            upto = torch.where(ends >= 0, total[ends.clamp_min(0)], 0.0)
            return upto.diff(prepend=upto.new_zeros(1))

        weight = each_cluster(above)
        moved = torch.where(weight > 0, each_cluster(first) / weight.clamp_min(1e-300), table)
        if torch.equal(moved, table):
            break
        table = moved
    table[table.abs().argmin()] = 0.0
    return Grid(stored(most[..., 0], group), 1 << bits, table=table.sort().values.float())
