"""Packed weights of any format: back to what they were, checked, and the format that takes the fewest bytes."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import load_all
from trimtab.core.types import BadInput, Change
from trimtab.methods import composite
from trimtab.methods.codes import LEVELS
from trimtab.methods.entrywise import PRODUCTS
from trimtab.methods.format.bitmask import bitmask
from trimtab.methods.format.bsr import bsr
from trimtab.methods.format.dense import dense
from trimtab.methods.format.lowrank import SIDES
from trimtab.methods.format.nm import nm
from trimtab.methods.format.panels import PANEL, TYPES, VECTORS, Packed
from trimtab.methods.gates import PREFIX, gate_of, ungated
from trimtab.methods.rounding import rounding_bytes, weight_alone

VERSION = 2  # of packed directories; 1 laid out n:m otherwise, and had csr
LARGEST = 2**31 - 1
DEEPEST = 4   # maps of maps
NUMBERS = ("rows", "cols", "n", "m", "group")
ACT = "act_bits"  # a number that is described where it is not 0
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "bits": (torch.uint8,), "columns": (torch.int32, torch.uint8), "pointers": (torch.int64,), "windows": (torch.int32,),
    "scales": (torch.float32, torch.float16), "zeros": (torch.uint8,), "table": (torch.float32,),
    "act_scale": (torch.float32,), "book": (torch.float16,), "residual": (torch.uint8,), "residual_book": (torch.float16,),
}


def restored(p: Packed) -> Tensor:
    """The weight [out, in] that was packed; of codes what they stand for, float32."""
    if p.format in composite.FORMATS:
        return composite.restored(ungated(p), [restored(f) for f in p.factors])
    inverse = load_all()[f"format/{p.format}"].inverse
    assert inverse is not None
    return inverse(weight_alone(ungated(p)))


def check(p: Packed) -> None:
    """BadInput unless the numbers make a layout, every buffer is there in its type and length, and every index lies inside."""
    gate_of(p)
    p = ungated(p)
    if p.format in composite.FORMATS:
        for f in p.factors:
            check(f)
        composite.check(p)
        return
    m = load_all().get(f"format/{p.format}")
    numbers = [getattr(p, k) for k in NUMBERS]
    values = {name: dtype for dtype, name in TYPES.items()} | dict.fromkeys((*LEVELS, VECTORS), torch.uint8)
    if m is None or p.type not in values or p.dim not in ("in", "out"):
        raise BadInput(f"no layout is called {p.format} {p.type} along {p.dim}")
    if any(type(i) is not int or not 0 <= i <= LARGEST for i in (*p.shape, *numbers)) or len(p.shape) != 2 or 0 in p.shape:
        raise BadInput(f"{p.format}: {list(p.shape)} and {dict(zip(NUMBERS, numbers, strict=True))} are no numbers of a layout")
    if p.type in LEVELS and (p.type not in m.facts["codes"] or not 1 <= p.group <= p.shape[1] or "scales" not in p.buffers):
        raise BadInput(f"{p.format} {p.type}: no layout of codes in groups of {p.group} of {p.shape[1]} inputs")
    for f in p.factors:
        check(f)
    for name, t in () if p.factors else p.buffers.items():
        if t.dtype not in ((values[p.type],) if name == "values" else DTYPES.get(name, ())):
            raise BadInput(f"{p.format} {p.type}: no buffer {name} of {str(t.dtype).removeprefix('torch.')} belongs to it")
    if bool(p.factors) != bool(m.facts["factors"]):
        raise BadInput(f"{p.format} {p.type}: it is {'not ' if p.factors else ''}made of factors")
    try:
        kept = m.facts["stored"](p)
    except KeyError as e:
        raise BadInput(f"{p.format} {p.type}: its buffer {e.args[0]} is missing") from None
    want = m.facts["bytes"](p.shape, p.entries, kept, {k: getattr(p, k) for k in (*NUMBERS, "dim")})
    want |= rounding_bytes(p)
    have = {k: t.nbytes for k, t in p.buffers.items()}
    for name in sorted(want.keys() | have):
        if want.get(name) != have.get(name):
            raise BadInput(f"{p.format} {p.type} {list(p.shape)}: {want.get(name, 0)} bytes of {name} expected, {have.get(name, 0)} given")


def describe(p: Packed) -> dict[str, Any]:
    """All of it but the buffers, as JSON data."""
    factors = {"factors": [describe(f) for f in p.factors]} if p.factors else {}
    own = {k: getattr(p, k) for k in NUMBERS} | ({ACT: p.act_bits} if p.act_bits else {})
    return {"format": p.format, "type": p.type, "shape": list(p.shape), "dim": p.dim, **own, **factors}


def described(name: str, about: Any, buffers: Mapping[str, Tensor]) -> Packed:
    """The inverse of `describe`, with its buffers in any shape; checked. BadInput names the layer."""
    try:
        p = _said(about, buffers)
        check(p)
    except BadInput as e:
        raise BadInput(f"packed layer {name} is corrupt: {e}; fetch or pack it again") from None
    return p


def _said(about: Any, buffers: Mapping[str, Tensor], depth: int = 0) -> Packed:
    """What a description says, not checked but for the types of what it holds."""
    keys = {"format", "type", "shape", "dim", *NUMBERS}
    if not isinstance(about, dict) or set(about) - {"factors", ACT} != keys or not isinstance(about["shape"], list):
        raise BadInput(f"it should be described by {', '.join(sorted(keys))}")
    if not all(isinstance(about[k], str) for k in ("format", "type", "dim")):
        raise BadInput("its format, type and dim should be words")
    own = {k: t if PREFIX in k else t.reshape(-1) for k, t in buffers.items()}  # the maps of a router are matrices
    p = Packed(**{**about, "shape": tuple(about["shape"]), "buffers": own, "factors": ()})
    if (each := about.get("factors")) is None:
        if p.format in composite.FORMATS:
            raise BadInput(f"{p.format}: it is made of other maps, and none is described")
        return p
    own_sides = list(PRODUCTS if p.format == "entrywise" else SIDES)
    sides = composite.names(p.format, len(each)) if isinstance(each, list) and p.format in composite.FORMATS else own_sides
    if not isinstance(each, list) or len(each) != len(sides) or depth >= DEEPEST:
        raise BadInput(f"its factors should be a list of {len(sides)}" if depth < DEEPEST else "it is made of maps of maps of maps")
    parts = [{k.removeprefix(f"{side}_"): t for k, t in own.items() if k.startswith(f"{side}_")} for side in sides]
    return replace(p, factors=tuple(_said(a, b, depth + 1) for a, b in zip(each, parts, strict=True)))


def smallest(w: Tensor) -> Packed:
    """The weight in the layout that takes the fewest bytes, judged by its zeros alone."""
    out, inputs = w.shape
    kept = w.detach() != 0
    sizes = {"dense": w.nbytes, "bitmask": -(-out // PANEL) * PANEL * inputs / 8 + w.dtype.itemsize * int(kept.sum())}
    if out % 32 == 0 and inputs % 32 == 0:
        stored = int(kept.reshape(out // 32, 32, inputs // 32, 32).any(3).any(1).sum())
        sizes["bsr"] = stored * (1024 * w.dtype.itemsize + 4)
    if inputs % 4 == 0 and int(kept.reshape(out, -1, 4).sum(2).max()) <= 2:
        sizes["nm"] = w.numel() / 2 * (w.dtype.itemsize + 0.25)
    makers = {"dense": dense, "bsr": bsr, "nm": nm, "bitmask": bitmask}  # of equals the simpler one
    return makers[min((k for k in makers if k in sizes), key=lambda k: sizes[k])](Change(w.detach()))
