"""Another basis for the inputs or the outputs of a weight: a scale of each, then an orthogonal map that is cheap to apply."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.types import BadInput


@dataclass(frozen=True)
class Basis:
    """x' = (left x right) (scale * x) for vectors of n: `scale` [n] without zeros, then the Kronecker product of the orthogonal `left`
    [a, a] and `right` [b, b], a b = n; float32. What is None is left out.

    On x as a matrix [a, b] the product is left x right^T: n (a + b) multiplications in place of n^2. A Hadamard matrix is one, of
    two smaller ones.
    """

    scale: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    def __post_init__(self) -> None:
        have = [t for t in (self.scale, self.left, self.right) if t is not None]
        if not have or (self.left is None) != (self.right is None):
            raise BadInput("a basis is a scale, or two orthogonal matrices, or both")
        if any(t.dtype != torch.float32 or not bool(torch.isfinite(t).all()) for t in have):
            raise BadInput("a basis is made of finite float32 numbers")
        if any(t.ndim != 2 or t.shape[0] != t.shape[1] or not len(t) for t in (self.left, self.right) if t is not None):
            raise BadInput("the orthogonal matrices of a basis are square")
        if self.scale is not None and (self.scale.ndim != 1 or not bool((self.scale != 0).all())):
            raise BadInput("the scale of a basis is a vector without zeros")
        if self.scale is not None and self.turns is not None and len(self.scale) != self.size:
            raise BadInput(f"a scale of {len(self.scale)} entries does not fit matrices of {self.size}")

    @property
    def turns(self) -> tuple[Tensor, Tensor] | None:
        """Both matrices."""
        return None if self.left is None or self.right is None else (self.left, self.right)

    @property
    def size(self) -> int:
        """Of the vectors."""
        if self.turns is None:
            assert self.scale is not None
            return len(self.scale)
        return len(self.turns[0]) * len(self.turns[1])

    def of(self, x: Tensor) -> Tensor:
        """x [..., n] in this basis."""
        x = x if self.scale is None else x * self.scale
        if self.turns is None:
            return x
        left, right = self.turns
        return (left @ (x.unflatten(-1, (len(left), len(right))) @ right.T)).flatten(-2)

    def straight(self, x: Tensor) -> Tensor:
        """The inverse of `of`."""
        if self.turns is not None:
            left, right = self.turns
            x = (left.T @ (x.unflatten(-1, (len(left), len(right))) @ right)).flatten(-2)
        return x if self.scale is None else x / self.scale

    def weight(self, w: Tensor) -> Tensor:
        """Of w [out, n] the w' that gives of `of(x)` what w gives of x."""
        return Basis.of(Basis(None if self.scale is None else 1 / self.scale, self.left, self.right), w)

    def plain(self, w: Tensor) -> Tensor:
        """The inverse of `weight`."""
        return Basis.straight(Basis(None if self.scale is None else 1 / self.scale, self.left, self.right), w)

    def scaled(self, s: Tensor) -> Basis:
        """This one of s * x [n], s without zeros."""
        return Basis(s if self.scale is None else self.scale * s, self.left, self.right)

    def gram(self, gram: Tensor) -> Tensor:
        """The second moment of `of(x)` [n, n], from that of x."""
        return self.of(self.of(gram).T)

    def parts(self, side: str) -> dict[str, Tensor]:
        """As a change carries them, `side` (in or out) before the names."""
        named = {"scale": self.scale, "left": self.left, "right": self.right}
        return {f"{side}_{k}": t.clone() for k, t in named.items() if t is not None}  # sites that share it are stored each

    @staticmethod
    def among(parts: Mapping[str, Tensor], side: str) -> Basis | None:
        """The basis of a side among the parts; None where there is none. BadInput where they contradict each other."""
        found = {k: parts[f"{side}_{k}"] for k in ("scale", "left", "right") if f"{side}_{k}" in parts}
        return Basis(**found) if found else None


def split(n: int) -> tuple[int, int]:
    """Two numbers whose product is n, as near to each other as can be, the smaller one first."""
    a = next(a for a in range(math.isqrt(n), 0, -1) if n % a == 0)
    return a, n // a


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [n, n], uniform over all."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64, device=generator.device))
    return (q * r.diagonal().sign()).float().contiguous()


def hadamard(n: int, device: torch.device) -> Tensor:
    """The Hadamard matrix of Sylvester [n, n], rows of length 1; n a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64, device=device)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (h / math.sqrt(n)).float()


def signs(n: int, generator: torch.Generator) -> Tensor:
    """Random signs, float32 [n]."""
    return torch.randint(0, 2, (n,), generator=generator, device=generator.device).float().mul_(2).sub_(1)


def mixed(n: int, seed: int, device: torch.device) -> Basis:
    """A randomly signed Hadamard basis of n."""
    g = torch.Generator(device).manual_seed(seed)
    a, b = split(n)
    return Basis(signs(n, g), mixing(a, g), mixing(b, g))


def by_head(turn: Basis, heads: int) -> Basis:
    """That of `heads` vectors one after the other, each in the basis `turn`, an orthogonal one."""
    n = turn.size
    right = turn.of(torch.eye(n)).T.contiguous()
    return Basis(None, torch.eye(heads), right)


def mixing(n: int, generator: torch.Generator) -> Tensor:
    """The Hadamard matrix [n, n], or where n is no power of two that of its even part beside a random orthogonal one of its odd part."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    h = hadamard(n // odd, generator.device)
    return h if odd == 1 else torch.kron(orthogonal(odd, generator), h)
