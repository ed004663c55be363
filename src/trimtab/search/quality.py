"""How far a network is from itself with other sublayers: assembled from what each of them became, and run on the search split."""
from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.calibrate import Walk
from trimtab.core.data import Batch
from trimtab.core.measured import divergences_behind, losses_behind
from trimtab.network.stream import Network
from trimtab.search.front import ABOUT
from trimtab.search.options import DENSE, OPTIONS
from trimtab.search.space import Choices, Space

ROOM = 2_000_000_000  # bytes of hidden states that candidates hold at once
SURE = 2.0  # standard errors

Read = Callable[[Any, str], tuple[dict[str, Tensor], dict[str, Tensor]]]  # tensors and parts of a place and an option


class Assembled(Walk):
    """Candidates on their way through the blocks together: what begins alike is computed once.

    `read` gives what a place becomes; samples are those of the search split, and `more` text for what they leave open. The network itself
    is the first to be measured. `in_bytes`: layers of codes meet their inputs as our kernels have them.
    """

    def __init__(self, net: Network, space: Space, samples: list[Batch], read: Read, scratch: Path, more: Sequence[Batch] = (), *,
                 in_bytes: bool = True):
        super().__init__(net, samples, scratch, None)
        self.embed()
        self._more, self._further = list(more), list[Assembled]()
        assert self.store is not None
        self.space, self.read, self.in_bytes, self._inputs = space, read, in_bytes, list(self.store)
        self._held = sum(x.nbytes for x in self._inputs)
        self._by_block = [[p for p in space.places if p.block == i] for i in range(space.blocks)]
        self._own = self._behind([own := self._key(space.dense)])[own]
        self._known: dict[tuple[str, ...], float] = {own: 0.0}
        self._losses = list(losses_behind(self, self._own))
        self.dense = sum(total for total, _ in self._losses) / max(sum(count for _, count in self._losses), 1)
        net.release()

    def rises(self, candidates: Sequence[Choices]) -> list[float]:
        """Of each: how far what it says of the next token is from what the network itself says, in nats: what the loss rises by, where
        text is as the network believes it is. What the head may be does not count here."""
        keys = [self._key(c) for c in candidates]
        new = sorted(set(keys) - self._known.keys())
        some = max(1, int(ROOM / max(1, self._held)))
        for begin in range(0, len(new), some):
            part = new[begin:begin + some]
            states = self._behind(part)
            self._known |= zip(part, divergences_behind(self, self._own, [states[k] for k in part]), strict=True)
            self.net.release()
        return [self._known[k] for k in keys]

    def texts(self) -> Iterator[Assembled]:
        """This one, and then others of more text, as much again as there was so far."""
        yield self
        had, k = len(self.samples), 0
        while some := self._more[had - len(self.samples):][:had]:
            if k == len(self._further):
                self._further.append(Assembled(self.net, self.space, some, self.read, self.scratch, in_bytes=self.in_bytes))
            yield self._further[k]
            had, k = had + len(some), k + 1

    def offs(self, choices: Choices) -> list[float]:
        """What the loss of a token rises by, of every sequence."""
        key = self._key(choices)
        both = zip(losses_behind(self, self._behind([key])[key]), self._losses, strict=True)
        found = [(total - own) / max(count, 1) for (total, count), (own, _) in both]
        self.net.release()
        return found

    def _key(self, choices: Choices) -> tuple[str, ...]:
        return tuple(choices[p.name] for p in self.space.places)

    @torch.no_grad()
    def _behind(self, keys: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], list[Tensor]]:
        """Hidden states behind the last block."""
        states: dict[tuple[str, ...], list[Tensor]] = {(): self._inputs}  # by what was chosen so far
        at = 0
        for i, places in enumerate(self._by_block):
            at += len(places)
            begun = {k[:at] for k in keys}
            new: dict[tuple[str, ...], list[Tensor]] = {}
            for own in sorted({k[at - len(places):] for k in begun}):
                module = self._block(i, dict(zip((p.name for p in places), own, strict=True)))
                for k in (k for k in begun if k[at - len(places):] == own):
                    before = states[k[:at - len(places)]]
                    new[k] = [self.net.run(module, i, x, self.contexts[b]) for b, x in enumerate(before)]
            states = new
        return states

    def _block(self, i: int, choices: Mapping[str, str]) -> nn.Module:
        tensors: dict[str, Tensor] = {}
        parts: dict[str, Tensor] = {}
        for p in self._by_block[i]:
            if choices[p.name] != DENSE:
                its, said = self.read(p, choices[p.name])
                tensors, parts = {**tensors, **its}, {**parts, **said}
        module = self.net.block(i, tensors)
        if parts:
            self.net.as_said(module, i, parts)
        for p in self._by_block[i]:
            if self.in_bytes and (group := group_of(choices[p.name])) is not None:
                met = InBytes(group)
                for name in {s.param.rpartition(".")[0] for s in self.net.sites_of(i) if s.group == p.group}:
                    module.get_submodule(name).register_forward_pre_hook(met)
        return module


