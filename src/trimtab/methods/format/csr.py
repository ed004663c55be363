from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import Codes
from trimtab.methods.format.panels import TYPES, Packed, Values, matrix, pattern

WIDEST = 1 << 16  # inputs that 16 bits tell apart


def size(shape: tuple[int, int], values: Values, kept: int, knobs: dict[str, Any]) -> dict[str, int]:
    return {"values": kept * (2 if values.type == "bf16" else 4), "columns": 2 * kept, "pointers": 8 * (shape[0] + 1)}


def stored(p: Packed) -> int:
    """Entries that are stored. BadInput unless every one lies inside, in order of rows."""
    pointers, columns = p.buffers["pointers"], p.buffers["columns"]
    if p.rows != 1 or p.shape[1] > WIDEST or len(pointers) != p.shape[0] + 1 or int(pointers[0]) or int(pointers[-1]) != len(columns) \
            or bool((pointers[1:] < pointers[:-1]).any()):
        raise BadInput(f"csr: the pointers do not divide the {len(columns)} entries among the {p.shape[0]} rows")
    if len(columns) and int(columns.int().max()) >= p.shape[1]:
        raise BadInput("csr: a column lies outside the matrix")
    return len(columns)


def restore(p: Packed) -> Tensor:
    values = p.buffers["values"]
    w = torch.zeros(p.shape, dtype=values.dtype, device=values.device)
    row = torch.repeat_interleave(torch.arange(p.shape[0], device=values.device), p.buffers["pointers"].diff())
    return w.index_put_((row, p.buffers["columns"].long()), values, accumulate=True)


@method("format", inverse=restore, holds="mask", bytes=size, stored=stored)
def csr(new: Change) -> Packed:
    """Compressed sparse rows: the kept entries of one output after the other, each with its column.

    More bytes than `bitmask`; its kernel skips what is not there, which pays from about eight rows of x at once.
    `values` [kept], `columns` uint16 [kept], `pointers` int64 [out + 1]. A dropped entry is restored as +0.
    BadInput for codes, and for more than 65536 inputs.

    Formula: bytes = (itemsize + 2) * kept + 8 * (out + 1)
    Source: textbook
    Deviations: columns of 16 bits
    """
    w = matrix(new)
    if isinstance(w, Codes):
        raise BadInput(f"csr: holds no codes of type {w.type}; use dense, or nm or bsr where the pattern is theirs")
    out, inputs = w.shape
    if inputs > WIDEST:
        raise BadInput(f"csr: {inputs} inputs, and 16 bits tell only {WIDEST} apart; use bitmask")
    kept = pattern(new)
    return Packed("csr", (out, inputs), TYPES[w.dtype], {
        "values": w[kept], "columns": kept.nonzero()[:, 1].to(torch.uint16),
        "pointers": torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))}, rows=1)
