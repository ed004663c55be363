"""The search, as a straight line: space -> time -> tensors and loss of options -> first front -> trials -> finish -> race -> report.

What is finished is a model like any that `trim` writes, with its proof; the search adds what it was chosen from, and why.
"""
from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

import trimtab
from trimtab.builtin import name_of
from trimtab.core import data, line
from trimtab.core.calibrate import StatCache
from trimtab.core.journal import Journal, write_json
from trimtab.core.line import Options, Report
from trimtab.core.types import BadInput, Failed
from trimtab.core.workers import hired, ray_library
from trimtab.export.publish import export
from trimtab.network.checkpoint import Checkpoint
from trimtab.network.stream import Network
from trimtab.runtime.decoder import Decoder, open_decoder, supported
from trimtab.search import proxies
from trimtab.search.edited import Edited, cache_home, keep_known, key_of, read_known, tidy
from trimtab.search.front import Limits, best, fastest, first_front, program
from trimtab.search.options import DENSE, DROP, FAMILIES, HEAD, MADE, OPTIONS, PLAIN, WHOLES, Whole, opened_by
from trimtab.search.quality import Assembled, Judge
from trimtab.search.space import INT8, KEEP, Choices, Space, recipe_of, space_of, takes
from trimtab.search.timing import (
    AS_IT_IS,
    NEW,
    ROUNDS,
    Costs,
    Layouts,
    Runs,
    dense_decoders,
    fastest_dense,
    of_timed,
    prompts_of,
    race,
    sooner,
)
from trimtab.search.trials import Search, Trial, file_in, open_storage, redo, study_of, trials_of
from trimtab.search.work import Tables, tables_by, trials_by

EXPORTS = {"gguf": ".gguf", "compressed-tensors": "-compressed-tensors"}  # what a finished model is written as beside its folder
RESULT, PAGE, MODELS = "search.json", "report.html", "models"
SPLIT = 16          # sequences of the search split
MORE = 240          # and of text beside it, for what it leaves open
ALIKE = 32          # tokens in a row that calibration does not have in common with these
FIRST = ("int4", "int8")  # which mostly lose next to nothing, and are measured first
WORST = 0.7         # nats that a point of the front may lose: half as likely, token for token
BROKEN = 2.0        # nats that no option alone may lose
TIMING, TABLES = 0.25, 0.55  # of the time, when options are no more timed, and no more made
RATHER = 40         # options like the first, for which there has to be time before other ways of making them all are tried
JUDGE = "int4"      # the option by which ways for all of them are compared
MODELLING = 0.6     # of what is left behind the tables, what finishing may take at most
WAY = 0.125         # steps that a token of a prompt takes as long as, before a turn of the race
SHORT = 8           # rounds of the race that says whether a model is as fast as was asked
PROXIES = 0.03      # of the time, what has to be left for proxies that take some
WRITING = 0.015     # of the time, what is left when the race ends
ROOM = 1.01         # times the asked speed, what is told of an answer
LEAST = 16          # trials that are made at any rate
NEAR = 2.0          # times the least divergence, below which the loss says which is best
FINALISTS = 8       # of what lies about as near, that are run for it
HOPE = 5.0          # times the limit, above which a divergence means no loss within it
RUINED = 9.0        # of the dense perplexity: no model that anybody wants
TELLING = 0.04      # what is kept for proxies, samples of text and the page
JUDGING = 0.05      # what answers may be judged for, where something is asked
FINISHING = 0.3     # what is kept for finishing models until the first one says how long that takes


@dataclass(frozen=True)
class Asked:
    """What a search is to find, and what it may take. `minutes` of all of it; `points` of the front that are finished."""

    limits: Limits = field(default_factory=Limits)
    minutes: float = 10.0
    trials: int | None = None  # stop with so many, if the time is not over before
    batch: int = 1
    context: int = 64
    formats: str = "ours"
    points: int = 5
    samples: int = 64
    seq_len: int = 256
    seed: int = 0
    calib: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    proof_tokens: int | None = None
    threads: int = 0
    storage: str = ""
    workers: int = 1
    ray: str = ""
    resume: bool = False
    force: bool = False

    @property
    def options(self) -> Options:
        """As `trim` takes them, of every finished model."""
        pack = line.pack.AS_RECIPE if self.formats == "ours" else ""
        return Options(samples=self.samples, seq_len=self.seq_len, seed=self.seed, calib=self.calib, text=self.text, threads=self.threads,
                       pack=pack, pack_dtype="bfloat16" if pack else None, speed=False, fresh=False, proof_tokens=self.proof_tokens)


