"""Routers, learned from calibration tokens: which of a sublayer's neurons or heads are active, told from what the sublayer is given."""
from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.types import BadInput
from trimtab.methods.gates import Router, passing
from trimtab.methods.products import linear
from trimtab.methods.solvers import Adam

LEARNED = "what it finds is what it learned, and for another share it learns something else"
BATCH = 128      # tokens of an update
DECAY = 0.01     # of the maps, times the rate
HELD = 8         # one token of so many is held out, to judge by
RARE = 0.005     # added to the weight of what is not active


class Steady(Adam):
    """Its memory of squares is long: of tokens drawn anew each step."""

    SECOND = 0.999


def active(h: Tensor, keep: float) -> Tensor:
    """Which hidden values count as active, bool: the share `keep` of the largest magnitudes, and of them those that are not zero."""
    return h.abs() > passing(h.abs(), keep).clamp_min(0)


def held_out(t: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens to learn from, and the last ones, to judge by."""
    some = len(t) - max(1, len(t) // HELD) if len(t) > 1 else 0
    return t[some:] if some == 0 else t[:some], t[some:]


def learned(x: Tensor, labels: Tensor, rank: int, *, lr: float, epochs: int, seed: int) -> Router:
    """A router of what is given, x [tokens, width], to which of it is active, `labels` bool [tokens, scores]: two maps with `rank` between,
    or for rank 0 one with a bias.

    Binary cross-entropy of the logistic function of its scores, what is active weighing 1 and what is not the share that is active, by
    AdamW; of all epochs the one that does best on tokens held out.
    """
    (x, judged), (y, wanted) = held_out(x), held_out(labels.float())
    share = float(y.mean()) + RARE
    generator = torch.Generator(x.device).manual_seed(seed)

    def drawn(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=x.device) / columns**0.5

    maps = [drawn(rank, x.shape[1]), drawn(y.shape[1], rank)] if rank else [drawn(y.shape[1], x.shape[1]), x.new_zeros(y.shape[1])]

    def scores(x: Tensor) -> Tensor:
        return linear(linear(x, maps[0]), maps[1]) if rank else linear(x, maps[0]) + maps[1]

    def loss() -> float:
        s = scores(judged)
        each = torch.nn.functional.softplus(s) - wanted * s
        return float(((wanted * (1 - share) + share) * each).double().sum())

    rates, best, least = [Steady(m, lr) for m in maps], [m.clone() for m in maps], loss()
    for _ in range(epochs):
        for some in torch.randperm(len(x), generator=generator, device=x.device).split(BATCH):
            mine, its = x[some], y[some]
            slope = (its * (1 - share) + share) * (torch.sigmoid(scores(mine)) - its) / len(some)
            if rank:
                inner = linear(mine, maps[0])
                slopes = [linear(linear(slope, maps[1].T).T, mine.T), linear(slope.T, inner.T)]
            else:
                slopes = [linear(slope.T, mine.T), slope.sum(0)]
            for m, rate, s in zip(maps, rates, slopes, strict=True):
                m.mul_(1 - lr * DECAY)
                rate.step(s)
        if (now := loss()) < least:
            best, least = [m.clone() for m in maps], now
    return Router(best[1], best[0]) if rank else Router(best[0], bias=best[1])


def check(knobs: dict[str, float]) -> None:
    """BadInput for knobs that no router can be learned with."""
    for name, least in (("rank", 0), ("epochs", 1), ("batch", 1)):
        if knobs.get(name, least) < least:
            raise BadInput(f"{name}={knobs[name]} makes no router; it is {least} or more")
    if not knobs["lr"] > 0:
        raise BadInput(f"lr={knobs['lr']:g} learns nothing; it is above 0")
    if not 0 < knobs.get("recall", 1) <= 1:
        raise BadInput(f"recall={knobs['recall']:g} is no share; it is above 0 and at most 1, such as 0.99")
