from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Summary
from trimtab.methods.budget.global_ import global_


def lamp_scores(s: Tensor) -> Tensor:
    """LAMP scores of a site, float64 [out * in] in ascending order. The best is exactly 1; what was 0 stays 0."""
    s = s.double().abs().flatten().sort().values
    sq = (s / s[-1].clamp_min(torch.finfo(s.dtype).tiny)).square()
    at_least = sq.flip(0).cumsum(0).flip(0)  # summed from the small end it would cancel
    return torch.where(sq > 0, sq / at_least, sq)


@method("budget", of=lamp_scores, xfail={"treats_equals_alike": "counts are whole: equal sites may differ by one entry"})
def lamp(scores: dict[str, Summary], target: float) -> dict[str, float]:
    """One threshold for all sites, on scores that are relative to what each site has left.

    A site's best entry scores 1, so no site is emptied while there are more entries to keep than sites. LAMP rises with
    the score it is made of, so a site's share of the best LAMP scores is its share of the best scores.

    Formula: L_u = S_u^2 / sum_{v: S_v >= S_u} S_v^2 inside a site; then the global threshold on L
    Source: LAMP, arXiv:2010.07611, section 3 as remembered
    Deviations: of any score, where the paper has |W|; the threshold is that of budget global
    """
    return global_(scores, target)
