from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import Codes
from trimtab.methods.format.panels import TYPES, Packed, Values, matrix, pattern

ROWS, COLS = 128, 256  # of a tile; a byte tells its inputs apart
FILL = 4               # entries a kernel takes at once


def tiles(shape: tuple[int, int]) -> tuple[int, int]:
    """Down and across."""
    return -(-shape[0] // ROWS), -(-shape[1] // COLS)


def size(shape: tuple[int, int], values: Values, kept: int, knobs: dict[str, Any]) -> dict[str, int]:
    return {"values": kept * (2 if values.type == "bf16" else 4), "columns": kept, "pointers": 2 * ROWS * math.prod(tiles(shape))}


def stored(p: Packed) -> int:
    """Entries that are stored. BadInput unless every one lies inside."""
    counts, columns, (down, across) = p.buffers["pointers"], p.buffers["columns"], tiles(p.shape)
    if (p.rows, p.cols) != (ROWS, min(COLS, p.shape[1])) or len(counts) != down * across * ROWS:
        raise BadInput(f"csr: tiles are {ROWS} outputs high and {COLS} inputs wide, with a count an output of each")
    counts = counts.long().view(down, across, ROWS)
    if int(counts.sum()) != len(columns) or bool((counts % FILL).any()):
        raise BadInput(f"csr: {int(counts.sum())} entries are counted, not everywhere a multiple of {FILL}; {len(columns)} are there")
    width = torch.full((across,), COLS, device=columns.device)
    width[-1] = p.shape[1] - (across - 1) * COLS
    if bool((columns.long() >= width[None, :, None].expand_as(counts).reshape(-1).repeat_interleave(counts.view(-1))).any()):
        raise BadInput("csr: an entry lies outside the matrix")
    return len(columns)


def restore(p: Packed) -> Tensor:
    values, (down, across) = p.buffers["values"], tiles(p.shape)
    tile = torch.repeat_interleave(torch.arange(down * across * ROWS, device=values.device), p.buffers["pointers"].long())
    row = tile // (across * ROWS) * ROWS + tile % ROWS
    column = tile // ROWS % across * COLS + p.buffers["columns"].long()
    w = torch.zeros(p.shape, dtype=values.dtype, device=values.device)
    return w.index_put_((row, column), values, accumulate=True)


@method("format", inverse=restore, holds="mask", bytes=size, stored=stored)
def csr(new: Change) -> Packed:
    """Compressed sparse rows in tiles of 128 outputs by 256 inputs: an output's kept entries in a tile, each with its column.

    More bytes than `bitmask` where half is kept; its kernel skips what is not there, which pays from about eight rows of x at
    once. Tiles lie across first, and in a tile output after output: `values` [kept], `columns` uint8 [kept] from the tile's
    first input on, `pointers` uint16 [down, across, 128]: how many entries each output has there, filled up with zeros to a
    multiple of four. A dropped entry is restored as +0. BadInput for codes.

    Formula: bytes = (itemsize + 1) * kept (filled up) + 256 * ceil(out / 128) * ceil(in / 256)
    Source: textbook
    Deviations: tiles, so that the inputs an entry meets lie in the first-level cache
    """
    w = matrix(new)
    if isinstance(w, Codes):
        raise BadInput(f"csr: holds no codes of type {w.type}; use dense, or nm or bsr where the pattern is theirs")
    shape = (w.shape[0], w.shape[1])
    down, across = tiles(shape)

    def tiled(t: Tensor) -> Tensor:
        t = torch.nn.functional.pad(t, (0, across * COLS - shape[1], 0, down * ROWS - shape[0]))
        return t.view(down, ROWS, across, COLS).transpose(1, 2)

    kept = tiled(pattern(new))
    counts = kept.sum(3)
    fill = counts.add(-counts % FILL).flatten()
    # Where an output ends, its last entry comes again, as zero.
    ends = counts.flatten().cumsum(0).repeat_interleave(fill - counts.flatten()) - 1
    at = torch.cat([torch.arange(int(counts.sum()), device=counts.device), ends]).sort(stable=True)
    again = at.indices >= counts.sum()
    return Packed("csr", shape, TYPES[w.dtype], {
        "values": tiled(w)[kept][at.values].masked_fill(again, 0), "columns": kept.nonzero()[:, 3].to(torch.uint8)[at.values],
        "pointers": fill.to(torch.uint16)}, rows=ROWS, cols=min(COLS, shape[1]))
