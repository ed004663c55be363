"""Moments of a site's input. One pass takes them all."""
from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.products import linear

TOKENS = 128  # of a batch that a sample has
STRIP = 1024  # of a large symmetric matrix, computed at once


@method("stat", merge="sum", mean=True, rescaled=lambda value, s: value / s.square(),
        moved=lambda value, z, mean: value - 2 * mean * z + z.square(), of_gram=lambda moment: moment.diagonal())
def in_sq(x: Tensor) -> Tensor:
    """Mean square of each input, [in].

    Formula: E[x_j^2]
    Source: textbook
    Deviations: none
    """
    return x.float().square().sum(0)


def add_products(total: Tensor, x: Tensor) -> None:
    """total [in, in] += x^T x; of many inputs every product once."""
    x, n = x.T.float().contiguous(), len(total)
    for a in range(0, n, STRIP):
        b = min(a + STRIP, n)
        total[a:b, a:] += linear(x[a:b], x[a:])
        total[b:, a:b] = total[a:b, b:].T


@method("stat", merge="sum", mean=True, rescaled=lambda value, s: value / s / s[:, None], of_gram=lambda moment: moment, into=add_products,
        moved=lambda value, z, mean: value - z * mean[:, None] - mean * z[:, None] + z * z[:, None],
        some=lambda value, inputs: value[inputs][:, inputs])
def gram(x: Tensor) -> Tensor:
    """Second moment of the inputs, [in, in]: the Hessian of the site's squared output error, up to a factor.

    Formula: X^T X / tokens
    Source: textbook
    Deviations: none
    """
    x = x.float()
    return x.T @ x


@method("stat", merge="sum", mean=True, rescaled=lambda value, s: value / s)
def in_abs(x: Tensor) -> Tensor:
    """Mean magnitude of each input, [in].

    Formula: E[|x_j|]
    Source: textbook
    Deviations: none
    """
    return x.float().abs().sum(0)


@method("stat", merge="max", rescaled=lambda value, s: value / s)
def absmax(x: Tensor) -> Tensor:
    """Largest magnitude of each input, [in].

    Formula: max |x_j|
    Source: textbook
    Deviations: none
    """
    return x.float().abs().amax(0)


@method("stat", merge="cat", rescaled=lambda value, s: value / s, moved=lambda value, z, mean: value - z,
        turned=lambda value, basis: basis.of(value), some=lambda value, inputs: value[:, inputs])
def sample(x: Tensor) -> Tensor:
    """Some of the tokens as they are, [tokens, in]: at most 128 of a batch, evenly spread.

    Formula: x_t
    Source: textbook
    Deviations: none
    """
    return x[:: -(-len(x) // TOKENS)].float().clone()


@method("stat", merge="sum", mean=True, rescaled=lambda value, s: value / s, moved=lambda value, z, mean: value - z)
def in_mean(x: Tensor) -> Tensor:
    """Mean of each input, [in].

    Formula: E[x_j]
    Source: textbook
    Deviations: none
    """
    return x.float().sum(0)
