"""Trials a minute of a search on the built-in model by one worker and by two, each single-threaded, in turns; starting up is not counted.

    python benchmarks/search_workers.py results/search_workers.jsonl [--rounds 3] [--seconds 45] [--ray local] [--storage URL]

Every round begins a study of its own, in a file or in the database of a URL. One worker is this process, as `--workers 1` is.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import uuid
from pathlib import Path

import torch

from trimtab.api import resolve
from trimtab.core import data
from trimtab.core.calibrate import StatCache
from trimtab.core.workers import hired
from trimtab.demo import machine
from trimtab.network.stream import Network
from trimtab.search.edited import Edited
from trimtab.search.options import OPTIONS
from trimtab.search.quality import Assembled
from trimtab.search.space import space_of
from trimtab.search.timing import Costs
from trimtab.search.trials import Search, open_study, trials_of
from trimtab.search.work import tables_by, trials_by

NAMES = ("dense", "int8", "int4", "2:4", "neurons50", "drop")
SPLIT, LENGTH = 16, 256  # as a search has them


def a_minute(workers: int, net: Network, samples: list[data.Batch], home: Path, a: argparse.Namespace) -> float:
    space = space_of(net, [OPTIONS[n] for n in NAMES])
    edited = Edited(net, samples[SPLIT:], home, StatCache())
    us = {p.name: {o: 10.0 / (1 + NAMES.index(o)) for o in p.options} for p in space.places}  # any will do: nothing is timed by them
    size = {p.name: {o: 1000 // (1 + NAMES.index(o)) for o in p.options} for p in space.places}
    costs = Costs(us, size, {"keep": 5.0, "int8": 3.0}, {"keep": 500, "int8": 200}, 1.0, 300.0)
    with tempfile.TemporaryDirectory() as tmp, hired(workers, a.ray if workers > 1 else "", a.storage, 1, home) as who:
        assembled = Assembled(net, space, samples[:SPLIT], edited.read, Path(tmp))
        rises = {p.name: {"dense": 0.0} for p in space.places}
        wanted = [{"option": o, "group": g, "places": [p.name for p in space.places if p.group == g and o in p.options]}
                  for o in NAMES[1:] for g in OPTIONS[o].groups]
        for its, found in tables_by(who, edited, assembled)(wanted):  # all have begun, and hold the model
            for place, rise in found.items():
                rises[place][its["option"]] = rise
        storage = a.storage or f"{tmp}/trials.db"
        study = open_study(storage, f"benchmark-{uuid.uuid4()}")
        run = trials_by(who, Search(study, space, costs, rises, assembled.rises), storage)
        began = time.monotonic()
        run(began + a.seconds)
        seconds = time.monotonic() - began
        return 60 * len(trials_of(study, space)) / seconds


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("out", type=Path)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--seconds", type=float, default=45)
    ap.add_argument("--ray", default="")
    ap.add_argument("--storage", default="")
    a = ap.parse_args()
    torch.set_num_threads(1)
    net = Network.open(resolve("builtin:lm"))
    samples = data.prepare(net, (), "calibration", SPLIT + 8, LENGTH, 0)
    found: dict[int, list[float]] = {1: [], 2: []}
    load = []
    with tempfile.TemporaryDirectory() as home:
        for r in range(a.rounds):
            for n in (1, 2) if r % 2 == 0 else (2, 1):
                load.append(os.getloadavg()[0])
                found[n].append(a_minute(n, net, samples, Path(home), a))
                print(f"round {r + 1}, {n} of them: {found[n][-1]:.1f} trials a minute (load {load[-1]:.1f} before)", flush=True)
    ratio = statistics.median(b / o for o, b in zip(found[1], found[2], strict=True))
    print(f"two give {ratio:.2f} x the trials of one")
    row = {"recipe": "search", "model": "builtin:lm", "seed": 0,
           "setting": f"two single-threaded workers against one, {'Ray tasks' if a.ray else 'processes'}, "
           f"{'PostgreSQL' if a.storage else 'SQLite'}, {a.seconds:g} s of trials", "metric": "trials_ratio", "value": round(ratio, 3),
           "trials_per_minute": {str(n): [round(x, 1) for x in its] for n, its in found.items()}, "load_before": load, "methods": {},
           "table": "search_workers", "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    with a.out.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row, sort_keys=True) + "\n")
