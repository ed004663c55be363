from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.factors import Factors, rank_of, whitened


@method("edit", joint=("unit", "score", "repair"), drops=False, factors=True)
def svdllm(w: Tensor, keep: float, gram: Tensor, *, rank: int = 0, damp: float = 0.01) -> Change:
    """The weight of a small rank whose outputs are nearest, as two factors: singular value decomposition behind whitened inputs.

    `w` [out, in]; `keep`: the share of its parameters that both factors have together; `gram` [in, in]; returns w [out, in] and the parts
    left (float32 [out, rank]) and right (float32 [rank, in]). `rank` of 0 follows from `keep`. BadInput for a rank that is not between
    1 and the shorter side.

    Formula: G + damp mean(diag G) I = S S^T, W S = U D V^T; W' = U_r D_r V_r^T S^-1 = U_r (U_r^T W); left = U_r, right = U_r^T W;
        r = floor(keep out in / (out + in)), at least 1
    Source: Wang et al. 2024 (SVD-LLM), arXiv:2403.07378, section 3, truncation-aware data whitening
    Deviations: the paper gives both factors D_r^(1/2) and inverts S; their product is the same, and where inputs do not fill their space
        there is nothing to invert. It damps only where G has no Cholesky factor; where 0 is asked for, damping from 1e-8 on does that.
        Inputs are those behind edited blocks, in place of its closed-form update. Its fine-tuning is left out
    """
    r = rank_of(w.shape, keep, rank)
    u = torch.linalg.svd(whitened(w, gram, damp), full_matrices=False)[0][:, :r]
    new = Factors(u.float().contiguous(), (u.T @ w.double()).float().contiguous()).change()
    return replace(new, w=new.w.to(w.dtype))
