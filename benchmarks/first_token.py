"""From nothing to the first token of a packed directory: seconds, resident memory, and what was imported on the way.

    python benchmarks/first_token.py DIR results/first_token.jsonl [--runs 20] [--prompt 64] [--new 64]

Every run is a fresh process that imports torch and then opens the directory, whose files are in the page cache. Limits: 2 seconds to the
first token of the prompt, counted from opening; resident memory above a bare `import torch` not more than the files, the keys and
values, and 150 MB; neither transformers' modelling code nor its auto classes are imported. The decoder's tests run first, and nothing is
timed when they are red.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import Roof, green

LIMIT_S, ROOM = 2.0, 150 << 20


def once(path: Path, prompt: int, new: int, threads: int) -> dict[str, Any]:
    """In a process of its own: torch is there, nothing else."""
    import torch

    from trimtab.core.memory import rss

    torch.set_num_threads(threads)
    torch.ones(8, 8) @ torch.ones(8, 8)
    bare, began = rss(), time.perf_counter()
    from trimtab.runtime.decoder import open_decoder

    decoder = open_decoder(path)
    opened = time.perf_counter()
    steps = decoder.generate(torch.arange(10, 10 + prompt), new)
    next(steps)
    first = time.perf_counter()
    for _ in steps:
        pass
    strange = sorted(m for m in sys.modules if m.startswith(("transformers.models", "transformers.modeling", "transformers.generation")))
    return {"open_s": opened - began, "first_token_s": first - began, "over_import": rss() - bare, "modelling_imported": strange}


def main() -> int:
    from trimtab.demo import machine
    from trimtab.runtime import native

    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("model", type=Path)
    ask.add_argument("out", type=Path)
    ask.add_argument("--runs", type=int, default=20)
    ask.add_argument("--prompt", type=int, default=64)
    ask.add_argument("--new", type=int, default=64)
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    a = ask.parse_args()
    if a.once:
        print(json.dumps(once(a.model, a.prompt, a.new, a.threads)))
        return 0
    if not green("decoder"):
        return 1
    config = json.loads((a.model / "config.json").read_text(encoding="utf-8"))
    files = sum(f.stat().st_size for f in a.model.iterdir() if f.is_file())
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    wide = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    cache = 2 * 2 * config["num_hidden_layers"] * heads * wide * -(-(a.prompt + a.new) // 128) * 128  # bfloat16, whole pages
    command = [sys.executable, __file__, str(a.model), str(a.out), "--once", "--prompt", str(a.prompt), "--new", str(a.new),
               "--threads", str(a.threads)]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(a.runs + 1)][1:]
    roof = Roof()
    roof.look(a.threads)
    print(machine(), native.level())
    print(roof)
    limits = {"first_token_s": LIMIT_S, "over_import": files + cache + ROOM}
    for metric in ("open_s", *limits):
        values = [r[metric] for r in runs]
        low, mid, high = statistics.quantiles(values, n=4)
        row = {"recipe": a.model.name, "model": a.model.parent.name.removesuffix("-packed"), "setting": f"prompt {a.prompt}, {a.new} new",
               "metric": metric, "value": round(mid, 4), "quartiles": [round(low, 4), round(high, 4)], "runs": a.runs, "seed": 0,
               "methods": {},
               "file_bytes": files, "cache_bytes": cache, "modelling_imported": runs[0]["modelling_imported"], "threads": a.threads,
               "read_gb_s": round(roof.gives("bandwidth") / 1e9, 2),
               "machine": machine(), "isa": native.level(), "date": time.strftime("%Y-%m-%d")}
        if metric in limits:
            row |= {"wanted": limits[metric], "met": mid <= limits[metric]}
        print(f"{a.model.name:28}{metric:16}{mid:16,.2f}  wanted at most {limits.get(metric, float('nan')):16,.2f}", flush=True)
        with a.out.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row, sort_keys=True) + "\n")
    print("modelling code imported:", ", ".join(runs[0]["modelling_imported"]) or "none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
