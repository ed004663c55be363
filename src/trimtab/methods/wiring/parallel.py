"""Attention and MLP of a layer side by side."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput
from trimtab.methods.select import top


def measured(knobs: Mapping[str, Any]) -> bool:
    """Whether what is rewired is what costs least."""
    return bool(knobs["by"] == "damage")


def fewest(damage: Tensor, share: float, by: str) -> Tensor:
    """Bool [n], the share of them that is rewired: where that does the least damage, or the first, or the last of them."""
    if not 0 < share <= 1:
        raise BadInput(f"share={share:g}; the share that is rewired is above 0 and at most 1, such as 0.25")
    if by not in ("damage", "first", "last"):
        raise BadInput(f"by={by} is unknown; use damage, first or last")
    order = torch.arange(len(damage), dtype=torch.float32, device=damage.device)
    score = {"damage": -damage.float(), "first": -order, "last": order}[by]
    return top(score[None], round(share * len(damage)))[0]


@method("wiring", of="layer", looks=measured, ours="some layers run attention and MLP side by side")
def parallel(damage: Tensor, *, share: float = 0.25, by: str = "damage") -> Tensor:
    """Attention and MLP of some layers read the same input, and what both add is added at once.

    Which layers, bool [n]. `damage` [n]: how far the hidden states behind the last block are off where that layer alone is parallel.

    Formula: x + A(n1(x)) + M(n2(x)) in place of y + M(n2(y)), y = x + A(n1(x))
    Source: the layer of A Neural ODE Interpretation of Transformer Layers, arXiv:2212.06011 (Zhong et al. 2022), by its abstract
    Deviations: there networks are trained with such layers, here nothing is; each part keeps its own norm; that some layers alone are
        rewired, and which, is ours; integration schemes of higher order are not made
    """
    return fewest(damage, share, by)
