"""Passes after which places of a network have one set of weights: who takes whose, what a site becomes by it, and what is left.

The plan says it by names, `<site>` or `<site>/<head>`: who takes, and whose. What is saved is bytes, of packed files and of the memory
they are mapped to, and no arithmetic.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core import structure
from trimtab.core.data import Batch
from trimtab.core.edits import Shared, edited
from trimtab.core.measured import Error, Tried
from trimtab.core.spec import Pass
from trimtab.core.types import BadInput, Site
from trimtab.methods.edit.share import OWN
from trimtab.network import graph
from trimtab.network.stream import Network

WeightOf = Callable[[Site], Tensor]  # of a site, as earlier sweeps left it
Walk = Callable[[dict[str, set[str]], Callable[[int, Any, Any], None]], None]
SHARES = ("q", "k", "v")  # whose rows are heads
DONOR, PIECES = "donor", "pieces"  # parts: the block whose weights a site has; where its rows are cut, [n]


# ---- places -----------------------------------------------------------------------------------
def by_block(sites: Iterable[Site]) -> dict[int, list[Site]]:
    found: dict[int, list[Site]] = {}
    for s in sites:
        found.setdefault(s.block, []).append(s)
    return found


def other_name(name: str, block: int) -> str:
    """What a site of this name is called in another block."""
    return f"{block}.{name.partition('.')[2]}"


def kind_of(sites: Iterable[Site]) -> tuple[Any, ...]:
    """What two blocks have to have in common, for one to take the weights of the other."""
    return tuple((other_name(s.name, 0), s.shape) for s in sites)


def own_of(p: Pass, sites: Iterable[Site]) -> int:
    """Weights that a block has beside those that it takes."""
    knobs = p.steps["edit"].bound
    rank, scaled = knobs.get("rank", 0), bool(knobs.get("scaled"))
    return sum(rank * sum(s.shape) + scaled * s.shape[0] for s in sites)


def groups_of(net: Network, s: Site) -> int:
    """Rows of a site that belong to a head of keys, or to the queries that read it."""
    return s.shape[0] // graph.heads(net.config_of(s.block))[1]


def heads_of(net: Network, p: Pass, i: int) -> dict[tuple[str, int], list[tuple[Site, slice]]]:
    """The places of a block: queries and keys of every head, and its values, as far as the pass spans them."""
    found: dict[tuple[str, int], list[tuple[Site, slice]]] = {}
    for s in net.sites_of(i):
        if s.role in SHARES and p.covers(s):
            n = groups_of(net, s)
            for h in range(s.shape[0] // n):
                found.setdefault(("v" if s.role == "v" else "qk", h), []).append((s, slice(h * n, (h + 1) * n)))
    return found


# ---- what is refused --------------------------------------------------------------------------
def check(net: Network, p: Pass, sites: list[Site], target: float) -> None:
    """BadInput where so little cannot be left."""
    name, total = p.steps["edit"].method.name, sum(s.size for s in sites)
    if p.ties == "head":
        if any(s.role not in SHARES for s in sites):
            raise BadInput(f"{name} shares queries, keys and values of heads, and {sites[0].name} is none; scope it to *.q,*.k,*.v")
        least = sum(s.size for s in sites if s.block == min(by_block(sites))) / total
    else:
        rank = p.steps["edit"].bound.get("rank", 0)
        if rank and (narrow := [s for s in sites if not 1 <= rank < s.shape[0] * s.shape[1] / sum(s.shape)]):
            s = narrow[0]
            most = math.ceil(s.shape[0] * s.shape[1] / sum(s.shape)) - 1
            raise BadInput(f"{name}: factors of rank {rank} are no smaller than {s.name} {list(s.shape)} itself; take 1 to {most}, or 0")
        runs: list[list[Site]] = []  # what may end up with the weights of one
        near = p.steps["edit"].bound["near"] and "score" not in p.steps
        for its in sorted(by_block(sites).values(), key=lambda its: (0 if near else kind_of(its), its[0].block)):
            if runs and kind_of(runs[-1][:len(its)]) == kind_of(its):
                runs[-1] += its
            else:
                runs.append(list(its))
        firsts = [[s for s in run if s.block == run[0].block] for run in runs]
        least = sum(sum(s.size for s in one) + own_of(p, run[len(one):]) for one, run in zip(firsts, runs, strict=True)) / total
    if least > target * (1 + 1e-9):
        raise BadInput(f"{name}: a share of {target:g} is less than the {least:.0%} that is left where all share that can; raise --keep")


# ---- who takes whose --------------------------------------------------------------------------
def planned(net: Network, p: Pass, sites: list[Site], target: float, samples: list[Batch], scratch: Path, weight: WeightOf,
            walk: Walk) -> dict[str, str]:
    """By the names of those that take the weights of others, whose. `walk`(needs, look) takes `look`(i, module, statistics) over all
    blocks."""
    if p.ties == "head":
        return of_heads(net, p, sites, target, weight)
    its = by_block(sites)
    left = {i: sum(s.size for s in one) for i, one in its.items()}
    goal, kinds = target * sum(left.values()) * (1 + 1e-9), {i: kind_of(one) for i, one in its.items()}
    alike = {j: [i for i in its if i != j and kinds[i] == kinds[j]] for j in its}
    near = p.steps["edit"].bound["near"]
    if "score" in p.steps:
        gone = lowest(worth_of(net, p, its, walk), left, {i: own_of(p, one) for i, one in its.items()}, alike, goal)
        pairs = {j: [i for i in alike[j] if i not in gone] for j in gone}
        pairs = {j: beside(j, some) if near else some for j, some in pairs.items()}
        costs = costs_of(net, p, its, pairs, samples, scratch, weight, walk)
        took = {j: min(some, key=lambda i: (costs[j, i], i)) for j, some in pairs.items()}
    else:
        reach = math.ceil(1 / target) if near else len(its)
        pairs = {j: [i for i in some if abs(i - j) <= reach] for j, some in alike.items()}
        costs = costs_of(net, p, its, pairs, samples, scratch, weight, walk)
        took = grouped(list(its), costs, left, {i: own_of(p, one) for i, one in its.items()}, goal, near)
    return {s.name: other_name(s.name, took[s.block]) for s in sites if s.block in took}


def beside(j: int, some: list[int]) -> list[int]:
    """Of these blocks those next to block j, on either side."""
    return [*[i for i in some if i < j][-1:], *[i for i in some if i > j][:1]]


def worth_of(net: Network, p: Pass, its: Mapping[int, list[Site]], walk: Walk) -> dict[int, float]:
    """What the score of the pass says of every block: of its sublayers, together."""
    step, worth = p.steps["score"], dict.fromkeys(its, 0.0)
    ends = {i: [s for s in one if s.role in ("o", "down")] or one[:1] for i, one in its.items()}

    def look(i: int, module: Any, stats: Any) -> None:
        for s in ends.get(i, ()):
            known = {"depth": torch.tensor(i / max(1, net.n_blocks - 1)), "heads": torch.tensor(structure.heads_of(net, s))}
            worth[i] += float(step.method({**(stats.of(s) if stats else {}), **known}, **step.bound).sum())

    walk({s.name: set(step.method.needs) for one in ends.values() for s in one if step.method.needs}, look)
    return worth


def lowest(worth: Mapping[int, float], left: Mapping[int, int], own: Mapping[int, int], alike: Mapping[int, list[int]],
           goal: float) -> list[int]:
    """The blocks that are worth least, until no more than `goal` weights are left; one of each kind stays."""
    gone: list[int] = []
    total = sum(left.values())
    for j in sorted(worth, key=lambda j: (worth[j], j)):
        if total <= goal:
            break
        if any(i not in gone for i in alike[j]):
            gone.append(j)
            total += own[j] - left[j]
    return gone


def costs_of(net: Network, p: Pass, its: Mapping[int, list[Site]], pairs: Mapping[int, list[int]], samples: list[Batch], scratch: Path,
             weight: WeightOf, walk: Walk) -> dict[tuple[int, int], float]:
    """What it costs that block j takes the weights of block i, for these pairs."""
    found: dict[tuple[int, int], float] = {}
    through = Tried(net, samples, scratch) if p.pairs else None

    def look(j: int, module: Any, stats: Any) -> None:
        error = through.through(j, module) if through else None
        for i in pairs.get(j, ()):
            found[j, i] = cost(net, p, module, its[j], [weight(s) for s in its[i]], lambda s: stats.of(s) if stats else {}, error)

    try:
        walk({s.name: set(p.steps["edit"].method.needs) for j in pairs for s in its[j] if p.steps["edit"].method.needs}, look)
    finally:
        if through:
            through.close()
    return found


def cost(net: Network, p: Pass, module: Any, mine: list[Site], theirs: list[Tensor], stats: Callable[[Site], dict[str, Tensor]],
         error: Error | None) -> float:
    """Of a block with the weights of another: what its outputs are off, or where nothing is tried its weights."""
    new: dict[Site, Tensor] = {}
    off = 0.0
    for s, other in zip(mine, theirs, strict=True):
        w, known = net.weight(module, s).float(), stats(s)
        new[s] = edited(p, w, math.nan, {**known, "other": other.float()}, None).w
        if error is None:
            own, its = (float((x @ known["gram"] if "gram" in known else x).mul(x).sum()) for x in (w, new.pop(s) - w))
            off += its / max(own, torch.finfo(torch.float32).tiny) / len(mine)
    return off if error is None else error({}, new)


def grouped(blocks: list[int], costs: Mapping[tuple[int, int], float], left: Mapping[int, int], own: Mapping[int, int], goal: float,
            near: bool) -> dict[int, int]:
    """Groups of blocks that have the weights of one of their own, in place of single ones, until no more than `goal` weights are left."""
    def best(group: list[int]) -> tuple[float, int]:
        return min((sum(costs.get((j, i), math.inf) for j in group if j != i), i) for i in group)

    groups = [[j] for j in blocks]
    while sum(left[best(g)[1]] + sum(own[j] for j in g) - own[best(g)[1]] for g in groups) > goal:
        which = list(pairwise(range(len(groups)))) if near else [(a, b) for b in range(len(groups)) for a in range(b)]
        rises = [(best(groups[a] + groups[b])[0] - best(groups[a])[0] - best(groups[b])[0], a, b) for a, b in which]
        rise, a, b = min(rises, default=(math.inf, 0, 0))
        if math.isinf(rise):
            raise BadInput("the blocks that may share are of several shapes, and too few of them follow each other; use near=false, or "
                           "raise --keep")
        groups[a] = sorted(groups[a] + groups.pop(b))
    return {j: best(g)[1] for g in groups for j in g if j != best(g)[1]}


def of_heads(net: Network, p: Pass, sites: list[Site], target: float, weight: WeightOf) -> dict[str, str]:
    """Of heads: each takes the weights of the one in an earlier block that it is most like, the most alike first."""
    found: list[tuple[float, int, tuple[str, int], int, tuple[str, int]]] = []
    blocks = sorted(by_block(sites))
    places = {i: heads_of(net, p, i) for i in blocks}

    def flat(i: int, kind: str) -> tuple[list[tuple[str, int]], Tensor]:
        """The heads of a block, of length 1 each [heads, entries]."""
        keys = [k for k in places[i] if k[0] == kind]
        whole = {s: weight(s).float() for s, _ in places[i][keys[0]]}
        each = [torch.cat([whole[s][rows].flatten() for s, rows in places[i][k]]) for k in keys]
        return keys, torch.nn.functional.normalize(torch.stack(each), dim=1)

    for j in blocks[1:]:
        for kind in dict.fromkeys(k for k, _ in places[j]):
            mine, v = flat(j, kind)
            best: list[tuple[float, int, tuple[str, int]] | None] = [None] * len(mine)
            for i in blocks[:blocks.index(j)]:
                if not any(k == kind for k, _ in places[i]):
                    continue
                theirs, u = flat(i, kind)
                if u.shape[1] != v.shape[1]:
                    continue
                most, at = (v @ u.T).max(1)
                for n, (c, h) in enumerate(zip(most.tolist(), at.tolist(), strict=True)):
                    if (so_far := best[n]) is None or c > so_far[0]:
                        best[n] = (c, i, theirs[h])
            found += [(-b[0], j, key, b[1], b[2]) for key, b in zip(mine, best, strict=True) if b is not None]
    left, took = float(sum(s.size for s in sites)), dict[tuple[int, tuple[str, int]], tuple[int, tuple[str, int]]]()
    goal = target * left * (1 + 1e-9)
    for _, j, key, i, other in sorted(found):
        if left <= goal:
            break
        took[j, key] = (i, other)
        left -= sum((rows.stop - rows.start) * s.shape[1] for s, rows in places[j][key])
    if left > goal:
        raise BadInput(f"{p.steps['edit'].method.name}: too few heads are of one shape to share so many; raise --keep")
    plan = {}
    for (j, key), (i, other) in took.items():
        while (i, other) in took:  # what takes another's itself
            i, other = took[i, other]
        for s, _ in places[j][key]:
            plan[f"{s.name}/{key[1]}"] = f"{other_name(s.name, i)}/{other[1]}"
    return plan


# ---- what a site becomes ----------------------------------------------------------------------
def taker(net: Network, plan: Mapping[str, str], weight: WeightOf) -> Callable[[Site], Shared | None]:
    """Of a site, what it is with the weights that the plan gives it; None where it keeps its own and nobody takes a part of it."""
    sites = {s.name: s for s in net.sites}
    cuts: dict[str, set[int]] = {}
    for name in {*plan, *plan.values()}:
        site, _, head = name.partition("/")
        if head:
            n = groups_of(net, sites[site])
            cuts.setdefault(site, set()).update((int(head) * n, (int(head) + 1) * n))

    def of(s: Site) -> Shared | None:
        if s.name in plan:
            whose = sites[plan[s.name]]
            return Shared(weight(whose).float(), {DONOR: torch.tensor([whose.block])})
        if s.name not in cuts:
            return None
        w, n = weight(s).float(), groups_of(net, s)
        mine = {head: other for k, other in plan.items() for site, _, head in [k.partition("/")] if site == s.name}
        for head, other in sorted(mine.items(), key=lambda item: item[1]):  # each of theirs is read once
            donor, _, its = other.partition("/")
            w[int(head) * n:(int(head) + 1) * n] = weight(sites[donor]).float()[int(its) * n:(int(its) + 1) * n]
        return Shared(w, {PIECES: torch.tensor(sorted({0, s.shape[0], *cuts[s.name]}))})

    return of


def own_weights(net: Network, plan: Mapping[str, str], s: Site, parts: Mapping[str, Tensor]) -> int:
    """Of the weights of a site those that no other place has."""
    if s.name in plan:
        return sum(t.numel() for k, t in parts.items() if k.startswith(OWN))
    return s.size - sum(n.partition("/")[0] == s.name for n in plan) * groups_of(net, s) * s.shape[1]


def told(plan: Mapping[str, str], own: Mapping[str, int], total: int) -> dict[str, Any]:
    """What a run says of what places share: who took whose, and the share of all weights of the blocks that no longer has to be stored."""
    return {"took": dict(sorted(plan.items())), "gone": round(1 - sum(own.values()) / total, 6)}
