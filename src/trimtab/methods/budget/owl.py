from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from trimtab.core.registry import method
from trimtab.core.types import Summary

K = TypeVar("K", bound=Hashable)


def window(values: dict[K, float], weights: dict[K, float], target: float, spread: float) -> dict[K, float]:
    """Shares that rise with `values` over a range of 2 * spread, inside [0, 1], with weighted mean `target`.

    All values equal: all shares are the target. What is cut off at 0 or 1 is made up for by shifting the others.
    """
    low, high = min(values.values()), max(values.values())
    total = sum(weights.values())
    raised = {k: 2 * spread * (v - low) / (high - low) if high > low else 0.0 for k, v in values.items()}
    mean = sum(raised[k] * weights[k] for k in values) / total

    def shifted(by: float) -> dict[K, float]:
        return {k: min(max(target + raised[k] - mean + by, 0.0), 1.0) for k in values}

    def excess(by: float) -> float:
        return sum(v * weights[k] for k, v in shifted(by).items()) / total - target

    if all(0 <= target + raised[k] - mean <= 1 for k in values):
        return shifted(0.0)
    down, up = -1 - 2 * abs(spread), 1 + 2 * abs(spread)  # everything at 0, everything at 1
    for _ in range(100):
        middle = (down + up) / 2
        down, up = (middle, up) if excess(middle) < 0 else (down, middle)
    return shifted(up)


@method("budget", mean="block")
def owl(scores: dict[str, Summary], target: float, *, outlier: float = 5.0, spread: float = 0.08) -> dict[str, float]:
    """Blocks with more outliers among their scores keep more; all sites of a block keep the same share.

    The population of a block is those of its sites the pass touches, taken together: for a pass over attention alone,
    the attention sites, and its outliers are counted against their mean.

    Formula: D_b = #{S > outlier * mean(S)} / #S over a block; r_b = 2 * spread * (D_b - min D) / (max D - min D);
        k_b = r_b - mean(r) + k
    Source: OWL, arXiv:2310.05175, section 3 as remembered, in the form of the authors' code (the factor 2 is theirs)
    Deviations: outliers are counted on a histogram, the threshold to within 1.1 %; of any score, where the paper has
        Wanda's; equal D gives the target everywhere; shares are cut to [0, 1] and the mean restored. The mean over blocks is
        the target, so the share of all weights is it only where blocks are of one size
    """
    blocks: dict[int, list[Summary]] = {}
    for s in scores.values():
        blocks.setdefault(s.site.block, []).append(s)
    density = {}
    for b, sites in blocks.items():
        count = sum(s.count for s in sites)
        mean = sum(s.total for s in sites) / count
        density[b] = sum(s.above(outlier * mean) for s in sites) / count
    shares = window(density, dict.fromkeys(density, 1.0), target, spread)
    return {n: shares[s.site.block] for n, s in scores.items()}
