"""What the loss of a language model rises by where some of its sites are rounded and all others are not."""
from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.calibrate import Walk
from trimtab.core.data import Batch
from trimtab.core.memory import Store
from trimtab.core.types import Site

SEQUENCES = 16  # that the loss is measured on


class Measured(Walk):
    """Networks that differ in a few sites each, on their way through the blocks together: every block is read once.

    `count`: how many there will be. Hidden states of all of them are kept, above `spill` bytes in files.
    """

    def __init__(self, net: Any, samples: list[Batch], scratch: Path, spill: int | None, count: int):
        super().__init__(net, samples[:SEQUENCES], scratch, spill)
        self.places = count + 1
        self.others: dict[Hashable, Store] = {}
        self.embed(self.places)

    @torch.no_grad()
    def through(self, i: int, module: nn.Module, variants: Iterable[tuple[Hashable, Mapping[Site, Tensor]]]) -> None:
        """Through block i, with which each of the `variants` begins: the weights [out, in] of its sites, by a name of its own."""
        assert self.store is not None
        begun: dict[Hashable, Store] = {}
        for name, weights in variants:
            before = {s: self.net.weight(module, s) for s in weights}
            for s, w in weights.items():
                self.net.set_weight(module, s, w.to(self.net.stored_dtype(s)))
            begun[name] = self._new(self.store[0], self.places)
            for b, x in enumerate(self.store):
                begun[name].append(self.net.run(module, i, x, self.contexts[b]))
            for s, w in before.items():
                self.net.set_weight(module, s, w)
        for store in (self.store, *self.others.values()):
            for b, x in enumerate(store):
                store[b] = self.net.run(module, i, x, self.contexts[b])
        self.others |= begun

    @torch.no_grad()
    def rises(self) -> dict[Hashable, float]:
        """Of every variant, behind the last block: how far its mean loss of a next token is above that of the network itself, in nats."""
        assert self.store is not None
        own = self._loss(self.store)
        found = {name: self._loss(store) - own for name, store in self.others.items()}
        self.net.release()
        return found

    def _loss(self, store: Store) -> float:
        total, count = 0.0, 0
        for b, x in enumerate(store):
            ids = self.batches[b]["input_ids"]
            real = self.batches[b].get("attention_mask", torch.ones_like(ids)).bool()
            followed = real[:, :-1] & real[:, 1:]
            logits = self.net.finish(x, self.contexts[b], self.batches[b])[:, :-1][followed].float()
            total += float(nn.functional.cross_entropy(logits, ids[:, 1:][followed], reduction="sum"))
            count += int(followed.sum())
        return total / max(count, 1)

    def close(self) -> None:
        super().close()
        for store in self.others.values():
            store.close()
