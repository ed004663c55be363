from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import Codes
from trimtab.methods.format.panels import (
    PANEL,
    TYPES,
    WORD,
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
    words,
)

ITEM = {"f32": 4, "bf16": 2, "i8": 1}  # bytes of a value
SLACK = 64   # bytes behind the values that a kernel may read
LINE = 64    # what the values end on, so that what lies behind them in a file begins on a cache line
COUNT = 1 << 20


def size(shape: tuple[int, int], values: Values, kept: int, knobs: dict[str, Any]) -> dict[str, int]:
    count, groups = -(-shape[0] // PANEL), -(-shape[1] // values.group) if values.group else 0
    stored = kept * ITEM[values.type] + SLACK
    return {"values": -(-stored // LINE) * LINE, "bits": count * PANEL * places(values.type, shape[1]) // 8,
            **values.side(count * groups * PANEL)}


def places(kind: str, inputs: int) -> int:
    """Inputs that have bits: bfloat16 is filled up to pairs, codes to words."""
    side = {"f32": 1, "bf16": 2}.get(kind) or WORD[kind]
    return -(-inputs // side) * side


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
    if p.type == "i8":
        hole = unworded((~kept).to(torch.uint8).view(count, -1, PANEL, 4), 8, inputs).bool()
        weight = decoded(replace(p, buffers={**p.buffers, "values": whole}), count, inputs, p.group)
        return unpanelled(weight.masked_fill_(hole, 0), p.shape[0])
    whole = whole.view((count, wide // 2, PANEL, 2) if p.type == "bf16" else (count, inputs, PANEL))
    return unpanelled(straight(whole, inputs), p.shape[0])


@method("format", inverse=restore, holds="mask", codes=("i8",), bytes=size, stored=stored)
def bitmask(new: Change) -> Packed:
    """The kept entries, and one bit an entry.

    In the order of a dense panel: `bits` uint8 [panels * in * 4], lowest first; `values` [kept] and zeros behind them; of codes,
    `scales` and `zeros` as in dense. A dropped entry is restored as +0: what is no code stands for the zero point.
    BadInput for codes of other types than i8.

    Formula: bytes = 4 * ceil(out / 32) * in (of bfloat16 filled up to pairs, of codes to fours) + itemsize * kept + 64, the values
        filled up to a multiple of 64; codes: itemsize 1, with the scales and zero points of dense
    Source: common practice
    Deviations: outputs are filled up to panels of 32; a kernel may read 64 bytes behind the last value
    """
    w = matrix(new)
    if isinstance(w, Codes) and w.type != "i8":
        raise BadInput(f"bitmask: holds no codes of type {w.type}; use dense, or nm or bsr where the pattern is theirs")
    stuff, kind = (w.codes, w.type) if isinstance(w, Codes) else (w, TYPES[w.dtype])

    def in_order(t: Tensor) -> Tensor:
        return words(panels(t), 8) if kind == "i8" else interleaved(panels(t))

    shape = (stuff.shape[0], stuff.shape[1])
    kept = in_order(pattern(new).to(stuff.dtype)) != 0
    values = in_order(stuff)[kept]
    full = size(shape, Values(kind), len(values), {})["values"] // ITEM[kind]
    buffers = {"values": torch.nn.functional.pad(values, (0, full - len(values))), "bits": pack_bits(kept)}
    if isinstance(w, Codes):
        return Packed("bitmask", shape, kind, {**buffers, **sides(w)}, group=w.group)
    return Packed("bitmask", shape, kind, buffers)
