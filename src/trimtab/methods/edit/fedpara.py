from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.entrywise import Entrywise, ranks_of
from trimtab.methods.factors import Factors, rank_of
from trimtab.methods.solvers import LARGE

FLOOR = 0.2   # of the mean size of a weight: what it is divided by, at least
FIRST = 3     # one of so many steps goes without what inputs have in common
KEPT = 10     # steps that L-BFGS remembers


def nearest(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Both factors of the nearest w of this rank."""
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).contiguous(), (root[:, None] * vt[:rank]).contiguous()


def fitted(w: Tensor, gram: Tensor | None, start: list[Tensor], steps: int) -> list[Tensor]:
    """left, right, left, right from `start` on, so many steps of L-BFGS nearer to w [out, in] where inputs have the second moment `gram`
    [in, in], or 1 where it is None."""
    own = [t.clone() for t in start]
    size = float(w.square().sum()) or 1.0
    search = torch.optim.LBFGS(own, max_iter=steps, max_eval=2 * steps, history_size=KEPT, tolerance_grad=0, tolerance_change=0,
                               line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        a, x, b, y = own
        first, second = a @ x, b @ y
        off = first * second - w
        slope = off if gram is None else off @ gram
        value = (off * slope).sum() / size
        first, second = slope.mul(first).mul_(2 / size), slope.mul(second).mul_(2 / size)
        a.grad, x.grad, b.grad, y.grad = second @ x.T, a.T @ second, first @ y.T, b.T @ first
        return value

    search.step(loss)  # type: ignore[no-untyped-call]
    return own


@method("edit", joint=("unit", "score", "repair"), drops=False, factors="entrywise",
        xfail={"factors_are_the_whole_at_full_rank": "steps end near the weight, not at it"})
def fedpara(w: Tensor, keep: float, gram: Tensor, *, rank: int = 0, iters: int = 120, damp: float = 0.01) -> Change:
    """Two products of factors, multiplied entry by entry, whose outputs are nearest.

    `w` [out, in]; `keep`: the share of its parameters that all four factors have together; `gram` [in, in]; returns w [out, in] and the
    parts first_left and second_left (float32 [out, rank]), first_right and second_right (float32 [rank, in]). `rank`: of each product; 0
    follows from `keep`, and of an odd number of columns the first product has one more. BadInput for a rank that is not between 1 and the
    shorter side.

    Formula: W' = (X1 Y1^T) * (X2 Y2^T), 2 r (out + in) parameters, of rank up to r^2; min sum ((W' - W) (G + damp mean(diag G) I) (W' -
        W)^T) by L-BFGS, the first third of its steps with the diagonal of G alone; at first, with V = W diag(G)^(1/2), X2 Y2^T the nearest
        |V| and X1 Y1^T the nearest V / max(X2 Y2^T, mean |V| / 5)
    Source: Hyeon-Woo et al. 2022 (FedPara), arXiv:2108.06098, the parameterisation of section 2, with equal ranks, which it finds best
    Deviations: the paper trains the factors from scratch, for what federated clients send; here they are fitted to a trained weight, and
        how is ours. It has no statistics of inputs. The paper's tanh and its form for convolutions are left out
    """
    both = 2 * rank_of(w.shape, keep, rank) if rank else max(2, rank_of(w.shape, keep))
    one, two = ranks_of(both)
    kind = torch.float64 if max(w.shape) <= LARGE else torch.float32
    exact = gram.to(kind)
    moment = exact.diagonal() + damp * exact.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    scale = moment.sqrt()
    common = exact / (scale * scale[:, None])
    common.diagonal().fill_(1.0)
    goal = w.to(kind) * scale
    second = nearest(goal.abs(), two)
    first = nearest(goal / (second[0] @ second[1]).clamp_min(FLOOR * goal.abs().mean()), one)
    low = fitted(goal, None, [*first, *second], iters // FIRST)
    a, x, b, y = fitted(goal, common, low, iters - iters // FIRST)
    new = Entrywise(Factors(a.float(), (x / scale).float()), Factors(b.float(), y.float())).change()
    return replace(new, w=new.w.to(w.dtype))
