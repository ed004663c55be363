from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.factors import Factors, rank_of, whitened

LEAST = 1e-6  # singular values below this share of the greatest count as zero


def places(v: Tensor) -> Tensor:
    """Rows of v [n, rank], orthonormal columns, that stand for all of them, int64 [rank], by discrete empirical interpolation.

    Where the rows so far say what the next column should be everywhere, the one where it is furthest from that.
    """
    rank = v.shape[1]
    at = torch.empty(rank, dtype=torch.long, device=v.device)
    left = v.clone()  # every column less what the rows so far say of it: Gaussian elimination with row pivots
    for k in range(rank):
        at[k] = left[:, k].abs().argmax()
        left[:, k + 1:] -= left[:, k, None] * (left[at[k], k + 1:] / left[at[k], k])
    return at


@method("edit", joint=("unit", "score", "repair"), drops=False, factors=True,
        xfail={"factors_beat_the_nearest": "rows and columns are those of the weight, and inputs only say which"})
def cur(w: Tensor, keep: float, gram: Tensor, *, rank: int = 0, whiten: bool = False) -> Change:
    """Some columns of the weight, some of its rows, and a small matrix between them, as two factors.

    `w` [out, in]; `keep`: the share of its parameters that both factors have together; `gram` [in, in]; returns w [out, in] and the parts
    left (float32 [out, rank], C U) and right (float32 [rank, in], R: rows of the weight as they are). `whiten`: U is that of the nearest
    outputs, not of the nearest weights. BadInput for a rank that is not between 1 and the shorter side.

    Formula: S_ij = |W_ij| E[x_j^2]^(1/2) = (A D B^T)_ij; C = W[:, q], R = W[p, :], p and q the places that DEIM finds in the first r
        columns of A and of B; U = C^+ W R^+, W' = C U R; whitened, with G = L L^T, U = C^+ W L (R L)^+
    Source: Park and Moon 2025 (CURing), arXiv:2501.04211, section 4, and the authors' code; DEIM of Sorensen and Embree 2016,
        arXiv:1407.5516, as textbooks have it
    Deviations: C and U are stored as their product, so that r (out + in) parameters are all, where the paper has r^2 more and a rank of at
        most 256; every site takes part, where the paper takes q, k and gate of some blocks; its healing of U is left out. The authors'
        code subtracts one vector from all columns that follow, which is not DEIM
    """
    r, exact = rank_of(w.shape, keep, rank), w.double()
    a, _, b = torch.linalg.svd(exact.abs() * gram.diagonal().double().clamp_min(0).sqrt(), full_matrices=False)
    p, q = places(a[:, :r]), places(b[:r].T)
    columns, rows = exact[:, q], exact[p]
    met, goal = (rows, exact) if not whiten else (whitened(rows, gram), whitened(exact, gram))
    low = torch.linalg.pinv(columns, rtol=LEAST) @ goal @ torch.linalg.pinv(met, rtol=LEAST)
    new = Factors((columns @ low).float().contiguous(), rows.float().contiguous()).change()
    return replace(new, w=new.w.to(w.dtype))
