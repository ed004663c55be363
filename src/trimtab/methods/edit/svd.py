from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.factors import Factors, rank_of


@method("edit", joint=("unit", "score", "repair"), drops=False, factors=True)
def svd(w: Tensor, keep: float, *, rank: int = 0) -> Change:
    """The nearest weight of a small rank, as two factors: truncated singular value decomposition.

    `w` [out, in]; `keep`: the share of its parameters that both factors have together; returns w [out, in] and the parts left
    (float32 [out, rank]) and right (float32 [rank, in]). `rank` of 0 follows from `keep`. BadInput for a rank that is not between
    1 and the shorter side.

    Formula: W = U S V^T; left = U_r S_r^(1/2), right = S_r^(1/2) V_r^T, W' = left right; r = floor(keep out in / (out + in)), at least 1
    Source: Eckart and Young 1936 (no matrix of rank r is nearer in the Frobenius norm); the baseline of SVD-LLM, arXiv:2403.07378
    Deviations: none
    """
    r = rank_of(w.shape, keep, rank)
    u, s, vt = torch.linalg.svd(w.float(), full_matrices=False)
    root = s[:r].sqrt()
    new = Factors((u[:, :r] * root).contiguous(), (root[:, None] * vt[:r]).contiguous()).change()
    return replace(new, w=new.w.to(w.dtype))
