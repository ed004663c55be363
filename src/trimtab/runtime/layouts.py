"""How a weight lies in memory so that a kernel can stream it: panels of outputs, input after input.

A panel is 32 outputs (or a block's height) side by side. One instruction meets one input with many outputs, nothing has
to be summed across lanes, and one stream is read from begin to end. The last panel is filled up with zeros. bfloat16
weights of two neighbouring inputs lie side by side, so that one 32-bit lane holds both. Codes of 8, 4 and 2 bits lie in
32-bit words of one output, 4, 8 or 16 inputs each: byte b of the word holds inputs b, b + 4, b + 8 ..., lowest bits first,
so that a shift and a mask leave four inputs a byte each. The layouts do not depend on the processor: what is written on
one is mapped on another.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.types import BadInput
from trimtab.methods.format.bitmask import pack_bits, unpack_bits
from trimtab.runtime.codes import BITS, Codes

PANEL = 32   # outputs of a panel
SLACK = 64   # bytes behind the values of a bitmask that a kernel may read
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Packed:
    """One linear map [out, in] as a kernel reads it.

    `format`: dense, bsr, bitmask or nm; `type` of the values: f32, bf16, or codes: i8, i4, i2; `rows`, `cols` of a block;
    `n`, `m` of n:m; `group`: inputs that share a scale; `buffers`: values (float32, bfloat16, or uint8 for words of codes),
    bits (uint8), columns (int32), pointers (int64), scales (float32 or float16), zeros (uint8), those it has.
    """

    format: str
    shape: tuple[int, int]
    type: str
    buffers: dict[str, Tensor]
    rows: int = PANEL
    cols: int = 1
    n: int = 1
    m: int = 1
    group: int = 0

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.buffers.values())


def _interleaved(t: Tensor) -> Tensor:
    """[..., inputs, outputs] -> the same for float32, [..., inputs / 2, outputs, 2] for bfloat16."""
    if t.dtype != torch.bfloat16:
        return t.contiguous()
    t = torch.nn.functional.pad(t, (0, 0, 0, t.shape[-2] % 2))
    return t.unflatten(-2, (-1, 2)).transpose(-1, -2).contiguous()


def _straight(t: Tensor, inputs: int) -> Tensor:
    """The inverse of `_interleaved`: [..., inputs, outputs]."""
    return t if t.dtype != torch.bfloat16 else t.transpose(-1, -2).flatten(-3, -2)[..., :inputs, :]


def _panels(w: Tensor) -> Tensor:
    """[out, in] -> [panels, in, PANEL], filled up with zeros."""
    w = torch.nn.functional.pad(w, (0, 0, 0, -w.shape[0] % PANEL))
    return w.unflatten(0, (-1, PANEL)).transpose(1, 2)


def _words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., inputs, outputs] -> words, uint8 [..., inputs / (32 / bits), outputs, 4]."""
    fields = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[-2] % (4 * fields)))
    codes = codes.unflatten(-2, (-1, fields, 4))
    whole = codes[..., 0, :, :].clone()
    for f in range(1, fields):
        whole |= codes[..., f, :, :] << bits * f
    return whole.transpose(-1, -2).contiguous()


