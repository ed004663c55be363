"""kill -9 at random moments, each followed by --resume: the files must equal an uninterrupted run's.

    python benchmarks/crash.py results/crash.jsonl [--kills 20] [--recipe sparsegpt] [--seed 0]
"""
from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def hashes(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir()
            if p.is_file() and p.name not in ("trimtab.json", "README.md")}  # those two hold timings


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("out", type=Path)
    ap.add_argument("--seed", type=int, default=0, help="of the moments")
    ap.add_argument("--kills", type=int, default=20)
    ap.add_argument("--recipe", default="sparsegpt")
    ap.add_argument("--samples", default="16")
    a = ap.parse_args()
    rng = random.Random(a.seed)
    with tempfile.TemporaryDirectory() as tmp:
        argv = [sys.executable, "-m", "trimtab.cli", "trim", "builtin:lm", a.recipe, "--samples", a.samples, "--proof-tokens",
                "512", "--no-speed", "-q", "--resume", "-o"]
        began = time.time()
        subprocess.run([*argv, f"{tmp}/whole"], check=True)
        length, want = time.time() - began, hashes(Path(tmp) / "whole")
        equal = 0
        for k in range(a.kills):
            out = Path(tmp) / f"o{k}"
            p = subprocess.Popen([*argv, str(out)])
            moment = rng.uniform(0, length)
            time.sleep(moment)
            p.send_signal(signal.SIGKILL)
            p.wait()
            state = "published" if out.exists() else f"{len(list(Path(f'{out}.partial').glob('sweep*')))} blocks"
            subprocess.run([*argv, str(out)], check=True)
            same = hashes(out) == want
            equal += same
            print(f"kill {k + 1:>2} at {moment:5.1f} s of {length:.1f} ({state}): {'equal' if same else 'DIFFERENT'}", flush=True)
        print(f"{equal} of {a.kills} equal")
        from trimtab.demo import machine

        row = {"recipe": a.recipe, "model": "builtin:lm", "setting": f"{a.kills} kills at random moments", "metric": "share_equal",
               "value": equal / a.kills, "seed": a.seed, "methods": {}, "seconds_uninterrupted": round(length, 1), "machine": machine(),
               "date": time.strftime("%Y-%m-%d")}
        with a.out.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row, sort_keys=True) + "\n")
        raise SystemExit(equal != a.kills)
