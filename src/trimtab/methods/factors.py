"""Weights as a product of two factors of a small rank: weight = left @ right."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.types import BadInput, Change
from trimtab.methods.solvers import factor

TYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Factors:
    """A weight [out, in]: `left` [out, rank] and `right` [rank, in], both float32 or both bfloat16."""

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        left, right = list(self.left.shape), list(self.right.shape)
        if len(left) != 2 or len(right) != 2 or left[1] != right[0] or 0 in left + right:
            raise BadInput(f"factors are [out, rank] and [rank, in], not {left} and {right}")
        if self.left.dtype != self.right.dtype or self.left.dtype not in TYPES:
            raise BadInput(f"factors are both float32 or both bfloat16, not {self.left.dtype} and {self.right.dtype}")

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def weight(self) -> Tensor:
        """What it stands for, float32 [out, in]."""
        return self.left.float().contiguous() @ self.right.float().contiguous()

    def to(self, dtype: torch.dtype) -> Factors:
        return Factors(self.left.to(dtype), self.right.to(dtype))

    def parts(self) -> dict[str, Tensor]:
        """As a change carries them."""
        return {"left": self.left, "right": self.right}

    def change(self) -> Change:
        """As an edit returns it: the parts, and what they decode to."""
        return Change(self.weight(), self.parts())

    @staticmethod
    def among(parts: Mapping[str, Tensor]) -> Factors | None:
        """The factors among the parts of a change; None where there are none. BadInput where they do not meet."""
        return Factors(parts["left"], parts["right"]) if "left" in parts else None


def rank_of(shape: tuple[int, ...], keep: float, rank: int = 0) -> int:
    """The rank whose factors hold a share `keep` of the parameters of [out, in], rounded down, at least 1; `rank`, where it is not 0.

    BadInput for a `rank` that is not between 1 and the shorter side.
    """
    out, inputs = shape
    if rank and not 1 <= rank <= min(shape):
        raise BadInput(f"a rank is 1 to {min(shape)} here (0: what the share of parameters allows), not {rank}")
    return rank or max(1, math.floor(keep * out * inputs / (out + inputs) + 1e-9))


def checked_rank(shape: tuple[int, ...], rank: int) -> int:
    """`rank`, if factors of a weight of this shape may have it; else BadInput."""
    if not 1 <= rank <= min(shape):
        raise BadInput(f"a rank is 1 to {min(shape)} here, not {rank}")
    return rank


def whitened(w: Tensor, gram: Tensor, damp: float = 0.0) -> Tensor:
    """w S, float64 [out, in], where S S^T is the inputs' second moment: what is off in it, squared and summed, is off in the outputs.

    An input that was always zero counts for next to nothing, `damp` of the mean.
    """
    def moment(extra: float) -> Tensor:
        h = gram.to(torch.float64, copy=True)
        d = h.diagonal()
        d += (damp + extra) * d.mean().clamp_min(torch.finfo(torch.float32).tiny)
        return h

    return w.double() @ factor(moment)


def losses_of_ranks(w: Tensor, gram: Tensor, grad_sq: Tensor) -> tuple[float, ...]:
    """What the network's loss rises by, to second order, behind the best factors of w [out, in] of every rank from 0 on.

    `gram` [in, in] and `grad_sq` [out, in] are the second moment of the inputs and of the weights' gradients. With K-FAC's approximation
    inputs and the gradients of outputs, h [out] their mean squares, have nothing to do with each other: 1/2 sum_i h_i E[((w' - w) x)_i^2].
    """
    u, size, _ = torch.linalg.svd(whitened(w, gram), full_matrices=False)
    h = grad_sq.double().sum(1) / gram.diagonal().double().sum().clamp_min(torch.finfo(torch.float32).tiny)
    each = size.square() * (h @ u.square()) / 2
    return (*each.flip(0).cumsum(0).flip(0).tolist(), 0.0)


def shares_of(moment: Tensor) -> Tensor:
    """Of eigenvalues, the greatest first: which share of all of them the first k are, for every k from 1 on."""
    total = moment.clamp_min(0).cumsum(0)
    return total / total[-1].clamp_min(torch.finfo(torch.float32).tiny)


def reaching(shares: Tensor, energy: float) -> int:
    """The fewest of them that reach a share, to within rounding."""
    return min(int((shares < energy * (1 - 1e-12)).sum()) + 1, len(shares))


def utilised_rank(inside: Tensor, outside: Tensor, energy: float) -> int:
    """How many directions a weight uses: the fewer of those that a share `energy` of its inputs, and of its outputs, lies in.

    `inside`, `outside`: the `shares_of` the eigenvalues of the inputs' second moment G and of the outputs', W G W^T.

    Formula: min(k_S, k_T), k the fewest eigenvalues that are a share `energy` of all
    Source: Garg et al. 2024 (utilised rank), arXiv:2407.04797, as `utilised` has it
    Deviations: second moments are not centred; the paper's own threshold was not found
    """
    return min(reaching(inside, energy), reaching(outside, energy))
