"""Gradients of the loss. Each g [out, in] is that of one sequence's mean-token loss at the dense weights."""
from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method


@method("stat", of="grad", merge="sum", mean=True)
def grad_sq(g: Tensor) -> Tensor:
    """Mean square of the gradient over sequences, [out, in]: the diagonal of the empirical Fisher matrix.

    Formula: E_n[g_n^2]
    Source: textbook
    Deviations: none
    """
    return g.float().square()


@method("stat", of="grad", merge="sum", mean=True)
def grad(g: Tensor) -> Tensor:
    """Mean gradient over sequences, [out, in].

    Formula: E_n[g_n]
    Source: textbook
    Deviations: none
    """
    return g.float()


@method("stat", of="grad", merge="stack")
def grads(g: Tensor) -> Tensor:
    """Every sequence's gradient, [n, out, in]: n times the memory of the site.

    Formula: g_1, ..., g_n
    Source: textbook
    Deviations: none
    """
    return g.float()
