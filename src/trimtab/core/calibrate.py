"""One pass over a block for the union of the statistics asked for; the walk from block to block."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.data import Batch, group
from trimtab.core.memory import Store
from trimtab.core.registry import Method, get
from trimtab.core.types import BadInput, Site

Tick = Callable[[], None]


@dataclass
class Collector:
    """Running statistics of one block. `wanted` maps each site to the statistics it needs."""

    wanted: dict[str, set[str]]
    sites: dict[str, Site]
    sums: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    inputs: dict[str, set[str]] = field(init=False)     # key of an activation -> statistics wanted of it
    gradients: dict[str, set[str]] = field(init=False)  # site -> statistics wanted of its gradient

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
        return {"input": site.input, "sublayer": site.group, "grad": site.name}[of]

    @property
    def kinds(self) -> set[str]:
        """What the block has to be tapped for."""
        return {"sublayer" if _of(s) == "sublayer" else "input" for stats in self.inputs.values() for s in stats}

    def see(self, kind: str, key: str, *tensors: Tensor) -> None:
        for stat in sorted(self.inputs.get(key, ())):
            if (_of(stat) == "sublayer") == (kind == "sublayer"):
                self._add(stat, key, len(tensors[0]), *tensors)

    def see_gradient(self, site: Site, g: Tensor) -> None:
        for stat in sorted(self.gradients.get(site.name, ())):
            self._add(stat, site.name, 1, g)

    def _add(self, stat: str, key: str, count: int, *tensors: Tensor) -> None:
        m, at = get(f"stat/{stat}"), (stat, key)
        value = m.fn(*tensors)
        self.counts[at] = self.counts.get(at, 0) + count
        if m.facts["merge"] == "stack":
            self.sums.setdefault(at, []).append(value)  # type: ignore[arg-type,union-attr]
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
            zero = m.fn(torch.zeros(site.shape if _of(stat) == "grad" else (1, site.shape[1])))
            return zero[None] if m.facts["merge"] == "stack" else zero
        value = torch.stack(self.sums[at]) if m.facts["merge"] == "stack" else self.sums[at]  # type: ignore[arg-type]
        value = value / self.counts[at] if m.facts["mean"] else value
        return m.facts["done"](value) if m.facts["done"] else value

    def starved(self) -> list[str]:
        """Activations that no calibration token reached (an expert that was never chosen)."""
        return sorted(k for k in self.inputs if not any(at[1] == k for at in self.sums))


def _of(stat: str) -> str:
    return get(f"stat/{stat}").facts["of"]


class Walk:
    """Calibration batches on their way through the blocks of one network.

    Hidden states are kept for one place of the network (all places, for a backward walk), in memory or, above
    `spill` bytes, in files under `scratch`.
    """

    def __init__(self, net: Any, samples: list[Batch], scratch: Path, spill: int | None, width: int = 8):
        self.net, self.samples, self.scratch, self.spill = net, samples, scratch, spill
        self.batches = group(samples, width)
        self.contexts: list[Any] = []
        self.store: Store | None = None
        self.made = 0

    def _new(self, like: Tensor, places: int = 1) -> Store:
        rows = sum(len(next(iter(b.values()))) for b in self.batches)
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


class BackwardWalk(Walk):
    """The dense network from its last block to its first, with the gradient of each sequence's mean next-token loss.

    The whole model is never held: block inputs come from a forward walk, each block is differentiated on its own.
    """

    def __init__(self, net: Any, samples: list[Batch], scratch: Path, spill: int | None):
        if net.kind != "lm":
            raise BadInput("gradient statistics need a language model's loss; this model has none, use wanda, sparsegpt or admm")
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
