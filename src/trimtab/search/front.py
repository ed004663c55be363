"""The first front: what an integer program says of the tables, in an instant. And what is better than what."""
from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from trimtab.core.types import BadInput
from trimtab.search.options import DROP, HEAD
from trimtab.search.space import Space, shape_of
from trimtab.search.timing import Costs

T = TypeVar("T")
Rises = Mapping[str, Mapping[str, float]]  # nats by place and option
STEPS = 12   # times that the program is solved for
RISES = 20   # and losses, in nats
LEAST, MOST = 2e-4, 0.7  # from the one to the other: half as likely, token for token
AROUND = (0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.45, 1.6, 1.8, 2.2)  # times the asked loss: divergences are not what text says
SHAKEN = 6   # times more at what is asked, with other rises
ABOUT = 0.3  # of a divergence, what the loss rises by is off from it
SLACK = 1 + 1e-9
SAYING = threading.Lock()


def extra(name: str, of: str) -> Any:
    """A library of the `search` extra. BadInput where it is not there."""
    import importlib

    try:
        return importlib.import_module(of)
    except ModuleNotFoundError:
        raise BadInput(f"search needs {name}, which is not installed; pip install 'trimtab[search]'") from None


@dataclass(frozen=True)
class Limits:
    """What is asked for: the loss as a share of the dense perplexity, bytes of the files, speed as times the dense model's."""

    loss: float | None = None
    bytes: int | None = None
    speed: float | None = None

    def met(self, loss: float, size: float, speed: float) -> bool:
        return (self.loss is None or loss <= self.loss * SLACK) and (self.bytes is None or size <= self.bytes) and (
            self.speed is None or speed >= self.speed / SLACK)

    def short(self, loss: float, size: float, speed: float) -> float:
        """How far off it is, as the sum of shares; 0 where it is met."""
        return sum((max(0.0, (loss - self.loss)) if self.loss is not None else 0.0,
                    max(0.0, size / self.bytes - 1) if self.bytes is not None else 0.0,
                    max(0.0, 1 - speed / self.speed) if self.speed is not None else 0.0))

    def __str__(self) -> str:
        return ", ".join(x for x in (f"at most {100 * self.loss:g} % of loss" if self.loss is not None else "",
                                     f"at most {self.bytes / 1e6:,.1f} MB" if self.bytes is not None else "",
                                     f"{self.speed:g} times as fast" if self.speed is not None else "") if x) or "nothing in particular"


def program(space: Space, costs: Costs, rises: Rises, *, time: float = math.inf, size: float = math.inf, loss: float = math.inf
            ) -> dict[str, str] | None:
    """The choices whose rises add up to the least among those of at most so many microseconds and bytes; where a loss is given, in nats,
    the quickest of those whose rises add up to no more. None where there are none.

    Formula: min sum_po r_po x_po  s.t.  sum_o x_po = 1 for every place p, sum t_po x_po <= T, sum b_po x_po <= B, x binary;
        min sum t_po x_po  s.t.  sum r_po x_po <= R, and the same
    Source: the multiple-choice knapsack; of mixed precision HAWQ-V3, arXiv:2011.10680, as remembered
    """
    optimize = extra("scipy", "scipy.optimize")
    cells = [(p.name, o) for p in space.places for o in p.options if o in rises.get(p.name, {}) and o in costs.us[p.name]]
    cells += [(HEAD, o) for o in space.heads]
    lost = np.array([0.0 if p == HEAD else max(0.0, rises[p][o]) for p, o in cells])
    took = np.array([costs.head_us[o] if p == HEAD else costs.us[p][o] for p, o in cells])
    takes = np.array([costs.head_bytes[o] if p == HEAD else costs.bytes[p][o] for p, o in cells], dtype=float)
    names = [*space.names, HEAD]
    one = np.array([[float(p == name) for p, _ in cells] for name in names])
    rules = [optimize.LinearConstraint(one, 1, 1)]
    rules += _even(optimize, space, cells) if space.even else []
    gone = np.array([float(o == DROP) for _, o in cells])
    rules.append(optimize.LinearConstraint(gone[None], 0, len(space.places) - 1))  # something has to be left
    if math.isfinite(time):
        rules.append(optimize.LinearConstraint(took[None], -np.inf, time - costs.beside))
    if math.isfinite(size):
        rules.append(optimize.LinearConstraint(takes[None] / 1e6, -np.inf, size / 1e6))
    # Of what loses as much the quickest, and then the smallest; of what is as quick the smallest, and then what loses the least.
    quick, small = took / max(took.max(), 1e-9), takes / max(takes.max(), 1.0)
    goal = lost + 1e-7 * quick + 1e-8 * small
    if math.isfinite(loss):
        rules.append(optimize.LinearConstraint(lost[None], -np.inf, loss))
        goal = quick + 1e-4 * small + 1e-5 * lost
    with nothing_said():
        found = optimize.milp(goal, constraints=rules, integrality=np.ones(len(cells)), bounds=optimize.Bounds(0, 1),
                              options={"time_limit": 10.0})
    if found.x is None:
        return None
    return {p: o for (p, o), x in zip(cells, found.x, strict=True) if x > 0.5}


