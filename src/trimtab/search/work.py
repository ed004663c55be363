"""Option tables and trials by many workers, which meet in a folder, in the cache and in the study's storage."""
from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from trimtab.core import data
from trimtab.core.calibrate import StatCache
from trimtab.core.journal import write_json
from trimtab.core.types import BadInput
from trimtab.core.workers import Request, Workers, spread
from trimtab.network.stream import Network
from trimtab.search.edited import Edited
from trimtab.search.front import Limits
from trimtab.search.options import OPTIONS
from trimtab.search.quality import Assembled
from trimtab.search.space import Place, Space
from trimtab.search.timing import Costs
from trimtab.search.trials import BATCH, Search, open_study, redo

CHUNK = 10.0   # seconds of trials that are asked for at once
TABLE, TRIALS = f"{__name__}:table", f"{__name__}:trials"

Tables = Callable[[Iterable[Request]], Iterator[tuple[Request, dict[str, float]]]]  # options, groups and places, and their rises


# ---- what they start from -------------------------------------------------------------------------
def set_out(folder: Path, edited: Edited, assembled: Assembled) -> None:
    """What a worker opens: the network, its text, where options are kept."""
    data.write_samples(folder / "calibration.safetensors", edited.samples)
    data.write_samples(folder / "split.safetensors", assembled.samples)
    write_json(folder / "setup.json", {"model": str(edited.net.checkpoint.path.resolve()), "digest": edited.net.digest,
                                       "home": str(edited.home.resolve()), "space": asdict(assembled.space),
                                       "in_bytes": assembled.in_bytes})


def set_tables(folder: Path, work: Search) -> None:
    """What trials are made from, beside that."""
    rises = {p: dict(r) for p, r in work.rises.items()}
    write_json(folder / "tables.json", {"space": asdict(work.space), "costs": asdict(work.costs), "rises": rises,
                                        "limits": [asdict(x) for x in work.limits]})


@dataclass
class Opened:
    edited: Edited
    assembled: Assembled
    searches: dict[str, Search] = field(default_factory=dict)


@lru_cache(maxsize=1)
def opened(folder: Path) -> Opened:
    """As `set_out` left it; a worker opens it once."""
    try:
        said = json.loads((folder / "setup.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{folder} is not there on {socket.gethostname()}; several machines have to share the folders of the model and of "
                       "$TRIMTAB_CACHE") from None
    net = Network.open(Path(said["model"]), dtype=torch.float32)
    if net.digest != said["digest"]:
        raise BadInput(f"{said['model']} is another model on {socket.gethostname()}; put it into a folder that all machines share")

    edited = Edited(net, data.read_samples(folder / "calibration.safetensors"), Path(said["home"]), StatCache())
    split = data.read_samples(folder / "split.safetensors")
    return Opened(edited, Assembled(net, space_in(said["space"]), split, edited.read, folder, in_bytes=said["in_bytes"]))


def space_in(said: Mapping[str, Any]) -> Space:
    return Space(said["blocks"], tuple(Place(**{**p, "options": tuple(p["options"])}) for p in said["places"]), tuple(said["heads"]),
                 said["even"])


# ---- what they do ---------------------------------------------------------------------------------
def alone(edited: Edited, assembled: Assembled, option: str, group: str, places: Iterable[str]) -> dict[str, float]:
    """An option of a group made, and what it alone raises the loss by at each of these places."""
    edited.make(OPTIONS[option], group, lambda s, d, n: None)
    some = list(places)
    return dict(zip(some, assembled.rises([assembled.space.dense | {p: option} for p in some]), strict=True))


def table(folder: str, worker: str, option: str, group: str, places: list[str]) -> dict[str, float]:
    its = opened(Path(folder))
    return alone(its.edited, its.assembled, option, group, places)


def trials(folder: str, worker: str, storage: str, study: str, seed: int, until: float, least: int, most: int | None, guided: bool
           ) -> dict[str, float]:
    """Trials for CHUNK seconds, or until a moment of `time.time`, which machines agree on: how many, and the seconds that the last of them
    took together."""
    its = opened(Path(folder))
    if worker not in its.searches:
        said = json.loads((Path(folder) / "tables.json").read_text(encoding="utf-8"))
        its.searches[worker] = Search(open_study(storage, study, seed), space_in(said["space"]), Costs(**said["costs"]), said["rises"],
                                      its.assembled.rises, seed, worker, [Limits(**x) for x in said["limits"]])
    ends = [time.monotonic()]
    made = its.searches[worker].run(ends[0] + min(CHUNK, until - time.time()), lambda n: ends.append(time.monotonic()), most, least=least,
                                    guided=guided)
    return {"made": made, "spent": ends[-1] - ends[-2] if made else 0.0}


# ---- who is asked ---------------------------------------------------------------------------------
def tables_by(workers: Workers | None, edited: Edited, assembled: Assembled) -> Tables:
    """`alone`, for many, by the workers or here."""
    if workers is None:
        return lambda items: ((i, alone(edited, assembled, **i)) for i in items)
    set_out(workers.folder, edited, assembled)
    return lambda items: spread(workers, TABLE, ({**i, "folder": str(workers.folder)} for i in items))


def trials_by(workers: Workers | None, work: Search, storage: str) -> Callable[..., int]:
    """`Search.run`, by the workers or here."""
    if workers is None:
        return work.run
    set_tables(workers.folder, work)
    if "://" not in storage:
        storage = str(Path(storage).resolve())
    return partial(run_trials, workers, work.study, storage, seed=work.seed)


def run_trials(workers: Workers, study: Any, storage: str, until: float, tick: Callable[[int], None] = lambda n: None,
               most: int | None = None, *, seed: int = 0, least: int = 0, guided: bool = True) -> int:
    """As `Search.run`, by all workers: until a moment of `time.monotonic`, or `most`. What a dead worker had begun is made again."""
    made, spent = 0, 0.0

    def request(k: int, left: int | None, must: int) -> Request:
        return {"folder": str(workers.folder), "storage": storage, "study": study.study_name, "seed": seed + 1 + k,
                "until": time.time() + until - time.monotonic(), "least": must, "most": left, "guided": guided}

    def requests() -> Iterator[Request]:
        for k in count():
            left = None if most is None else min(BATCH, most - k * BATCH)
            if (left is not None and left <= 0) or (k * BATCH >= least and until - time.monotonic() <= spent):
                return
            yield request(k, left, BATCH if k * BATCH < least else 0)

    def done(items: Iterable[Request]) -> None:
        nonlocal made, spent
        for _, its in spread(workers, TRIALS, items, lambda worker: redo(study, worker)):
            made, spent = made + int(its["made"]), its["spent"] or spent
            tick(made)

    done(requests())
    if left := redo(study):  # whose worker died before it had put its name to them
        done([request(made, left, left)])
    return made
