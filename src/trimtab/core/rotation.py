"""One rotation of the residual stream, and one of every head: the bases that sites have of it, and what is left of them in a packed
network, where what writes a vector takes the turn that what reads it would undo."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.core.spec import Step
from trimtab.core.types import BadInput, Site
from trimtab.methods.basis import Basis, by_head
from trimtab.methods.terms import INSIDE, OUTSIDE, Terms, of_site
from trimtab.network import graph
from trimtab.network.stream import Layer, Network

LEAST = 1e-6  # of the largest weight of a norm: a smaller one is no scale, and the norm keeps what it has
NEAR = 1e-6   # how nearly a norm's weight and the scale behind it have to cancel


def check(net: Network, step: Step) -> None:
    """BadInput unless the network's residual stream can be turned as a whole."""
    head = net.model.get_output_embeddings() if net.kind == "lm" else None
    if graph.stream(net.family) is None or type(head) is not torch.nn.Linear or head.bias is not None:
        known = ", ".join(sorted(f.name for f in graph.FAMILIES.values() if graph.stream(f)))
        raise BadInput(f"{step} turns the residual stream of language models of the families {known}, and this is a "
                       f"{type(net.model).__name__}; use hadamard, which turns what each site reads")


def _of(step: Step, n: int, device: Any) -> Basis:
    found: Basis = step.method.facts["shared"](n, step.bound, device)
    return found


def inside(net: Network, module: Any, s: Site, step: Step, device: Any) -> Basis | None:
    """The basis of a site's inputs where a neighbour can take it; None where none can."""
    stream = graph.stream(net.family)
    assert stream is not None
    if (norm := stream.norms.get(s.input)) is not None:
        g = module.get_parameter(f"{norm}.weight").detach().float()
        least = LEAST * g.abs().max().clamp_min(1e-30)
        return _of(step, len(g), device).scaled(1 / torch.where(g.abs() < least, least, g))
    if s.role == "o":
        heads, _, width = graph.heads(net.config_of(s.block))
        return by_head(_of(step, width, device), heads)
    return None


def outside(net: Network, s: Site, step: Step, device: Any) -> Basis | None:
    """The basis of a site's outputs where what reads them has it too."""
    if s.role in ("o", "down"):
        return _of(step, s.shape[0], device)
    if s.role == "v":
        _, heads, width = graph.heads(net.config_of(s.block))
        return by_head(_of(step, width, device), heads)
    return None


@dataclass
class Fused:
    """What packing makes of rotations that neighbours share: `dropped`, the sides of a site whose basis is gone; `turned`, what becomes of
    a stored tensor by its name; `stream`, the basis that the residual stream is left in, and `last`, the scale [width] that the head's
    inputs take before it turns them back."""

    dropped: dict[str, set[str]] = field(default_factory=dict)
    turned: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    stream: Basis | None = None
    last: Tensor | None = None
    why_not: str = ""

    def tensor(self, name: str, t: Tensor) -> Tensor:
        """A stored tensor that is no packed layer, as it is in the network that was turned."""
        return self.turned[name](t.float()).to(t.dtype) if name in self.turned else t

    def parts(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is left of parts by `<site>:<part>`."""
        gone = {(s, f"{side}_{k}") for s, sides in self.dropped.items() for side in sides for k in ("scale", "left", "right")}
        return {n: t for n, t in parts.items() if tuple(n.rsplit(":", 1)) not in gone}

    def weight(self, layer: Layer, w: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """The layer's weight, from the parts that are left of its site."""
        if not any(s.name in self.dropped for s in layer.sites):
            return w
        terms = Terms.among(of_site(parts, layer.sites[0].name))
        assert terms is not None
        return terms.weight().to(w.dtype)

    @property
    def head(self) -> Basis | None:
        """What the head's inputs are turned back by, behind a norm whose weight is 1."""
        if self.stream is None or self.stream.turns is None:
            return None
        left, right = self.stream.turns
        return Basis(None, left.T.contiguous(), right.T.contiguous())


Parts = Callable[[int, list[str]], dict[str, Tensor]]  # of a block, those parts of these names that there are, by `<site>:<part>`


def fused(net: Network, parts: Parts, weight: Callable[[str], Tensor], free_table: bool) -> Fused:
    """What can be left out of the bases of a network's sites. `parts`: of a block; `weight`: a stored tensor by name as it was edited;
    `free_table`: whether the table of embeddings is no head besides."""
    found = Fused()
    stream = graph.stream(net.family)
    if stream is None:
        return found
    sides = [f"{side}_{k}" for side in (INSIDE, OUTSIDE) for k in ("scale", "left", "right")]
    ends, wants = [], ["columns", "entries", *sides]
    turn: Basis | None = None
    for i in range(net.n_blocks):
        its = parts(i, [f"{s.name}:{k}" for s in net.sites_of(i) for k in wants])
        bases = {s.name: (Basis.among(mine := of_site(its, s.name), INSIDE), Basis.among(mine, OUTSIDE)) for s in net.sites_of(i)}
        spared = {n.rpartition(":")[0] for n in its if n.endswith((":columns", ":entries"))}
        _heads(net, i, bases, spared, found)
        turn = turn or next((b for s in net.sites_of(i) if s.role in ("o", "down") and (b := bases[s.name][1]) is not None), None)
        ends.append((bases, spared))
    if turn is None:
        return found
    if (why := _stream(net, stream, ends, turn, weight, free_table, found)) is not None:
        return replace(found, why_not=why)
    return found


def same(a: Basis | None, b: Basis | None) -> bool:
    if a is None or b is None:
        return a is b
    mine, its = a.parts(""), b.parts("")
    return mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in mine)


