"""Packed weights made of others: maps whose outputs are added, or stand one after the other, and a map between a change of its inputs
and one of its outputs."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab.core.types import BadInput
from trimtab.methods.basis import Basis
from trimtab.methods.format.panels import Packed
from trimtab.methods.terms import INSIDE, OUTSIDE

SUM, BASED, STACK = FORMATS = ("sum", "based", "stack")
TAKEN = "taken"  # which inputs a map takes
BASES = tuple(f"{side}_{k}" for side in (INSIDE, OUTSIDE) for k in ("scale", "left", "right"))


def names(format_: str, count: int) -> list[str]:
    """What stands before the buffers of a composite's maps."""
    return ["inner"] if format_ == BASED else [str(i) for i in range(count)]


def _owned(format_: str, maps: tuple[Packed, ...]) -> dict[str, Tensor]:
    return {f"{name}_{k}": t for name, p in zip(names(format_, len(maps)), maps, strict=True) for k, t in p.buffers.items()}


def summed(*maps: Packed) -> Packed:
    """y = sum of what the maps, all of one shape, give of x; one alone as it is."""
    if len(maps) == 1:
        return maps[0]
    return Packed(SUM, maps[0].shape, maps[0].type, _owned(SUM, maps), factors=maps)


def stacked(*maps: Packed) -> Packed:
    """y = what the maps, of the same x, give one after the other; one alone as it is."""
    if len(maps) == 1:
        return maps[0]
    return Packed(STACK, (sum(p.shape[0] for p in maps), maps[0].shape[1]), maps[0].type, _owned(STACK, maps), factors=maps)


def based(inner: Packed, inputs: int, taken: Tensor | None = None, inside: Basis | None = None, outside: Basis | None = None) -> Packed:
    """y = outside^-1 (inner (inside (x [taken]))), of x [inputs]; `taken` int32, rising. What is None is left out; `inner` if all are."""
    if taken is None and inside is None and outside is None:
        return inner
    own = {TAKEN: taken} if taken is not None else {}
    bases = {k: t for side, b in ((INSIDE, inside), (OUTSIDE, outside)) if b is not None for k, t in b.parts(side).items()}
    return Packed(BASED, (inner.shape[0], inputs), inner.type, {**_owned(BASED, (inner,)), **own, **bases}, factors=(inner,))


def around(p: Packed) -> tuple[Tensor | None, Basis | None, Basis | None]:
    """What is around a based map: the inputs it takes, the bases of its inputs and outputs. BadInput where they contradict each other."""
    own = {k: t for k, t in p.buffers.items() if not k.startswith("inner_")}
    for k, t in own.items():
        if k.endswith(("left", "right")) and (n := math.isqrt(t.numel())) ** 2 == t.numel():
            own[k] = t.reshape(n, n)
    return own.get(TAKEN), Basis.among(own, INSIDE), Basis.among(own, OUTSIDE)


def restored(p: Packed, each: list[Tensor]) -> Tensor:
    """The weight [out, in] float32 of a composite, from those of its maps."""
    if p.format == SUM:
        whole = each[0].float().clone()
        for w in each[1:]:
            whole += w
        return whole
    if p.format == STACK:
        return torch.cat([w.float() for w in each])
    taken, inside, outside = around(p)
    w = each[0].float()
    w = w if inside is None else inside.plain(w)
    w = w if outside is None else outside.straight(w.T).T
    if taken is None:
        return w.contiguous()
    whole = torch.zeros(p.shape, device=w.device)
    whole[:, taken.long()] = w
    return whole


def check(p: Packed) -> None:
    """BadInput unless the maps meet in its shape, and what is around them fits; each map is checked by itself."""
    if not p.factors or p.type != p.factors[0].type:
        raise BadInput(f"{p.format} {p.type}: it is made of maps, the first one of its type")
    own = {k for k in p.buffers if not k.startswith(tuple(f"{n}_" for n in names(p.format, len(p.factors))))}
    if own - ({TAKEN, *BASES} if p.format == BASED else set()):
        raise BadInput(f"{p.format} {p.type}: no buffer {min(own)} belongs to it")
    if p.format == SUM:
        if len(p.factors) < 2 or any(f.shape != p.shape for f in p.factors):
            raise BadInput(f"sum {p.type}: it is made of maps of its shape, {list(p.shape)}, two at least")
        return
    if p.format == STACK:
        if len(p.factors) < 2 or any(f.shape[1] != p.shape[1] for f in p.factors) or sum(f.shape[0] for f in p.factors) != p.shape[0]:
            raise BadInput(f"stack {p.type}: it is made of maps of {p.shape[1]} inputs, two at least, of {p.shape[0]} outputs together")
        return
    if len(p.factors) != 1 or p.factors[0].shape[0] != p.shape[0]:
        raise BadInput(f"based {p.type}: it is made of one map of {p.shape[0]} outputs")
    taken, inside, outside = around(p)
    if taken is not None and (taken.dtype != torch.int32 or not len(taken) or int(taken[0]) < 0 or int(taken[-1]) >= p.shape[1]
                              or not bool((taken.diff() > 0).all())):
        raise BadInput(f"based {p.type}: the inputs it takes are int32, rising, and below {p.shape[1]}")
    if (p.shape[1] if taken is None else len(taken)) != p.factors[0].shape[1]:
        raise BadInput(f"based {p.type}: its map has {p.factors[0].shape[1]} inputs, and is given another number")
    for basis, size in ((inside, p.factors[0].shape[1]), (outside, p.shape[0])):
        if basis is not None and basis.size != size:
            raise BadInput(f"based {p.type}: a basis of {basis.size} does not fit {size}")
