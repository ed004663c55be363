"""What it costs to round or to gate some sites and no others, as it is measured: of the loss, or of the outputs of a block."""
from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trimtab.core.calibrate import Walk
from trimtab.core.data import Batch
from trimtab.core.edits import edited
from trimtab.core.memory import Store
from trimtab.core.spec import Pass, Step
from trimtab.core.types import Site

SEQUENCES = 16  # that the loss is measured on
TRIED = 1024    # tokens that shares are tried on, held in memory
NONE: Mapping[Any, Any] = MappingProxyType({})


@contextmanager
def replaced(net: Any, module: nn.Module, weights: Mapping[Site, Tensor]) -> Iterator[nn.Module]:
    """A block with other weights [out, in] of some sites, which has its own again afterwards."""
    before = {s: net.weight(module, s) for s in weights}
    try:
        for s, w in weights.items():
            net.set_weight(module, s, w.to(net.stored_dtype(s)))
        yield module
    finally:
        for s, w in before.items():
            net.set_weight(module, s, w)


def loss_behind(walk: Walk, hidden: Iterable[Tensor]) -> float:
    """The mean loss of a next token in nats, of a walk's batches whose hidden states behind the last block are these."""
    each = list(losses_behind(walk, hidden))
    return sum(total for total, _ in each) / max(sum(count for _, count in each), 1)


def losses_behind(walk: Walk, hidden: Iterable[Tensor]) -> Iterator[tuple[float, int]]:
    """Of every sequence the loss of all its next tokens, and how many there are."""
    for b, x in enumerate(hidden):
        ids = walk.batches[b]["input_ids"]
        real = walk.batches[b].get("attention_mask", torch.ones_like(ids)).bool()
        followed = real[:, :-1] & real[:, 1:]
        logits = walk.net.finish(x, walk.contexts[b], walk.batches[b])[:, :-1][followed].float()
        each = nn.functional.cross_entropy(logits, ids[:, 1:][followed], reduction="none").double()
        sums = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, followed.nonzero()[:, 0], each)
        yield from zip(sums.tolist(), followed.sum(1).tolist(), strict=True)


def divergences_behind(walk: Walk, own: Sequence[Tensor], others: Sequence[Sequence[Tensor]]) -> list[float]:
    """How far what networks say of the next token is from what one says whose hidden states behind the last block are `own`: the mean of
    the Kullback-Leibler divergence over a walk's batches, in nats.

    In expectation that is what the loss rises by, where text is as that network believes it is; and it is never below zero, and varies far
    less from text to text than the rise itself.
    """
    total, count = [0.0] * len(others), 0
    for b, x in enumerate(own):
        ids = walk.batches[b]["input_ids"]
        real = walk.batches[b].get("attention_mask", torch.ones_like(ids)).bool()
        followed = real[:, :-1] & real[:, 1:]

        def said(hidden: Tensor, b: int = b, followed: Tensor = followed) -> Tensor:
            return walk.net.finish(hidden, walk.contexts[b], walk.batches[b])[:, :-1][followed].float().log_softmax(-1)

        first = said(x)
        sure = first.exp().flatten()
        for k, states in enumerate(others):  # differences are small beside what they are of
            total[k] += float(torch.dot(sure, said(states[b]).neg_().add_(first).flatten()))
        count += int(followed.sum())
    return [max(0.0, t / max(count, 1)) if math.isfinite(t) else math.inf for t in total]


class Measured(Walk):
    """Networks that differ in one block each, on their way through the blocks together: every block is read once.

    `count`: how many there will be. Hidden states of all of them are kept, above `spill` bytes in files.
    """

    def __init__(self, net: Any, samples: list[Batch], scratch: Path, spill: int | None, count: int):
        super().__init__(net, samples[:SEQUENCES], scratch, spill)
        self.places = count + 1
        self.others: dict[Hashable, Store] = {}
        self.embed(self.places)

    @torch.no_grad()
    def through(self, i: int, module: nn.Module, variants: Iterable[tuple[Hashable, AbstractContextManager[nn.Module]]]) -> None:
        """Through block i, with which each of the `variants` begins: what it has in its place, by a name of its own."""
        assert self.store is not None
        begun: dict[Hashable, Store] = {}
        for name, variant in variants:
            begun[name] = self._new(self.store[0], self.places)
            with variant as other:
                for b, x in enumerate(self.store):
                    begun[name].append(self.net.run(other, i, x, self.contexts[b]))
        for store in (self.store, *self.others.values()):
            for b, x in enumerate(store):
                store[b] = self.net.run(module, i, x, self.contexts[b])
        self.others |= begun

    @torch.no_grad()
    def rises(self) -> dict[Hashable, float]:
        """Of every variant, behind the last block: how far its mean loss of a next token is above that of the network itself, in nats."""
        assert self.store is not None
        own = loss_behind(self, self.store)
        found = {name: loss_behind(self, store) - own for name, store in self.others.items()}
        self.net.release()
        return found

    @torch.no_grad()
    def distances(self) -> dict[Hashable, float]:
        """Of every variant, behind the last block: how far hidden states are off, squared, as a share of them, the mean over tokens."""
        assert self.store is not None
        off, count = dict.fromkeys(self.others, 0.0), 0
        for b, x in enumerate(self.store):
            mask = self.contexts[b].mask
            own, *theirs = (t.double().flatten(0, 1)[slice(None) if mask is None else mask]
                            for t in (x, *(store[b] for store in self.others.values())))
            count += len(own)
            for name, y in zip(self.others, theirs, strict=True):
                off[name] += float(((y - own).square().sum(1) / own.square().sum(1).clamp_min(1e-30)).sum())
        return {name: total / max(1, count) for name, total in off.items()}

    def close(self) -> None:
        super().close()
        for store in self.others.values():
            store.close()


