"""Ours beside llm-compressor on the same model, samples and scheme: perplexity, wall time, peak memory; each run a process of its own.

    python benchmarks/llmcompressor.py builtin:lm results/llmcompressor.jsonl --peer PYTHON
    python benchmarks/random_llama.py build/llama-1b --size 1b
    python benchmarks/llmcompressor.py build/llama-1b results/llmcompressor.jsonl --peer PYTHON --samples 16 --no-quality

PYTHON has llmcompressor (python -m venv DIR && DIR/bin/pip install llmcompressor). Both start from one directory and the same token ids and
write a directory. Seconds are those of loading, editing and writing, without imports and without our proof; memory is the most that was
resident, above what a bare `import torch` holds. Perplexity is that of transformers with compressed-tensors, theirs, for both: ours is
exported to that format. Rounds alternate. Wanted: perplexity not more than 0.5 % above theirs, seconds and memory at most half.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

OURS = {"gptq w4a16": "gptq(bits=4,group=128)", "awq w4a16": "awq", "gptq w8a8": "gptq(bits=8,group=0)", "rtn w8a8": "rtn(bits=8,group=0)"}
WANTED = {"perplexity": 1.005, "perplexity_int8_inputs": 1.005, "whole_seconds": 0.5, "peak_over_import": 0.5}
LENGTH, HELD_OUT = 256, 64
PARTS = ("load_seconds", "edit_seconds", "save_seconds")


def ours(spec: dict[str, Any]) -> dict[str, Any]:
    """Our side of `llmcompressor_worker.py trim`."""
    import torch

    from trimtab.core.memory import rss

    torch.set_num_threads(spec["threads"])
    bare = rss()
    import trimtab as tt

    import_module("transformers.models.llama.modeling_llama")  # theirs has it, too, before its clock starts

    out = Path(spec["out"])
    tt.trim(spec["model"], spec["recipe"], out, calib=(spec["inputs"],), text=(spec["inputs"],), samples=spec["samples"], seq_len=LENGTH,
            proof_tokens=LENGTH, speed=False, fresh=False, max_memory=spec["max_memory"], dtype=spec["dtype"])
    notes = json.loads((out / "trimtab.json").read_text(encoding="utf-8"))
    return {"load_seconds": notes["load_seconds"], "edit_seconds": notes["edit_seconds"], "save_seconds": 0.0,
            "over_import": notes["edit_peak_rss_bytes"] - bare, "plan_hash": notes["plan_hash"], "methods": notes["header"]["methods"]}


def ask(command: list[str], spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a process says to a spec."""
    file = folder / "spec.json"
    file.write_text(json.dumps(spec), encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"HF_HUB_OFFLINE": "1"}
    found = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False, env=env)
    if found.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{found.stderr[-3000:]}")
    return json.loads(found.stdout.splitlines()[-1])


def inputs(model: Path, split: str, count: int, seed: int | None, file: Path) -> None:
    """Windows of the built-in corpus as `trim` takes them."""
    import torch
    from safetensors.torch import save_file

    from trimtab.core import data
    from trimtab.network.stream import Network

    samples = data.prepare(Network.open(model), (), split, count, LENGTH, seed)
    save_file({"input_ids": torch.cat([s["input_ids"] for s in samples])}, file)


def whole(run: dict[str, Any]) -> float:
    return sum(run[k] for k in PARTS)


Runs = dict[str, list[dict[str, Any]]]  # of ours and theirs
Qualities = dict[str, tuple[float, float, float]]  # ours, theirs and dense, by metric