class Judge:
    """What the loss itself says, of as much text as that takes: of the search split, and of twice as much as long as that leaves it open,
    there is text, and there is time `until` a moment of `time.monotonic`. The divergence says more surely which of two is nearer to the
    network; the loss of text is what was asked about."""

    def __init__(self, assembled: Assembled, until: float = math.inf):
        self.assembled, self.until = assembled, until

    def within(self, choices: Choices, most: float) -> bool:
        """Whether its loss rises by no more than so many nats, and by two standard errors over the samples not. Where that is left open, it
        does not."""
        off: list[float] = []
        for walk in self._texts([choices]):
            off += walk.offs(choices)
            if not all(map(math.isfinite, off)):
                return False
            mean, error = mean_of(off)
            if mean + SURE * error <= most:
                return True
            if mean - SURE * error > most:
                return False
        return False

    def least(self, candidates: Sequence[Choices]) -> int:
        """Which one's loss rises the least. With every text those leave that are behind the best by two standard errors.

        Formula: of two, (k / a^2 + x / e^2) / (1 / a^2 + 1 / e^2), with the difference k of their divergences, off by a (ABOUT), and the
            mean x and the standard error e of what the one loses more than the other of every sequence
        Source: the mean of two measures weighed by their precision
        """
        told = self.assembled.rises(candidates)
        off: list[list[float]] = [[] for _ in candidates]

        def more(k: int, than: int) -> tuple[float, float]:
            return _weighed(told[k], told[than], [x - y for x, y in zip(off[k], off[than], strict=True)])

        left = sorted(range(len(candidates)), key=lambda k: told[k])
        for walk in self._texts(left) if len(left) > 1 else ():
            for k in left:
                off[k] += walk.offs(candidates[k])
            left[:] = [k for k in left if all(map(math.isfinite, off[k]))] or left[:1]
            if len(left) > 1:
                first = min(left, key=lambda k: more(k, left[0])[0])
                left[:] = [first, *(k for k in left if k != first and more(k, first)[0] <= SURE * more(k, first)[1])]
            if len(left) == 1:
                break
        return left[0]

    def _texts(self, running: Sequence[Any]) -> Iterator[Assembled]:
        """Texts, as long as there is time for what is running, as far as the last one tells; the search split at any rate."""
        pace = 0.0
        for walk in self.assembled.texts():
            began, runs = time.monotonic(), len(running) * len(walk.samples)
            if pace and began + pace * runs > self.until:
                return
            yield walk
            pace = (time.monotonic() - began) / runs


def mean_of(off: Sequence[float]) -> tuple[float, float]:
    """And its standard error, which of a single one is not known: as large as that one."""
    return statistics.fmean(off), statistics.stdev(off) / math.sqrt(len(off)) if len(off) > 1 else abs(off[0])


def _weighed(told: float, other: float, off: Sequence[float]) -> tuple[float, float]:
    """The mean of what is told and of what was found, and the standard error of what was found."""
    mean, error = mean_of(off)
    a, e = max(ABOUT * math.hypot(told, other), 1e-12) ** -2, max(error, 1e-12) ** -2
    return (a * (told - other) + e * mean) / (a + e), error


def group_of(option: str) -> int | None:
    """Inputs of an option's codes that have one scale; None where it has no codes."""
    grids = [p.steps["grid"] for p in OPTIONS[option].passes if "grid" in p.steps]
    return int(grids[-1].bound["group"]) if grids else None


class InBytes:
    """Lets layers meet x [..., in] as kernels of codes do: rounded to eight bits, by groups of inputs. Of one x in a row it is done once.

    Formula: round(x / s) s, s = max |x| / 127 of the group
    """

    def __init__(self, group: int):
        self.group = group
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        if self.last is None or self.last[0] is not x:
            wide = nn.functional.pad(x, (0, short)) if (short := -x.shape[-1] % self.group) else x
            wide = wide.unflatten(-1, (-1, self.group))
            scale = torch.maximum(wide.amax(-1, keepdim=True), -wide.amin(-1, keepdim=True)).div_(127).clamp_(min=1e-30)
            self.last = x, (wide / scale).round_().mul_(scale).flatten(-2)[..., :x.shape[-1]]
        return self.last[1], *args[1:]
