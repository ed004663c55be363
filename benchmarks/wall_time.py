"""Wall time of recipes on the built-in model, load and proof not counted: medians of N runs, recipes alternating.

    python benchmarks/wall_time.py results/wall_time.jsonl [--repeat 5] [--profile wanda]
"""
from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import tempfile
import time
from pathlib import Path

import torch

import trimtab as tt
from trimtab.demo import machine

RECIPES = ("magnitude", "wanda", "sparsegpt", "admm", "wanda_owl", "gblm")


def once(recipe: str) -> float:
    """Calibrate, plan, edit and write, from an opened network to a finished directory, as the run itself counts it."""
    with tempfile.TemporaryDirectory() as tmp:
        found = tt.trim("builtin:lm", recipe, Path(tmp) / "out", keep=0.5, proof_tokens=256, speed=False, fresh=False)
    return float(found["edit_seconds"])


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("out", type=Path)
    ap.add_argument("--repeat", type=int, default=5)
    ap.add_argument("--profile", help="print where the time of one recipe goes instead")
    a = ap.parse_args()
    torch.set_num_threads(2)
    if a.profile:
        with cProfile.Profile() as prof:
            once(a.profile)
        pstats.Stats(prof).sort_stats("tottime").print_stats(14)
        raise SystemExit
    times: dict[str, list[float]] = {r: [] for r in RECIPES}
    for _ in range(a.repeat):
        for r in RECIPES:
            times[r].append(once(r))
    with a.out.open("a") as f:
        for r, t in times.items():
            row = {"recipe": r, "model": "builtin:lm", "setting": "50%, 128 x 256 tokens", "metric": "seconds",
                   "value": round(statistics.median(t), 2), "seed": 0, "methods": {}, "min": round(min(t), 2),
                   "max": round(max(t), 2), "runs": len(t), "machine": machine(), "date": time.strftime("%Y-%m-%d")}
            f.write(json.dumps(row, sort_keys=True) + "\n")
            print(f"{r:<12}{row['value']:>7.2f} s  ({row['min']} to {row['max']})")
