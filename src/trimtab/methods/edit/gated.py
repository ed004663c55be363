from __future__ import annotations

from typing import Any

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change


@method("edit", joint=("unit", "score", "rewrite", "grid", "repair", "input", "format"), drops=False, gates=True)
def gated(w: Tensor, keep: float, mask: Tensor, gate: Any) -> Change:
    """Leave the weight as it is, and of every token compute the inputs that the gate lets pass.

    `w` [out, in]; `keep`: the share of inputs computed; `mask` bool [out, in] (False = dropped by an earlier pass). Returns w and the
    parts of the gate.

    Formula: y = W (m(x) * x)
    Source: Liu et al. 2024 (TEAL), arXiv:2408.14690, equation 1
    Deviations: none
    """
    return Change(w, gate(w, keep).parts(), None if bool(mask.all()) else mask)
