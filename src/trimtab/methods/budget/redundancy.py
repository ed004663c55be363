from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Summary
from trimtab.methods.budget.owl import window


@method("budget")
def redundancy(scores: dict[str, Summary], target: float, cosine: dict[str, Tensor], *, spread: float = 0.1) -> dict[str, float]:
    """Sublayers that change the residual stream least keep least; all sites of a sublayer keep the same share.

    cosine {site: [1]}. Sublayers (attention or MLP of a block) are ranked together, equal ones sharing their rank.

    Formula: r_u = rank of 1 - cos(x_u, y_u), 0 for the least and 1 for the greatest; k_u = k + 2 * spread * (r_u - mean(r)),
        the mean weighted by size
    Source: LLM-Drop, arXiv:2406.15786, section 3 as remembered (the measure)
    Deviations: our own rule. The paper drops the sublayers ranked last and leaves the others whole; here the same ranking
        decides how much each one keeps. Shares are cut to [0, 1] and the mean restored
    """
    seen: dict[tuple[int, str], list[float]] = {}
    size: dict[tuple[int, str], float] = {}
    for n, s in scores.items():
        at = s.site.block, s.site.group
        seen.setdefault(at, []).append(float(cosine[n]))
        size[at] = size.get(at, 0.0) + s.count
    change = {at: 1 - sum(c) / len(c) for at, c in seen.items()}
    rank = {at: sum((o < c) + (o == c) / 2 for o in change.values()) for at, c in change.items()}
    shares = window(rank, size, target, spread)
    return {n: shares[s.site.block, s.site.group] for n, s in scores.items()}
