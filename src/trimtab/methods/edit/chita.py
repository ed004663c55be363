from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change

TRIES = 10  # halvings of one step


@method("edit", joint=("score", "repair"))
def chita(w: Tensor, keep: float, mask: Tensor, unit: Any, grads: Tensor, *, ridge: float = 1.0, iters: int = 20,
          tol: float = 1e-4, block: int = 0) -> Change:
    """Choose and refit the weights together on the empirical Fisher model of the loss, which is never formed.

    `w`, `mask` [out, in] (False = dropped by an earlier pass, stays zero), `grads` [n, out, in], one gradient a
    sequence; returns w [out, in]. An iteration costs n * out * in; nothing larger than `grads` is held beside it.

    Formula: A [n, b] the gradients of a block of weights, y = A w_0; min sum over blocks of 1/2 ||A w - y||^2 +
        n lambda / 2 ||w - w_0||^2 with at most k non-zeros: w <- P(w - tau * gradient), P keeping the best squares;
        and exactly on the support S by an n x n system: w_S = w_0S + A_S^T (A_S A_S^T + n lambda I)^-1 A_D w_0D, D the
        dropped
    Source: Benbaki et al. 2023, arXiv:2302.14623; objective as in the released code (pruners/CHITA.py)
    Deviations: one site at a time; blocks of `block` consecutive weights, one output's weights if 0, the whole site if
        at least out * in (with far fewer gradients than weights the whole-site model fits anything); no first-order
        term (alpha = 0); lambda = ridge * mean diag(A^T A) / n, free of the loss's scale; P is the unit's; starts from
        magnitude pruning solved exactly; tau from the exact minimum along the gradient, halved until the objective
        falls, where the paper follows a piecewise quadratic; no active set, no coordinate descent, one stage
    """
    n, size = len(grads), w.numel()
    b = min(block or w.shape[1], size)
    fill = -size % b
    pad = torch.nn.functional.pad
    a = pad(grads.float().flatten(1), (0, fill)).view(n, -1, b).transpose(0, 1)  # [blocks, n, b]
    w0 = pad(w.float().flatten(), (0, fill)).view(-1, b, 1)
    live = pad(mask.flatten(), (0, fill)).view(-1, b, 1)
    lam = ridge * float(grads.float().square().mean()) * n or 1.0  # n * lambda of the formula

    def project(x: Tensor) -> Tensor:
        s = (x.square() * live).flatten()[:size].view(w.shape)
        return pad(unit(s, keep).flatten(), (0, fill)).view(live.shape) & live

    def value(x: Tensor) -> tuple[float, Tensor]:
        """The objective, and A (w - w_0) of every block."""
        r = a @ (x - w0)
        return 0.5 * float(r.double().square().sum() + lam * (x - w0).double().square().sum()), r

    def solve(on: Tensor) -> Tensor:
        x, some = torch.empty_like(w0), max(1, (1 << 22) // (n * max(n, b)))
        for i in range(0, len(a), some):  # a few blocks at a time: their n x n systems are float64
            ai, off = a[i:i + some], on[i:i + some]
            k = ((ai * off.mT) @ ai.mT).double()
            k.diagonal(dim1=1, dim2=2).add_(lam)
            lost = (ai @ (w0[i:i + some] * ~off)).double()
            x[i:i + some] = (w0[i:i + some] + ai.mT @ torch.linalg.solve(k, lost).float()) * off
        return x

    on = project(w0)
    x = solve(on)
    f, r = value(x)
    for _ in range(iters):
        g = a.mT @ r + lam * (x - w0)
        gg = g.square().sum(1, keepdim=True)
        step = gg / ((a @ g).square().sum(1, keepdim=True) + lam * gg).clamp_min(torch.finfo(g.dtype).tiny)
        before = f
        for _ in range(TRIES):
            y = x - step * g
            now = project(y)
            fy, ry = value(y * now)
            if fy < f:
                x, f, r, on = y * now, fy, ry, now
                break
            step = step / 2
        if before - f <= tol * before:
            break
    y = solve(on)
    if value(y)[0] < f:
        x = y
    new = x.masked_fill(~on, 0).flatten()[:size].view(w.shape).to(w.dtype)
    on = on.flatten()[:size].view(w.shape)
    return Change(torch.where(on.all(), w, new), mask=on)
