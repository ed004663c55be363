from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import Codes, Grid, rounded
from trimtab.methods.edit.gptq import gptq
from trimtab.methods.edit.rtn import rtn
from trimtab.methods.solvers import Settle, errors, sweep
from trimtab.methods.terms import Terms


@method("edit", joint=("unit", "score", "budget"), drops=False, codes=True, either=True,
        xfail={"rows": "outputs that are neighbours share a scale"})
def adadim(w: Tensor, mask: Tensor, grid: Any, gram: Tensor, *, feedback: bool = False, damp: float = 0.01) -> Change:
    """Groups along the inputs or along the outputs, whichever costs the outputs less.

    `w`, `mask` [out, in] (False = dropped by an earlier pass, stays zero), `gram` [in, in]; returns w [out, in] and the parts codes,
    scales, grid and a table, as `rtn` does, or those of the transposed weight [in, out] and the part transposed. `feedback`: rounds
    column after column and mends what that costs in the columns to come, as GPTQ does. BadInput for a grid with zero points.

    Formula: argmin over both of tr(D G D^T), D = Q(W) - W with a scale for so many inputs of an output, or so many outputs of an input
    Source: Heo et al. 2023 (AdaDim), arXiv:2309.15531, section 4.2 and equation 5; GPTQ-ada with feedback
    Deviations: judged by the site's own output, where the source takes that of the attention or the MLP; symmetric grids and tables alone;
        a grid that has to see the inputs' statistics lies along the inputs
    """
    kept = w.float() * mask
    if grid(kept[:1]).zeros is not None:
        raise BadInput("adadim: groups along the outputs have no zero points; use a symmetric grid or a table")
    along_inputs = gptq(w, mask, grid, gram, damp=damp) if feedback else rtn(w, mask, grid)
    if not grid.blind:
        return along_inputs
    codes = swept(kept, mask, grid, gram, damp) if feedback else rounded(kept.T.contiguous(), grid(kept.T), grid.group(w.T))
    other = Terms(codes, None, transposed=True)
    there = other.weight()
    if float(errors(w, there, gram).sum()) < float(errors(w, along_inputs.w, gram).sum()):
        return Change(there.to(w.dtype), other.parts(), None if bool(mask.all()) else mask)
    return along_inputs


def swept(w: Tensor, mask: Tensor, grid: Any, gram: Tensor, damp: float) -> Codes:
    """Codes of the transposed weight: column after column is fitted and rounded when the sweep reaches it."""
    group, kept = grid.group(w.T), mask.T
    found: list[Codes] = []

    def settle(begin: int, end: int) -> Settle:
        def column(cur: Tensor, scale: Tensor, j: int) -> Tensor:
            now = (cur[j] * kept[begin + j])[None]
            found.append(rounded(now, grid(now), group))
            return found[-1].weight()[0]

        return column

    sweep(w, gram, settle, damp=damp, block=128)
    one = found[0].grid
    scales = torch.cat([c.grid.scales for c in found])
    return Codes(torch.cat([c.codes for c in found]), Grid(scales, one.levels, table=one.table), group)
