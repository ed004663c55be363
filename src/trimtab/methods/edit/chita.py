from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change

TRIES = 4  # halvings of one step
CELLS = 1 << 22  # entries of the systems solved at once
STRIP = 1 << 14  # weights whose masked gradients are held at once


@method("edit", joint=("score", "repair"))
def chita(w: Tensor, keep: float, mask: Tensor, unit: Any, grads: Tensor, *, ridge: float = 3.0, iters: int = 20,
          tol: float = 1e-4, block: int = 0) -> Change:
    """Choose and refit the weights together on the empirical Fisher model of the loss, which is never formed.

    `w`, `mask` [out, in] (False = dropped by an earlier pass, stays zero), `grads` [n, out, in], one gradient a
    sequence; returns w [out, in]. An iteration costs n * out * in, and holds nothing larger than `grads` beside it.

    Formula: A [n, b] the gradients of a block of weights, y = A w_0; min sum over blocks of 1/2 ||A w - y||^2 +
        n lambda / 2 ||w - w_0||^2 with at most k non-zeros: S = the best D (w - tau * gradient / D)^2 with D =
        diag(A^T A) + n lambda, then on S exactly by an n x n system, R the rest:
        w_S = w_0S + A_S^T (A_S A_S^T + n lambda I)^-1 A_R w_0R; repeated while the objective falls
    Source: Benbaki et al. 2023, arXiv:2302.14623; objective as in the released code (pruners/CHITA.py)
    Deviations: one site at a time, in blocks of `block` consecutive weights (0: the whole site as one block, which far
        fewer gradients than weights fit on almost any support); no first-order term; lambda = ridge * mean diag(A^T A) /
        n, free of the loss's scale, with a default of our own; steps are scaled by D and start at tau = 1, halved until the
        objective falls, where the paper searches a piecewise quadratic; every trial is solved exactly, not the last one
        only; starts from the better of the unit's best |w| and best D w^2; no active set, no coordinate descent, one
        stage
    """
    n, size = len(grads), w.numel()
    b = min(block or size, size)
    fill = -size % b

    def blocks(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x.flatten(), (0, fill)).view(-1, b, 1)

    def whole(x: Tensor) -> Tensor:
        return x.flatten()[:size].view(w.shape)

    a = torch.nn.functional.pad(grads.float().flatten(1), (0, fill)).view(n, -1, b).transpose(0, 1)  # [blocks, n, b]
    w0, live = blocks(w.float()), blocks(mask)
    curve = torch.linalg.vector_norm(a, dim=1).square().unsqueeze(2)
    lam = ridge * float(whole(curve).mean()) or 1.0  # n * lambda of the formula
    curve += lam

    def project(s: Tensor) -> Tensor:
        return blocks(unit(whole(s * live), keep)) & live

    def value(x: Tensor) -> tuple[float, Tensor]:
        """The objective, and A (w - w_0) of every block."""
        r = a @ (x - w0)
        return 0.5 * float(r.double().square().sum() + lam * (x - w0).double().square().sum()), r

    def solve(on: Tensor) -> Tensor:
        x, some = torch.empty_like(w0), max(1, CELLS // (n * max(n, b)))
        for i in range(0, len(a), some):
            ai, oi, wi = a[i:i + some], on[i:i + some], w0[i:i + some]
            k = torch.diag_embed(torch.full(ai.shape[:2], lam, dtype=torch.float64, device=a.device))
            for c in range(0, b, STRIP):
                part = ai[..., c:c + STRIP]
                k += (part * oi[:, c:c + STRIP].mT) @ part.mT
            x[i:i + some] = (wi + ai.mT @ torch.linalg.solve(k, (ai @ (wi * ~oi)).double()).float()) * oi
        return x

    def solved(on: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        x = solve(on)
        return *value(x), x, on

    f, r, x, on = min((solved(project(s * w0.abs())) for s in (1.0, curve.sqrt())), key=lambda t: t[0])
    for _ in range(iters):
        before, move = f, (a.mT @ r + lam * (x - w0)) / curve
        for halvings in range(TRIES):
            now = project(curve.sqrt() * (x - move / 2 ** halvings).abs())
            trial = solved(now)
            if trial[0] < f:
                f, r, x, on = trial
                break
        if before - f <= tol * before:
            break
    on = whole(on)
    return Change(torch.where(on.all(), w, whole(x).masked_fill(~on, 0).to(w.dtype)), mask=on)
