from __future__ import annotations

from typing import Any

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.factors import Factors
from trimtab.methods.format.dense import dense
from trimtab.methods.format.dense import restore as whole
from trimtab.methods.format.dense import size as size_of_one
from trimtab.methods.format.panels import Packed, Values, matrix

SIDES = ("right", "left")  # in the order in which they are applied


def size(shape: tuple[int, int], values: Values, kept: int, knobs: dict[str, Any]) -> dict[str, int]:
    rank = kept // sum(shape)
    shapes = ((rank, shape[1]), (shape[0], rank))
    return {f"{side}_{k}": n for side, s in zip(SIDES, shapes, strict=True) for k, n in size_of_one(s, values, s[0] * s[1], {}).items()}


def stored(p: Packed) -> int:
    """Entries of both factors. BadInput unless they are two dense ones of its type, each checked by itself, and meet in its shape."""
    if len(p.factors) != len(SIDES) or any((f.format, f.type) != ("dense", p.type) for f in p.factors):
        raise BadInput(f"lowrank {p.type}: it is made of two dense factors of its type")
    right, left = p.factors
    if left.shape[1] != right.shape[0] or (left.shape[0], right.shape[1]) != p.shape:
        raise BadInput(f"lowrank {p.type}: factors of {list(right.shape)} and {list(left.shape)} do not make {list(p.shape)}")
    return right.shape[0] * sum(p.shape)


def restore(p: Packed) -> Tensor:
    right, left = p.factors
    return Factors(whole(left), whole(right)).weight()


@method("format", inverse=restore, holds="factors", bytes=size, stored=stored, factors="dense")
def lowrank(new: Change) -> Packed:
    """Two factors one after the other, each as a dense map: y = left (right x).

    `right_values` and `left_values` as dense has them, of [rank, in] and [out, rank]. It is restored as their product in float32.
    BadInput for a weight that is no factors.

    Formula: bytes = those of dense of [rank, in] and of [out, rank]
    Source: common practice
    Deviations: the outputs of both are filled up to panels of 32, those of the first, which are the rank, too
    """
    factors = Factors.among(new.parts)
    if factors is None:
        matrix(new)
        raise BadInput("lowrank: holds factors alone, no codes and no whole weight; factorise it (svd), or store it as dense")
    each = (dense(Change(factors.right)), dense(Change(factors.left)))
    buffers = {f"{side}_{k}": t for side, f in zip(SIDES, each, strict=True) for k, t in f.buffers.items()}
    return Packed("lowrank", (factors.left.shape[0], factors.right.shape[1]), each[0].type, buffers, factors=each)