@dataclass
class Clock:
    """When the search has to be over, how long finishing one more model took so far, and what its turns in the race will."""

    began: float
    seconds: float
    each: list[float] = field(default_factory=list)
    turns: float = 0.0

    @property
    def end(self) -> float:
        return self.began + self.seconds

    def at(self, share: float) -> float:
        return self.began + share * self.seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def racing(self) -> float:
        """Seconds that the race of what is finished is told to take."""
        return (len(self.each) + len(AS_IT_IS)) * self.turns

    def finishing(self, models: int) -> float:
        """Seconds that so many models more, and the race of all of them, are told to take."""
        if not self.each:
            return FINISHING * self.seconds
        return models * (max(self.each) * 1.1 + self.turns) + self.racing + TELLING * self.seconds


def search(model: Path, out: Path, asked: Asked, tick: Report) -> dict[str, Any]:
    """Search, finish the best, prove and time them, and write `out`: models/, search.json and report.html. Returns what search.json holds.

    BadInput (nothing written) where what is asked cannot be, as far as the tables tell; Failed where none could be finished.
    """
    clock = Clock(time.monotonic(), 60 * asked.minutes)
    line.set_up(asked.options)
    check(model, out, asked)
    net = Network.open(model, dtype=torch.float32)
    check_model(net)
    calibration, split, more = texts_of(net, asked)
    home = cache_home()
    with (tempfile.TemporaryDirectory(prefix="trimtab-search-") as tmp,
          hired(asked.workers, asked.ray, asked.storage, asked.threads, home) as workers):
        space = space_of(net, opened_by(asked.formats))
        if asked.formats != "ours":
            space = replace(space, heads=(KEEP,), even=True)
        costs = Layouts(model, net, space, calibration, home, Path(tmp), batch=asked.batch, context=asked.context,
                        machine=machine()).costs(tick, clock.at(TIMING))
        clock.turns = 1e-6 * costs.dense * (ROUNDS + 1) * (NEW + WAY * asked.batch * asked.context)
        space = of_timed(space, costs)
        check_limits(space, costs, asked.limits)
        edited = Edited(net, calibration, home, StatCache())
        assembled = Assembled(net, space, split, edited.read, Path(tmp), more, in_bytes=bool(asked.options.pack))
        tables = tables_by(workers, edited, assembled)
        whole, tried = whole_of(net, space, edited, assembled, tables, clock, tick)
        space, costs = space.made(whole), costs.made(whole)
        rises = known_rises(net, space, costs, edited, assembled, tables, clock, tick)
        space = of_known(space, rises)
        first = first_front(space, costs, rises, spared(asked.limits))
        check_loss(first, space, costs, rises, asked.limits, assembled)
        journal = Journal(out)
        with line.writing(journal, out):
            header = header_of(net, [*calibration, *split, *more], asked)
            resumed = journal.open(header, resume=asked.resume, force=asked.force)
            if asked.resume and not resumed:
                tick("resume: nothing to continue, starting afresh", 0, 0)
            finisher = Finisher(model, net, space, costs, journal.dir, asked, edited.stats, clock, tick, calibration)
            storage = asked.storage or file_in(journal.dir.resolve())
            study = study_of(storage, key_of(header, str(out.resolve())), space, costs, asked.seed, afresh=not resumed)
            redo(study)
            work = Search(study, space, costs, rises, assembled.rises, asked.seed, limits=(asked.limits,))
            rivals = baselines(space, costs, rises, asked.limits)
            work.queue([space.dense, *first, *(choices for _, choices in rivals)], "program")
            work.queue([space.uniform(o) for o in sorted({o for p in space.places for o in p.options} - {DENSE, DROP})], "uniform")
            if rivals:  # the first one says how long it takes
                finisher.finish(rivals[0][1], f"baseline-{rivals[0][0]}")
            judging = JUDGING * clock.seconds if asked.limits != Limits() else 0.0
            until = clock.end - min(clock.finishing(asked.points + len(rivals)) + judging, MODELLING * max(0.0, clock.left))
            began = time.monotonic()
            run = trials_by(workers, work, storage)
            run(until, lambda n: tick("search", min(1000, int(1000 * (time.monotonic() - began) / max(1e-9, until - began))), 1000),
                most=asked.trials, least=LEAST)
            if workers:  # what is timed from here on is alone
                workers.close()
            tick("search", 1000, 1000)
            trials = trials_of(study, space, costs)
            judge = Judge(assembled, time.monotonic() + judging)
            points = finish_front(finisher, [t for t in trials if t.choices != space.dense], asked, rivals, judge)
            result = told(model, net, space, costs, rises, asked, finisher, trials, rivals, points, assembled.dense, edited, clock, tick)
            result["whole"] = {"rewrite": whole.rewrite, "repair": whole.repair, "tried": tried}
            forget(finisher)
            write(journal, result)
            journal.close(remove=True)
    tidy(home)
    return {**result, "out": str(out)}


