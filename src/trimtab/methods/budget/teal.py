from __future__ import annotations

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Trial


@method("budget", xfail={"treats_equals_alike": "steps are whole: equal sites may differ by one step"})
def teal(trial: Trial, target: float, *, step: float = 0.01) -> dict[str, float]:
    """Inside a block, gates skip most where it costs its outputs least, which is tried; every block skips the same share of its weights.

    `trial` is one block; `target`: the share of the weights of its sites that is computed. Every site begins with all of it, and step by
    step the one is dropped from that leaves the least error: `step` of the weights of them all, so that a small site loses a larger share
    of its own at a time, and never more than it has. The last step is what is left to drop.

    Formula: s_j <- s_j + step / w_j for the j of the least error(s) there, w_j = size_j / sum_i size_i, until sum_j w_j s_j = 1 - target;
        shares are 1 - s
    Source: Liu et al. 2024 (TEAL), arXiv:2408.14690, algorithm 1, and the authors' code
    Deviations: a site is tried again only where what the same step added to the squared error when it was tried last is less than what
        the best one adds now, theirs tries all; a step is a part of all weights, theirs of those of q (0.05 of them, in a Llama 0.004 of
        all); the error is that of all tokens, theirs of the last quarter of a sequence, in both the norm over tokens, averaged over
        channels; no site drops more than it has; where one share for all sites does no worse, that is taken. The steps are as in their
        code; the paper's own text was not read whole
    """
    if not 0 < step <= 1:
        raise BadInput(f"teal: step is {step:g}; the share of a block's weights that is dropped at a time is above 0 and at most 1, "
                       "such as 0.01")
    names = sorted(trial.sites)
    even = dict.fromkeys(names, target)
    if len(names) == 1 or target >= 1:
        return even
    sizes = {n: trial.sites[n].size for n in names}
    total = sum(sizes.values())
    shares, error = dict.fromkeys(names, 1.0), 0.0
    added: dict[tuple[str, float], float] = {}  # to the squared error, by dropping so many weights of a site, when that was tried last
    left = (1 - target) * total
    while left > 1e-9 * total:
        drops = {n: min(step * total, left, shares[n] * sizes[n]) for n in names if shares[n] > 0}
        before = {n: added.get((n, drop), 0.0) for n, drop in drops.items()}
        best, least = "", 0.0
        for n in sorted(drops, key=lambda n: before[n]):
            if best and before[n] >= least**2 - error**2:
                break
            found = trial.error({**shares, n: max(0.0, shares[n] - drops[n] / sizes[n])})
            added[n, drops[n]] = found**2 - error**2
            if not best or found < least:
                best, least = n, found
        left -= drops[best]
        shares[best], error = max(0.0, shares[best] - drops[best] / sizes[best]), least
    return shares if error < trial.error(even) else even
