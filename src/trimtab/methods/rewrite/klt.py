from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.basis import Basis, mixing, split


@method("rewrite", basis=True)
def klt(gram: Tensor, *, seed: int = 0) -> Basis:
    """Inputs of equal power: first in the basis of their principal directions, then mixed evenly by a Hadamard matrix.

    `gram` [in, in]: the second moment of the inputs; returns their basis. Both matrices of it are made so, of the part of the second
    moment that falls to each.

    Formula: R = K H, E[x^T x] = K diag(l) K^T: every entry of the diagonal of R^T E[x^T x] R is the mean of l
    Source: Xu et al. 2025 (MambaQuant), arXiv:2501.13484, section 4.1 (variance-aligned rotation)
    Deviations: K as a product of two smaller ones, of the second moments of the rows and of the columns of x as a matrix, so that it can be
        applied; variances are equal where that of x is such a product, and nearly so elsewhere; the mean is not taken off
    """
    n = len(gram)
    a, b = split(n)
    g = torch.Generator(gram.device).manual_seed(seed)
    each = gram.double().view(a, b, a, b)

    def mixed(moment: Tensor) -> Tensor:
        return (mixing(len(moment), g).double() @ torch.linalg.eigh(moment).eigenvectors.T).float().contiguous()

    return Basis(None, mixed(each.diagonal(dim1=1, dim2=3).sum(-1)), mixed(each.diagonal(dim1=0, dim2=2).sum(-1)))