def texts_of(net: Network, asked: Asked) -> tuple[list[data.Batch], list[data.Batch], list[data.Batch]]:
    """Calibration, the search split and more text, which have no ALIKE tokens in a row in common with calibration, where there is text that
    has not. BadInput where there is nothing to search on."""
    samples = data.prepare(net, asked.calib, "calibration", asked.samples + 2 * (SPLIT + MORE), asked.seq_len, asked.seed)
    calibration, rest = samples[:asked.samples], samples[asked.samples:]
    if not rest:
        raise BadInput(f"--calib holds {len(samples)} samples, and {SPLIT} beside the {asked.samples} for calibration are searched on; "
                       "give more, or lower --samples")

    def runs(sample: data.Batch) -> set[tuple[int, ...]]:
        return {tuple(r) for row in sample["input_ids"] for r in row.unfold(0, min(ALIKE, len(row)), 1).tolist()}

    seen = set[tuple[int, ...]]().union(*map(runs, calibration))
    apart = [s for s in rest if seen.isdisjoint(runs(s))]
    apart = apart if len(apart) >= min(SPLIT, len(rest)) else rest
    return calibration, apart[:SPLIT], apart[SPLIT:SPLIT + MORE]


# ---- what can be refused before anything is written ----------------------------------------------
def check(model: Path, out: Path, asked: Asked) -> None:
    if out.exists() and not asked.force:
        raise BadInput(f"{out} exists; choose another -o, or replace it with --force")
    if out.exists():
        line.check_ours(out, RESULT)
    else:
        line.check_out(model, out, asked.options)
    if (left := Journal(out).dir).exists() and not (asked.resume or asked.force):
        raise BadInput(f"{left} is left from an unfinished run; continue it with --resume or discard it with --force")
    opened_by(asked.formats)
    if asked.ray:
        ray_library()
    if asked.storage:
        open_storage(asked.storage)
    if asked.minutes <= 0:
        raise BadInput(f"--minutes {asked.minutes:g} is no time; give some, such as 10")


def check_model(net: Network) -> None:
    """What is timed is our decoder: the model has to run there."""
    if net.checkpoint.packed or net.checkpoint.quantized:
        raise BadInput(f"{net.checkpoint.path} is packed or quantised already; search from the model it was made from")
    if net.kind != "lm":
        raise BadInput(f"search times a language model's decoding, and {net.checkpoint.path} is none; trim it by a recipe, and see bench")
    if not supported(net.checkpoint):
        raise BadInput(f"search times models in the native decoder, which does not run a {net.family.name} here; trim it by a recipe, and "
                       "see bench")


def check_limits(space: Space, costs: Costs, limits: Limits) -> None:
    """Whether so fast, or so small, can be at all."""
    top = costs.dense / fastest(space, costs)
    if limits.speed and limits.speed > top:
        raise BadInput(f"--min-speed {limits.speed:g}x cannot be: with every sublayer as fast as it gets, or gone, a step is {top:.2f} "
                       f"times as fast here; ask for less than {top:.2f}x")
    least = min(costs.head_bytes[h] for h in space.heads) + sum(min(costs.bytes[p.name][o] for o in p.options) for p in space.places)
    if limits.bytes and limits.bytes < least:
        raise BadInput(f"--max-bytes {limits.bytes / 1e6:.1f}MB cannot be: what is no sublayer and the smallest of each take "
                       f"{least / 1e6:.1f}MB; ask for more than that")


def check_loss(first: Sequence[Choices], space: Space, costs: Costs, rises: Mapping[str, Mapping[str, float]], limits: Limits,
               assembled: Assembled) -> None:
    """Whether speed and bytes can be had at the asked loss, as the program's best answer is when it is run, with room for a better one;
    where no loss was asked, at one that does not ruin the model."""
    if limits.speed is None and limits.bytes is None:
        return
    most = RUINED if limits.loss is None else 2 * limits.loss + 0.02
    found = program(space, costs, rises, time=costs.dense / limits.speed if limits.speed else math.inf, size=limits.bytes or math.inf)
    loss = math.expm1(min(50.0, *assembled.rises([found]))) if found else math.inf
    if found and (loss <= most or Judge(assembled, until=0.0).within(found, math.log1p(most))):  # by the split alone
        return
    costly = f"costs {100 * loss:.3g} % more perplexity" if found else "takes what breaks the network by itself"
    fits = [c for c in first if math.expm1(min(50.0, added(rises, c))) <= (most if limits.loss is None else limits.loss)]
    near = min(fits, key=lambda c: limits.short(0.0, costs.size(c), costs.speed(c)), default=space.dense)
    raise BadInput(f"{limits} cannot be had here, as the tables tell: it {costly}; the nearest is "
                   f"{costs.speed(near):.2f} times as fast in {costs.size(near) / 1e6:.1f}MB at "
                   f"{100 * math.expm1(added(rises, near)):.2g} %")


def added(rises: Mapping[str, Mapping[str, float]], choices: Choices) -> float:
    """What each sublayer alone raises the loss by, in sum."""
    return sum(max(0.0, rises[p][o]) for p, o in choices.items() if p != HEAD)


