"""Training at the level of the network: edited blocks from the journal, one loss over all of them, a share of the samples held out."""
from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.calibrate import Walk
from trimtab.core.data import Batch
from trimtab.core.journal import write_tensors
from trimtab.core.memory import Store
from trimtab.core.types import BadInput, Change, Loss, Seen, Site, Start, Weight
from trimtab.methods.terms import of_site
from trimtab.network.checkpoint import SafeFile

HELD = 5          # one of so many samples is held out
EVERY = 25        # updates from one check on the samples held out to the next
PATIENCE = 5      # checks without gain until training stops
ROOM = 2e9        # bytes that kept blocks may take where no limit of memory is given
MINUTE = 60.0     # seconds after which the state is journalled between checks, too
BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam

Own = dict[str, dict[str, Tensor]]  # what is trained, by site and name
Read = Callable[[int], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]  # a block's tensors, and parts by `<site>:<part>`


def held_bytes(net: Any, tokens: int) -> float:
    """What all blocks take where they are kept: weights, gradients and what sites were edited to, and what a sequence leaves behind."""
    return 12.0 * sum(s.size for s in net.sites) + 8.0 * tokens * sum(sum(s.shape) for s in net.sites)


@dataclass
class State:
    """Where training stands: what is trained with both moments of its gradients, and what did best so far, none at first."""

    own: Own
    first: Own
    second: Own
    best: Own
    least: float      # loss of the best on the samples held out
    began: float      # of the sites as they were
    step: int = 0     # updates made
    idle: int = 0     # checks since the best

    def write(self, path: Path) -> None:
        tensors = {f"{kind}:{site}:{name}": t for kind in ("own", "first", "second", "best")
                   for site, its in getattr(self, kind).items() for name, t in its.items()}
        write_tensors(path, tensors, {k: getattr(self, k) for k in ("least", "began", "step", "idle")})

    @staticmethod
    def read(path: Path) -> State:
        f = SafeFile(path)
        kinds: dict[str, Own] = {"own": {}, "first": {}, "second": {}, "best": {}}
        for n in f.names:
            kind, site, name = n.split(":")
            kinds[kind].setdefault(site, {})[name] = f.read(n)
        notes: dict[str, Any] = json.loads(f.metadata["notes"])
        return State(kinds["own"], kinds["first"], kinds["second"], kinds["best"], **notes)

    def update(self, grads: Own, lr: float) -> None:
        """One step of Adam."""
        self.step += 1
        for site, its in grads.items():
            for name, g in its.items():
                m, v = self.first[site][name], self.second[site][name]
                m.lerp_(g, 1 - BETAS[0])
                v.lerp_(g.square(), 1 - BETAS[1])
                root = (v / (1 - BETAS[1] ** self.step)).sqrt_()
                self.own[site][name].sub_(m / (root + EPS), alpha=lr / (1 - BETAS[0] ** self.step))


