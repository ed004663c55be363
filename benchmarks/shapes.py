"""What smaller shapes buy: a model and what is left of it, in transformers and in our decoder, taking turns.

    python benchmarks/random_llama.py build/llama-110m --size 110m
    python benchmarks/shapes.py build/llama-110m llama-110m results/shapes.jsonl [--rounds 21] [--only NAME ...]
    python benchmarks/shapes.py builtin:lm builtin:lm results/shapes.jsonl

Takes 30 % of the weights of the blocks in every way below, into MODEL-shapes/ (once), and times both in pairs A B, B A: 16 new tokens
behind a prompt of 64, and a prompt of 512, in bfloat16. Medians over the pairs; the spread is the
quartiles.
"""
from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from measure import green

import trimtab as tt
from trimtab.builtin import model_path
from trimtab.demo import machine
from trimtab.network.stream import Network
from trimtab.prove.proof import removed
from trimtab.prove.speed import measure

KEEP = 0.7
WAYS = {"neurons": "neuron | magnitude", "heads and neurons": "inner | magnitude", "channels": "channel(scaled=false) | magnitude",
        "layers": "layer | shallow"}
# What is wanted of a pair: how many times as fast, by runner and metric; in transformers each layer takes its time whatever its width.
WANTED = {("torch", "prefill_tok_s"): 1.25, ("trimtab", "prefill_tok_s"): 1.25, ("trimtab", "decode_tok_s"): 1.25}
DECODE = {"layers": 1.25}
WIDTH = 1.05
SETTINGS = {"decode_tok_s": (64, 16), "prefill_tok_s": (512, 1)}


def pairs(before: Path, after: Path, runner: str, metric: str, rounds: int) -> dict[str, Any]:
    prompt, new = SETTINGS[metric]
    ours = {"ours": True, "cache": "bf16"} if runner == "trimtab" else {}
    return measure(before, after, prompt=prompt, new=new, repeats=rounds, dtype=torch.bfloat16, **ours)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("model")
    ask.add_argument("name")
    ask.add_argument("out", type=Path)
    ask.add_argument("--rounds", type=int, default=21)
    ask.add_argument("--only", nargs="+", default=list(WAYS))
    a = ask.parse_args()
    if not green("decoder"):
        raise SystemExit("the decoder's tests are red: nothing is timed")
    before = model_path(a.model) if a.model.startswith("builtin:") else Path(a.model)
    made = Path("build/shapes" if a.model.startswith("builtin:") else f"{a.model}-shapes") / a.name.replace(":", "-")
    made.mkdir(parents=True, exist_ok=True)
    for way in a.only:
        after = made / way.replace(" ", "-")
        if not after.exists():
            tt.trim(before, WAYS[way], after, keep=KEEP, samples=4, proof_tokens=256, speed=False)
        nets = [Network.open(before), Network.open(after)]
        for runner in ("torch", "trimtab"):
            for metric in SETTINGS:
                found = pairs(before, after, runner, metric, a.rounds)
                ratio = found["ratio"][metric]
                gone = removed(nets, found)
                assert gone is not None
                wanted = WANTED.get((runner, metric), DECODE.get(way, WIDTH))
                row = {"recipe": WAYS[way], "model": a.name, "setting": f"{way}, {runner}", "metric": metric, "seed": 0, "methods": {},
                       "table": "shapes", "value": round(ratio["median"], 4), "least": round(ratio["min"], 4),
                       "most": round(ratio["max"], 4), "quartiles": [round(q, 4) for q in ratio["quartiles"]], "pairs": a.rounds,
                       "before": round(found["before"][metric], 2), "after": round(found["after"][metric], 2), "removed": gone,
                       "wanted": wanted, "met": ratio["median"] >= wanted, "threads": found["threads"], "dtype": found["dtype"],
                       "machine": machine(), "date": time.strftime("%Y-%m-%d")}
                with a.out.open("a", encoding="utf-8") as f:
                    f.write(json.dumps(row, sort_keys=True) + "\n")
                print(f"{a.name} {way:<20}{runner:<9}{metric:<15}{row['before']:>10,.1f} -> {row['after']:>10,.1f}  {row['value']:.3f} x "
                      f"({row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f}), {wanted} wanted: {'met' if row['met'] else 'MISSED'}; "
                      f"{gone['became_time'][metric.removesuffix('_tok_s')]:.0%} of what is gone became time", flush=True)


if __name__ == "__main__":
    main()
