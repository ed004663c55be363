"""How well the times that a search goes by are told: random candidates, as the tables have them and as they are measured, twice.

    python benchmarks/random_llama.py build/llama-110m --size 110m
    python benchmarks/search_time.py build/llama-110m llama-110m results/search_time.jsonl [--count 12] [--threads N]

Candidates are laid out as the search lays out its options (time hangs on shapes and formats), so that a network of random weights will do.
They decode in turns with the dense model, and once more in a process of its own: the error of what was told, and whether the order stays.
"""
from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import green

from trimtab.builtin import model_path
from trimtab.core import data
from trimtab.demo import machine
from trimtab.network.stream import Network
from trimtab.runtime.decoder import open_decoder
from trimtab.search.edited import cache_home
from trimtab.search.options import DENSE, opened_by
from trimtab.search.predictor import kendall
from trimtab.search.space import space_of
from trimtab.search.timing import FEW, Layouts, dense_decoders, fastest_dense, of_timed, prompts_of, race

SLOW = ("rank50", "rank30", "gate50", "gate30", "int4-gate50", "int4-gate30")  # which take long to be made, or are seldom worth it
BETTER = 1.02  # of two speeds, what makes one the faster


def samples_of(net: Network) -> list[data.Batch]:
    """Text where there is a tokenizer, else tokens at random."""
    if net.tokenizer() is not None:
        return data.prepare(net, (), "calibration", FEW, 128, 0)
    ids = torch.randint(0, net.config.vocab_size, (FEW, 128), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row[None]} for row in ids]


def speeds(model: Path, folders: list[str], samples: list[data.Batch], context: int) -> list[float]:
    runs = race({**dense_decoders(model), **{f: open_decoder(Path(f)) for f in folders}}, prompts_of(samples, 1, context), rounds=21)
    base = runs[fastest_dense(runs)]
    return [runs[f].speed(base) for f in folders]


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("model")
    ask.add_argument("name")
    ask.add_argument("out", type=Path)
    ask.add_argument("--count", type=int, default=12)
    ask.add_argument("--context", type=int, default=64)
    ask.add_argument("--threads", type=int, default=0)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--again", nargs="+", default=[], help=argparse.SUPPRESS)
    a = ask.parse_args()
    if not green("decoder"):
        raise SystemExit("the decoder's tests are red: nothing is timed")
    if a.threads:
        torch.set_num_threads(a.threads)
    model = model_path(a.model) if a.model.startswith("builtin:") else Path(a.model)
    net = Network.open(model)
    samples = samples_of(net)
    if a.again:
        print(json.dumps(speeds(model, a.again, samples, a.context)))
        return
    with tempfile.TemporaryDirectory() as tmp:
        def told(stage: str, done: int, of: int) -> None:
            print(f"{time.strftime('%H:%M:%S')} {stage} {done} of {of}", flush=True) if done == of else None

        space = space_of(net, [o for o in opened_by("ours") if o.name not in SLOW])
        layouts = Layouts(model, net, space, samples, cache_home(), Path(tmp), batch=1, context=a.context, machine=machine())
        costs = layouts.costs(told)
        space, draw = of_timed(space, costs), random.Random(a.seed)
        chosen = []
        for k in range(a.count):  # from nearly dense to nearly none of it
            keep = (k + 0.5) / a.count
            chosen.append({p.name: DENSE if draw.random() < keep else draw.choice(p.options) for p in space.places}
                          | {"head": draw.choice(space.heads)})
        folders = [str(layouts.lay_out(c, 1000 + k)) for k, c in enumerate(chosen)]
        first = speeds(model, folders, samples, a.context)
        command = [sys.executable, __file__, a.model, a.name, str(a.out), "--context", str(a.context), "--threads",
                   str(torch.get_num_threads()), "--again", *folders]
        second = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    tells = [costs.speed(c) for c in chosen]
    off = [abs(t / s - 1) for t, s in zip(tells, first, strict=True)]
    apart = [(i, j) for i in range(a.count) for j in range(a.count) if first[i] > BETTER * first[j]]
    row = {"recipe": "search", "model": a.name, "setting": f"{a.count} random candidates, behind {a.context} tokens",
           "metric": "median error", "value": statistics.median(off), "worst": max(off), "told": tells, "speeds": first, "again": second,
           "kept": sum(second[i] > second[j] for i, j in apart) / max(1, len(apart)), "pairs": len(apart),
           "kendall": kendall(first, second),
           "rank": kendall(tells, first), "seed": a.seed, "methods": {}, "table": "search_time", "threads": torch.get_num_threads(),
           "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    with a.out.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row, sort_keys=True) + "\n")
    for t, s, again in sorted(zip(tells, first, second, strict=True)):
        print(f"told {t:.3f} x  measured {s:.3f} x  again {again:.3f} x")
    print(f"median error {row['value']:.1%}, worst {row['worst']:.1%}; of {len(apart)} pairs apart {row['kept']:.1%} keep their order")


if __name__ == "__main__":
    main()
