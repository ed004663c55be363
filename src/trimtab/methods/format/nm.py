from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import BITS, Codes
from trimtab.methods.format.panels import (
    PANEL,
    TYPES,
    Packed,
    Values,
    decoded,
    matrix,
    pack_bits,
    panels,
    pattern,
    sides,
    unpack_bits,
    unpanelled,
    unworded,
    words,
)


def width(m: int) -> int:
    """Bits that tell m places apart."""
    return (m - 1).bit_length()


def size(shape: tuple[int, int], values: Values, kept: int, knobs: dict[str, Any]) -> dict[str, int]:
    n, m = knobs["n"], knobs["m"]
    out, inputs = shape if knobs["dim"] == "in" else shape[::-1]
    count, held = -(-out // PANEL), inputs // m * n
    if values.type in BITS:
        places = Values("i2").bytes(held) if m == 4 else held * PANEL * width(m) // 8
        return {"values": count * values.bytes(held), "bits": count * places, **values.side(count * PANEL * -(-inputs // values.group))}
    return {"values": count * held * PANEL * (2 if values.type == "bf16" else 4), "bits": count * held * PANEL * width(m) // 8}


def places(p: Packed) -> Tensor:
    """Which place of its group each stored value has, uint8 [panels, groups of m, n, PANEL]."""
    out, inputs = p.shape if p.dim == "in" else p.shape[::-1]
    shape = (-(-out // PANEL), inputs // p.m, p.n, PANEL)
    if p.type in BITS and p.m == 4:
        held = inputs // p.m * p.n
        return unworded(p.buffers["bits"].reshape(shape[0], -(-held // 16), PANEL, 4), 2, held).reshape(shape)
    return unpack_bits(p.buffers["bits"], width(p.m), shape[0] * shape[1] * shape[2] * PANEL).view(shape)


def stored(p: Packed) -> int:
    """How many values there are. BadInput unless m divides, and every place lies inside its group."""
    along, codes = p.shape[p.dim == "in"], p.type in BITS
    if p.rows != PANEL or not 0 < p.n <= p.m or not 2 <= p.m <= 256 or along % p.m \
            or (codes and (p.dim == "out" or (p.group < along and p.group % p.m))):
        raise BadInput(f"nm: {p.n} of {p.m} along {p.dim} with groups of {p.group} do not divide {list(p.shape)}")
    bits, knobs = p.buffers["bits"], {"n": p.n, "m": p.m, "dim": p.dim}
    if p.m & (p.m - 1) and bits.nbytes == size(p.shape, p.entries, 0, knobs)["bits"] and int(places(p).max()) >= p.m:
        raise BadInput(f"nm: a place lies outside its group of {p.m}")
    return p.shape[0] * p.shape[1] // p.m * p.n


def restore(p: Packed) -> Tensor:
    out, inputs = p.shape if p.dim == "in" else p.shape[::-1]
    at, held = places(p).long(), inputs // p.m * p.n
    values = decoded(p, len(at), held, p.group // p.m * p.n) if p.type in BITS else p.buffers["values"]
    values = values.reshape(at.shape)
    groups = torch.zeros(at.shape[0], inputs // p.m, p.m, PANEL, dtype=values.dtype, device=values.device)
    w = unpanelled(groups.scatter_add_(2, at, values).flatten(1, 2), out)
    return w if p.dim == "in" else w.T.contiguous()


@method("format", inverse=restore, holds="nm", codes=tuple(BITS), bytes=size, stored=stored)
def nm(new: Change, *, n: int = 2, m: int = 4, dim: str = "in") -> Packed:
    """At most n entries of every m consecutive ones, with their places.

    `values` [panels, in / m, n, 32] of float32 or bfloat16, in order of place, or words of codes over the stored inputs with
    `scales` and `zeros` as in dense; `bits` uint8: the place of each value inside its group, ceil(log2 m) bits each, lowest
    first (codes of n:4: as words of codes of 2 bits). A group with fewer than n entries is filled up with zeros at its first
    free places. Along the output it is the transpose that is packed. A dropped entry is restored as +0.
    BadInput if m does not divide the dimension, a group keeps more than n, or codes lie along the output.

    Formula: bytes = itemsize * s + s * ceil(log2 m) / 8, s = n * in / m * 32 * ceil(out / 32); codes: bits / 8 for itemsize, filled
        up to words, with the scales and zero points of dense
    Source: Mishra et al. 2021, arXiv:2104.08378, section 3 (2:4)
    Deviations: any n and m, either dimension, kernels for m = 4 along the input alone; outputs are filled up to panels of 32;
        no hardware's reordering of the indices
    """
    what = f"nm(n={n},m={m},dim={dim})"
    if dim not in ("in", "out") or not 0 < n <= m or not 2 <= m <= 256:
        raise BadInput(f"{what}: want 0 < n <= m, m of 2 to 256, and dim in or out")
    w, kept = matrix(new), pattern(new)
    if isinstance(w, Codes) and w.type not in BITS:
        raise BadInput(f"{what}: holds no codes of type {w.type}; name the format dense")
    stuff = w.codes if isinstance(w, Codes) else w
    shape = (stuff.shape[0], stuff.shape[1])
    if isinstance(w, Codes) and (dim == "out" or (w.group < shape[1] and w.group % m)):
        raise BadInput(f"{what}: codes share scales along the input, in groups that {m} divides; name the format dense")
    if dim == "out":
        stuff, kept = stuff.T, kept.T
    if stuff.shape[1] % m:
        raise BadInput(f"{what}: {m} does not divide {stuff.shape[1]}, the {dim}put dimension")
    groups, kept = (panels(t).unflatten(1, (-1, m)) for t in (stuff, kept))
    most = int(kept.sum(2).max())
    if most > n:
        raise BadInput(f"{what}: a group of {m} keeps {most} entries; use the unit of that name or format bitmask")
    at = kept.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[:, :, :n].sort(dim=2).values
    values = groups.gather(2, at)  # codes of what was dropped stand for zero as they are
    if isinstance(w, Codes):
        bits = words(at.to(torch.uint8).flatten(1, 2), 2) if m == 4 else pack_bits(at, width(m))
        values = words(values.flatten(1, 2), w.bits)
        return Packed("nm", shape, w.type, {"values": values, "bits": bits, **sides(w)}, n=n, m=m, group=w.group)
    values = values.masked_fill(~kept.gather(2, at), 0).contiguous()
    return Packed("nm", shape, TYPES[stuff.dtype], {"values": values, "bits": pack_bits(at, width(m))}, n=n, m=m, dim=dim)
