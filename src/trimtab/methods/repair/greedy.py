from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.codes import Codes
from trimtab.methods.solvers import damped, lower

BLOCK = 128  # columns whose errors are kept up to date one by one


@method("repair", keeps=("mask", "codes"))
def greedy(w: Tensor, new: Change, gram: Tensor, *, iters: int = 9, damp: float = 0.01) -> Change:
    """Other codes on the same grid: column after column the best one, all others as they are, again and again.

    `w` [out, in] is the dense weight, `gram` [in, in]; returns `new` with other codes, the grid and the mask as they were. `iters`: passes
    over all columns; it stops earlier where a pass changes no code. A change without codes is left as it is.

    Formula: H = G + damp * mean(diag G) * I; w'_j <- nearest(w'_j - ((w' - w) H)_j / H_jj) for each j, the least tr((w' - w) H (w' - w)^T)
        that column j alone can reach
    Source: Chee et al. 2023 (QuIP), arXiv:2307.13304, as in the authors' code (greedy passes behind LDLQ, up to 9)
    Deviations: a repair of any rounding; damping holds for the passes, and a row whose error without it does not fall is left as it was
    """
    had = Codes.among(new.parts)
    if had is None:
        return new
    h, inputs = damped(gram, damp).float(), w.shape[1]
    parts = [had.grid.group(slice(g, g + 1)) for g in range(had.grid.scales.shape[1])]
    kept = None if new.mask is None else new.mask.T.contiguous()
    codes = had.codes.T.contiguous()                 # [in, out]: a column of w is a contiguous row
    off = (had.weight() - w.float()).T.contiguous()  # w' - w
    for _ in range(iters):
        before = codes.clone()
        for a in range(0, inputs, BLOCK):
            b = min(a + BLOCK, inputs)
            slope = h[a:b] @ off  # (w' - w) H of these columns
            for j in range(a, b):
                part = parts[j // had.group]
                now = part.values(codes[j, :, None, None])[:, 0, 0]
                q = part.codes((now - slope[j - a] / h[j, j])[:, None, None])
                if kept is not None:
                    q = torch.where(kept[j, :, None, None], q, codes[j, :, None, None])
                step = part.values(q)[:, 0, 0] - now
                codes[j] = q[:, 0, 0]
                off[j] += step
                slope[j - a:].addr_(h[j, j:b], step)
        if torch.equal(before, codes):
            break
    found = Codes(codes.T.contiguous(), had.grid, had.group)
    wins = lower(w, found.weight(), new.w, gram)
    merged = replace(found, codes=torch.where(wins[:, None], found.codes, had.codes)).change(new.mask)
    return replace(merged, w=merged.w.to(new.w.dtype), parts={**new.parts, **merged.parts})