def header_of(net: Network, samples: list[data.Batch], asked: Asked) -> dict[str, Any]:
    """What a search that goes on has to have in common with the one that began."""
    return {"source": net.digest, "calibration": data.digest(samples), "batch": asked.batch, "context": asked.context,
            "formats": asked.formats, "storage": asked.storage.rpartition("@")[2], "threads": torch.get_num_threads(),
            "versions": {"trimtab": trimtab.__version__, "torch": torch.__version__}, "machine": machine()["cpu"],
            "seed": asked.seed, "samples": asked.samples}


def machine() -> dict[str, str]:
    from trimtab.demo import machine as here

    return here()


# ---- tables ---------------------------------------------------------------------------------------
def whole_of(net: Network, space: Space, edited: Edited, assembled: Assembled, tables: Tables, clock: Clock, tick: Report
             ) -> tuple[Whole, list[dict[str, Any]]]:
    """What is chosen for the whole network: of rewrites and repairs around codes those with which it loses the least where all of it is in
    codes of 4 bits; and what each of those that there was time for loses so, in nats."""
    groups = sorted({p.group for p in space.places if JUDGE in p.options})
    ways = [w for w in WHOLES if all(takes(net, OPTIONS[MADE.get((JUDGE, w), JUDGE)], g) for g in groups)]
    if not groups:
        return PLAIN, []
    found: dict[Whole, float] = {}
    began, first = time.monotonic(), 0.0
    for k, whole in enumerate(ways):
        option = MADE.get((JUDGE, whole), JUDGE)
        first = first or time.monotonic() - began if k else 0.0
        if k and RATHER * first > clock.at(TABLES) - time.monotonic() and not all(edited.has(OPTIONS[option], g) for g in groups):
            continue
        tick("rewrites and repairs", k, len(ways))
        for _ in tables({"option": option, "group": g, "places": []} for g in groups):
            pass
        found[whole] = assembled.rises([{p.name: option if JUDGE in p.options else DENSE for p in space.places} | {HEAD: KEEP}])[0]
    tick("rewrites and repairs", len(ways), len(ways))
    best_ = min(found, key=lambda w: found[w])
    return best_, [{"rewrite": w.rewrite, "repair": w.repair, "rise": rise} for w, rise in found.items()]


def known_rises(net: Network, space: Space, costs: Costs, edited: Edited, assembled: Assembled, tables: Tables,
                clock: Clock, tick: Report) -> dict[str, dict[str, float]]:
    """What every option alone raises the loss by, by place: what loses next to nothing first, then what that does not beat in both time and
    bytes, as far as there is time, then what stands for its family."""
    key = key_of("rises in bytes" if assembled.in_bytes else "rises", net.digest, data.digest(assembled.samples),
                 data.digest(edited.samples), trimtab.__version__, {o: OPTIONS[o].text for o in OPTIONS})
    kept: dict[str, dict[str, float]] = read_known(edited.home, "rises", key)
    rises = {p.name: {DENSE: 0.0, **{o: r for o, r in kept.get(p.name, {}).items() if o in p.options}} for p in space.places}

    def measure(names: Sequence[tuple[str, str]]) -> None:
        def wanted() -> Iterator[dict[str, Any]]:
            for k, (option, group) in enumerate(names):
                tick("options", k, len(names))
                if not k or time.monotonic() <= clock.at(TABLES) or edited.has(OPTIONS[option], group):
                    yield {"option": option, "group": group, "places": [
                        p.name for p in space.places if p.group == group and option in p.options and option not in rises[p.name]]}

        for its, found in tables(wanted()):
            for p, rise in found.items():
                rises[p][its["option"]] = rise
            if found:
                keep_known(edited.home, "rises", key, {n: {**kept.get(n, {}), **r} for n, r in rises.items()})
        tick("options", len(names), len(names))

    def each(of: Space, names: Sequence[str]) -> list[tuple[str, str]]:
        return [(o, g) for o in names for g in OPTIONS[o].groups if any(p.group == g and o in p.options for p in of.places)]

    first = [o for o in OPTIONS if (OPTIONS[o].plain or o) in FIRST]
    measure(each(space, first))
    ahead = sooner(space, costs, rises)
    rest = [o for o in OPTIONS if o not in (DENSE, *first)]
    promising = each(ahead, rest)
    measure(promising)
    measure([x for x in each(space, rest) if x not in promising and OPTIONS[x[0]].family not in ("mixed", "gates")])
    return rises


def of_known(space: Space, rises: Mapping[str, Mapping[str, float]]) -> Space:
    """The space with what was measured, and does not break the network by itself."""
    def stays(p: str, o: str) -> bool:
        return o == DENSE or rises[p].get(o, math.inf) <= BROKEN

    return replace(space, places=tuple(replace(p, options=tuple(o for o in p.options if stays(p.name, o))) for p in space.places))


