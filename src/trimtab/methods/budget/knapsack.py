from __future__ import annotations

import math

import torch

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Choices

CELLS = 100_000  # sizes that are told apart


def least(options: dict[str, Choices], mean: float) -> dict[str, str]:
    """One of its choices for every site, of least loss together within `mean` bits a weight; the same for sites that read one input.

    By dynamic programming over sizes.
    """
    together: dict[tuple[int, str], list[Choices]] = {}
    for o in options.values():
        together.setdefault((o.site.block, o.site.input), []).append(o)
    keys = sorted(together)
    sizes = [[sum(each) for each in zip(*(o.bytes for o in together[k]), strict=True)] for k in keys]
    losses = [[sum(each) for each in zip(*(o.losses for o in together[k]), strict=True)] for k in keys]
    weights = sum(o.site.size for o in options.values())
    floor = sum(map(min, sizes))
    room = math.floor(mean * weights / 8) - floor
    if room < 0:
        raise BadInput(f"{mean:g} bits a weight are less than the smallest grids take, {8 * floor / weights:.3f}; "
                       "raise mean, or name a smaller grid")
    above = [[b - min(its) for b in its] for its in sizes]
    unit = max(math.gcd(*(b for its in above for b in its)), -(-room // CELLS), 1)
    room //= unit
    best, picks = torch.zeros(room + 1, dtype=torch.float64, device="cpu"), []
    for its, lost in zip(above, losses, strict=True):
        tried = torch.full((len(its), room + 1), torch.inf, dtype=torch.float64, device="cpu")
        for i, b in enumerate(-(-b // unit) for b in its):
            if b <= room:
                tried[i, b:] = best[:room + 1 - b] + lost[i]
        picks.append(tried.argmin(0))
        best = tried.amin(0)
    chosen: dict[str, str] = {}
    for k, its, pick in zip(reversed(keys), reversed(above), reversed(picks), strict=True):
        i = int(pick[room])
        room -= -(-its[i] // unit)
        chosen |= {o.site.name: o.names[i] for o in together[k]}
    return chosen


@method("budget", chooses="gradients")
def knapsack(options: dict[str, Choices], *, mean: float = 3.0) -> dict[str, str]:
    """One of several grids for every site: the least loss of all together that so many bits a weight allow.

    Sites that read one input (q, k and v; gate and up) take the same. `mean` counts codes, scales, zero points and tables; returns
    {site: the grid's name}. BadInput where even the smallest grids take more.

    Formula: min sum_l d_l(o_l) subject to sum_l bytes_l(o_l) <= mean / 8 * sum_l size_l, one option o_l for every l; d_l = 1/2 sum_ij
        E[g_ij^2] (Q(W) - W)_ij^2, Q to the nearest value, g the gradient of a sequence's loss
    Source: Hubara et al. 2020, arXiv:2006.10518, section 4, equation 8 (the integer program)
    Deviations: solved by dynamic programming over sizes, exact where their common unit fits 100,000 times into what is left, else to
        within one part in 100,000 of it, never above; the network's loss is told by the diagonal of its empirical Fisher matrix, where
        the paper measures it (`measured`); both take losses to add up
    """
    return least(options, mean)