Bases = dict[str, tuple[Basis | None, Basis | None]]  # of a site's inputs and outputs


def _heads(net: Network, i: int, bases: Bases, spared: set[str], found: Fused) -> None:
    """Drop the turn of a block's heads where v and o agree on it."""
    v, o = (next((s for s in net.sites_of(i) if s.group == "attn" and s.role == r), None) for r in "vo")
    if v is None or o is None:  # a layer without attention
        return
    its, reads = bases[v.name][1], bases[o.name][0]
    if its is None or reads is None or its.turns is None or reads.turns is None or its.scale is not None or reads.scale is not None:
        return
    heads, kv, width = graph.heads(net.config_of(i))
    turn = its.turns[1]
    if {v.name, o.name} & spared or len(turn) != width or not (same(its, Basis(None, torch.eye(kv), turn))
                                                             and same(reads, Basis(None, torch.eye(heads), turn))):
        return
    found.dropped.setdefault(v.name, set()).add(OUTSIDE)
    found.dropped.setdefault(o.name, set()).add(INSIDE)
    if (bias := net.bias_file(v)) is not None:
        found.turned[bias] = its.of


def _stream(net: Network, stream: graph.Stream, ends: list[tuple[Bases, set[str]]], turn: Basis, weight: Callable[[str], Tensor],
            free_table: bool, found: Fused) -> str | None:
    """Drop the turn of the residual stream; why it stays, where somebody does not agree."""
    dropped: list[tuple[str, str]] = []
    turned: dict[str, Callable[[Tensor], Tensor]] = {}
    plain = turn.scale if turn.scale is not None else torch.ones(turn.size)
    for i, (bases, spared) in enumerate(ends):
        for s in net.sites_of(i):
            if s.name in spared:
                return f"what {s.name} spares is in no basis"
            if s.role in ("o", "down"):
                if not same(bases[s.name][1], turn):
                    return f"{s.name} writes it in another basis"
                dropped.append((s.name, OUTSIDE))
                if (bias := net.bias_file(s)) is not None:
                    turned[bias] = turn.of
            if (norm := stream.norms.get(s.input)) is None:
                continue
            mine = bases[s.name][0]
            file = net.block_file(i, f"{norm}.weight")
            if mine is None or mine.scale is None or not same(Basis(None, mine.left, mine.right), Basis(None, turn.left, turn.right)):
                return f"{s.name} reads it in another basis"
            left = weight(file).float() * mine.scale
            if not torch.allclose(left.abs(), plain.abs(), rtol=NEAR, atol=0):
                return f"the norm before {s.name} has weights that are nearly zero"
            if not torch.equal(left.sign(), plain.sign()):
                return f"{s.name} reads it in another basis"
            dropped.append((s.name, INSIDE))
            turned[file] = torch.ones_like
    if not free_table:
        return "the head is the table of embeddings; --head int8 stores it apart"
    found.turned |= turned | {net.file(net.table): turn.of, (last := net.file(f"{net.base}{stream.last}.weight")): torch.ones_like}
    for name, side in dropped:
        found.dropped.setdefault(name, set()).add(side)
    found.stream, found.last = turn, weight(last).float() / plain
    return None