def baselines(space: Space, costs: Costs, rises: Mapping[str, Mapping[str, float]], limits: Limits) -> list[tuple[str, dict[str, str]]]:
    """Of every family of methods the best that it gives by itself, by the integer program, where that reaches what is asked of speed and
    bytes; its fastest at the loss, where that alone is asked; else where the family is at half of its way."""
    found = []
    for family in FAMILIES:
        own = space.only(o for o in OPTIONS if OPTIONS[o].family == family)
        if family == "mixed" or all(p.options == (DENSE,) for p in own.places):
            continue
        own = own if family == "quantise" else replace(own, heads=(KEEP,))
        at = costs.dense / limits.speed if limits.speed else math.inf
        size = limits.bytes or math.inf
        if limits.loss is not None and not (limits.speed or limits.bytes):
            at_loss = program(own, costs, rises, loss=math.log1p(limits.loss))
            found += [(family, at_loss)] if at_loss else []
            continue
        if not (limits.speed or limits.bytes):
            at = math.sqrt(costs.time(own.dense) * fastest(own, costs))
        if (choices := program(own, costs, rises, time=at, size=size)) is not None:
            found.append((family, choices))
    return [(family, choices) for family, choices in found if choices != space.dense]  # that one stands there anyway


# ---- finished models ------------------------------------------------------------------------------
@dataclass
class Finisher:
    """Carries choices out: a trimmed model each under models/, proved but for its speed, which the race tells."""

    model: Path
    net: Network
    space: Space
    costs: Costs
    dir: Path
    asked: Asked
    stats: StatCache
    clock: Clock
    tick: Report
    samples: list[data.Batch]
    proofs: dict[str, dict[str, Any]] = field(default_factory=dict)
    choices: dict[str, dict[str, str]] = field(default_factory=dict)

    def finish(self, choices: Choices, name: str) -> dict[str, Any]:
        """The proof of the model; where another name stands for the same choices, that one's."""
        taken = self.space.checked(choices)
        if (same := next((n for n, c in self.choices.items() if c == taken), None)) is not None:
            self.choices[name], self.proofs[name] = taken, self.proofs[same]
            return self.proofs[same]
        began = time.monotonic()
        out = self.dir / MODELS / name
        out.parent.mkdir(exist_ok=True)
        head = ("int8" if taken[HEAD] == INT8 else "keep") if self.asked.options.pack else None
        opts = replace(self.asked.options, cache=self.stats, head=head, resume=True, force=True)
        proof = line.trim(self.model, recipe_of(self.space, taken), out, opts, lambda s, d, n: None)
        if (runtime := self.asked.formats) in EXPORTS:
            told_ = export(out, runtime, out.with_name(name + EXPORTS[runtime]), force=True)
            proof = {**proof, "after": {**proof["after"], "bytes": told_["bytes"]}, "warnings": [*proof["warnings"], *told_["warnings"]]}
        self.choices[name], self.proofs[name] = taken, proof
        self.clock.each.append(time.monotonic() - began)
        self.tick(f"finished {name}: perplexity {proof['after']['perplexity']:.4g}, {proof['after']['bytes'] / 1e6:.1f} MB, "
                  f"{self.costs.speed(taken):.2f}x told", 0, 0)
        return proof

    def speed(self, name: str) -> float:
        """Times as fast as the dense model, as a short race says."""
        runs = race({**dense_decoders(self.model), name: opened(self, [name])[name]},
                    prompts_of(self.samples, self.asked.batch, self.asked.context), rounds=SHORT)
        return runs[name].speed(runs[fastest_dense(runs)])

    def timed(self, name: str) -> Path:
        """The folder of the model that is timed: what others open may be code by code what we do, or is packed once more for it."""
        where = self.dir / MODELS / name
        if self.asked.formats == "compressed-tensors":
            return where.with_name(name + EXPORTS[self.asked.formats])
        if self.asked.formats == "gguf":
            out = self.dir / "timed" / name
            out.parent.mkdir(exist_ok=True)
            opts = replace(self.asked.options, cache=self.stats, pack=line.pack.AS_RECIPE, pack_dtype="bfloat16", head="keep", force=True)
            line.trim(self.model, recipe_of(self.space, self.choices[name]), out, opts, lambda s, d, n: None)
            return out
        return where


def finish_front(finisher: Finisher, trials: Sequence[Trial], asked: Asked, rivals: Sequence[tuple[str, Choices]], judge: Judge
                 ) -> list[str]:
    """The names of the finished points of the front: what answers what was asked first, again where its proof falls short; then points
    spread over the speeds that there are, and the baselines, by turns, as long as there is time."""
    limits, clock = asked.limits, finisher.clock
    names: list[str] = []
    wanted = spared(limits)
    while limits != Limits() and len(names) < 3 and (not names or clock.left > clock.finishing(1)):
        if (answer := answer_of(trials, wanted, finisher.costs, judge)) is None:
            break
        proof = finisher.finish(answer.choices, name := f"answer{len(names) + 1}" if names else "answer")
        names.append(name)
        loss = proof["after"]["perplexity"] / proof["before"]["perplexity"] - 1
        speed = finisher.speed(name) if limits.speed else math.inf
        if limits.met(loss, 0, speed):
            break
        if limits.loss is not None and loss > limits.loss:  # what was searched on flattered it
            wanted = replace(wanted, loss=(wanted.loss or 0.0) * 0.8)
        if limits.speed and wanted.speed and speed < limits.speed:  # and what was told, this
            wanted = replace(wanted, speed=wanted.speed * 1.01 * limits.speed / speed)
    more = [(f"p{k + 1}", t.choices) for k, t in enumerate(spread(trials, asked.points - bool(names)))]
    others = [(f"baseline-{family}", choices) for family, choices in rivals]
    for pair in zip_longest(more, others):
        for name, choices in (x for x in pair if x is not None and x[0] not in finisher.proofs):
            if names and clock.left < clock.finishing(1):
                return names
            finisher.finish(choices, name)
            names += [name] if name.startswith("p") else []
    return names


