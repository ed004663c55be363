from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.factors import Factors, rank_of, reaching, shares_of, whitened


@method("edit", joint=("unit", "score", "repair"), drops=False, factors=True)
def utilised(w: Tensor, keep: float, gram: Tensor, *, rank: int = 0, energy: float = 0.0) -> Change:
    """What the weight does between the directions that its inputs and its outputs mostly lie in, as two factors.

    `w` [out, in]; `keep`: the share of its parameters that both factors have together; `gram` [in, in]; returns w [out, in] and the parts
    left (float32 [out, rank]) and right (float32 [rank, in]). `energy`: the share of either second moment that is kept, from which the
    rank follows; a weight whose factors would then take no fewer parameters is left whole. BadInput for a rank that is not between 1 and
    the shorter side, for an energy that is not above 0 and at most 1 (0: not asked for), and for both.

    Formula: W' = P_T W P_S, P_S = S S^T with the first k_S eigenvectors of G, P_T = T T^T with the first k_T of W G W^T; rank
        min(k_S, k_T); k: the fewest whose eigenvalues are a share `energy` of all; for a given rank r the greatest energy that leaves it
    Source: Garg et al. 2024 (utilised rank), arXiv:2407.04797; W' and min(k_S, k_T) from a summary of it
    Deviations: second moments are not centred; how the paper chooses k_S and k_T was not found: one share of energy for both is ours, as
        is its choice by a share of parameters. Its fine-tuning is left out
    """
    if not 0 <= energy <= 1 or (energy and rank):
        raise BadInput(f"utilised: energy is {energy:g}{f' and rank {rank}' if rank else ''}; it is a share above 0 and at most 1, such as "
                       "0.99, in place of a rank")
    out, inputs = w.shape
    moment, s = torch.linalg.eigh(gram.double())
    t, size, _ = torch.linalg.svd(whitened(w, gram), full_matrices=False)
    inside, outside = shares_of(moment.flip(0)), shares_of(size.square())
    if energy:
        k_in, k_out = reaching(inside, energy), reaching(outside, energy)
        if min(k_in, k_out) * (out + inputs) >= out * inputs:
            return Change(w)
    else:
        r = rank_of(w.shape, keep, rank)
        most = float(torch.maximum(inside[r - 1], outside[r - 1]))
        k_in, k_out = max(r, reaching(inside, most)), max(r, reaching(outside, most))
    s, t, wide = s.flip(1)[:, :k_in], t[:, :k_out], w.double()
    if k_out <= k_in:
        left, right = t, t.T @ wide
        right = right @ s @ s.T if k_in < inputs else right
    else:
        left, right = wide @ s, s.T
        left = t @ (t.T @ left)
    new = Factors(left.float().contiguous(), right.float().contiguous()).change()
    return replace(new, w=new.w.to(w.dtype))
