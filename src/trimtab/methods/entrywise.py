"""Weights as two products of factors, multiplied entry by entry: of far more than their own rank, for as many parameters."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.types import BadInput, Change
from trimtab.methods.factors import Factors

PRODUCTS = ("first", "second")  # before the names of their parts, and of their buffers
FIRST = f"{PRODUCTS[0]}_left"   # the part that says so


@dataclass(frozen=True)
class Entrywise:
    """A weight [out, in]: `first` times `second`, entry by entry, of one shape and type; `second` has the rank of `first` or one less."""

    first: Factors
    second: Factors

    def __post_init__(self) -> None:
        a, b = (((len(f.left), f.right.shape[1]), f.left.dtype) for f in (self.first, self.second))
        if a != b:
            raise BadInput(f"products that are multiplied are of one shape and type, not {list(a[0])} {a[1]} and {list(b[0])} {b[1]}")
        if self.first.rank - self.second.rank not in (0, 1):
            raise BadInput(f"products that are multiplied have one rank, or the first one more, not {self.first.rank} and "
                           f"{self.second.rank}")

    @property
    def rank(self) -> int:
        """Of both products together, which is what parameters are taken for."""
        return self.first.rank + self.second.rank

    def weight(self) -> Tensor:
        """What it stands for, float32 [out, in]."""
        return self.first.weight() * self.second.weight()

    def to(self, dtype: torch.dtype) -> Entrywise:
        return Entrywise(self.first.to(dtype), self.second.to(dtype))

    def parts(self) -> dict[str, Tensor]:
        """As a change carries them."""
        return {f"{name}_{k}": t for name, f in zip(PRODUCTS, (self.first, self.second), strict=True) for k, t in f.parts().items()}

    def change(self) -> Change:
        """As an edit returns it: the parts, and what they decode to."""
        return Change(self.weight(), self.parts())

    @staticmethod
    def among(parts: Mapping[str, Tensor]) -> Entrywise | None:
        """The products among the parts of a change; None where there are none. BadInput where they do not meet."""
        found = [Factors.among({k.removeprefix(f"{name}_"): t for k, t in parts.items() if k.startswith(f"{name}_")}) for name in PRODUCTS]
        first, second = found
        return None if first is None or second is None else Entrywise(first, second)


def ranks_of(rank: int) -> tuple[int, int]:
    """Those of both products that have so much together."""
    return rank - rank // 2, rank // 2