@contextmanager
def nothing_said() -> Iterator[None]:
    """What C code writes to stdout goes nowhere: HiGHS 1.12 says a line of its own however silent it is asked to be (its issue 2783), and
    what trimtab says there may be read by programs."""
    with SAYING:
        try:
            kept = os.dup(1)
        except OSError:  # closed: nothing is said there
            yield
            return
        flush = ctypes.CDLL(None).fflush
        if sys.stdout is not None:
            sys.stdout.flush()
        flush(None)
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            yield
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)


def _even(optimize: Any, space: Space, cells: list[tuple[str, str]]) -> list[Any]:
    """A block goes whole, and two that stay are of one shape."""
    rows = []
    for p in space.places:
        for q in space.places:
            if p.block == q.block and p.group < q.group:
                rows += [[(c == (p.name, DROP)) - (c == (q.name, DROP)) for c in cells], [(c == (q.name, DROP)) - (c == (p.name, DROP))
                                                                                          for c in cells]]
            if p.group == q.group and p.block != q.block:
                for shape in {shape_of(o) for o in p.options if o != DROP}:
                    rows.append([(c[0] == p.name and c[1] != DROP and shape_of(c[1]) == shape)
                                 - (c[0] == q.name and (c[1] == DROP or shape_of(c[1]) == shape)) for c in cells])
    return [optimize.LinearConstraint(np.array(rows, dtype=float), -np.inf, 0)] if rows else []


def fastest(space: Space, costs: Costs) -> float:
    """Microseconds of the fastest that there is."""
    least = sum(min(costs.us[p.name][o] for o in p.options) for p in space.places)
    return costs.beside + min(costs.head_us[o] for o in space.heads) + least


def first_front(space: Space, costs: Costs, rises: Rises, *asked: Limits) -> list[dict[str, str]]:
    """The program's answers from the dense model's time to the least there is, from next to no loss to much, and at what is asked: there
    also with rises that are otherwise by as much as losses are, so that there is a choice of what lies about as near."""
    most, least = costs.time(space.dense), fastest(space, costs)
    draw = np.random.default_rng(0)
    shaken = [{p: {o: r * math.exp(ABOUT * draw.standard_normal()) for o, r in its.items()} for p, its in rises.items()}
              for _ in range(SHAKEN)]
    wanted: list[tuple[Rises, dict[str, float]]] = []
    for limits in asked or (Limits(),):
        size = {"size": float(limits.bytes)} if limits.bytes else {}
        if limits.speed:
            wanted += [(r, {"time": costs.dense / limits.speed, **size}) for r in (rises, *shaken)]
        elif limits.loss is not None:
            wanted += [(r, {"loss": x * math.log1p(limits.loss), **size}) for x in AROUND for r in (rises, *shaken[::3])]
        wanted += [(r, size) for r in (rises, *shaken)] if size else []
    bound = {"size": float(min(x.bytes for x in asked if x.bytes))} if asked and all(x.bytes for x in asked) else {}
    wanted += [(rises, {"time": t, **bound}) for t in np.geomspace(max(least, 1e-9) * 1.0001, most, STEPS)]
    wanted += [(rises, {"loss": x, **bound}) for x in np.geomspace(LEAST, MOST, RISES)] + [(rises, bound)]
    out: dict[tuple[str, ...], dict[str, str]] = {}
    for choices in (program(space, costs, r, **w) for r, w in wanted):
        if choices is not None:
            out.setdefault(tuple(choices[n] for n in (*space.names, HEAD)), choices)
    return list(out.values())


def best(items: Iterable[T], cost: Callable[[T], Sequence[float]]) -> list[T]:
    """Those that no other is as good as in everything and better in something; `cost`: the lower the better. The first of equals."""
    each = [(item, tuple(cost(item))) for item in items]
    out: list[T] = []
    seen: set[tuple[float, ...]] = set()
    for item, own in each:
        if own not in seen and not any(other != own and all(b <= a for a, b in zip(own, other, strict=True)) for _, other in each):
            out.append(item)
            seen.add(own)
    return out
