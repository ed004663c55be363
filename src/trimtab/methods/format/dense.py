from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import LEVELS, TABLES, Codes, e4m3_step
from trimtab.methods.format.panels import (
    PANEL,
    TYPES,
    WORD,
    Packed,
    Values,
    decoded,
    interleaved,
    matrix,
    panels,
    sides,
    straight,
    unpanelled,
    values_of,
    worded,
)

SOME = 64  # panels restored together


def size(shape: tuple[int, int], values: Values, kept: int, knobs: dict[str, Any]) -> dict[str, int]:
    count = -(-shape[0] // PANEL)
    groups = -(-shape[1] // values.group) if values.group else 0
    return {"values": count * values.bytes(shape[1]), **values.side(count * groups * PANEL)}


def stored(p: Packed) -> int:
    """All of them. BadInput unless a panel is as high and wide as it must be."""
    if p.rows != PANEL or p.cols != p.shape[1]:
        raise BadInput(f"dense: a panel is {PANEL} outputs high and {p.shape[1]} inputs wide, not {p.rows} x {p.cols}")
    if p.type == "t" and ("zeros" in p.buffers or (p.group < p.shape[1] and p.group % WORD[p.type])):
        raise BadInput(f"dense: ternary codes have no zero points, and groups of a multiple of {WORD[p.type]} inputs, not {p.group}")
    if p.type in TABLES and ("zeros" in p.buffers or not bool(torch.isfinite(p.buffers["table"]).all())):
        raise BadInput(f"dense: codes of a table ({p.type}) have finite steps, and no zero points")
    return p.shape[0] * p.shape[1]


def restore(p: Packed) -> Tensor:
    """Some panels at a time, for a head is large."""
    count, inputs, values = -(-p.shape[0] // PANEL), p.shape[1], p.buffers["values"]
    whole = torch.empty(p.shape, dtype=torch.float32 if p.type in LEVELS else values.dtype, device=values.device)
    for a in range(0, count, SOME):
        rows = whole[a * PANEL:(a + SOME) * PANEL]
        mine = {k: t if k == "table" else t.reshape(count, -1)[a:a + SOME] for k, t in p.buffers.items()}
        some, n = replace(p, buffers=mine), -(-len(rows) // PANEL)
        inside = decoded(some, n, inputs, p.group) if p.type in LEVELS else straight(values_of(some, n, inputs), inputs)
        rows.copy_(unpanelled(inside, len(rows)))
    return whole


def float8(w: Codes, step: float) -> Codes:
    """The same without the outer of the two codes that are one number at either end, and with what its bits would be in their place."""
    assert w.grid.table is not None
    table = w.grid.table.clone()
    table[0], table[-1] = -480 * step, 480 * step
    return replace(w, codes=w.codes.clamp(1, 254), grid=replace(w.grid, table=table))


@method("format", inverse=restore, holds="any", codes=tuple(LEVELS), bytes=size, stored=stored)
def dense(new: Change) -> Packed:
    """Every entry, zeros included, 32 outputs side by side.

    `values` [panels, in, 32] of float32, [panels, in / 2, 32, 2] of bfloat16, or words of codes [panels, in * bits / 32, 32, 4]
    with `scales` and, where the grid is asymmetric, `zeros` [panels, groups, 32], or the grid's `table`; words of ternary codes are
    [panels, in / 20, 32, 4], of 3 bits [panels, in / 32 * 3, 32, 4]. BadInput for ternary codes whose groups are not multiples of 20
    inputs: a word has one scale.

    Formula: bytes = itemsize * 32 * ceil(out / 32) * in, of bfloat16 with `in` filled up to pairs; codes: 4 * ceil(in * bits / 32)
        an output, ternary 4 * ceil(in / 20), 3 bits 12 * ceil(in / 32), with 2 (one scale a row: 4) bytes a scale, 1 a zero point and 4 a
        step of the table
    Source: common practice
    Deviations: outputs are filled up to panels of 32
    """
    w = matrix(new)
    if isinstance(w, Codes):
        out, inputs = w.codes.shape
        if w.type == "t" and w.group < inputs and w.group % WORD[w.type]:
            raise BadInput(f"dense: ternary codes lie {WORD[w.type]} inputs a word, in groups of whole words, not of {w.group} inputs; "
                           "quantise with group=0 (the row), 40, 80, 160 or the like")
        if w.type == "l8" and w.grid.table is not None and (step := e4m3_step(w.grid.table)) is not None:
            w = float8(w, step)
        return Packed("dense", (out, inputs), w.type, {"values": worded(w.type, panels(w.codes)), **sides(w)}, cols=inputs, group=w.group)
    return Packed("dense", (w.shape[0], w.shape[1]), TYPES[w.dtype], {"values": interleaved(panels(w))}, cols=w.shape[1])
