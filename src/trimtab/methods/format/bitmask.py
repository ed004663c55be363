from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import Codes
from trimtab.methods.format.panels import (
    PANEL,
    TYPES,
    Packed,
    Values,
    interleaved,
    matrix,
    pack_bits,
    panels,
    pattern,
    straight,
    unpack_bits,
    unpanelled,
)

SLACK = 64   # bytes behind the values that a kernel may read
LINE = 64    # what the values end on, so that what lies behind them in a file begins on a cache line
COUNT = 1 << 20


def size(shape: tuple[int, int], values: Values, kept: int, knobs: dict[str, Any]) -> dict[str, int]:
    stored = kept * (2 if values.type == "bf16" else 4) + SLACK
    return {"values": -(-stored // LINE) * LINE, "bits": -(-shape[0] // PANEL) * PANEL * places(values.type, shape[1]) // 8}


def places(kind: str, inputs: int) -> int:
    """Inputs that have bits: bfloat16 is filled up to pairs."""
    return inputs + inputs % 2 if kind == "bf16" else inputs


def stored(p: Packed) -> int:
    """Entries that the bits say are kept. BadInput unless a panel is as high as it must be."""
    if p.rows != PANEL:
        raise BadInput(f"bitmask: a panel is {PANEL} outputs high, not {p.rows}")
    ones = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.uint8)
    return sum(int(ones[part.int()].sum()) for part in p.buffers["bits"].split(COUNT))


def restore(p: Packed) -> Tensor:
    count, inputs, values = -(-p.shape[0] // PANEL), p.shape[1], p.buffers["values"]
    wide = places(p.type, inputs)
    kept = unpack_bits(p.buffers["bits"], 1, count * wide * PANEL).bool()
    whole = torch.zeros(kept.shape, dtype=values.dtype, device=values.device).masked_scatter_(kept, values)
    whole = whole.view((count, wide // 2, PANEL, 2) if p.type == "bf16" else (count, inputs, PANEL))
    return unpanelled(straight(whole, inputs), p.shape[0])


@method("format", inverse=restore, holds="mask", bytes=size, stored=stored)
def bitmask(new: Change) -> Packed:
    """The kept entries, and one bit an entry.

    In the order of a dense panel: `bits` uint8 [panels * in * 4], lowest first; `values` [kept] and zeros behind them.
    A dropped entry is restored as +0. BadInput for codes.

    Formula: bytes = 4 * ceil(out / 32) * in (of bfloat16 filled up to pairs) + itemsize * kept + 64, the values filled up to
        a multiple of 64
    Source: common practice
    Deviations: outputs are filled up to panels of 32; a kernel may read 64 bytes behind the last value
    """
    w = matrix(new)
    if isinstance(w, Codes):
        raise BadInput(f"bitmask: holds no codes ({w.type}); use dense, or nm or bsr where the pattern is theirs")
    whole = interleaved(panels(w))
    kept = interleaved(panels(pattern(new).to(w.dtype))) != 0
    values = whole[kept]
    full = size((w.shape[0], w.shape[1]), Values(TYPES[w.dtype]), len(values), {})["values"] // w.dtype.itemsize
    return Packed("bitmask", (w.shape[0], w.shape[1]), TYPES[w.dtype],
                  {"values": torch.nn.functional.pad(values, (0, full - len(values))), "bits": pack_bits(kept)})
