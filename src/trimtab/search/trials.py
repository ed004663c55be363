"""Real evaluations of candidates, chosen by evolution, by a predictor and by chance; kept in a storage that many workers share."""
from __future__ import annotations

import hashlib
import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.core.types import BadInput
from trimtab.search.front import Limits, best, extra
from trimtab.search.options import HEAD
from trimtab.search.predictor import Predictor, encode
from trimtab.search.space import Choices, Space
from trimtab.search.timing import Costs

STUDY = "trimtab"
BATCH = 8        # candidates that are evaluated together
LEARN = 24       # trials before the predictor is asked
CANDIDATES = 400  # that it ranks
NEAREST = 5      # of the front, to what is asked
OVER = 1.3       # times the loss, what a divergence is
WAIT = 60        # seconds for a file that other workers write


@dataclass(frozen=True)
class Trial:
    """A candidate that was evaluated: `rise` in nats on the search split, `us` as told by the tables, `by` whom it was proposed."""

    choices: dict[str, str]
    rise: float
    us: float
    bytes: int
    by: str


def open_storage(storage: str) -> Any:
    """A file, or the database of a URL. BadInput where it does not open."""
    optuna = extra("optuna", "optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = re.sub("^postgres(ql)?://", "postgresql+psycopg2://", storage) if "://" in storage else f"sqlite:///{storage}"
    wait = {"connect_args": {"timeout": WAIT}} if url.startswith("sqlite:") else {}
    try:
        found = optuna.storages.RDBStorage(url, engine_kwargs=wait)
    except ImportError:
        raise BadInput(f"no driver for {url.partition(':')[0]} is installed; for PostgreSQL: pip install 'trimtab[postgres]'") from None
    except Exception as e:  # the driver's own, or the database's
        raise BadInput(f"the storage {url.split('@')[-1]} does not open ({str(e).splitlines()[0][:120]}); give a file, or a URL such as "
                       "postgresql://user@host/name") from None
    if wait:
        _whole(found.engine)
    return found


def _whole(engine: Any) -> None:
    """SQLite locks no rows: a transaction has the file from its beginning, so that no two workers take the same waiting trial."""
    from sqlalchemy import event

    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # where transactions begin is said here

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    engine.dispose()  # what is connected already does not know


def study_of(storage: str, name: str, space: Space, costs: Costs, seed: int = 0, *, afresh: bool = False) -> Any:
    """The study of a search in this space, with what was found in others before, as far as it lies in this one: a search that goes on may
    know more options than when it began, and a study has the same ones all along. `afresh`: all that is forgotten."""
    optuna, where = extra("optuna", "optuna"), open_storage(storage)
    own = f"{name}-{hashlib.sha256(repr(space).encode()).hexdigest()[:8]}"
    others = [n for n in optuna.study.get_all_study_names(where) if n.startswith(f"{name}-") and n != own]
    if afresh:
        for n in others:
            optuna.delete_study(study_name=n, storage=where)
        return open_study(storage, own, seed, afresh=True)
    study = open_study(storage, own, seed)
    known = distributions({p.name: p.options for p in space.places} | {HEAD: space.heads})
    met = {tuple(sorted(t.choices.items())) for t in trials_of(study, space)}
    for other in (optuna.load_study(study_name=n, storage=where) for n in others):
        for t in trials_of(other, space, costs):
            if (key := tuple(sorted(t.choices.items()))) not in met:
                met.add(key)
                study.add_trial(optuna.trial.create_trial(params=t.choices, distributions=known, values=[t.rise, t.us, float(t.bytes)],
                                                          user_attrs={"by": t.by}))
    return study


def distributions(options: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    of = extra("optuna", "optuna").distributions.CategoricalDistribution
    return {n: of(its) for n, its in options.items()}


def open_study(storage: str, name: str = STUDY, seed: int = 0, *, afresh: bool = False) -> Any:
    """A study. `storage`: a file, or the URL of a database. `afresh`: what is left there under its name is forgotten."""
    optuna, where = extra("optuna", "optuna"), open_storage(storage)
    if afresh and name in optuna.study.get_all_study_names(where):
        optuna.delete_study(study_name=name, storage=where)
    sampler = optuna.samplers.NSGAIISampler(population_size=24, seed=seed)
    return optuna.create_study(study_name=name, storage=where, directions=["minimize", "minimize", "minimize"], sampler=sampler,
                               load_if_exists=True)


def redo(study: Any, worker: str | None = None) -> int:
    """Trials that were begun by a worker that is no more, or by whomever where none is named, are made again. Returns how many."""
    state = extra("optuna", "optuna").trial.TrialState
    left = [t for t in study.get_trials(deepcopy=False, states=(state.RUNNING,)) if worker in (None, t.user_attrs.get("worker"))]
    for t in left:
        study.tell(t.number, state=state.FAIL)
        study.enqueue_trial(t.params or t.system_attrs.get("fixed_params", {}), user_attrs={"by": t.user_attrs.get("by", "evolution")})
    return len(left)


def trials_of(study: Any, space: Space, costs: Costs | None = None) -> list[Trial]:
    """All that were finished and lie in the space, in their order; times and bytes as these costs tell them, which may be other ones than
    when they were made."""
    out, known = [], {p.name: p.options for p in space.places} | {HEAD: space.heads}
    for t in study.get_trials(deepcopy=False):
        if t.values is not None and set(t.params) == set(known) and all(o in known[p] for p, o in t.params.items()):
            us, size = (costs.time(t.params), costs.size(t.params)) if costs else (t.values[1], int(t.values[2]))
            out.append(Trial(dict(t.params), t.values[0], us, size, t.user_attrs.get("by", "evolution")))
    return out


def front_of(trials: Sequence[Trial]) -> list[Trial]:
    return best(trials, lambda t: (t.rise, t.us, t.bytes))


class Search:
    """Asks for candidates, evaluates them, and tells the study, until the time is over. Any number of these may work on one study."""

    def __init__(self, study: Any, space: Space, costs: Costs, rises: Mapping[str, Mapping[str, float]],
                 evaluate: Callable[[Sequence[Choices]], list[float]], seed: int = 0, worker: str = "0", limits: Sequence[Limits] = ()):
        self.study, self.space, self.costs, self.rises, self.evaluate, self.worker = study, space, costs, rises, evaluate, worker
        self.seed, self.draw, self.turn = seed, random.Random(seed), 0
        self.limits = [x for x in limits if x != Limits()]
        self.known = {p.name: [o for o in p.options if o in rises[p.name]] for p in space.places} | {HEAD: list(space.heads)}

    def queue(self, candidates: Sequence[Choices], by: str) -> None:
        """To be evaluated before anything else."""
        for c in candidates:
            self.study.enqueue_trial(dict(c), user_attrs={"by": by}, skip_if_exists=True)

    def run(self, until: float, tick: Callable[[int], None] = lambda n: None, most: int | None = None, *, least: int = 0,
            guided: bool = True) -> int:
        """Until a moment of `time.monotonic`, `least` trials at any rate and `most` at most; what was queued comes first. Returns how many
        were made.

        By turns what NSGA-II of Optuna proposes, and (`guided`) moves from the front that the predictor thinks best.
        """
        made, spent = 0, 0.0
        while (made < least or until - time.monotonic() > spent) and (most is None or made < most):
            began = time.monotonic()
            if (self.space.even or (guided and self.turn % 2)) and not self._waiting():
                self.queue(self.moves(), "predictor")
            asked = [self._ask() for _ in range(BATCH if most is None else min(BATCH, most - made))]
            if self.space.even:  # of what was proposed blindly
                asked = self._evened(asked)
            rises = self.evaluate([t.params for t in asked])
            for t, rise in zip(asked, rises, strict=True):
                self.study.tell(t, (rise, self.costs.time(t.params), float(self.costs.size(t.params))))
            made += len(asked)
            self.turn += 1
            tick(made)
            spent = time.monotonic() - began
        return made

    def _evened(self, asked: list[Any]) -> list[Any]:
        """Those that the space allows; the others are taken back, and the nearest that are allowed come in their place."""
        state = extra("optuna", "optuna").trial.TrialState
        kept = []
        for t in asked:
            near = self.space.allowed(t.params)
            if near == t.params:
                kept.append(t)
                continue
            self.study.tell(t, state=state.PRUNED)
            self.study.enqueue_trial(near, user_attrs={"by": "evolution"})
            kept.append(self._ask())
        return kept

    def moves(self) -> list[dict[str, str]]:
        """Neighbours of the front, those that the predictor thinks would better it the most.

        Formula: a fit of evaluated choices ranks random candidates, and the first of them are evaluated
        Source: Neural Predictor, arXiv:1912.00848, from its abstract; the moves are those of sub-networks, LLaMA-NAS, arXiv:2405.18377: of
            depth and width, one or two sublayers at a time
        Deviations: candidates are neighbours of the front, not of all the space; what is fitted is chosen by cross-validation
        """
        done = trials_of(self.study, self.space, self.costs)
        front = front_of(done)
        if len(done) < LEARN or not front:
            return [self._moved(self._parent(front)) for _ in range(BATCH)] if front else []
        seen = {self._key(t.choices) for t in done}
        some = {self._key(c): c
                for c in (self._moved(self._parent(front)) for _ in range(CANDIDATES))}
        new = [c for k, c in some.items() if k not in seen]
        if not new:
            return []
        options = sorted({o for p in self.space.places for o in self.known[p.name]})
        table = {(p.name, o): self.rises[p.name][o] for p in self.space.places for o in self.known[p.name]}
        x = encode([t.choices for t in done], self.space.names, options, table)
        fit = Predictor.fit(x, torch.tensor([t.rise for t in done]), self.draw.randrange(2**31))
        told = encode(new, self.space.names, options, table)
        mean = fit.predict(told)[0].tolist()
        ahead = [k for k, (c, rise) in enumerate(zip(new, mean, strict=True))
                 if not any(t.rise <= rise and t.us <= self.costs.time(c) and t.bytes <= self.costs.size(c) for t in front)]
        return [new[ahead[k]] for k in self.draw.sample(range(len(ahead)), min(BATCH, len(ahead)))]

    def random(self) -> dict[str, str]:
        """Anything."""
        return self.space.allowed({n: self.draw.choice(its) for n, its in self.known.items()})

    def _parent(self, front: Sequence[Trial]) -> Choices:
        """Any of the front, and every second time one of those that lie nearest to what is asked."""
        if not self.limits or self.draw.random() < 0.5:
            return self.draw.choice(front).choices
        limits = self.draw.choice(self.limits)

        def off(t: Trial) -> float:  # a loss is most often less than the divergence
            ratios = [t.us * limits.speed / self.costs.dense] if limits.speed else []
            ratios += [t.bytes / limits.bytes] if limits.bytes else []
            ratios += [max(t.rise, 1e-6) / (OVER * math.log1p(limits.loss))] if limits.loss else []
            return max((abs(math.log(x)) for x in ratios), default=0.0)

        return self.draw.choice(sorted(front, key=off)[:NEAREST]).choices

    def _moved(self, choices: Choices) -> dict[str, str]:
        """One or two sublayers otherwise, or two that swap what they are."""
        new = dict(choices)
        names = self.space.names
        if self.draw.random() < 0.3 and len(names) > 1:
            a, b = self.draw.sample(names, 2)
            if new[b] in self.known[a] and new[a] in self.known[b]:
                new[a], new[b] = new[b], new[a]
        for name in self.draw.sample([*names, HEAD], self.draw.choice((1, 1, 2))):
            new[name] = self.draw.choice(self.known[name])
        return self.space.allowed(new)

    def _ask(self) -> Any:
        trial = self.study.ask(distributions(self.known))
        trial.set_user_attr("worker", self.worker)
        return trial

    def _key(self, choices: Choices) -> tuple[str, ...]:
        return tuple(choices[n] for n in (*self.space.names, HEAD))

    def _waiting(self) -> bool:
        state = extra("optuna", "optuna").trial.TrialState.WAITING
        return bool(self.study.get_trials(deepcopy=False, states=(state,)))


def file_in(folder: Path) -> str:
    """Where a search keeps its trials that was given no database."""
    return str(folder / "trials.db")
