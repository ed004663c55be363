from __future__ import annotations

from trimtab.core.registry import method
from trimtab.core.types import Summary


@method("budget", own=True)
def alive(scores: dict[str, Summary]) -> dict[str, float]:
    """What is worth nothing goes, and all else stays: the share follows from the scores.

    Formula: k_l = #{S_l > 0} / size_l
    Source: Hu et al. 2016 (network trimming), arXiv:1607.03250: neurons whose outputs are mostly zero
    Deviations: the source goes by how often an output is zero, and trains what is left; here goes what is zero for all of the data, and
        nothing changes there
    """
    return {name: s.above(0) / s.count for name, s in scores.items()}
