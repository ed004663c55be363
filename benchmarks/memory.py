"""Peak resident memory of `trimtab trim` under --max-memory, over the whole process tree, proof included.

    python benchmarks/memory.py build/llama-1b results/memory.jsonl [--samples 128] [RUN...]

The tree is sampled every 50 ms from /proc (VmRSS, mapped pages counted), so a short peak may be missed by that much;
each process's own high-water mark (VmHWM), summed, is stored beside it as an upper bound. `--dry-run` is asked first, and
what it said is stored beside what came.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = {
    "wanda uniform": ("wanda", "2GB"), "magnitude uniform": ("magnitude(unit=site)", "2GB"),
    "wanda global": ("wanda(unit=model)", "2GB"), "magnitude global": ("magnitude(unit=model)", "2GB"),
    "sparsegpt": ("sparsegpt", "2.5GB"),
}


def tree(pid: int) -> list[int]:
    found = [pid]
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += tree(int(child))
    except OSError:
        pass
    return found


def field(pid: int, name: str) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def held(folder: Path) -> int:
    """Bytes of disk under a folder that is being written."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(where) / name).stat().st_size
    return total


def measure(model: Path, recipe: str, limit: str, samples: int) -> dict:
    with tempfile.TemporaryDirectory(dir=model.parent) as tmp:
        argv = [sys.executable, "-m", "trimtab.cli", "trim", str(model), recipe, "-o", f"{tmp}/out", "--max-memory", limit,
                "--samples", str(samples), "--json", "-q"]
        if ":" not in recipe:
            argv += ["--keep", "0.5"]
        said = json.loads(subprocess.run([*argv, "--dry-run"], check=True, capture_output=True, text=True).stdout)
        began, peak, marks, disk = time.time(), 0, {}, 0
        p = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        while p.poll() is None:
            pids = tree(p.pid)
            peak = max(peak, sum(field(q, "VmRSS") for q in pids))
            marks |= {q: max(marks.get(q, 0), field(q, "VmHWM")) for q in pids}
            disk = max(disk, held(Path(tmp)))
            time.sleep(0.05)
        out = p.stdout.read() if p.stdout else ""
        if p.returncode:
            raise SystemExit(f"{recipe}: exit {p.returncode}")
        r = json.loads(out)
        seconds = time.time() - began
        return {"recipe": recipe, "setting": f"--max-memory {limit}, {samples} samples", "metric": "peak_GB",
                "value": round(peak / 1e9, 3), "seed": 0, "methods": {}, "peak_tree_rss_bytes": peak,
                "sum_of_high_water_bytes": sum(marks.values()), "own_report_bytes": r["peak_rss_bytes"],
                "edit_seconds": r["edit_seconds"], "seconds": round(seconds, 1), "plan_hash": r["plan_hash"],
                "model_bytes": r["before"]["bytes"], "peak_disk_bytes": disk, "estimate": said["estimate"],
                "estimate_after_one_block": said["measured"],
                "estimate_off_by": {"memory": round(said["estimate"]["memory"] / peak - 1, 3),
                                    "disk": round(said["estimate"]["disk"] / disk - 1, 3),
                                    "minutes": round(said["estimate"]["minutes"] * 60 / seconds - 1, 3)}}


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("model", type=Path)
    ap.add_argument("out", type=Path)
    ap.add_argument("runs", nargs="*", default=list(RUNS))
    ap.add_argument("--samples", type=int, default=128)
    a = ap.parse_intermixed_args()
    from trimtab.demo import machine

    for name in a.runs:
        row = {"run": name, "model": a.model.name, **measure(a.model, *RUNS[name], a.samples), "machine": machine(),
               "date": time.strftime("%Y-%m-%d")}
        print(f"{name:<20}{row['peak_tree_rss_bytes'] / 1e9:.2f} GB peak, {row['seconds']:.0f} s; "
              f"the estimate was off by {row['estimate_off_by']}", flush=True)
        with a.out.open("a") as f:
            f.write(json.dumps(row, sort_keys=True) + "\n")
        shutil.rmtree(a.model.parent / "out.partial", ignore_errors=True)
