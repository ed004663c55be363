"""Weights as a product of two factors of a small rank: weight = left @ right."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.types import BadInput, Change

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
