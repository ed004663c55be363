"""Time, as it is here: what every option of a sublayer takes in a step of decoding, in the model's own order and among its own bytes.

A layout is a packed model with one option wherever it fits, quickly made, since time hangs on shapes and formats and not on what the
weights are. Layouts and the dense model decode in turns, and the decoder itself says how long each sublayer took.
"""
from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core import data, line
from trimtab.core.journal import Journal
from trimtab.core.line import Options
from trimtab.network.checkpoint import Checkpoint
from trimtab.network.stream import Network
from trimtab.runtime import native
from trimtab.runtime.decoder import Decoder, open_decoder
from trimtab.search.edited import keep_known, key_of, read_known
from trimtab.search.options import ATTN, DENSE, DROP, HEAD, MADE, Whole
from trimtab.search.space import INT8, KEEP, Choices, Space, recipe_of

ROUNDS, NEW = 20, 64
FEW = 16              # samples that a layout is calibrated on, where it has to be
TOGETHER = 2_000_000_000  # bytes of decoders that take turns
LITTLE = 0.0005       # nats
ODD = 0.1             # by how much what is the same in all layouts may differ, before one is timed once more
AGAIN = 2             # times that this is done
AS_IT_IS = ("dense bfloat16", "dense float32")  # the model that others are compared with


@dataclass
class Runs:
    """The turns of a decoder: of each, seconds a step, and of those what was spent in every place and, last, in no sublayer."""

    places: list[str]
    steps: list[float] = field(default_factory=list)
    spent: list[list[float]] = field(default_factory=list)

    @property
    def step(self) -> float:
        return statistics.median(self.steps)

    def against(self, other: Runs) -> list[float]:
        """How many times as fast as the other, round by round: a machine that is shared is fast for a while and then slow for a while, and
        medians of each for itself fall on one or the other as it happens."""
        return [b / a for a, b in zip(self.steps, other.steps, strict=True)]

    def speed(self, other: Runs) -> float:
        return statistics.median(self.against(other))

    def shares(self, other: Runs) -> dict[str, float]:
        """Of a step of the other in the same round, what each place takes; `rest` is what is no sublayer, `beside` what the decoder does
        not see: the calls themselves."""
        rows = [[x / base for x in (*spent, step - sum(spent))]
                for step, spent, base in zip(self.steps, self.spent, other.steps, strict=True)]
        return dict(zip([*self.places, "rest", "beside"], map(statistics.median, zip(*rows, strict=True)), strict=True))


def race(decoders: Mapping[str, Decoder], prompts: Sequence[Tensor], *, new: int = NEW, rounds: int = ROUNDS, until: float = -math.inf,
         tick: Callable[[int, int], None] = lambda d, n: None) -> dict[str, Runs]:
    """All of them in turns, the other way round every second time, and once before it counts; so many rounds, and more as long as there
    is time for until this moment of `time.monotonic`."""
    runs = {name: Runs(d.places) for name, d in decoders.items()}
    names = list(decoders)
    r, over = 0, False
    while not over:
        began = time.monotonic()
        for name in names[::-1] if r % 2 else names:
            step, spent = decoders[name].timed(prompts, new if r else min(new, 8))
            if r:
                runs[name].steps.append(step)
                runs[name].spent.append(spent)
        now = time.monotonic()
        over = r >= rounds and now + now - began >= until
        if r < rounds or over:
            tick(min(r, rounds), rounds)
        r += 1
    return runs


def prompts_of(samples: list[data.Batch], batch: int, context: int) -> list[Tensor]:
    """So many prompts of so many tokens, of real text: which inputs a gate lets pass hangs on it."""
    stream = torch.cat([s["input_ids"].flatten() for s in samples])
    return [stream[(i * context) % max(1, len(stream) - context):][:context] for i in range(batch)]


def dense_decoders(model: Path) -> dict[str, Decoder]:
    """The model as it is, in our decoder: the fastest of them is what others are compared with."""
    return {name: open_decoder(model, name.split()[1]) for name in AS_IT_IS}


def fastest_dense(runs: Mapping[str, Runs]) -> str:
    bf16, f32 = AS_IT_IS
    return f32 if runs[f32].speed(runs[bf16]) > 1 else bf16


