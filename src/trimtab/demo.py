"""The main job on the built-in model: a dense baseline and many recipes side by side, a table, a report."""
from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import trimtab
from trimtab.builtin import model_path
from trimtab.core import line, spec
from trimtab.core.calibrate import StatCache
from trimtab.core.types import BadInput

# (name shown, recipe, share kept where it is free)
RUNS = (
    ("magnitude 50%", "magnitude", 0.5),
    ("wanda 50%", "wanda", 0.5),
    ("sparsegpt 50%", "sparsegpt", 0.5),
    ("admm 50%", "admm", 0.5),
    ("magnitude 2:4", "magnitude(unit=2:4)", None),
    ("sparsegpt 2:4", "sparsegpt(unit=2:4)", None),
    ("admm 2:4", "admm(unit=2:4)", None),
    ("global 50%", "magnitude(unit=model)", 0.5),
    ("blocks 32x32 50%", "block(b=32) | wanda | uniform | mask | least_squares", 0.5),
    ("neurons 30% gone", "neuron | wanda | uniform | mask | least_squares", 0.7),
    ("slicegpt 20% gone", "slicegpt", 0.8),
    ("gptq 4 bits", "gptq(bits=4)", None),
)
SAMPLES = 64  # half the default: the demo shows the way, the guide's tables use all
PROMPT = "import unittest\n\nclass StackTest(unittest.TestCase):\n    def test_push(self):"


def machine() -> dict[str, str]:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            name = next((row.split(":", 1)[1].strip() for row in f if row.startswith("model name")), name)
    except OSError:
        pass
    return {"cpu": name, "isa": torch.backends.cpu.get_cpu_capability(), "threads": str(torch.get_num_threads()),
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "trimtab": trimtab.__version__}


def sample(path: Path) -> str:
    import trimtab as tt

    return "".join(tt.load(path).generate(PROMPT, max_new_tokens=64))


def demo(out: Path, *, force: bool, threads: int, quiet: bool, words: bool) -> dict[str, Any]:
    """Run every recipe of RUNS into `out`/models, prove each, write `out`/report.html and results.jsonl."""
    from trimtab.cli import Progress
    from trimtab.report.page import page
    from trimtab.report.table import print_runs, ranked

    model = model_path()
    if out.exists() and not (force and out.is_dir()):
        raise BadInput(f"{out} exists; choose another --out" + (", or replace it with --force" if out.is_dir() else " folder"))
    line.check_ours(out, "report.html")
    staging = out.with_name(out.name + ".partial")
    if staging.exists() and not (staging / "models").is_dir():
        raise BadInput(f"{staging} was not made by this demo; move it away or choose another --out")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "models").mkdir(parents=True)
    began, cache = time.monotonic(), StatCache()
    samples = {"dense": sample(model)}
    runs: list[dict[str, Any]] = []
    for n, (name, text, keep) in enumerate(RUNS):
        spent = time.monotonic() - began
        left = f", about {spent / n * (len(RUNS) - n):.0f} s left in all" if n else ""
        progress = Progress(quiet, prefix=f"[{n + 1}/{len(RUNS)}] {name:<17} ")
        if not quiet:
            print(f"[{n + 1}/{len(RUNS)}] {name}{left}", file=sys.stderr, flush=True)
        target = staging / "models" / name.replace(" ", "-").replace(":", "of").replace("%", "")
        try:
            result = line.trim(model, spec.load(text).limited(None, keep), target,
                               line.Options(threads=threads, cache=cache, samples=SAMPLES, speed_seconds=3.0, proof_tokens=6144), progress)
        finally:
            progress.close()
        result["name"] = name
        result["out"] = str(out / target.relative_to(staging))
        runs.append(result)
        samples[name] = sample(target)
    seconds = time.monotonic() - began
    (staging / "results.jsonl").write_text("".join(json.dumps(r, sort_keys=True) + "\n" for r in runs), encoding="utf-8")
    facts = {**machine(), "statistics reused": str(cache.hits), "seconds": f"{seconds:.0f}"}
    html = page("trimtab demo: builtin:lm, trimmed twelve ways", runs, {"prompt": PROMPT, **samples}, facts)
    (staging / "report.html").write_text(html, encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    if words:
        print_runs(runs)
        best = ranked(runs)[0]
        print(f"\nprompt     {PROMPT!r}\nbefore     {samples['dense']!r}\nafter      {samples[best['name']]!r}   ({best['name']})")
        print(f"\n{seconds:.0f} s in all. The report: {out / 'report.html'}")
    return {"runs": runs, "samples": samples, "report": str(out / "report.html"), "seconds": round(seconds, 1)}
