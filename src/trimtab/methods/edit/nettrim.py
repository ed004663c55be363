from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.solvers import kernel, splitting


@method("edit", joint=("score", "repair"))
def nettrim(w: Tensor, keep: float, mask: Tensor, unit: Any, gram: Tensor, *, damp: float = 0.01, iters: int = 200,
            rho: float = 0.1) -> Change:
    """The weights of smallest l1 norm whose responses stay within a radius of the dense ones.

    `w`, `mask` [out, in] (False = dropped by an earlier pass, stays zero), `gram` [in, in]; returns w [out, in].

    Formula: min ||W'||_1 subject to tr((W' - W) H (W' - W)^T) <= eps^2, H = G + damp * mean(diag G) * I; by ADMM on
        1/2 tr((W' - W) H (W' - W)^T) + mu ||W'||_1; mu is the multiplier at which the asked share is left non-zero
    Source: Aghasi, Abdi, Nguyen and Romberg 2017, arXiv:1611.05162 (the convex program); ADMM as in arXiv:1806.06457
    Deviations: the program for a linear layer, without the inequalities of a ReLU, and parallel, not cascade; eps is not
        given but follows from the share kept: one for the site, or one an output where the unit keeps equally many in
        every row; mu is found while iterating, then held, and the last shrinkage is set to leave the exact count; damp
        makes the solution unique; the weights are the program's own, shrunk by the l1 norm and not refitted; what a
        pattern (n:m, blocks) excludes is cut afterwards; rho is relative to the mean diagonal of G
    """
    n = gram.diagonal().float().mean().clamp_min(1e-30).sqrt().expand(w.shape[1])
    mu: Tensor | None = None

    def cut(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The unit's choice, and the levels at which one entry fewer and one more than it keeps exceed them, [out, 1]."""
        s = x.abs() * mask
        m = unit(s, keep)
        rows = m.sum(1, keepdim=True)
        if not bool((rows == rows[0]).all()):
            rows, s = rows.sum(0, keepdim=True), s.view(1, -1)
        s = s.sort(1, descending=True).values
        s = torch.cat([2 * s[:, :1], s, torch.zeros_like(s[:, :1])], 1)
        return m & mask, s.gather(1, rows), s.gather(1, rows + 1)

    def shrink(x: Tensor, t: int) -> Tensor:
        nonlocal mu
        if mu is None or t < iters // 2:
            _, high, low = cut(x)
            middle = (high + low) / 2
            mu = middle if mu is None else mu + (middle - mu) * (1 - 2 * t / iters)
        return (x.abs() - mu).clamp_min(0) * x.sign() * mask

    x = splitting(w.float() * n, kernel(gram, n, damp, rho), shrink, max(iters, 1))
    m, high, low = cut(x)
    assert mu is not None
    level = torch.where((mu >= low) & (mu < high), mu, low)
    new = ((x.abs() - level).clamp_min(0) * x.sign() / n).masked_fill(~m, 0)
    return Change(torch.where(m.all(1, keepdim=True), w, new.to(w.dtype)), mask=m)
