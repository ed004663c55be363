from __future__ import annotations

from typing import Any

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.entrywise import PRODUCTS, Entrywise, ranks_of
from trimtab.methods.format.lowrank import lowrank
from trimtab.methods.format.lowrank import restore as product
from trimtab.methods.format.lowrank import size as size_of_one
from trimtab.methods.format.lowrank import stored as stored_of_one
from trimtab.methods.format.panels import Packed, Values, matrix


def size(shape: tuple[int, int], values: Values, kept: int, knobs: dict[str, Any]) -> dict[str, int]:
    return {f"{name}_{k}": n for name, rank in zip(PRODUCTS, ranks_of(kept // sum(shape)), strict=True)
            for k, n in size_of_one(shape, values, rank * sum(shape), knobs).items()}


def stored(p: Packed) -> int:
    """Entries of all factors. BadInput unless they are those of two products of its type and shape, each checked by itself, of one rank,
    or the first of one more."""
    if len(p.factors) != len(PRODUCTS) or any((f.format, f.type, f.shape) != ("lowrank", p.type, p.shape) for f in p.factors):
        raise BadInput(f"entrywise {p.type}: it is made of two products of factors, of its type and shape")
    kept = [stored_of_one(f) for f in p.factors]
    ranks = [n // sum(p.shape) for n in kept]
    if tuple(ranks) != ranks_of(sum(ranks)):
        raise BadInput(f"entrywise {p.type}: its products have one rank, or the first one more, not {ranks[0]} and {ranks[1]}")
    return sum(kept)


def restore(p: Packed) -> Tensor:
    first, second = map(product, p.factors)
    return first * second


@method("format", inverse=restore, holds="entrywise", bytes=size, stored=stored, factors="lowrank")
def entrywise(new: Change) -> Packed:
    """Two products of factors that are multiplied entry by entry: y = ((X1 Y1^T) * (X2 Y2^T)) x.

    `first_right_values`, `first_left_values`, `second_right_values` and `second_left_values` as lowrank has them. It saves bytes in the
    file, and no time: there is no way to run it but as the weight it stands for, which is what the runtime makes of it where it is opened.
    BadInput for a weight that is no such products.

    Formula: bytes = those of lowrank of the first product and of the second
    Source: Hyeon-Woo et al. 2022 (FedPara), arXiv:2108.06098, which sends the factors and computes with the weight
    Deviations: outputs of every factor are filled up to panels of 32
    """
    products = Entrywise.among(new.parts)
    if products is None:
        matrix(new)
        raise BadInput("entrywise: holds products of factors alone, no codes and no whole weight; make some of it (fedpara), or store it "
                       "as dense")
    each = (lowrank(products.first.change()), lowrank(products.second.change()))
    buffers = {f"{name}_{k}": t for name, f in zip(PRODUCTS, each, strict=True) for k, t in f.buffers.items()}
    return Packed("entrywise", each[0].shape, each[0].type, buffers, factors=each)
