from __future__ import annotations

from typing import Any

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput
from trimtab.methods.select import top


def period(knobs: dict[str, Any]) -> int:
    return knobs["cols"] or knobs["b"]


@method("unit", period=period, format="bsr")
def block(s: Tensor, keep: float, *, b: int = 32, rows: int = 0, cols: int = 0) -> Tensor:
    """Rectangles of weights stand or fall together; all rectangles of a matrix compete.

    `rows` and `cols` of 0 mean `b`. BadInput if the rectangle does not divide the matrix.

    Formula: the round(keep * blocks) blocks with the largest sum of S_ij^2
    Source: BLaST, arXiv:2507.03117
    Deviations: the block rule (Frobenius norm, ranked inside a matrix) is from memory, not confirmed in the paper; scores
        in place of weights; one-shot, without the growing of blocks, the schedule and the training of the paper
    """
    rows, cols = rows or b, cols or b
    out, width = s.shape
    if min(rows, cols) < 1 or out % rows or width % cols:
        raise BadInput(f"block: a block of {rows} x {cols} does not divide {out} x {width}; choose rows and cols that do")
    grid = out // rows, width // cols
    # float64, because the squares of small scores underflow in float32
    worth = s.double().square().reshape(grid[0], rows, grid[1], cols).sum((1, 3))
    kept = top(worth.reshape(1, -1), round(keep * worth.numel())).reshape(grid[0], 1, grid[1], 1)
    return kept.expand(grid[0], rows, grid[1], cols).reshape(s.shape)
