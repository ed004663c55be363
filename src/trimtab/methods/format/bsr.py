from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.format.bitmask import pattern


def size(shape: tuple[int, int], itemsize: int, kept: int, knobs: dict[str, Any]) -> int:
    rows, cols = knobs["rows"] or knobs["b"], knobs["cols"] or knobs["b"]
    blocks = -(-kept // (rows * cols))
    return itemsize * blocks * rows * cols + 4 * blocks + 4 * (shape[0] // rows + 1)


def restore(buffers: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    values, columns, pointers = buffers["values"], buffers["columns"].long(), buffers["pointers"].long()
    rows, cols = values.shape[1:]
    grid = torch.zeros(shape[0] // rows, shape[1] // cols, rows, cols, dtype=values.dtype, device=values.device)
    row = torch.repeat_interleave(torch.arange(len(pointers) - 1, device=values.device), pointers.diff())
    grid[row, columns] = values
    return grid.transpose(1, 2).reshape(shape)


@method("format", inverse=restore, holds="block", bytes=size)
def bsr(new: Change, *, b: int = 32, rows: int = 0, cols: int = 0) -> dict[str, Tensor]:
    """Block sparse rows: the blocks that keep anything, dense, in order of block rows.

    `values` [blocks, rows, cols]; `columns` int32 [blocks]: the block column of each; `pointers` int32
    [out / rows + 1]: block row i holds blocks pointers[i] to pointers[i + 1]. `rows` and `cols` of 0 mean `b`.
    A dropped entry is restored as +0. BadInput if the block does not divide the matrix.

    Formula: bytes = (itemsize * rows * cols + 4) * blocks + 4 * (out / rows + 1)
    Source: textbook
    Deviations: none
    """
    rows, cols = rows or b, cols or b
    out, width = new.w.shape
    if min(rows, cols) < 1 or out % rows or width % cols:
        raise BadInput(f"bsr: a block of {rows} x {cols} does not divide {out} x {width}")
    kept = pattern(new)

    def blocks(t: Tensor) -> Tensor:
        return t.reshape(out // rows, rows, width // cols, cols).transpose(1, 2)

    stored = blocks(kept).flatten(2).any(-1)
    pointers = torch.nn.functional.pad(stored.sum(1).cumsum(0), (1, 0))
    return {"columns": stored.nonzero()[:, 1].to(torch.int32), "pointers": pointers.to(torch.int32),
            "values": blocks(new.w.masked_fill(~kept, 0))[stored]}
