from __future__ import annotations

from trimtab.core.registry import method
from trimtab.core.types import Summary


@method("budget")
def uniform(scores: dict[str, Summary], target: float) -> dict[str, float]:
    """The same share everywhere.

    Formula: k_l = k
    Source: common practice
    Deviations: none
    """
    return dict.fromkeys(scores, target)
