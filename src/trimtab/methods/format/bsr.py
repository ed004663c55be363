from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import Codes
from trimtab.methods.format.panels import (
    BITS,
    TYPES,
    Packed,
    Values,
    decoded,
    interleaved,
    matrix,
    pattern,
    sides_of,
    straight,
    unworded,
    values_of,
    words,
)


def together(type_: str, cols: int) -> int:
    """Blocks that fill a word: blocks of one input are packed as the inputs of a panel are."""
    return 1 if cols > 1 else 2 if type_ == "bf16" else 32 // BITS.get(type_, 32)


def size(shape: tuple[int, int], values: Values, kept: int, knobs: dict[str, Any]) -> dict[str, int]:
    rows, cols = knobs["rows"] or knobs["b"], knobs["cols"] or knobs["b"]
    blocks = -(-kept // (rows * cols))
    inside, scaled = (values.bytes(blocks, rows), shape[0]) if cols == 1 else (blocks * values.bytes(cols, rows), blocks * rows)
    return {"values": inside, **values.side(scaled), "columns": 4 * blocks, "pointers": 8 * (shape[0] // rows + 1)}


def stored(p: Packed) -> int:
    """Entries in the stored blocks, those that fill up words included. BadInput unless every block lies inside, in order of block rows."""
    if not p.rows or not p.cols or p.shape[0] % p.rows or p.shape[1] % p.cols \
            or (p.type in BITS and p.group != (p.cols if p.cols > 1 else p.shape[1])):
        raise BadInput(f"bsr: blocks of {p.rows} x {p.cols} with groups of {p.group} do not divide {list(p.shape)}")
    pointers, columns = p.buffers["pointers"], p.buffers["columns"]
    if len(pointers) != p.shape[0] // p.rows + 1 or int(pointers[0]) or int(pointers[-1]) != len(columns) \
            or bool((pointers[1:] < pointers[:-1]).any()):
        raise BadInput(f"bsr: the pointers do not divide the {len(columns)} blocks among the block rows")
    width, word, counts = p.shape[1] // p.cols, together(p.type, p.cols), pointers.diff()
    if bool((counts % word).any()) or int(counts.max()) > -(-width // word) * word:
        raise BadInput(f"bsr: a block row holds no whole words of {word} blocks, or more blocks than places")
    if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < width:
        raise BadInput("bsr: a block lies outside the matrix")
    return len(columns) * p.rows * p.cols


def restore(p: Packed) -> Tensor:
    (out, inputs), count = p.shape, len(p.buffers["columns"])
    row = torch.repeat_interleave(torch.arange(out // p.rows, device=p.buffers["columns"].device), p.buffers["pointers"].diff())
    if p.cols > 1:
        inside = decoded(p, count, p.cols, p.cols) if p.type in BITS else straight(values_of(p, count, p.cols), p.cols)
    elif p.type in BITS:
        scales, zeros = sides_of(p, (out // p.rows, p.rows))
        inside = ((unworded(values_of(p, 1, count), BITS[p.type], count)[0].float() - zeros[row]) * scales[row])[:, None]
    else:
        inside = straight(values_of(p, 1, count), count)[0, :, None]
    grid = torch.zeros(out // p.rows, inputs // p.cols, p.rows, p.cols, dtype=inside.dtype, device=inside.device)
    grid.index_put_((row, p.buffers["columns"].long()), inside.transpose(1, 2), accumulate=True)
    return grid.transpose(1, 2).reshape(out, inputs).contiguous()


@method("format", inverse=restore, holds="block", codes=tuple(BITS), bytes=size, stored=stored)
def bsr(new: Change, *, b: int = 32, rows: int = 0, cols: int = 0) -> Packed:
    """Block sparse rows: the blocks that keep anything, dense, in order of block rows.

    `values` [blocks, cols, rows] of float32, [blocks, cols / 2, rows, 2] of bfloat16, or words of codes with `scales` and `zeros`
    [blocks, 1, rows]; `columns` int32 [blocks]: the block column of each; `pointers` int64 [out / rows + 1]: block row i
    holds blocks pointers[i] to pointers[i + 1]. `rows` and `cols` of 0 mean `b`. A dropped entry is restored as +0.
    Blocks of one input are packed as the inputs of a panel are: `values` [blocks, rows] of float32, [blocks / 2, rows, 2] of
    bfloat16, or words of 32 / bits blocks with one scale an output, `scales` and `zeros` [out / rows, 1, rows]; a block row is filled
    up to whole pairs or words with blocks of zeros, which repeat its last column and count as blocks.
    BadInput if the block does not divide the matrix, or codes have another group than a block has columns (one column: than the row).

    Formula: bytes = (itemsize * rows * cols + 4) * blocks + 8 * (out / rows + 1), of bfloat16 with `cols` filled up to pairs;
        codes: 4 * ceil(cols * bits / 32) an output of a block, with 2 bytes a scale and 1 a zero point; cols = 1: bits / 8 for
        itemsize, blocks filled up to words, a scale (4 bytes) and a zero point an output
    Source: textbook
    Deviations: none
    """
    rows, cols = rows or b, cols or b
    w = matrix(new)
    codes = isinstance(w, Codes)
    if isinstance(w, Codes) and w.type not in BITS:
        raise BadInput(f"bsr: holds no codes of type {w.type}; name the format dense")
    stuff = w.codes if isinstance(w, Codes) else w
    out, inputs = stuff.shape
    if min(rows, cols) < 1 or out % rows or inputs % cols:
        raise BadInput(f"bsr: a block of {rows} x {cols} does not divide {out} x {inputs}")
    if isinstance(w, Codes) and w.group != (cols if cols > 1 else inputs):
        raise BadInput(f"bsr: codes in blocks of {rows} x {cols} want groups of {cols if cols > 1 else inputs} inputs, not {w.group}; "
                       f"quantise with group={cols if cols > 1 else 0}, or name the format dense")

    def blocks(t: Tensor, width: int = cols) -> Tensor:
        return t.reshape(out // rows, rows, -1, width).transpose(1, 2)

    kept = pattern(new)
    held = blocks(kept).flatten(2).any(-1)
    type_ = w.type if isinstance(w, Codes) else TYPES[stuff.dtype]
    word, count = together(type_, cols), held.sum(1)
    fill = -count % word
    extra = torch.repeat_interleave(torch.arange(len(fill), device=fill.device), fill)
    last = held.shape[1] - 1 - held.flip(1).to(torch.uint8).argmax(1)
    row, column = held.nonzero().unbind(1)
    row, order = torch.cat([row, extra]).sort(stable=True)
    column, empty = torch.cat([column, last[extra]])[order], order >= len(order) - len(extra)
    buffers = {"columns": column.to(torch.int32), "pointers": torch.nn.functional.pad((count + fill).cumsum(0), (1, 0))}
    inside = blocks(stuff if codes else stuff.masked_fill(~kept, 0))[row, column].transpose(1, 2)
    inside[empty] = blocks(w.grid.zero(), 1)[row[empty], 0].transpose(1, 2) if isinstance(w, Codes) else inside.new_zeros(())
    inside = inside[:, 0] if cols == 1 else inside
    if isinstance(w, Codes):
        at = (slice(None), 0) if cols == 1 else (row, column)
        scales = blocks(w.grid.scales, 1)[at].transpose(1, 2).clone(memory_format=torch.contiguous_format)
        buffers |= {"values": words(inside, w.bits), "scales": scales}
        if w.grid.zeros is not None:
            buffers["zeros"] = blocks(w.grid.zeros, 1)[at].transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return Packed("bsr", (out, inputs), type_, buffers, rows=rows, cols=cols, group=w.group)
    return Packed("bsr", (out, inputs), type_, {**buffers, "values": interleaved(inside)}, rows=rows, cols=cols)
