from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput


@method("score")
def obs(w: Tensor, gram: Tensor, *, damp: float = 0.01) -> Tensor:
    """The output error of removing a weight, once the others of its row have made up for it.

    BadInput if the damped second moment is not positive definite.

    Formula: S_ij = W_ij^2 / [H^-1]_jj, H = G + damp * mean(diag G) * I
    Source: Hassibi and Stork 1993 (optimal brain surgeon); SparseGPT, arXiv:2301.00774, section 3 as remembered (the damping)
    Deviations: G without the factor 2 of the squared error, which keeps the order; all inputs of the row may still make up
        for the loss, while SparseGPT's sweep has only those to the right of j; where no token was seen (G = 0), H = damp * I
    """
    h = gram.to(torch.float64, copy=True)
    mean = h.diagonal().mean()
    h.diagonal().add_(damp * torch.where(mean > 0, mean, 1.0))
    lower, info = torch.linalg.cholesky_ex(h)
    if bool(info):
        raise BadInput(f"obs(damp={damp:g}): the second moment of the inputs is singular; use more samples or a larger damp")
    return w.float().square() / torch.cholesky_inverse(lower).diagonal().float()
