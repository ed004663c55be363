from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change


@method("edit")
def mask(w: Tensor, mask: Tensor) -> Change:
    """Zero what the unit dropped.

    Formula: W' = W * M
    Source: common practice
    Deviations: none
    """
    return Change(w * mask, mask=mask)