class Net(Walk):
    """A network with edited `sites`, whose blocks `read` gives, as a repair at its level sees it.

    Sequences go through one at a time where all blocks, and what a sequence leaves behind in them, take no more than `room` bytes; else
    those of one update go block by block, twice through every block, which is read each time. Both give the same bits. The state of
    the training is kept in the file `state`, from which it goes on.
    """

    def __init__(self, net: Any, sites: Iterable[Site], read: Read, samples: list[Batch], scratch: Path, spill: int | None,
                 room: float = ROOM, state: Path | None = None, tick: Callable[[str, int, int], None] = lambda *_: None):
        super().__init__(net, samples, scratch, spill, width=1)
        self.read, self.state, self.tick = read, state, tick
        self.of_block: dict[int, list[Site]] = {}
        self.trained = list(sites)
        for s in self.trained:
            self.of_block.setdefault(s.block, []).append(s)
        count = len(self.batches)
        if count < 2:
            raise BadInput("training holds samples out to judge itself by; give two samples or more")
        self.held = list(range(HELD - 1, count, HELD)) or [count - 1]
        self.taught = [b for b in range(count) if b not in self.held]
        self.kept = held_bytes(net, max(b["input_ids"].numel() for b in self.batches)) <= room
        self.blocks: dict[int, tuple[nn.Module, dict[str, Change]]] = {}
        self.ready = False

    # ---- the loop ---------------------------------------------------------------------------
    def fit(self, start: Start, weight: Weight, loss: Loss, *, lr: float, epochs: int, accumulate: int, seed: int,
            dtype: torch.dtype) -> Own:
        """See `types.Net`. What is judged is what would be stored: in `dtype`, the weight in that of the files."""
        draw = torch.Generator().manual_seed(seed)
        order = torch.cat([torch.randperm(len(self.taught), generator=draw) for _ in range(epochs)])
        updates = order.split(accumulate)
        self._use(None, weight, True)
        if self.state is not None and self.state.exists():
            t = State.read(self.state)
        else:
            own = {s.name: start(changes[s.name], draw) for i in sorted(self.of_block) for changes in [self._block(i)[1]]
                   for s in self.of_block[i]}
            least = self._measure(None, weight, loss)
            first, second = ({n: {k: torch.zeros_like(v) for k, v in its.items()} for n, its in own.items()} for _ in range(2))
            t = State(own, first, second, {}, least, least)
        saved = time.monotonic()
        while t.step < len(updates) and t.idle < PATIENCE:
            t.update(self._gradients([self.taught[n] for n in updates[t.step].tolist()], t.own, weight, loss), lr)
            if judged := t.step % EVERY == 0 or t.step == len(updates):
                now = {n: {k: v.to(dtype, copy=True) for k, v in its.items()} for n, its in t.own.items()}
                value = self._measure(now, weight, loss)
                better = value < t.least
                t.least, t.best, t.idle = (value, now, 0) if better else (t.least, t.best, t.idle + 1)
            if self.state is not None and (judged or time.monotonic() - saved > MINUTE):
                t.write(self.state)
                saved = time.monotonic()
            self.tick("train", t.step, len(updates))
        self.tick(f"trained: loss on the samples held out {t.began:.4f}, at best {t.least:.4f}, {t.step} of {len(updates)} updates", 0, 0)
        self.blocks = {}
        self.net.release()
        return t.best

    def updates(self, start: Start, weight: Weight, loss: Loss, *, lr: float, epochs: int, accumulate: int,
                seed: int) -> Iterator[tuple[Own, Own]]:
        """See `types.Net`."""
        draw = torch.Generator().manual_seed(seed)
        order = torch.cat([torch.randperm(len(self.taught), generator=draw) for _ in range(epochs)]).split(accumulate)
        self._use(None, weight, True)
        own = {s.name: start(changes[s.name], draw) for i in sorted(self.of_block) for changes in [self._block(i)[1]]
               for s in self.of_block[i]}
        first, second = ({n: {k: torch.zeros_like(v) for k, v in its.items()} for n, its in own.items()} for _ in range(2))
        t, grads = State(own, first, second, {}, 0.0, 0.0), own
        try:
            for ids in order:
                grads = self._gradients([self.taught[n] for n in ids.tolist()], t.own, weight, loss)
                yield t.own, grads
                t.update(grads, lr)
                self.tick("train", t.step, len(order))
            yield t.own, grads
        finally:
            self.blocks = {}
            self.net.release()

    # ---- blocks -----------------------------------------------------------------------------
    def _use(self, own: Own | None, weight: Weight, stored: bool) -> None:
        """From here on sites have the weights that `own` gives them, those they were edited to for none; `stored`: as files hold them."""
        self.now = own, weight, stored
        if own is None or not self.kept:
            self.blocks = {}
        for i in self.blocks:
            self._put(i)

    def _block(self, i: int) -> tuple[nn.Module, dict[str, Change]]:
        """Block i, and what its sites were edited to. Where not all are kept, the one before it goes."""
        if i not in self.blocks:
            tensors, parts = self.read(i)
            module, changes = self.net.block(i, tensors), {}
            for s in self.of_block.get(i, ()):
                its = of_site(parts, s.name)
                changes[s.name] = Change(self.net.weight(module, s), its)
                self.net.param(module, s).requires_grad_(True)
            self.blocks = {**(self.blocks if self.kept else {}), i: (module, changes)}
            self._put(i)
        return self.blocks[i]

    @torch.no_grad()
    def _put(self, i: int) -> None:
        own, weight, stored = self.now
        module, changes = self.blocks[i]
        if own is None:
            return
        for s in self.of_block.get(i, ()):
            w = weight(changes[s.name], own[s.name])
            self.net.set_weight(module, s, w.to(self.net.stored_dtype(s)) if stored else w)

    def _chained(self, i: int, own: Own, weight: Weight) -> Own:
        """Gradients of what is trained, from those of the block's weights, which are done with."""
        module, changes = self._block(i)
        grads: Own = {}
        for s in self.of_block.get(i, ()):
            its = {k: v.detach().requires_grad_() for k, v in own[s.name].items()}
            with torch.enable_grad():
                w = weight(changes[s.name], its)
            found = torch.autograd.grad(w, list(its.values()), self.net.weight_grad(module, s).to(w.dtype))
            grads[s.name] = dict(zip(its, found, strict=True))
        module.zero_grad(set_to_none=True)
        return grads

    # ---- walking ----------------------------------------------------------------------------
    def _prepare(self) -> None:
        """The hidden states in front of the first block, and behind the dense network."""
        self.embed(places=3)
        assert self.store is not None
        self.first = self.store
        self.last = self._new(self.first[0], 3)
        for x in self.first:
            self.last.append(x)
        with torch.no_grad():
            for i in range(self.net.n_blocks):
                module = self.net.block(i)
                for b, x in enumerate(self.last):
                    self.last[b] = self.net.run(module, i, x, self.contexts[b])
                self.tick("dense", i + 1, self.net.n_blocks)
            for b, x in enumerate(self.last):
                self.last[b] = self.net.ends(x, self.contexts[b], self.batches[b])[0]
        self.ready = True

    def _groups(self, ids: list[int]) -> list[list[int]]:
        """Sequences that go through the blocks together."""
        if not self.ready:
            self._prepare()
        return [[b] for b in ids] if self.kept else [ids]

    def _loss(self, b: int, x: Tensor, loss: Loss) -> Tensor:
        """Of sequence b, whose hidden states behind the last block are x."""
        batch = self.batches[b]
        hidden, logits = self.net.ends(x, self.contexts[b], batch)
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[0].bool()
        followed = real[:-1] & real[1:]
        return loss(Seen(hidden[0, real], self.last[b][0, real], logits[0, :-1][followed], batch["input_ids"][0, 1:][followed]))

    @torch.no_grad()
    def _measure(self, own: Own | None, weight: Weight, loss: Loss) -> float:
        """The mean loss of the samples held out, with weights as they would be stored."""
        self._use(own, weight, True)
        total = 0.0
        for group in self._groups(self.held):
            here = self._new(self.first[0], 3, len(group))
            for b in group:
                here.append(self.first[b])
            for i in range(self.net.n_blocks):
                module, _ = self._block(i)
                for j, b in enumerate(group):
                    here[j] = self.net.run(module, i, here[j], self.contexts[b])
            for j, b in enumerate(group):
                total += float(self._loss(b, here[j], loss))
            here.close()
        return total / len(self.held)

    def _gradients(self, ids: list[int], own: Own, weight: Weight, loss: Loss) -> Own:
        """Gradients of the mean loss of these sequences."""
        self._use(own, weight, False)
        grads: Own = {}
        groups, lowest = self._groups(ids), min(self.of_block)
        for group in groups:
            places, tape = self._ahead(group, lowest)
            upstream = places.pop()
            for j, b in enumerate(group):
                x = upstream[j].detach().requires_grad_()
                with torch.enable_grad():
                    upstream[j] = torch.autograd.grad(self._loss(b, x, loss) / len(ids), x)[0]
            for i in reversed(range(lowest, self.net.n_blocks)):
                module, _ = self._block(i)
                for j, b in enumerate(group):
                    x, y = tape.pop() if tape else self._run(module, i, places[i][j], b)
                    y.backward(upstream[j])
                    assert x.grad is not None
                    upstream[j] = x.grad
                if group is groups[-1]:
                    grads |= self._chained(i, own, weight)
            for store in (*places, upstream):
                store.close()
        return grads

    @torch.no_grad()
    def _ahead(self, group: list[int], lowest: int) -> tuple[list[Store], list[tuple[Tensor, Tensor]]]:
        """Hidden states of these sequences before every block and behind the last. Where blocks are kept also what goes in and what comes
        out of those that are differentiated, for a single sequence."""
        places, tape = [self._new(self.first[0], self.net.n_blocks, len(group))], []
        for b in group:
            places[0].append(self.first[b])
        for i in range(self.net.n_blocks):
            module, _ = self._block(i)
            after = self._new(self.first[0], self.net.n_blocks, len(group))
            for j, b in enumerate(group):
                if self.kept and i >= lowest:
                    tape.append(self._run(module, i, places[i][j], b))
                    after.append(tape[-1][1].detach())
                else:
                    after.append(self.net.run(module, i, places[i][j], self.contexts[b]))
            places.append(after)
        return places, tape

    @torch.enable_grad()
    def _run(self, module: nn.Module, i: int, x: Tensor, b: int) -> tuple[Tensor, Tensor]:
        """What goes into block i, and what comes out of it, to be differentiated."""
        x = x.detach().requires_grad_()
        return x, self.net.run(module, i, x, self.contexts[b])

    def close(self) -> None:
        super().close()
        for store in (self.first, self.last) if self.ready else ():
            store.close()
