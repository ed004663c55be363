from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import BITS, Codes
from trimtab.methods.format.panels import TYPES, Packed, Values, decoded, interleaved, matrix, pattern, straight, values_of, words


def size(shape: tuple[int, int], values: Values, kept: int, knobs: dict[str, Any]) -> dict[str, int]:
    rows, cols = knobs["rows"] or knobs["b"], knobs["cols"] or knobs["b"]
    blocks = -(-kept // (rows * cols))
    return {"values": blocks * values.bytes(cols, rows), **values.side(blocks * rows), "columns": 4 * blocks,
            "pointers": 8 * (shape[0] // rows + 1)}


def stored(p: Packed) -> int:
    """Entries in the stored blocks. BadInput unless every block lies inside, in order of block rows."""
    if not p.rows or not p.cols or p.shape[0] % p.rows or p.shape[1] % p.cols or (p.type in BITS and p.group != p.cols):
        raise BadInput(f"bsr: blocks of {p.rows} x {p.cols} with groups of {p.group} do not divide {list(p.shape)}")
    pointers, columns = p.buffers["pointers"], p.buffers["columns"]
    if len(pointers) != p.shape[0] // p.rows + 1 or int(pointers[0]) or int(pointers[-1]) != len(columns) \
            or bool((pointers[1:] < pointers[:-1]).any()):
        raise BadInput(f"bsr: the pointers do not divide the {len(columns)} blocks among the block rows")
    if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < p.shape[1] // p.cols:
        raise BadInput("bsr: a block lies outside the matrix")
    return len(columns) * p.rows * p.cols


def restore(p: Packed) -> Tensor:
    (out, inputs), count = p.shape, len(p.buffers["columns"])
    inside = decoded(p, count, p.cols, p.cols) if p.type in BITS else straight(values_of(p, count, p.cols), p.cols)
    grid = torch.zeros(out // p.rows, inputs // p.cols, p.rows, p.cols, dtype=inside.dtype, device=inside.device)
    row = torch.repeat_interleave(torch.arange(out // p.rows, device=inside.device), p.buffers["pointers"].diff())
    grid.index_put_((row, p.buffers["columns"].long()), inside.transpose(1, 2), accumulate=True)
    return grid.transpose(1, 2).reshape(out, inputs).contiguous()


@method("format", inverse=restore, holds="block", codes=tuple(BITS), bytes=size, stored=stored)
def bsr(new: Change, *, b: int = 32, rows: int = 0, cols: int = 0) -> Packed:
    """Block sparse rows: the blocks that keep anything, dense, in order of block rows.

    `values` [blocks, cols, rows] of float32, [blocks, cols / 2, rows, 2] of bfloat16, or words of codes with `scales` and `zeros`
    [blocks, 1, rows]; `columns` int32 [blocks]: the block column of each; `pointers` int64 [out / rows + 1]: block row i
    holds blocks pointers[i] to pointers[i + 1]. `rows` and `cols` of 0 mean `b`. A dropped entry is restored as +0.
    BadInput if the block does not divide the matrix, or codes have another group than a block has columns.

    Formula: bytes = (itemsize * rows * cols + 4) * blocks + 8 * (out / rows + 1), of bfloat16 with `cols` filled up to pairs;
        codes: 4 * ceil(cols * bits / 32) an output of a block, with 2 bytes a scale and 1 a zero point
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
    if isinstance(w, Codes) and w.group != cols:
        raise BadInput(f"bsr: codes in blocks of {rows} x {cols} want groups of {cols} inputs, not {w.group}; "
                       f"quantise with group={cols}, or name the format dense")

    def blocks(t: Tensor, width: int = cols) -> Tensor:
        return t.reshape(out // rows, rows, -1, width).transpose(1, 2)

    kept = pattern(new)
    held = blocks(kept).flatten(2).any(-1)
    pointers = torch.nn.functional.pad(held.sum(1).cumsum(0), (1, 0))
    buffers = {"columns": held.nonzero()[:, 1].to(torch.int32), "pointers": pointers}
    inside = blocks(stuff if codes else stuff.masked_fill(~kept, 0))[held].transpose(1, 2)
    if isinstance(w, Codes):
        buffers |= {"values": words(inside, w.bits), "scales": blocks(w.scales, 1)[held].transpose(1, 2).contiguous()}
        if w.zeros is not None:
            buffers["zeros"] = blocks(w.zeros, 1)[held].transpose(1, 2).contiguous()
        return Packed("bsr", (out, inputs), w.type, buffers, rows=rows, cols=cols, group=cols)
    return Packed("bsr", (out, inputs), TYPES[stuff.dtype], {**buffers, "values": interleaved(inside)}, rows=rows, cols=cols)
