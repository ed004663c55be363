from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import Codes
from trimtab.methods.format.panels import (
    BITS,
    PANEL,
    TYPES,
    Packed,
    Values,
    decoded,
    interleaved,
    matrix,
    pack_bits,
    panels,
    pattern,
    sides,
    straight,
    unpack_bits,
    unpanelled,
    unworded,
    values_of,
    words,
)

PLANES = {4: ((0, 2),), 8: ((0, 2), (2, 1))}  # m whose places lie in words: lowest bit and width of each plane of words


def width(m: int) -> int:
    """Bits that tell m places apart."""
    return (m - 1).bit_length()


def size(shape: tuple[int, int], values: Values, kept: int, knobs: dict[str, Any]) -> dict[str, int]:
    n, m = knobs["n"], knobs["m"]
    out, inputs = shape if knobs["dim"] == "in" else shape[::-1]
    count, held = -(-out // PANEL), inputs // m * n
    bits = sum(-(-held * b // 32) * 4 * PANEL for _, b in PLANES[m]) if m in PLANES else held * PANEL * width(m) // 8
    groups = -(-inputs // values.group) if values.group else 0
    return {"values": count * values.bytes(held), "bits": count * bits, **values.side(count * PANEL * groups)}


def turned(t: Tensor, a: int, b: int) -> Tensor:
    """[panels, values, PANEL]: every a * b values as a table of a rows, column after column; filled up to whole tables."""
    t = torch.nn.functional.pad(t, (0, 0, 0, -t.shape[1] % (a * b)))
    return t.unflatten(1, (-1, a, b)).transpose(2, 3).flatten(1, 3)


def packed_places(at: Tensor, m: int, codes: bool) -> Tensor:
    """Places uint8 [panels, values, PANEL] as the buffer `bits`. Codes meet four inputs at once, so that those of four values lie
    in a byte each, as codes do; the places of floats lie in order, lowest bits first."""
    if m not in PLANES:
        return pack_bits(at, width(m))
    planes = [((at >> low) & (1 << b) - 1, b) for low, b in PLANES[m]]
    return torch.cat([words(t if codes else turned(t, 4, 8 // b), b) for t, b in planes], 1)


def places(p: Packed) -> Tensor:
    """Which place of its group each stored value has, uint8 [panels, groups of m, n, PANEL]."""
    out, inputs = p.shape if p.dim == "in" else p.shape[::-1]
    count, held = -(-out // PANEL), inputs // p.m * p.n
    shape = (count, inputs // p.m, p.n, PANEL)
    if p.m not in PLANES:
        return unpack_bits(p.buffers["bits"], width(p.m), count * held * PANEL).view(shape)
    at = torch.zeros(count, held, PANEL, dtype=torch.uint8, device=p.buffers["bits"].device)
    planes = p.buffers["bits"].reshape(count, -1, PANEL, 4).split([-(-held * b // 32) for _, b in PLANES[p.m]], 1)
    for plane, (low, b) in zip(planes, PLANES[p.m], strict=True):
        t = unworded(plane, b, plane.shape[1] * 32 // b)
        at |= (t if p.type in BITS else turned(t, 8 // b, 4))[:, :held] << low
    return at.view(shape)


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
    values = decoded(p, len(at), held, p.group // p.m * p.n) if p.type in BITS else straight(values_of(p, len(at), held), held)
    values = values.reshape(at.shape)
    groups = torch.zeros(at.shape[0], inputs // p.m, p.m, PANEL, dtype=values.dtype, device=values.device)
    w = unpanelled(groups.scatter_add_(2, at, values).flatten(1, 2), out)
    return w if p.dim == "in" else w.T.contiguous()


@method("format", inverse=restore, holds="nm", codes=tuple(BITS), bytes=size, stored=stored)
def nm(new: Change, *, n: int = 2, m: int = 4, dim: str = "in") -> Packed:
    """At most n entries of every m consecutive ones, with their places.

    The s = n * in / m values of an output, in order of place, lie as its inputs do in dense: `values` [panels, s, 32] of float32,
    [panels, s / 2, 32, 2] of bfloat16, or words of codes with `scales` and `zeros`. `bits` uint8: the place of each value inside
    its group. Of m = 4 these are 32-bit words [panels, s / 16, 32, 4] of two bits a value, of m = 8 followed, panel by panel, by
    words [panels, s / 32, 32, 4] of the third bits, both in order of the values, lowest bits first (of codes in that of words of
    codes); of another m they are one stream of ceil(log2 m) bits each, lowest first. A group with fewer than n entries is filled
    up with zeros at its first free places. Along the output it is the transpose that is packed. A dropped entry is restored as +0.
    BadInput if m does not divide the dimension, a group keeps more than n, or codes lie along the output.

    Formula: bytes = 32 * ceil(out / 32) * s * (itemsize + ceil(log2 m) / 8), the values of bfloat16 filled up to pairs, the places
        of m = 4 and 8 to words; codes: bits / 8 for itemsize, filled up to words, with the scales and zero points of dense
    Source: Mishra et al. 2021, arXiv:2104.08378, section 3 (2:4)
    Deviations: any n and m, either dimension, kernels for m = 4 and 8 along the input alone (of codes 2:4 and 4:8); outputs are
        filled up to panels of 32; no hardware's reordering of the indices
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
    values = values if isinstance(w, Codes) else values.masked_fill(~kept.gather(2, at), 0)
    values, bits = values.flatten(1, 2), packed_places(at.to(torch.uint8).flatten(1, 2), m, isinstance(w, Codes))
    if isinstance(w, Codes):
        return Packed("nm", shape, w.type, {"values": words(values, w.bits), "bits": bits, **sides(w)}, n=n, m=m, group=w.group)
    return Packed("nm", shape, TYPES[stuff.dtype], {"values": interleaved(values), "bits": bits}, n=n, m=m, dim=dim)
