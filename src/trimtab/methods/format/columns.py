from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import Codes
from trimtab.methods.format.panels import TYPES, Packed, Values, matrix, sides_of

STRIPE = 128  # outputs that a column is filled up to
BITS = {"f32": 32, "bf16": 16, "i8": 8, "i4": 4}  # of a weight


def filled(out: int) -> int:
    return -(-out // STRIPE) * STRIPE


def size(shape: tuple[int, int], values: Values, kept: int, knobs: dict[str, Any]) -> dict[str, int]:
    groups = -(-shape[1] // values.group) if values.group else 0
    return {"values": shape[1] * filled(shape[0]) * BITS[values.type] // 8, **values.side(groups * filled(shape[0]))}


def stored(p: Packed) -> int:
    """All of them. BadInput unless it is divided as it must be."""
    if p.rows != STRIPE or p.cols != p.shape[1]:
        raise BadInput(f"columns: they are divided every {STRIPE} outputs, and there is one an input, not {p.rows} x {p.cols}")
    return p.shape[0] * p.shape[1]


def restore(p: Packed) -> Tensor:
    (out, inputs), wide, values = p.shape, filled(p.shape[0]), p.buffers["values"]
    if p.type not in ("i8", "i4"):
        return values.reshape(inputs, wide)[:, :out].T.contiguous()
    if p.type == "i4":
        pairs = values.reshape(inputs, -1, STRIPE // 2)
        values = torch.stack([pairs & 15, pairs >> 4], 2)
    codes = values.reshape(inputs, wide)
    scales, zeros = (t.repeat_interleave(p.group, 0)[:inputs] for t in sides_of(p, (-(-inputs // p.group), wide)))
    return (codes.float().sub_(zeros).mul_(scales))[:, :out].T.contiguous()


@method("format", inverse=restore, holds="any", codes=("i8", "i4"), bytes=size, stored=stored)
def columns(new: Change) -> Packed:
    """Input after input, the weights of all outputs one after the other: a kernel reads those of the inputs that are not zero.

    `values` [in, out] of float32 or bfloat16, of codes of 8 bits a byte each, of 4 bits two outputs a byte, 64 apart, the lower one first;
    `out` filled up to a multiple of 128; of codes `scales` and, where the grid is asymmetric, `zeros` [groups, out]. BadInput for other
    codes.

    Formula: bytes = bits / 8 * in * 128 ceil(out / 128), and of codes 2 (one scale a row: 4) a scale and 1 a zero point
    Source: Liu et al. 2024 (TEAL), arXiv:2408.14690, section 4.2 (weights stored by column)
    Deviations: none
    """
    w = matrix(new)
    if isinstance(w, Codes):
        if w.type not in ("i8", "i4"):
            raise BadInput(f"columns: holds no codes of type {w.type}; use dense")
        out, inputs = w.codes.shape
        pad = (0, filled(out) - out)
        values = torch.nn.functional.pad(w.codes.T, pad)
        if w.type == "i4":
            low, high = values.reshape(inputs, -1, 2, STRIPE // 2).unbind(2)
            values = (low | high << 4).flatten(1)
        sides = {"scales": torch.nn.functional.pad(w.grid.scales.T, pad).contiguous()}
        sides |= {} if w.grid.zeros is None else {"zeros": torch.nn.functional.pad(w.grid.zeros.T, pad).contiguous()}
        return Packed("columns", (out, inputs), w.type, {"values": values.contiguous(), **sides}, rows=STRIPE, cols=inputs, group=w.group)
    return Packed("columns", (w.shape[0], w.shape[1]), TYPES[w.dtype], {
        "values": torch.nn.functional.pad(w.T, (0, filled(len(w)) - len(w))).contiguous()}, rows=STRIPE, cols=w.shape[1])
