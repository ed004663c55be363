"""One bit an entry says what is kept. The bit packing here serves the other formats too."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change


def pack_bits(codes: Tensor, width: int = 1) -> Tensor:
    """Codes below 2^width one after the other, lowest bit first, eight bits a byte: uint8 [ceil(count * width / 8)].

    `width` is at most 8, so that bytes are all it takes: a large mask must not be blown up on the way.
    """
    codes = codes.flatten().to(torch.uint8)
    bits = (codes[:, None] >> torch.arange(width, device=codes.device, dtype=torch.uint8)) & 1
    bits = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 8)).reshape(-1, 8)
    return (bits << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """The first `count` codes of `pack_bits`, uint8 [count]."""
    bits = (packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    bits = bits.flatten()[: count * width].reshape(count, width)
    return (bits << torch.arange(width, device=packed.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask that was packed with one bit an entry, bool `shape`."""
    return unpack_bits(packed, 1, math.prod(shape)).bool().reshape(shape)


def pattern(new: Change) -> Tensor:
    """The entries to store, bool [out, in]: the mask, or where there is none what is not zero.

    BadInput if an entry outside the mask is not zero: it would be lost.
    """
    if new.mask is None:
        return new.w != 0
    if bool((new.w.masked_fill(new.mask, 0) != 0).any()):
        raise BadInput("a weight outside its mask is not zero and would be lost; store it as dense")
    return new.mask


def restore(buffers: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    values = buffers["values"]
    kept = unpack_mask(buffers["bits"], shape)
    return torch.zeros(shape, dtype=values.dtype, device=values.device).masked_scatter_(kept, values)


@method("format", inverse=restore, holds="mask",
        bytes=lambda shape, itemsize, kept, knobs: -(-shape[0] * shape[1] // 8) + itemsize * kept)
def bitmask(new: Change) -> dict[str, Tensor]:
    """The kept entries in order of rows, and one bit an entry.

    `bits` uint8 [ceil(out * in / 8)]: entry k of the flattened matrix is bit k mod 8 (lowest first) of byte k div 8;
    `values` [kept]. A dropped entry is restored as +0.

    Formula: bytes = ceil(out * in / 8) + itemsize * kept
    Source: common practice
    Deviations: none
    """
    kept = pattern(new)
    return {"bits": pack_bits(kept), "values": new.w[kept]}
