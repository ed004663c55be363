from __future__ import annotations

from typing import Any

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput
from trimtab.methods.select import top


def period(knobs: dict[str, Any]) -> int | None:
    """Along the output every column is decided by itself."""
    return knobs["m"] if knobs["dim"] == "in" else None


@method("unit", free=False, period=period, format="nm")
def nm(s: Tensor, keep: float, *, n: int = 2, m: int = 4, dim: str = "in") -> Tensor:
    """The n best of every m consecutive weights, whatever share is asked for.

    Groups run along the input of one output (dim="in", what sparse tensor cores read), or along the outputs of one
    input (dim="out"). BadInput if m does not divide that dimension, or n is not between 1 and m.

    Formula: in each aligned group of m entries the n with the highest score
    Source: Mishra et al. 2021, arXiv:2104.08378, section 3 (2:4); DaSS, arXiv:2405.01943 (along the output)
    Deviations: any n and m
    """
    if dim not in ("in", "out") or not 1 <= n <= m:
        raise BadInput(f"nm(n={n},m={m},dim={dim}): n is between 1 and m, and dim is in or out, such as nm(n=2,m=4,dim=in)")
    lines = s if dim == "in" else s.T
    if lines.shape[1] % m:
        raise BadInput(f"nm(n={n},m={m},dim={dim}): {m} does not divide {lines.shape[1]}, the {dim}put dimension; "
                       "choose an m that does")
    mask = top(lines.reshape(lines.shape[0], -1, m), n).reshape(lines.shape)
    return mask if dim == "in" else mask.T.contiguous()
