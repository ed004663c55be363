from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.basis import Basis
from trimtab.methods.codes import Codes, Grid
from trimtab.methods.terms import Terms

SIGNS = (-1.0, 1.0)


def signed(positive: Tensor, rows: Tensor) -> Codes:
    """Signs [out, in] (True: +1) times a scale [out] of each row."""
    table = torch.tensor(SIGNS, device=rows.device)
    return Codes(positive.to(torch.uint8), Grid(rows.float()[:, None].contiguous(), 2, table=table), positive.shape[1])


@method("edit", joint=("unit", "score", "budget", "grid"), drops=False, codes="l1", zero=False, based=True)
def onebit(w: Tensor, *, iters: int = 100) -> Change:
    """Signs between a scale of every output and one of every input.

    `w` [out, in]; returns w [out, in] and the parts codes, scales, grid and table of the signs, and in_scale [in].

    Formula: W' = sign(W) * (h g^T), h g^T the non-negative product of rank one that is nearest to |W|
    Source: Xu et al. 2024 (OneBit), arXiv:2402.11295, equation 3: sign-value-independent decomposition, the start of its training
    Deviations: the start alone, without the training that follows, and without the normalisation behind every map; the product is the
        leading singular pair of |W|, which is non-negative, by power iteration
    """
    size = w.float().abs()
    g = size.mean(0)
    for _ in range(iters):
        h = size @ g
        last, g = g, size.T @ (h / h.norm().clamp_min(1e-30))
        if torch.allclose(last, g, rtol=1e-7, atol=0):
            break
    least = 1e-6 * float(g.max()) or 1.0
    scale = g.clamp_min(least)
    h = size @ g / g.square().sum().clamp_min(1e-30)
    terms = Terms(signed(w >= 0, h * scale.mean()), None, Basis(scale / scale.mean()))
    return Change(terms.weight().to(w.dtype), terms.parts())
