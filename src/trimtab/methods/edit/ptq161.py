from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.basis import Basis
from trimtab.methods.edit.onebit import signed
from trimtab.methods.factors import Factors
from trimtab.methods.solvers import damped
from trimtab.methods.terms import Terms


@method("edit", joint=("unit", "score", "budget", "grid"), drops=False, codes="l1", zero=False)
def ptq161(w: Tensor, gram: Tensor, *, damp: float = 0.01, iters: int = 10) -> Change:
    """Signs about a mean, between a scale of every output and one of every input, both fitted to the outputs.

    `w` [out, in], `gram` [in, in]; returns w [out, in] and the parts codes, scales, grid and table of the signs, in_scale [in], and left
    and right, the mean [out, 1] and ones [1, in].

    Formula: W' = (a sign(W - mu) + mu) * r^T, mu and a from the mean of W and of |W - mu| over a row; then in turns the least squares of
        tr((W' - W) G (W' - W)^T) in a and mu, row by row, and in r
    Source: Zhao et al. 2025 (PTQ1.61), arXiv:2502.13179, section 3.2
    Deviations: a and r by least squares on the site's second moment, where the source trains them on a block's outputs; mu takes part;
        without the fine-tuning that prepares the weights. Salient inputs are spared by a pass before it, as in the row ptq161
    """
    weight, g = w.double(), damped(gram, damp)
    mu = weight.mean(1, keepdim=True)
    positive = weight >= mu
    sign = positive.double() * 2 - 1
    a, r = (weight - mu).abs().mean(1, keepdim=True), torch.ones_like(weight[:1])
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    for _ in range(iters + 1):
        off = (a * sign + mu) * r - weight
        lost = float(((off @ g) * off).sum())
        if best is None or lost < best[0]:
            best = (lost, a, mu, r)
        one, two = sign * r, r.expand_as(sign)
        both = torch.stack([one, two], 1)                     # [out, 2, in]
        seen = both @ g
        normal, right = seen @ both.transpose(1, 2), (seen @ weight[..., None])[..., 0]
        normal += 1e-9 * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30) * torch.eye(2, device=w.device)
        a, mu = torch.linalg.solve(normal, right)[:, :, None].unbind(1)
        base = a * sign + mu
        matrix = (base.T @ base) * g
        matrix.diagonal().add_(1e-9 * matrix.diagonal().mean().clamp_min(1e-30))
        r = torch.linalg.solve(matrix, (base * (weight @ g)).sum(0))[None]
    assert best is not None
    _, a, mu, r = best
    scale = torch.where(r.abs() < 1e-6 * r.abs().max().clamp_min(1e-30), torch.ones_like(r), r)[0].float()
    mean = Factors(mu.bfloat16().contiguous(), torch.ones_like(w[:1], dtype=torch.bfloat16))
    terms = Terms(signed(positive, a[:, 0]), mean, Basis(scale))
    return Change(terms.weight().to(w.dtype), terms.parts())
