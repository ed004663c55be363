from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.format.bitmask import pack_bits, pattern, unpack_bits


def width(m: int) -> int:
    """Bits that tell m places apart."""
    return (m - 1).bit_length()


def size(shape: tuple[int, int], itemsize: int, kept: int, knobs: dict[str, Any]) -> int:
    stored = shape[0] * shape[1] // knobs["m"] * knobs["n"]
    return itemsize * stored + -(-stored * width(knobs["m"]) // 8)


def restore(buffers: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    values = buffers["values"]
    along_in = values.shape[0] == shape[0]  # along the output the first dimension is out / m, which is less
    m = shape[1] // values.shape[1] if along_in else shape[0] // values.shape[0]
    at = unpack_bits(buffers["index"], width(m), values.numel()).long().reshape(values.shape)
    groups = torch.zeros(*values.shape[:2], m, dtype=values.dtype, device=values.device).scatter_(-1, at, values)
    return (groups if along_in else groups.transpose(1, 2)).reshape(shape)


@method("format", inverse=restore, holds="nm", bytes=size)
def nm(new: Change, *, n: int = 2, m: int = 4, dim: str = "in") -> dict[str, Tensor]:
    """At most n entries of every m consecutive ones, with their places.

    `values` [out, in / m, n], or [out / m, in, n] along the output, in order of place; `index` uint8: the place of each
    value inside its group, ceil(log2 m) bits each, lowest bit first. A group with fewer than n entries is filled up
    with zeros at its first free places. A dropped entry is restored as +0.
    BadInput if m does not divide the dimension, or a group keeps more than n.

    Formula: bytes = itemsize * s + ceil(s * ceil(log2 m) / 8), s = n * out * in / m
    Source: Mishra et al. 2021, arXiv:2104.08378, section 3 (2:4)
    Deviations: any n and m, either dimension; indices are one stream of bits, without the hardware's reordering
    """
    if dim not in ("in", "out") or not 0 < n <= m or not 2 <= m <= 256:
        raise BadInput(f"nm(n={n},m={m},dim={dim}): want 0 < n <= m, m of 2 to 256, and dim in or out")
    kept, (rows, cols) = pattern(new), new.w.shape
    length = cols if dim == "in" else rows
    if length % m:
        raise BadInput(f"nm(n={n},m={m},dim={dim}): {m} does not divide {length}, the {dim}put dimension")

    def grouped(t: Tensor) -> Tensor:
        return t.reshape(rows, cols // m, m) if dim == "in" else t.reshape(rows // m, m, cols).transpose(1, 2)

    most = int(grouped(kept).sum(-1).max())
    if most > n:
        raise BadInput(f"nm(n={n},m={m},dim={dim}): a group of {m} keeps {most} entries; use the unit of that name "
                       "or format bitmask")
    first = torch.argsort(grouped(kept).to(torch.uint8), dim=-1, descending=True, stable=True)[..., :n]
    at = first.sort(dim=-1).values
    values = grouped(new.w).gather(-1, at)
    return {"index": pack_bits(at, width(m)), "values": values.masked_fill(~grouped(kept).gather(-1, at), 0)}