def compared(model: Path, scheme: str, peer: Path, folder: Path, *, samples: int, seed: int, threads: int, rounds: int, batch: int = 8,
             max_memory: int | None = None, dtype: str = "float32", quality: bool = True) -> tuple[Runs, Qualities]:
    """Both on one scheme, in a folder with room for their outputs."""
    import trimtab as tt

    theirs = [str(peer), "-I", str(Path(__file__).with_name("llmcompressor_worker.py"))]
    calibration, held = folder / "calibration.safetensors", folder / "held-out.safetensors"
    inputs(model, "calibration", samples, seed, calibration)
    both = {"ours": ([sys.executable, __file__, "--ours"], OURS[scheme], folder / "ours"),
            "theirs": ([*theirs, "trim"], scheme, folder / "theirs")}
    spec = {"model": str(model), "inputs": str(calibration), "samples": samples, "batch": batch, "threads": threads,
            "max_memory": max_memory, "dtype": dtype}
    runs: Runs = {who: [] for who in both}
    for _ in range(rounds):
        for who, (command, recipe, out) in both.items():
            shutil.rmtree(out, ignore_errors=True)
            runs[who].append(ask(command, spec | {"recipe": recipe, "out": str(out)}, folder))
    if not quality:
        return runs, {}
    inputs(model, "validation", HELD_OUT, None, held)
    eight = "w8a8" in scheme
    tt.export(folder / "ours", "compressed-tensors", folder / "exported", force=True, type="w8a8" if eight else "auto")
    asked = {"models": [str(folder / "exported"), str(folder / "theirs"), str(model)], "inputs": str(held), "threads": threads}
    mine, its, dense = ask([*theirs, "score"], asked, folder)["perplexity"]
    found = {"perplexity": (mine["weights"], its["weights"], dense["all"])}
    return runs, found | ({"perplexity_int8_inputs": (mine["all"], its["all"], dense["all"])} if eight else {})


def main() -> int:
    import torch

    from trimtab.api import resolve
    from trimtab.demo import machine

    ap = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ap.add_argument("model")
    ap.add_argument("out", type=Path)
    ap.add_argument("--peer", type=Path, required=True, metavar="PYTHON")
    ap.add_argument("--only", nargs="+", choices=OURS, default=list(OURS))
    ap.add_argument("--samples", type=int, default=128)
    ap.add_argument("--batch", type=int, default=8, help="of theirs; ours takes 8")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--rounds", type=int, default=1)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--max-memory", type=int, help="of ours, in bytes")
    ap.add_argument("--dtype", default="float32", help="that ours computes in; theirs computes in that of the files")
    ap.add_argument("--no-quality", action="store_true", help="for random weights")
    ap.add_argument("--no-speed", action="store_true", help="no rows of seconds, while the machine is busy")
    ap.add_argument("--where", type=Path, help="a directory with room for both outputs")
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    model = resolve(a.model).resolve()
    for scheme in a.only:
        with tempfile.TemporaryDirectory(dir=a.where) as folder:
            runs, quality = compared(model, scheme, a.peer, Path(folder), samples=a.samples, seed=a.seed, threads=a.threads,
                                     rounds=a.rounds, batch=a.batch, max_memory=a.max_memory, dtype=a.dtype, quality=not a.no_quality)
        found: dict[str, tuple[float, float, dict[str, Any]]] = {
            metric: (round(mine, 4), round(its, 4), {"dense": round(dense, 4)}) for metric, (mine, its, dense) in quality.items()}
        measures = {"peak_over_import": lambda r: r["over_import"]} | ({} if a.no_speed else {"whole_seconds": whole})
        for metric, of in measures.items():
            both = {who: [of(r) for r in rs] for who, rs in runs.items()}
            more: dict[str, Any] = {f"{who}_range": [round(f(x), 2) for f in (min, max)] for who, x in both.items()}
            if metric == "whole_seconds":
                more["parts"] = {who: {k: round(statistics.median(r[k] for r in rs), 2) for k in PARTS} for who, rs in runs.items()}
            found[metric] = (*(round(statistics.median(x), 2) for x in both.values()), more)
        one = runs["ours"][0]
        for metric, (mine, its, more) in found.items():
            row = {"recipe": OURS[scheme], "model": a.model if a.model.startswith("builtin") else model.name,
                   "setting": f"llmcompressor {scheme}, {a.samples} x {LENGTH}" + (f", {a.max_memory / 1e9:g} GB" if a.max_memory else "")
                   + (f", {a.dtype}" if a.dtype != "float32" else ""),
                   "metric": metric, "value": mine, "theirs": its, "ratio": round(mine / its, 4), "wanted": WANTED[metric],
                   "met": mine <= WANTED[metric] * its, "seed": a.seed, "methods": one["methods"], "plan_hash": one["plan_hash"],
                   "rounds": a.rounds, "threads": a.threads, "their_batch": a.batch, "their_versions": runs["theirs"][0]["versions"],
                   "machine": machine(), "date": time.strftime("%Y-%m-%d"), **more}
            print(f"{scheme:12}{metric:24}{mine:18,.4f} ours{its:18,.4f} theirs{mine / its:10.4f}  {'met' if row['met'] else 'missed'}",
                  flush=True)
            with a.out.open("a", encoding="utf-8") as f:
                f.write(json.dumps(row, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--ours":
        print(json.dumps(ours(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))))
    else:
        sys.exit(main())