@dataclass
class Costs:
    """What options cost: microseconds a step and bytes, by place and option; of what is no sublayer by what the head is. `beside`: what a
    step takes that the decoder does not see, microseconds; `dense`: all of a step of the dense model."""

    us: dict[str, dict[str, float]]
    bytes: dict[str, dict[str, int]]
    head_us: dict[str, float]
    head_bytes: dict[str, int]
    beside: float
    dense: float

    def made(self, whole: Whole) -> Costs:
        """The same with codes made so, which changes no shape."""
        return replace(self, us={p: {MADE.get((o, whole), o): x for o, x in its.items()} for p, its in self.us.items()},
                       bytes={p: {MADE.get((o, whole), o): x for o, x in its.items()} for p, its in self.bytes.items()})

    def time(self, choices: Choices) -> float:
        """Microseconds that a step is told to take."""
        return self.beside + self.head_us[choices[HEAD]] + sum(self.us[p][o] for p, o in choices.items() if p != HEAD)

    def speed(self, choices: Choices) -> float:
        """Times as fast as the dense model."""
        return self.dense / self.time(choices)

    def size(self, choices: Choices) -> int:
        return self.head_bytes[choices[HEAD]] + sum(self.bytes[p][o] for p, o in choices.items() if p != HEAD)


class Layouts:
    """What options take, measured once and known by what decides it: the machine, the kernels, threads, batch, context and the network."""

    def __init__(self, model: Path, net: Network, space: Space, samples: list[data.Batch], home: Path, scratch: Path, *, batch: int,
                 context: int, machine: Mapping[str, str]):
        self.model, self.net, self.space, self.samples, self.home, self.scratch = model, net, space, samples, home, scratch
        self.batch, self.context = batch, context
        self.at = [dict(machine), native.level(), torch.get_num_threads(), batch, context, net.digest, data.digest(samples[:FEW])]

    def key(self, choices: Choices) -> str:
        return key_of(self.at, recipe_of(self.space, choices, quick=True).text, choices[HEAD])

    def probes(self) -> dict[str, dict[str, str]]:
        """Choices in which every option stands somewhere; first the dense model with either head."""
        groups = sorted({p.group for p in self.space.places})
        lists = {g: list(dict.fromkeys(o for p in self.space.places if p.group == g for o in p.options if o not in (DENSE, DROP)))
                 for g in groups}
        found = {f"head {h}": self.space.dense | {HEAD: h} for h in self.space.heads}
        each = [{g: names[k] for g, names in lists.items() if k < len(names)} for k in range(max(map(len, lists.values()), default=0))]
        each += [{ATTN: names[0]} for g, names in lists.items() if g == ATTN and names]  # dense MLPs among smaller others
        for own in each:
            found[" + ".join(own.values())] = self.space.dense | {
                p.name: own[p.group] for p in self.space.places if own.get(p.group) in p.options}
        return found

    def known(self, choices: Choices) -> dict[str, Any]:
        return read_known(self.home, "shares", self.key(choices))

    def costs(self, tick: line.Report, until: float = math.inf) -> Costs:
        """All of them, from what is known where it is, and measured beside the dense model where it is not: as many as there is time for
        until this moment of `time.monotonic`, the dense model and its heads at any rate."""
        probes = self.probes()
        todo = {name: c for name, c in probes.items() if not self.known(c)}
        dense: dict[str, Decoder] = {}
        done = len(probes) - len(todo)
        while todo:
            dense = dense or dense_decoders(self.model)
            some: dict[str, Path] = {}
            size = 0
            for name, choices in list(todo.items()):
                if some and size > TOGETHER:
                    break
                if not name.startswith(HEAD) and time.monotonic() > until:
                    todo = {}
                    break
                some[name] = self.lay_out(choices, len(some))
                size += Checkpoint.open(some[name]).weight_bytes
                todo.pop(name)
                done += 1
                tick("lay out", done, len(probes))
            if not some:
                break
            for name, (run, base) in self._raced(dense, some, probes, tick, until).items():
                self._keep(probes[name], run, base, some[name])
        return self._table(probes)

    def _raced(self, dense: Mapping[str, Decoder], some: Mapping[str, Path], probes: Mapping[str, Choices], tick: line.Report,
               until: float) -> dict[str, tuple[Runs, Runs]]:
        """The turns of layouts, and those of the dense model beside them. The head is the same in all of them, and should take the same:
        now and then a decoder is slower in everything for as long as it lives, and is opened and timed anew."""
        found: dict[str, tuple[Runs, Runs]] = {}
        left = list(some)
        for k in range(1 + AGAIN):
            runs = race({**dense, **{n: open_decoder(some[n]) for n in left}}, prompts_of(self.samples, self.batch, self.context),
                        tick=lambda d, n: tick("time", d, n))
            base = runs[fastest_dense(runs)]
            for n in left:
                if k == 0 or runs[n].shares(base)["rest"] < found[n][0].shares(found[n][1])["rest"]:
                    found[n] = runs[n], base
            rest = {n: run.shares(own)["rest"] for n, (run, own) in found.items()}
            usual = {h: statistics.median(each) for h in self.space.heads if (each := [rest[n] for n in rest if probes[n][HEAD] == h])}
            left = [n for n in rest if rest[n] > (1 + ODD) * usual[probes[n][HEAD]]]
            if not left or time.monotonic() > until:
                break
        return found

    def lay_out(self, choices: Choices, k: int) -> Path:
        out = self.scratch / f"layout{k}"
        recipe = recipe_of(self.space, choices, quick=True)
        opts = Options(pack=line.pack.AS_RECIPE, pack_dtype="bfloat16", head="int8" if choices[HEAD] == INT8 else "keep")
        parts, journal = line.check_parts(self.net, recipe, opts), Journal(out)
        header = {"layout": recipe.text}
        with line.writing(journal, out):
            journal.open(header, resume=False, force=True)
            line.written(self.net, recipe, parts, self.samples[:FEW] if recipe.calibrated else [], journal, header, opts,
                         lambda s, d, n: None)
            journal.close(remove=True)
        return out

    def _keep(self, choices: Choices, run: Runs, base: Runs, path: Path) -> None:
        """Of a layout: its bytes, and its times as shares of a step of the dense model beside it, which says how busy the machine was."""
        sizes: dict[str, int] = dict.fromkeys(self.space.names, 0)
        packed = line.read_notes(path)["packed_bytes"]
        for layer in self.net.layers():
            if not layer.is_head:
                sizes[f"{layer.sites[0].block}.{layer.sites[0].group}"] += packed[layer.name]
        total = Checkpoint.open(path).weight_bytes
        keep_known(self.home, "shares", self.key(choices), {
            "shares": run.shares(base), "dense": base.step, "bytes": sizes, "rest_bytes": total - sum(sizes.values())})

    def _table(self, probes: Mapping[str, Choices]) -> Costs:
        found = {name: known for name, c in probes.items() if (known := self.known(c))}
        whole = found[f"head {KEEP}"]
        step = 1e6 * statistics.median(f["dense"] for f in found.values())
        us: dict[str, dict[str, float]] = {p.name: {DROP: 0.0} for p in self.space.places}
        size: dict[str, dict[str, int]] = {p.name: {DROP: 0} for p in self.space.places}
        for p in self.space.places:
            for option in {c[p.name] for n, c in probes.items() if n in found} - {DROP}:
                alike = {n: [q.name for q in self.space.places if q.group == p.group and probes[n][q.name] == option
                             and whole["bytes"][q.name] == whole["bytes"][p.name]] for n in found if probes[n][p.name] == option}
                us[p.name][option] = step * _among(found[n]["shares"][q] for n, names in alike.items() for q in names)
                size[p.name][option] = found[next(iter(alike))]["bytes"][p.name]
        keep = _among(f["shares"]["rest"] for n, f in found.items() if probes[n][HEAD] == KEEP)
        heads = {h: found[f"head {h}"] for h in self.space.heads}
        return Costs(us, size, {h: step * f["shares"]["rest"] * keep / whole["shares"]["rest"] for h, f in heads.items()},
                     {h: f["rest_bytes"] for h, f in heads.items()}, step * _among(f["shares"]["beside"] for f in found.values()), step)


def _among(shares: Iterable[float]) -> float:
    """What stands in several layouts takes the less time the smaller the others are there, as more of it stays in the caches; candidates
    lie between them."""
    return statistics.median(shares)


def of_timed(space: Space, costs: Costs) -> Space:
    """The space with what was timed."""
    return replace(space, places=tuple(replace(p, options=tuple(o for o in p.options if o in costs.us[p.name])) for p in space.places))


def sooner(space: Space, costs: Costs, rises: Mapping[str, Mapping[str, float]]) -> Space:
    """The space without what takes as much time and as many bytes as another option that is known to lose next to nothing there."""
    def beaten(p: str, o: str) -> bool:
        return any(q != o and rise < LITTLE and costs.us[p][q] <= costs.us[p][o] and costs.bytes[p][q] <= costs.bytes[p][o]
                   for q, rise in rises.get(p, {}).items())

    return replace(space, places=tuple(replace(p, options=tuple(o for o in p.options if o == DENSE or not beaten(p.name, o)))
                                       for p in space.places))
