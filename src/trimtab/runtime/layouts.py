"""How a weight lies in memory so that a kernel can stream it: panels of outputs, input after input.

A panel is 32 outputs (or a block's height) side by side. One instruction meets one input with many outputs, nothing has
to be summed across lanes, and one stream is read from begin to end. The last panel is filled up with zeros. bfloat16
weights of two neighbouring inputs lie side by side, so that one 32-bit lane holds both. The layouts do not depend on the
processor: what is written on one is mapped on another.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.types import BadInput
from trimtab.methods.format.bitmask import pack_bits, unpack_bits

PANEL = 32   # outputs of a panel
SLACK = 64   # bytes behind the values of a bitmask that a kernel may read
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Packed:
    """One linear map [out, in] as a kernel reads it.

    `format`: dense, bsr, bitmask or nm; `dtype` of the values; `rows`, `cols` of a block; `n`, `m` of a group;
    `buffers`: values (dtype), bits (uint8), columns (int32), pointers (int64), those the format has.
    """

    format: str
    shape: tuple[int, int]
    dtype: torch.dtype
    buffers: dict[str, Tensor]
    rows: int = PANEL
    cols: int = 1
    n: int = 1
    m: int = 1

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


def _checked(w: Tensor) -> Tensor:
    if w.ndim != 2 or w.dtype not in TYPES or 0 in w.shape:
        raise BadInput(f"a packed weight is [out, in] of float32 or bfloat16, not {w.dtype} {list(w.shape)}")
    return w.detach()


def dense(w: Tensor) -> Packed:
    """Every weight."""
    w = _checked(w)
    return Packed("dense", tuple(w.shape), w.dtype, {"values": _interleaved(_panels(w))}, cols=w.shape[1])


def bsr(w: Tensor, rows: int = 32, cols: int = 32) -> Packed:
    """The blocks that hold anything but zeros. BadInput if the block does not divide the matrix."""
    w = _checked(w)
    out, inputs = w.shape
    if min(rows, cols) < 1 or out % rows or inputs % cols:
        raise BadInput(f"bsr: a block of {rows} x {cols} does not divide {out} x {inputs}")
    blocks = w.reshape(out // rows, rows, inputs // cols, cols).transpose(1, 2)
    stored = (blocks != 0).flatten(2).any(-1)
    return Packed("bsr", (out, inputs), w.dtype, {
        "values": _interleaved(blocks[stored].transpose(1, 2)), "columns": stored.nonzero()[:, 1].to(torch.int32),
        "pointers": torch.nn.functional.pad(stored.sum(1).cumsum(0), (1, 0))}, rows=rows, cols=cols)


def bitmask(w: Tensor) -> Packed:
    """What is not zero, and a bit a place."""
    w = _checked(w)
    panels = _panels(w)
    kept = panels != 0
    values = torch.nn.functional.pad(panels[kept], (0, SLACK // w.dtype.itemsize))
    return Packed("bitmask", tuple(w.shape), w.dtype, {"values": values, "bits": pack_bits(kept)})


def nm(w: Tensor, n: int = 2, m: int = 4) -> Packed:
    """At most n of every m consecutive inputs, with their places. BadInput where there are more."""
    w = _checked(w)
    out, inputs = w.shape
    if not 0 < n <= m or inputs % m:
        raise BadInput(f"nm: {m} does not divide {inputs} inputs, or {n} is not between 1 and {m}")
    groups = _panels(w).unflatten(1, (-1, m))  # [panels, groups, m, PANEL]
    kept = groups != 0
    if int((most := kept.sum(2)).max()) > n:
        raise BadInput(f"nm: a group of {m} keeps {int(most.max())} entries, more than {n}; use bitmask")
    at = kept.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[:, :, :n].sort(dim=2).values
    values = groups.gather(2, at).masked_fill(~kept.gather(2, at), 0)
    return Packed("nm", (out, inputs), w.dtype, {"values": values.contiguous(), "bits": pack_bits(at, (m - 1).bit_length())}, n=n, m=m)


def smallest(w: Tensor) -> Packed:
    """The weight in the layout that takes the fewest bytes, judged by its zeros alone."""
    w = _checked(w)
    out, inputs = w.shape
    kept = w != 0
    sizes = {"dense": w.nbytes, "bitmask": -(-out // PANEL) * PANEL * inputs / 8 + w.dtype.itemsize * int(kept.sum())}
    if out % 32 == 0 and inputs % 32 == 0:
        stored = int(kept.reshape(out // 32, 32, inputs // 32, 32).any(3).any(1).sum())
        sizes["bsr"] = stored * (1024 * w.dtype.itemsize + 4)
    if inputs % 4 == 0 and int(kept.reshape(out, -1, 4).sum(2).max()) <= 2:
        sizes["nm"] = w.numel() / 2 * (w.dtype.itemsize + 0.25)
    makers = {"dense": dense, "bsr": bsr, "nm": nm, "bitmask": bitmask}  # of equals the simpler one
    return makers[min((k for k in makers if k in sizes), key=lambda k: sizes[k])](w)


def restored(p: Packed) -> Tensor:
    """The weight [out, in] that was packed."""
    out, inputs = p.shape
    values, count = p.buffers["values"], -(-out // PANEL)
    if p.format == "dense":
        return _straight(values, inputs).transpose(1, 2).flatten(0, 1)[:out].contiguous()
    if p.format == "bsr":
        grid = torch.zeros(out // p.rows, inputs // p.cols, p.rows, p.cols, dtype=p.dtype)
        row = torch.repeat_interleave(torch.arange(out // p.rows), p.buffers["pointers"].diff())
        grid[row, p.buffers["columns"].long()] = _straight(values, p.cols).transpose(1, 2)
        return grid.transpose(1, 2).reshape(out, inputs).contiguous()
    if p.format == "bitmask":
        kept = unpack_bits(p.buffers["bits"], 1, count * inputs * PANEL).bool().view(count, inputs, PANEL)
        panels = torch.zeros(kept.shape, dtype=p.dtype).masked_scatter_(kept, values)
    else:
        at = unpack_bits(p.buffers["bits"], (p.m - 1).bit_length(), values.numel()).long().view(values.shape)
        panels = torch.zeros(count, inputs // p.m, p.m, PANEL, dtype=p.dtype).scatter_(2, at, values).flatten(1, 2)
    return panels.transpose(1, 2).flatten(0, 1)[:out].contiguous()
