"""One pass over a block for the union of the statistics asked for; the walk from block to block."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.data import Batch, group
from trimtab.core.memory import Store
from trimtab.core.registry import get
from trimtab.core.types import Site

Tick = Callable[[], None]
LISTS = {"stack": torch.stack, "cat": torch.cat}  # of values that are kept each, how they become one


class StatCache:
    """Statistics already taken, by content: hidden states, block weights, statistic, activation. For many recipes in one run."""

    def __init__(self, limit: int = 1_000_000_000):
        self.limit, self.held, self.hits = limit, 0, 0
        self.stats: dict[tuple[str, str, str], tuple[Any, int]] = {}
        self.outputs: dict[str, list[Tensor]] = {}

    def room(self, size: int) -> bool:
        self.held += size if (fits := self.held + size <= self.limit) else 0
        return fits


def content(store: Store, module: nn.Module) -> str:
    h = hashlib.blake2b(digest_size=16)
    for t in [*store, *module.parameters(), *module.buffers()]:
        h.update(t.detach().contiguous().view(torch.uint8).flatten().numpy())
    return h.hexdigest()


@dataclass
class Collector:
    """Running statistics of one block. `wanted` maps each site to the statistics it needs."""

    wanted: dict[str, set[str]]
    sites: dict[str, Site]
    sums: dict[tuple[str, str], Any] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    inputs: dict[str, set[str]] = field(init=False)     # key of an activation -> statistics wanted of it
    gradients: dict[str, set[str]] = field(init=False)  # site -> statistics wanted of its gradient
    taken: set[tuple[str, str]] = field(default_factory=set)  # had from the cache

    def __post_init__(self) -> None:
        self.inputs, self.gradients = {}, {}
        for name, stats in self.wanted.items():
            for stat in stats:
                where = self.gradients if _of(stat) == "grad" else self.inputs
                where.setdefault(self._key(self.sites[name], stat), set()).add(stat)

    def _key(self, site: Site, stat: str) -> str:
        of = _of(stat)
        if of == "mid":
            return self.sites[site.consumer].input if site.consumer in self.sites else site.input
        return {"input": site.input, "hidden": site.input, "fed": site.input, "sentence": site.input,
                "sublayer": site.group, "block": "block", "grad": site.name}[of]

    @property
    def kinds(self) -> set[str]:
        """What the block has to be tapped for."""
        return {_kind(s)
                for key, stats in self.inputs.items() for s in stats if (s, key) not in self.taken}

    def take(self, cache: StatCache, at: str) -> None:
        for key, stats in self.inputs.items():
            for stat in stats:
                if (at, stat, key) in cache.stats:
                    self.sums[stat, key], self.counts[stat, key] = cache.stats[at, stat, key]
                    self.taken.add((stat, key))
                    cache.hits += 1

    def give(self, cache: StatCache, at: str) -> None:
        for (stat, key), value in self.sums.items():
            if (stat, key) not in self.taken and cache.room(sum(t.nbytes for t in value) if isinstance(value, list) else value.nbytes):
                cache.stats[at, stat, key] = (value, self.counts[stat, key])

    def see(self, kind: str, key: str, *tensors: Tensor) -> None:
        for stat in sorted(self.inputs.get(key, ())):
            if _kind(stat) == kind and (stat, key) not in self.taken:
                self._add(stat, key, len(tensors[0]), *tensors)

    def see_gradient(self, site: Site, g: Tensor) -> None:
        for stat in sorted(self.gradients.get(site.name, ())):
            self._add(stat, site.name, 1, g)

    def _add(self, stat: str, key: str, count: int, *tensors: Tensor) -> None:
        m, at = get(f"stat/{stat}"), (stat, key)
        self.counts[at] = self.counts.get(at, 0) + count
        if m.facts["into"]:
            if at not in self.sums:
                self.sums[at] = m.fn(*(t[:0] for t in tensors))
            m.facts["into"](self.sums[at], *tensors)
            return
        value = m.fn(*tensors)
        if m.facts["merge"] in LISTS:
            self.sums.setdefault(at, []).append(value)
        elif at not in self.sums:
            self.sums[at] = value.clone()
        elif m.facts["merge"] == "max":
            torch.maximum(self.sums[at], value, out=self.sums[at])
        else:
            self.sums[at] += value

    def of(self, site: Site) -> dict[str, Tensor]:
        """The finished statistics of one site. An input no token reached counts as zero."""
        return {stat: self._finish(stat, self._key(site, stat), site) for stat in sorted(self.wanted.get(site.name, ()))}

    def _finish(self, stat: str, key: str, site: Site) -> Tensor:
        m, at = get(f"stat/{stat}"), (stat, key)
        if at not in self.sums:  # no token reached it: what a single zero gives
            width = site.shape[0] if _of(stat) == "mid" and site.consumer in self.sites else site.shape[1]
            zero = m.fn(*(torch.zeros(site.shape if _of(stat) == "grad" else (1, width)) for _ in m.data))
            return zero[None] if m.facts["merge"] == "stack" else zero
        if m.facts["merge"] in LISTS:
            value = LISTS[m.facts["merge"]](self.sums[at])
        else:
            if m.facts["mean"] and self.counts[at] != 1:  # in the sum's place: both would be the largest things held
                self.sums[at], self.counts[at] = self.sums[at] / self.counts[at], 1
            value = self.sums[at]
        return m.facts["done"](value) if m.facts["done"] else value

    def starved(self) -> list[str]:
        """Activations that no calibration token reached (an expert that was never chosen)."""
        return sorted(k for k in self.inputs if not any(at[1] == k for at in self.sums))


def _of(stat: str) -> str:
    return get(f"stat/{stat}").facts["of"]


def _kind(stat: str) -> str:
    """What a block is tapped for to take it."""
    return of if (of := _of(stat)) in ("sublayer", "hidden", "fed", "sentence") else "sublayer" if of == "block" else "input"


class Walk:
    """Calibration batches on their way through the blocks of one network.

    Hidden states are kept for one place of the network (all places, for a backward walk), in memory or, above
    `spill` bytes, in files under `scratch`.
    """

    def __init__(self, net: Any, samples: list[Batch], scratch: Path, spill: int | None, width: int = 8,
                 cache: StatCache | None = None):
        self.net, self.samples, self.scratch, self.spill, self.cache = net, samples, scratch, spill, cache
        self.batches = group(samples, width)
        self.contexts: list[Any] = []
        self.store: Store | None = None
        self.made = 0

    def _new(self, like: Tensor, places: int = 1, rows: int = 0) -> Store:
        """Room for hidden states of so many sequences, or of all, at one of `places`."""
        rows = rows or sum(len(next(iter(b.values()))) for b in self.batches)
        size = like[0].numel() * like.element_size() * rows * places
        self.made += 1
        spilled = self.spill is not None and size > self.spill
        return Store(self.scratch / f"hidden{self.made}" if spilled else None)

    def embed(self, places: int = 1) -> None:
        self.contexts = []
        for b in self.batches:
            hidden, context = self.net.embed(b)
            if self.store is None:
                self.store = self._new(hidden, places)
            self.store.append(hidden)
            self.contexts.append(context)
        self.net.release()

    def close(self) -> None:
        if self.store:
            self.store.close()
            self.store = None

    @torch.no_grad()
    def forward(self, module: nn.Module, i: int, collect: Collector | None, advance: bool, tick: Tick) -> None:
        """Run block i on every batch; its outputs become the hidden states when `advance`."""
        assert self.store is not None
        at = content(self.store, module) if self.cache and (collect or advance) else ""
        if self.cache and collect is not None:
            collect.take(self.cache, at)
        known = self.cache.outputs.get(at) if self.cache else None
        if (known or not advance) and (collect is None or not collect.kinds):
            for b in range(len(self.batches)):
                if advance and known:
                    self.store[b] = known[b]
                tick()
            return
        for b in range(len(self.batches)):
            x = self.store[b]
            if collect is not None and collect.kinds:
                with self.net.taps(module, i, collect.kinds, collect.see):
                    y = self.net.run(module, i, x, self.contexts[b])
            else:
                y = self.net.run(module, i, x, self.contexts[b])
            if advance:
                self.store[b] = y
            tick()
        if self.cache and collect is not None:
            collect.give(self.cache, at)
        if self.cache and advance and self.cache.room(sum(x.nbytes for x in self.store)):
            self.cache.outputs[at] = list(self.store)


class BackwardWalk(Walk):
    """The dense network from its last block to its first, with the gradient of each sequence's mean next-token loss.

    The whole model is never held: block inputs come from a forward walk, each block is differentiated on its own.
    """

    def __init__(self, net: Any, samples: list[Batch], scratch: Path, spill: int | None):
        super().__init__(net, samples, scratch, spill, width=1)
        self.inputs: list[Store] = []
        self.upstream: Store | None = None

    def start(self, tick: Tick) -> None:
        self.embed(places=self.net.n_blocks + 1)
        assert self.store is not None
        for i in range(self.net.n_blocks):
            module = self.net.block(i)
            after = self._new(self.store[0], self.net.n_blocks + 1)
            with torch.no_grad():
                for b, x in enumerate(self.store):
                    after.append(self.net.run(module, i, x, self.contexts[b]))
                    tick()
            self.inputs.append(self.store)
            self.store = after
        self.upstream = self._new(self.store[0], self.net.n_blocks + 1)
        for b, batch in enumerate(self.batches):
            x = self.store[b].clone().requires_grad_()
            with torch.enable_grad():
                logits = self.net.finish(x, self.contexts[b], batch)
                loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten())
                self.upstream.append(torch.autograd.grad(loss, x)[0])
        self.net.release()

    def back(self, module: nn.Module, i: int, sites: Iterable[Site], collect: Collector | None, tick: Tick) -> None:
        """Through block i: gradients of its sites go to `collect`, the hidden gradient moves one block down."""
        assert self.upstream is not None
        sites = [s for s in sites if collect is not None and s.name in collect.wanted]
        for p in {id(p): p for p in (self.net.param(module, s) for s in sites)}.values():
            p.requires_grad_(True)
        for b in range(len(self.batches)):
            x = self.inputs[i][b].clone().requires_grad_()
            module.zero_grad(set_to_none=True)
            with torch.enable_grad():
                if collect is not None and collect.kinds:
                    with self.net.taps(module, i, collect.kinds, lambda k, key, *t: collect.see(k, key, *(v.detach() for v in t))):
                        y = self.net.run(module, i, x, self.contexts[b])
                else:
                    y = self.net.run(module, i, x, self.contexts[b])
                y.backward(self.upstream[b])
            if collect is not None:
                for s in sites:
                    collect.see_gradient(s, self.net.weight_grad(module, s))
            assert x.grad is not None
            self.upstream[b] = x.grad
            tick()
        module.zero_grad(set_to_none=True)
        module.requires_grad_(False)
        self.inputs[i].close()

    def close(self) -> None:
        super().close()
        for s in [*self.inputs, *([self.upstream] if self.upstream else [])]:
            s.close()