def spared(limits: Limits) -> Limits:
    """The limits with a little more speed, which what was told may be off."""
    return replace(limits, speed=limits.speed * ROOM if limits.speed else None)


def answer_of(trials: Sequence[Trial], limits: Limits, costs: Costs, judge: Judge) -> Trial | None:
    """What meets the limits at the least loss, or at the greatest speed where loss is all that is limited. The divergence says which come
    into question, and text which of those loses the least. It is mostly more than what the loss rises by: where it is above the limit, the
    loss itself is asked, with its error."""
    fits = [t for t in trials if t.rise <= math.log1p(RUINED) and replace(limits, loss=None).met(0, t.bytes, costs.dense / t.us)]
    fits = list({tuple(o for p, o in sorted(t.choices.items()) if p != HEAD): t  # of those with the same sublayers the quickest
                 for t in sorted(fits, key=lambda t: (-t.us, -t.bytes))}.values())
    most = math.inf if limits.loss is None else math.log1p(limits.loss)
    if limits.speed or limits.bytes or limits.loss is None:
        fits.sort(key=lambda t: (t.rise, t.us))
        near = [t for t in fits if t.rise <= NEAR * fits[0].rise][:FINALISTS]
        found = near[judge.least([t.choices for t in near])] if near else None
        return found if found and (found.rise <= most or judge.within(found.choices, most)) else None
    front = [t for t in best(fits, lambda t: (t.us, t.rise)) if t.rise <= HOPE * most]
    front.sort(key=lambda t: t.us)  # and so by what they lose, the most first: looked for by halves
    low, high = 0, next((k for k, t in enumerate(front) if t.rise <= most), len(front))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if judge.within(front[middle].choices, most) else (middle + 1, high)
    if low == len(front):
        return None
    others = [t for t in fits if t.us < front[low].us and t.rise <= HOPE * most and t not in front]  # which may lose less for all that
    others = sorted(others, key=lambda t: t.rise)[:FINALISTS]
    return next((t for t in sorted(others, key=lambda t: t.us) if judge.within(t.choices, most)), front[low])


def spread(trials: Sequence[Trial], count: int) -> list[Trial]:
    """So many of the front of loss and time, evenly over the times that lose no more than WORST; those in the middle first."""
    usable = sorted((t for t in best(trials, lambda t: (t.rise, t.us)) if t.rise <= WORST), key=lambda t: t.us)
    if not usable or count < 1:
        return []
    low, high = math.log(usable[0].us), math.log(usable[-1].us)
    places = sorted(((k + 0.5) / count for k in range(count)), key=lambda x: abs(x - 0.5))
    found: list[Trial] = []
    for at in (math.exp(low + (high - low) * x) for x in places):
        t = min(usable, key=lambda t: abs(math.log(t.us / at)))
        found += [t] if t not in found else []
    return found