def _unworded(words: Tensor, bits: int, inputs: int) -> Tensor:
    """The inverse of `_words`: uint8 [..., inputs, outputs]."""
    fields = [(words.transpose(-1, -2) >> bits * f) & (1 << bits) - 1 for f in range(8 // bits)]
    return torch.stack(fields, -3).flatten(-4, -2)[..., :inputs, :]


def _sides(w: Codes) -> dict[str, Tensor]:
    """Scales and zero points by panels: [panels, groups, PANEL]."""
    sides = {"scales": _panels(w.scales).contiguous()}
    return sides if w.zeros is None else {**sides, "zeros": _panels(w.zeros).contiguous()}


def _checked(w: Tensor | Codes) -> None:
    if isinstance(w, Codes):
        w = w.codes
    elif w.dtype not in TYPES:
        raise BadInput(f"a packed weight is [out, in] of float32 or bfloat16, not {w.dtype} {list(w.shape)}")
    if w.ndim != 2 or 0 in w.shape:
        raise BadInput(f"a packed weight is [out, in], not {list(w.shape)}")


def dense(w: Tensor | Codes) -> Packed:
    """Every weight."""
    _checked(w)
    if isinstance(w, Codes):
        return Packed("dense", _shape(w.codes), w.type, {"values": _words(_panels(w.codes), w.bits), **_sides(w)},
                      cols=w.codes.shape[1], group=w.group)
    return Packed("dense", _shape(w), TYPES[w.dtype], {"values": _interleaved(_panels(w.detach()))}, cols=w.shape[1])


def _shape(w: Tensor) -> tuple[int, int]:
    return w.shape[0], w.shape[1]


def bsr(w: Tensor | Codes, rows: int = 32, cols: int = 32) -> Packed:
    """The blocks that hold anything but zeros. BadInput if the block does not divide the matrix, or codes have another group."""
    _checked(w)
    matrix = w.codes if isinstance(w, Codes) else w.detach()
    out, inputs = matrix.shape
    if min(rows, cols) < 1 or out % rows or inputs % cols:
        raise BadInput(f"bsr: a block of {rows} x {cols} does not divide {out} x {inputs}")

    def blocks(t: Tensor, width: int = cols) -> Tensor:
        return t.reshape(out // rows, rows, -1, width).transpose(1, 2)

    if isinstance(w, Codes):
        if w.group != cols:
            raise BadInput(f"bsr: codes in blocks of {rows} x {cols} want groups of {cols} inputs, not {w.group}")
        kept = torch.ones_like(matrix, dtype=torch.bool) if w.kept is None else w.kept
    else:
        kept = matrix != 0
    stored = blocks(kept).flatten(2).any(-1)
    inside = blocks(matrix)[stored].transpose(1, 2)
    buffers = {"columns": stored.nonzero()[:, 1].to(torch.int32), "pointers": torch.nn.functional.pad(stored.sum(1).cumsum(0), (1, 0))}
    if isinstance(w, Codes):
        buffers |= {"values": _words(inside, w.bits), "scales": blocks(w.scales, 1)[stored].contiguous()}
        if w.zeros is not None:
            buffers["zeros"] = blocks(w.zeros, 1)[stored].contiguous()
        return Packed("bsr", (out, inputs), w.type, buffers, rows=rows, cols=cols, group=cols)
    return Packed("bsr", (out, inputs), TYPES[w.dtype], {**buffers, "values": _interleaved(inside)}, rows=rows, cols=cols)


def bitmask(w: Tensor) -> Packed:
    """What is not zero, and a bit a place."""
    _checked(w)
    panels = _interleaved(_panels(w.detach()))
    kept = panels != 0
    values = torch.nn.functional.pad(panels[kept], (0, SLACK // w.dtype.itemsize))
    return Packed("bitmask", _shape(w), TYPES[w.dtype], {"values": values, "bits": pack_bits(kept)})


def nm(w: Tensor | Codes, n: int = 2, m: int = 4) -> Packed:
    """At most n of every m consecutive inputs, with their places. BadInput where there are more."""
    _checked(w)
    matrix = w.codes if isinstance(w, Codes) else w.detach()
    out, inputs = matrix.shape
    if not 0 < n <= m or inputs % m:
        raise BadInput(f"nm: {m} does not divide {inputs} inputs, or {n} is not between 1 and {m}")
    if isinstance(w, Codes):
        if (n, m) != (2, 4):
            raise BadInput(f"nm: codes are packed as 2:4, not {n}:{m}")
        kept = torch.ones_like(matrix, dtype=torch.bool) if w.kept is None else w.kept
    else:
        kept = matrix != 0
    groups, kept = (_panels(t).unflatten(1, (-1, m)) for t in (matrix, kept))  # [panels, groups, m, PANEL]
    if int((most := kept.sum(2)).max()) > n:
        raise BadInput(f"nm: a group of {m} keeps {int(most.max())} entries, more than {n}; use bitmask")
    at = kept.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[:, :, :n].sort(dim=2).values
    values = groups.gather(2, at)
    if isinstance(w, Codes):  # a place that is free holds the zero point
        empty = _panels(w.each(w.zero())).unflatten(1, (-1, m)).gather(2, at)
        values = torch.where(kept.gather(2, at), values, empty)
        return Packed("nm", (out, inputs), w.type, {
            "values": _words(values.flatten(1, 2), w.bits), "bits": _words(at.to(torch.uint8).flatten(1, 2), 2), **_sides(w)},
            n=n, m=m, group=w.group)
    values = values.masked_fill(~kept.gather(2, at), 0).contiguous()
    return Packed("nm", (out, inputs), TYPES[w.dtype], {"values": values, "bits": pack_bits(at, (m - 1).bit_length())}, n=n, m=m)


def smallest(w: Tensor) -> Packed:
    """The weight in the layout that takes the fewest bytes, judged by its zeros alone."""
    _checked(w)
    out, inputs = w.shape
    kept = w.detach() != 0
    sizes = {"dense": w.nbytes, "bitmask": -(-out // PANEL) * PANEL * inputs / 8 + w.dtype.itemsize * int(kept.sum())}
    if out % 32 == 0 and inputs % 32 == 0:
        stored = int(kept.reshape(out // 32, 32, inputs // 32, 32).any(3).any(1).sum())
        sizes["bsr"] = stored * (1024 * w.dtype.itemsize + 4)
    if inputs % 4 == 0 and int(kept.reshape(out, -1, 4).sum(2).max()) <= 2:
        sizes["nm"] = w.numel() / 2 * (w.dtype.itemsize + 0.25)
    makers = {"dense": dense, "bsr": bsr, "nm": nm, "bitmask": bitmask}  # of equals the simpler one
    return makers[min((k for k in makers if k in sizes), key=lambda k: sizes[k])](w)


def restored(p: Packed) -> Tensor:
    """The weight [out, in] that was packed; of codes what they stand for, float32."""
    out, inputs = p.shape
    values, count = p.buffers["values"], -(-out // PANEL)
    codes = _decoded(p) if p.type in BITS else None
    if p.format == "bsr":
        inside = _straight(values, p.cols) if codes is None else codes
        grid = torch.zeros(out // p.rows, inputs // p.cols, p.rows, p.cols, dtype=inside.dtype)
        row = torch.repeat_interleave(torch.arange(out // p.rows), p.buffers["pointers"].diff())
        grid[row, p.buffers["columns"].long()] = inside.transpose(1, 2)
        return grid.transpose(1, 2).reshape(out, inputs).contiguous()
    if p.format == "dense":
        panels = _straight(values, inputs) if codes is None else codes
    elif p.format == "bitmask":
        wide = inputs + inputs % 2 if p.type == "bf16" else inputs
        kept = unpack_bits(p.buffers["bits"], 1, count * wide * PANEL).bool()
        panels = torch.zeros(kept.shape, dtype=values.dtype).masked_scatter_(kept, values)
        panels = _straight(panels.view((count, wide // 2, PANEL, 2) if p.type == "bf16" else (count, inputs, PANEL)), inputs)
    else:
        if codes is None:
            at = unpack_bits(p.buffers["bits"], (p.m - 1).bit_length(), values.numel()).long().view(values.shape)
        else:
            at = _unworded(p.buffers["bits"], 2, inputs // 2).long().unflatten(1, (-1, p.n))
            values = codes.unflatten(1, (-1, p.n))
        panels = torch.zeros(count, inputs // p.m, p.m, PANEL, dtype=values.dtype).scatter_(2, at, values).flatten(1, 2)
    return panels.transpose(1, 2).flatten(0, 1)[:out].contiguous()


def _decoded(p: Packed) -> Tensor:
    """Codes as weights, as they are stored: [panels or blocks, stored inputs, rows] float32."""
    share = p.n / p.m if p.format == "nm" else 1
    inputs, group = (p.cols, p.cols) if p.format == "bsr" else (int(p.shape[1] * share), int(p.group * share))
    scales = p.buffers["scales"].float()
    zeros = p.buffers["zeros"].float() if "zeros" in p.buffers else torch.full_like(scales, 1 << BITS[p.type] - 1)
    of_each = (len(scales), 1 if p.format == "bsr" else -1, p.rows)
    scales, zeros = (t.view(of_each).repeat_interleave(group, 1)[:, :inputs] for t in (scales, zeros))
    return scales * (_unworded(p.buffers["values"], BITS[p.type], inputs).float() - zeros)