class Error(Protocol):
    def __call__(self, parts: Mapping[str, Tensor], weights: Mapping[Site, Tensor] = ...) -> float: ...


class Tried(Walk):
    """Calibration sequences on their way through the blocks, with each of which something can be tried."""

    def __init__(self, net: Any, samples: list[Batch], scratch: Path):
        super().__init__(net, samples, scratch, None)
        self.embed()

    @torch.no_grad()
    def through(self, i: int, module: nn.Module) -> Error:
        """Through block i. Returns how far its outputs are off where sites have these parts, by `<site>:<part>`, and these weights.

        That is the norm over tokens of what a channel is off, averaged over channels, as a share of the same of the channels themselves.
        """
        assert self.store is not None
        inputs = list(self.store)
        outputs = [self.net.run(module, i, x, self.contexts[b]) for b, x in enumerate(inputs)]
        for b, y in enumerate(outputs):
            self.store[b] = y

        @torch.no_grad()
        def error(parts: Mapping[str, Tensor], weights: Mapping[Site, Tensor] = NONE) -> float:
            off = own = outputs[0].new_zeros(outputs[0].shape[-1], dtype=torch.float32)
            with replaced(self.net, module, weights):
                twin = self.net.twin(module)
                self.net.as_said(twin, i, parts)
                for b, x in enumerate(inputs):
                    y, real = self.net.run(twin, i, x, self.contexts[b]), self.contexts[b].mask
                    its, was = (t.float().flatten(0, -2)[slice(None) if real is None else real] for t in (y, outputs[b]))
                    off, own = off + (its - was).square().sum(0), own + was.square().sum(0)
            return float(off.sqrt().mean() / own.sqrt().mean().clamp_min(torch.finfo(torch.float32).tiny))

        return error


class Gating:
    """A block whose sites the gate of a pass may leave inputs out of: what a budget tries shares on.

    `stats` has the statistics of every site, `weight` gives its weight, [out, in]; `error` is what `Tried` says of the block. A gate that
    would let so many pass of every token stands for that share by a threshold here, which takes no sorting.
    """

    def __init__(self, p: Pass, sites: Iterable[Site], stats: Callable[[Site], dict[str, Tensor]], weight: Callable[[Site], Tensor],
                 error: Callable[[Mapping[str, Tensor]], float]):
        self.sites = {s.name: s for s in sites}
        self._stats, self._weight, self._error = {n: stats(s) for n, s in self.sites.items()}, weight, error
        gate = p.steps["gate"]
        if "exact" in gate.method.knobs:
            p = replace(p, steps={**p.steps, "gate": Step(gate.key, tuple(sorted({**dict(gate.knobs), "exact": False}.items())))})
        self._pass = p
        self._known: dict[tuple[str, float], dict[str, Tensor]] = {}

    def error(self, shares: Mapping[str, float]) -> float:
        parts: dict[str, Tensor] = {}
        for n, keep in shares.items():
            if keep < 1:
                parts |= self._parts(n, keep)
        return self._error(parts)

    def _parts(self, name: str, keep: float) -> dict[str, Tensor]:
        """Of the gate of a site: a share comes up in many trials."""
        if (name, keep) not in self._known:
            w = self._weight(self.sites[name]).float()
            change = edited(self._pass, w, keep, self._stats[name], None)
            self._known[name, keep] = {f"{name}:{k}": t for k, t in change.parts.items()}
        return self._known[name, keep]
