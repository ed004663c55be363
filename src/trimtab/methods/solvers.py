"""Solvers that several methods share. All work on one site: w [out, in], gram [in, in] = E[x x^T].

What every one of them lowers is the calibration error of a row, (w' - w) G (w' - w)^T. Factorisations are float64 (sweeps over many
inputs float32) and done in place: the largest holding is one [in, in] and a few float32 [out, in].
"""
from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from trimtab.core.types import Change
from trimtab.methods.products import linear

STRIP = 512   # columns that are factorised together, where there are many
LARGE = 1024  # beyond this many inputs errors are those of float32, and sweeps factorised so: half the time and the memory


def damped(gram: Tensor, damp: float, flip: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    """G + damp * mean(diag G) * I, a new [in, in], from the last input to the first if `flip`.

    An input that was always zero gets 1 on the diagonal.
    """
    h = gram.flip(0, 1).to(dtype) if flip else gram.to(dtype, copy=True)
    d = h.diagonal()
    dead = d == 0
    d += damp * d.mean()
    d[dead] = 1.0
    return h


def factor(build: Callable[[float], Tensor]) -> Tensor:
    """Lower Cholesky factor of the symmetric `build(0.0)`, computed in the memory of what it returns.

    Where that is not positive definite, of `build(1e-8)`, `build(1e-7)` and so on: more and more damping.
    """
    extra = 0.0
    while extra <= 1e3:
        h = build(extra)
        if factorised(h):
            return h
        extra = max(10 * extra, 1e-8)
    raise ValueError("the Gram matrix has no Cholesky factor; are the calibration inputs finite?")


def factorised(h: Tensor) -> bool:
    """The symmetric `h` becomes its lower Cholesky factor; False where it is not positive definite. A strip of columns after the other,
    from what lies left of it: most of it is one product."""
    n = len(h)
    strip = STRIP if n > LARGE else n
    for a in range(0, n, strip):
        b = min(a + strip, n)
        if a:
            h[a:, a:b] -= linear(h[a:, :a], h[a:b, :a].contiguous())
        low, info = torch.linalg.cholesky_ex(h[a:b, a:b])
        if bool(info):
            return False
        h[a:b, a:b] = low
        h[b:, a:b] = torch.linalg.solve_triangular(low.T, h[b:, a:b], upper=True, left=False)
        h[a:b, b:] = 0
    return True


def errors(w: Tensor, new: Tensor, gram: Tensor) -> Tensor:
    """Calibration error of every row, [out] float64: (w' - w) G (w' - w)^T."""
    d = new.to(_exact(w)) - w.to(_exact(w))
    return _between(d, gram, d)


def lower(w: Tensor, new: Tensor, than: Tensor, gram: Tensor) -> Tensor:
    """Which rows have a lower calibration error in `new` than in `than`, all [out, in], bool [out].

    With w' and w'' for the two, that of w' less that of w'' is (w' - w'') G (w' + w'' - 2 w)^T: one product for both.
    """
    new, than, w = (t.to(_exact(w)) for t in (new, than, w))
    return _between(new - than, gram, new + than - 2 * w) < 0


def _exact(w: Tensor) -> torch.dtype:
    return torch.float64 if w.shape[1] <= LARGE else torch.float32


def _between(a: Tensor, gram: Tensor, b: Tensor) -> Tensor:
    """a G b^T of every row, [out] float64; G is symmetric."""
    total = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    for c in range(0, a.shape[1], LARGE):  # in strips, so that no second copy of G is held
        total += (linear(a, gram[c:c + LARGE].to(a.dtype)) * b[:, c:c + LARGE]).sum(1)
    return total


def improved(w: Tensor, new: Change, better: Tensor, gram: Tensor) -> Change:
    """`new` with those rows of `better` that lower the calibration error; off the mask exactly zero."""
    assert new.mask is not None
    cand = torch.where(new.mask, better.to(new.w.dtype), torch.zeros_like(new.w))
    return replace(new, w=torch.where(lower(w, cand, new.w, gram)[:, None], cand, new.w))


class _Last:
    """The last factor of a sweep, for as long as what it is of lives unchanged: q, k and v read one input."""

    def __init__(self) -> None:
        self.key: tuple[int, float] | None = None
        self.gram: weakref.ref[Tensor] = weakref.ref(torch.empty(0))
        self.low: Tensor | None = None

    def of(self, gram: Tensor, damp: float) -> Tensor:
        """Of the damped second moment, from the last input to the first."""
        key = gram._version, damp
        if self.low is None or self.gram() is not gram or self.key != key:
            self.low = None  # before the next one is made
            self.low = factor(lambda extra: damped(gram, damp + extra, flip=True, dtype=_exact(gram)))
            self.key, self.gram = key, weakref.ref(gram, self._gone)
        return self.low

    def _gone(self, which: weakref.ref[Tensor]) -> None:
        if which is self.gram:
            self.low = None


_last = _Last()
Settle = Callable[[Tensor, Tensor, int], Tensor]


def sweep(w: Tensor, gram: Tensor, settle: Callable[[int, int], Settle], *, damp: float, block: int) -> Tensor:
    """The column sweep of SparseGPT and GPTQ: settle columns from left to right, mend what that costs in the columns after it.

    `settle(begin, end)` is called once a block of `block` columns and returns what settles them: a function of the block's current
    weights [end - begin, out] (a column of w is a row of it), of 1 / U_jj [end - begin, 1], and of j, which returns the final column
    begin + j [out]. The columns before j of the block are final. Returns the weights [out, in] float32, transposed in memory.

    With H = R R^T, R upper triangular, the paper's U (H^-1 = U^T U) is R^-1, and after a change D of the columns so far
    the best change of those that follow is the one that makes D R vanish there. So H is never inverted: the current
    weights of a block are w - (D R)_block R_block^-1, with D of the earlier blocks only.
    """
    n = w.shape[1]
    low = _last.of(gram, damp)  # R[a, b] = low[n - 1 - a, n - 1 - b]
    dense = w.T.float().clone(memory_format=torch.contiguous_format)  # [in, out]: a column of w is a row, and becomes its change
    new = torch.empty_like(dense)
    for a in range(0, n, block):
        b = min(a + block, n)
        r = low[n - b:n - a, n - b:n - a].flip(0, 1)
        u = torch.linalg.solve_triangular(r, torch.eye(b - a, dtype=r.dtype, device=r.device), upper=True).float()
        scale = r.diagonal().float()[:, None]  # 1 / U_jj
        cur = new[a:b].copy_(dense[a:b])
        if a:
            cur -= u.T @ linear(low[n - a:, n - b:n - a].flip(0, 1).float().T, dense[:a].T)
        one, costs = settle(a, b), u * scale
        for j in range(b - a):
            final = one(cur, scale, j)
            cur[j + 1:].addr_(costs[j, j + 1:], cur[j] - final, alpha=-1)
            cur[j] = final
        torch.sub(cur, dense[a:b], out=dense[a:b])
    return new.T


def lengths(gram: Tensor) -> Tensor:
    """Root mean square of every input, [in] float32; a share of 1e-8 of the largest where an input is always zero."""
    n = gram.diagonal().float().clamp_min(0).sqrt()
    return n.clamp_min(1e-8 * float(n.max())) if bool((n > 0).any()) else torch.ones_like(n)


def kernel(gram: Tensor, n: Tensor, damp: float, rho: float) -> Tensor:
    """rho * (A + rho I)^-1 in float32, for `splitting`; A = G / (n n^T) + damp * mean(diag) * I, n [in]."""

    def build(extra: float) -> Tensor:
        a = gram.to(torch.float64, copy=True)
        a /= n
        a /= n[:, None]
        d = a.diagonal()
        d += (damp + extra) * d.mean() + rho
        return a

    low = factor(build)
    return torch.cholesky_inverse(low, out=low).mul_(rho).float()  # symmetric: its order does not matter


def splitting(v0: Tensor, pull: Tensor, project: Callable[[Tensor, int], Tensor], iters: int) -> Tensor:
    """ADMM for min 1/2 (v - v0) A (v - v0)^T + g(v), all rows [out, in] at once; `pull` is the `kernel` of A.

    `project(x, t)`, a new tensor, is the proximal map of g / rho at iteration t. Returns the argument of the next one.
    The step of v, (v0 A + rho (z - u)) (A + rho I)^-1, is written as a change of v0, so that nothing large cancels.
    """
    x = v0.clone()  # v + u
    for t in range(iters):
        z = project(x, t)
        u = x.sub_(z)
        x = torch.addmm(v0, z.sub_(u).sub_(v0), pull).add_(u)
    return x


class Adam:
    """Adam (arXiv:1412.6980) for one tensor, its memory of squares short: what is learned from all data at once has no noise to average.

    Every row is learned as if it were alone.
    """

    FIRST, SECOND = 0.9, 0.95

    def __init__(self, x: Tensor, rate: float):
        self.x, self.rate, self.steps = x, rate, 0
        self.mean, self.square = torch.zeros_like(x), torch.zeros_like(x)

    def step(self, slope: Tensor) -> None:
        """Change the tensor in place, by about `rate` against the sign of its slope."""
        self.steps += 1
        self.mean.lerp_(slope, 1 - self.FIRST)
        self.square.lerp_(slope.square(), 1 - self.SECOND)
        root = (self.square / (1 - self.SECOND**self.steps)).sqrt_().add_(1e-8)
        self.x.addcdiv_(self.mean, root, value=-self.rate / (1 - self.FIRST**self.steps))


def refit(w: Tensor, mask: Tensor, gram: Tensor, damp: float) -> Tensor:
    """The weights on `mask` that minimise every row's calibration error, [out, in] float32.

    Rows that share a pattern share its factor.
    """
    h = damped(gram, damp)
    rhs = w.double() @ h
    out = torch.zeros_like(rhs)
    patterns, which = torch.unique(mask, dim=0, return_inverse=True)
    groups = torch.argsort(which, stable=True).split(torch.bincount(which, minlength=len(patterns)).tolist())
    for pattern, rows in zip(patterns, groups, strict=True):
        at = pattern.nonzero().squeeze(1)
        if len(at):
            part = h.index_select(0, at).index_select(1, at)
            low = factor(partial(_ridge, part))
            cell = (rows[:, None], at)
            out[cell] = torch.cholesky_solve(rhs[cell].T, low).T
    return out.float()


def _ridge(h: Tensor, share: float) -> Tensor:
    """A copy with `share` of the mean diagonal added to it."""
    h = h.clone()
    d = h.diagonal()
    d += share * d.mean()
    return h