# ---- what is told ---------------------------------------------------------------------------------
def told(model: Path, net: Network, space: Space, costs: Costs, rises: Mapping[str, Mapping[str, float]], asked: Asked, finisher: Finisher,
         trials: Sequence[Trial], rivals: Sequence[tuple[str, Choices]], points: Sequence[str], dense_loss: float, edited: Edited,
         clock: Clock, tick: Report) -> dict[str, Any]:
    """All that search.json holds, speeds measured: the finished models and the dense one in turns."""
    if not points:
        raise Failed("no model of the front was finished in the time given; give more --minutes")
    first = next(iter(finisher.proofs.values()))
    perplexity = first["before"]["perplexity"]
    by_choice = {tuple(sorted(t.choices.items())): t for t in trials}
    prompt, texts = samples_of(model, net, finisher)
    ranks = ranked_proxies(net, space, costs, rises, trials, edited, clock)
    decoders = {**dense_decoders(model), **opened(finisher, finisher.proofs)}
    runs = race(decoders, prompts_of(edited.samples, asked.batch, asked.context), tick=lambda d, n: tick("time", d, n),
                until=-math.inf if asked.trials else clock.end - WRITING * clock.seconds)  # what is left makes speeds surer
    base = fastest_dense(runs)
    step = runs[base].step

    def point(name: str) -> dict[str, Any]:
        proof, choices, run = finisher.proofs[name], finisher.choices[name], runs[name]
        ratios = sorted(run.against(runs[base]))
        trial = by_choice.get(tuple(sorted(choices.items())))
        return {"name": name, "recipe": proof["pipeline"], "choices": choices, "perplexity": proof["after"]["perplexity"],
                "search_perplexity": math.exp(dense_loss + trial.rise) if trial else None,
                "loss": proof["after"]["perplexity"] / perplexity - 1, "bytes": proof["after"]["bytes"],
                "speed": (speed := run.speed(runs[base])), "speed_spread": [ratios[len(ratios) // 4], ratios[-len(ratios) // 4]],
                "predicted_speed": costs.speed(choices), "decode_tok_s": asked.batch * speed / step, "us": 1e6 * step / speed,
                "predicted_us": costs.time(choices), "times": times_of(space, choices, run, runs[base]), "sample": texts[name],
                "out": f"{MODELS}/{folder(finisher, name)}", "proof": proof, "by": trial.by if trial else "program",
                "commands": commands(model, asked, choices, proof, folder(finisher, name))}

    every = {name: point(name) for name in finisher.proofs}
    front = best([every[n] for n in points], lambda p: (p["perplexity"], -p["speed"], p["bytes"]))
    rivals_ = [every[f"baseline-{family}"] | {"family": family, "how": "program"} for family, _ in rivals if f"baseline-{family}" in every]
    dense = {"family": "dense", "how": "uniform", "name": base, "recipe": "dense", "perplexity": perplexity, "loss": 0.0,
             "bytes": first["before"]["bytes"], "speed": 1.0, "decode_tok_s": asked.batch / step, "choices": space.dense,
             "predicted_speed": costs.speed(space.dense), "times": times_of(space, space.dense, runs[base], runs[base])}
    meets = [p["name"] for p in front if asked.limits.met(p["loss"], p["bytes"], p["speed"])]
    nearest = min(front, key=lambda p: asked.limits.short(p["loss"], p["bytes"], p["speed"]))["name"]
    off = [abs(p["predicted_speed"] / p["speed"] - 1) for p in every.values()]
    gaps = [p["perplexity"] / perplexity / math.exp(math.log(p["search_perplexity"]) - dense_loss) - 1
            for p in every.values() if p["search_perplexity"]]
    shown = sorted({o for p in space.places for o in p.options} - {DENSE}, key=lambda o: list(OPTIONS).index(OPTIONS[o].plain or o))
    return {
        "model": name_of(model) or model.resolve().name, "blocks": net.n_blocks, "params": net.n_params, "batch": asked.batch,
        "context": asked.context, "formats": asked.formats, "minutes": asked.minutes, "seconds": round(time.monotonic() - clock.began, 1),
        "asked": {"max_loss": asked.limits.loss, "max_bytes": asked.limits.bytes, "min_speed": asked.limits.speed},
        "meets": meets, "nearest": nearest, "machine": machine(),
        "dense": {"perplexity": perplexity, "search_perplexity": math.exp(dense_loss), "bytes": dense["bytes"],
                  "decode_tok_s": dense["decode_tok_s"], "runner": f"trimtab {base.removeprefix('dense ')}", "sample": texts["dense"],
                  "times": dense["times"], "us": 1e6 * step},
        "prompt": prompt, "places": space.names,
        "options": {o: {"family": OPTIONS[o].family, "text": OPTIONS[o].text, "label": OPTIONS[o].label} for o in (DENSE, *shown)},
        "front": sorted(front, key=lambda p: p["speed"]), "baselines": [dense, *rivals_],
        "sensitivity": {"options": shown, "places": space.names,
                        **{k: [[t.get(p, {}).get(o) if o in q.options else None for p, q in zip(space.names, space.places, strict=True)]
                               for o in shown] for k, t in (("rise", rises), ("bytes", costs.bytes), ("us", costs.us))}},
        "trials": [{"loss": math.expm1(min(t.rise, 50)), "speed": costs.dense / t.us, "bytes": t.bytes, "by": t.by} for t in trials],
        "prediction": {"median_error": sorted(off)[len(off) // 2], "points": [
            {"name": n, "predicted": p["predicted_speed"], "measured": p["speed"]} for n, p in every.items()]},
        "gap": {"median": sorted(gaps)[len(gaps) // 2] if gaps else None, "points": len(gaps)},
        "proxies": ranks,
        "warnings": [f"speeds are those of our decoder; what opens {asked.formats} may be faster or slower"] * (asked.formats != "ours"),
    }


def folder(finisher: Finisher, name: str) -> str:
    """That of the model, which several names may stand for."""
    return next(n for n, c in finisher.choices.items() if c == finisher.choices[name])


def opened(finisher: Finisher, names: Iterable[str]) -> dict[str, Decoder]:
    """Finished models by name, each once."""
    held: dict[str, Decoder] = {}
    for name in names:
        if (at := folder(finisher, name)) not in held:
            held[at] = decoder = open_decoder(where := finisher.timed(at), None if Checkpoint.open(where).packed else "bfloat16")
            if finisher.asked.formats == "compressed-tensors":
                decoder.narrowest = "i8"  # as what is packed has it, and what its options were timed in
        held[name] = held[at]
    return held


def times_of(space: Space, choices: Choices, run: Runs, base: Runs) -> dict[str, float]:
    """Microseconds by place of the whole network, whose blocks may have other numbers in what was timed."""
    gone = {i for i in range(space.blocks) if all(choices[p.name] == DROP for p in space.places if p.block == i)}
    number = {k: i for k, i in enumerate(i for i in range(space.blocks) if i not in gone)}
    found = {}
    for name, share in run.shares(base).items():
        block, dot, group = name.partition(".")
        found[f"{number[int(block)]}.{group}" if dot else name] = round(1e6 * share * base.step, 2)
    return found


def samples_of(model: Path, net: Network, finisher: Finisher) -> tuple[str, dict[str, str]]:
    """What every model goes on with, of the same words."""
    import trimtab as tt

    asked = finisher.asked
    proof = line.proof_samples(net, replace(asked.options, proof_tokens=4 * asked.seq_len))
    tokenizer = net.tokenizer()
    assert tokenizer is not None  # the text went through it
    prompt = tokenizer.decode(proof[0]["input_ids"][0, :48].tolist(), skip_special_tokens=True)
    texts = {"dense": "".join(tt.load(model).generate(prompt, max_new_tokens=64))}
    for name in finisher.proofs:
        at = folder(finisher, name)
        texts[name] = texts[at] if at in texts else "".join(tt.load(finisher.dir / MODELS / name).generate(prompt, max_new_tokens=64))
    return prompt, texts


def commands(model: Path, asked: Asked, choices: Choices, proof: Mapping[str, Any], where: str) -> list[str]:
    """How to make the point again, and how to use it."""
    import shlex

    base = shlex.quote(name_of(model) or str(model))
    more = f" --samples {asked.samples} --seq-len {asked.seq_len} --seed {asked.seed}"
    more += f" --pack --pack-dtype bfloat16 --head {'int8' if choices[HEAD] == INT8 else 'keep'}" if asked.options.pack else ""
    more += "".join(f" {o} {shlex.join(files)}" for o, files in (("--calib", asked.calib), ("--text", asked.text)) if files)
    return [f"trimtab trim {base} '{proof['pipeline']}' -o {MODELS}/{where}{more}",
            f"trimtab bench {MODELS}/{where} --against {base}", f"trimtab generate {MODELS}/{where} 'def main():'",
            f"trimtab serve {MODELS}/{where}"]


def ranked_proxies(net: Network, space: Space, costs: Costs, rises: Mapping[str, Mapping[str, float]], trials: Sequence[Trial],
                   edited: Edited, clock: Clock) -> list[dict[str, Any]]:
    """How well what is known without running a candidate ranks those that were run. What takes longer to be known is left out where there
    is no time for it."""
    usable = [t for t in trials if all(t.choices[p] in rises[p] for p in space.names)]
    if len(usable) < 8:
        return []
    table = {(p, o): r for p, its in rises.items() for o, r in its.items()}
    sizes = {(p, o): float(b) for p, its in costs.bytes.items() for o, b in its.items()}
    known = proxies.Known(tuple(space.names), rise=table, bytes=sizes)
    if clock.left - clock.racing > PROXIES * clock.seconds or clock.seconds == math.inf:
        places = {p.name: p for p in space.places}
        met = sorted({(p, t.choices[p]) for t in usable for p in space.names})
        params, off = proxies.place_tables(net, met, lambda p, o: edited.read(places[p], o)[0])
        own = proxies.place_components(net, edited.samples[:8])
        rest = net.n_params - sum(s.size for s in net.sites)
        known = replace(known, params=params, error=off, components={k: float(n) for k, n in own.items()}, rest=rest)
    return proxies.correlations(proxies.values(known, [t.choices for t in usable]), [t.rise for t in usable])


def forget(finisher: Finisher) -> None:
    """What an earlier run left that was stopped, and that nothing stands for any more."""
    kept = {name + end for name in finisher.choices for end in ("", *EXPORTS.values())}
    for left in (finisher.dir / MODELS).iterdir():
        if left.name not in kept:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def write(journal: Journal, result: Mapping[str, Any]) -> None:
    """The finished folder, as a whole."""
    from trimtab.report.search_page import search_page

    finished = journal.dir / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir()
    (journal.dir / MODELS).rename(finished / MODELS)
    write_json(finished / RESULT, json.loads(json.dumps(result, default=str)))
    (finished / PAGE).write_text(search_page(f"trimtab search: {result['model']}", dict(result)), encoding="utf-8")
    journal.publish(finished)

