"""Whole models, tokens per second: our decoder on packed directories beside other runtimes, all in one run, taking turns.

    python benchmarks/random_llama.py build/llama-110m --size 110m
    python benchmarks/decode.py build/llama-110m results/decode.jsonl [--llama PYTHON] [--rounds 5] [--only NAME ...]
                                [--genai PYTHON --openvino DIR ... --onnxruntime DIR ...] [--no-transformers]
                                [--one-at-a-time] [--table NAME]

Packs the model with every recipe below into DIR-packed/ (once), then starts one process a candidate; each waits until it is
its turn. With `--one-at-a-time` a process lives for its turn only, in which it first runs untimed: for models that do not fit
into memory together. Prompt 64 and 64 new tokens, and a prompt of 512; 2 threads; medians over the rounds, the spread is the
quartiles. The decoder's tests run first, and nothing is timed when they are red; the read bandwidth is measured between the
rounds, and counts at its best. transformers runs in bfloat16 and in torch.ao's dynamic int8 (transformers_worker.py).
`--llama`: an interpreter with llama-cpp-python, gguf and numpy. `--genai`: one with openvino-genai and onnxruntime-genai, and the
same model as those want it (genai_worker.py says how to make it): directories named after what the weights are, int8 and so on.
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

PACKED = {
    "dense bf16": ["dense"],
    "int8": ["rtn(bits=8,group=0)"],
    "int4 g128": ["rtn(bits=4,group=128)"],
    "int2 g64": ["rtn(bits=2,group=64)"],
    "int4 g128, each layer turned": ["hadamard | int(bits=4,group=128) | rtn"],
    "int4 g128, turned by neighbours": ["quarot | int(bits=4,group=128) | rtn"],
    "2:4 int4 g128": ["nm(n=2,m=4) | magnitude ; rtn(bits=4,group=128)"],
    "bf16, gates skip 65%": ["gate_magnitude", "--keep", "0.35"],
    "int4 g128, gates skip 65%": ["rtn(bits=4,group=128) ; gate_magnitude(keep=0.35)"],
    "mlp blocks 20% kept, bf16": ["mlp: blocks", "--keep", "0.2"],
    "mlp blocks 5% kept, bf16": ["mlp: blocks", "--keep", "0.05"],
}
REST = 0.05  # seconds in which the threads of the one before go to sleep
SETTINGS = {"decode_tok_s": (64, 64), "prefill_tok_s": (512, 1)}


def serve(path: Path, threads: int) -> None:
    """Our side of the protocol: a line "PROMPT NEW" in, a line of JSON out."""
    import torch

    from trimtab.core.memory import rss
    from trimtab.runtime.decoder import open_decoder

    torch.set_num_threads(threads)
    before, began = rss(), time.perf_counter()
    decoder = open_decoder(path)
    loaded = time.perf_counter() - began
    print("ready", flush=True)
    for line in sys.stdin:
        prompt, new = map(int, line.split())
        ids = torch.randint(10, 1000, (prompt,), generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        steps = decoder.generate(ids, new + 1)
        next(steps)
        first = time.perf_counter()
        for _ in steps:
            pass
        end = time.perf_counter()
        print(json.dumps({"prefill_tok_s": prompt / (first - start), "decode_tok_s": new / (end - first), "load_s": loaded,
                          "rss_over_import": rss() - before, "bytes_per_token": decoder.weight_bytes}), flush=True)


class Worker:
    """A candidate in a process of its own, from when it is first asked until `end`."""

    def __init__(self, command: list[str]):
        self.command = command
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{' '.join(self.command)} did not start")

    def turn(self, prompt: int, new: int) -> dict[str, Any]:
        assert self.process and self.process.stdin and self.process.stdout
        time.sleep(REST)
        self.process.stdin.write(f"{prompt} {new}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


def main() -> int:
    from trimtab.demo import machine
    from trimtab.runtime import native

    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("model", type=Path)
    ask.add_argument("out", type=Path)
    ask.add_argument("--llama", type=Path)
    ask.add_argument("--genai", type=Path)
    ask.add_argument("--openvino", type=Path, nargs="+", default=[], metavar="DIR")
    ask.add_argument("--onnxruntime", type=Path, nargs="+", default=[], metavar="DIR")
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument("--one-at-a-time", action="store_true")
    ask.add_argument("--no-transformers", action="store_true")
    ask.add_argument("--table", help="a name, where the rows are to stand in a table of their own")
    ask.add_argument("--only", nargs="+", choices=PACKED, default=list(PACKED))
    a = ask.parse_args()
    if (a.openvino or a.onnxruntime) and not a.genai:
        ask.error("--openvino and --onnxruntime want --genai, an interpreter that has them")
    if not green("decoder"):
        return 1
    print(machine(), native.level())
    folder = a.model.with_name(a.model.name + "-packed")
    folder.mkdir(exist_ok=True)
    commands: dict[str, list[str]] = {}
    skipped: dict[str, dict[str, Any]] = {}  # by gates, of the weights behind them, on held-out text
    for name in a.only:
        at = folder / "".join(c if c.isalnum() else "-" for c in name)
        if not at.exists():
            subprocess.run([sys.executable, "-m", "trimtab.cli", "trim", str(a.model), *PACKED[name], "-o", str(at), "--pack", "--no-speed",
                            "--proof-tokens", "512", "--samples", "2", "-q"], check=True, stdout=subprocess.DEVNULL)
        gated = json.loads((at / "trimtab.json").read_text(encoding="utf-8")).get("sparsity") or {}
        if "reached" in gated:
            skipped[f"trimtab {name}"] = {"skipped": {k: round(gated[k], 4) for k in ("target", "reached")}}
        commands[f"trimtab {name}"] = [sys.executable, __file__, "--serve", str(at), str(a.threads)]
    if a.llama:
        theirs, script = folder / "llama", Path(__file__).with_name("llama_worker.py")
        if not theirs.with_suffix(".q4_0.gguf").exists():
            subprocess.run([a.llama, script, "make", a.model / "config.json", theirs], check=True, stderr=subprocess.DEVNULL)
        for kind in ("bf16", "q8_0", "q4_0"):
            commands[f"llama.cpp {kind}"] = [str(a.llama), str(script), "serve", str(theirs.with_suffix(f".{kind}.gguf")), str(a.threads)]
    for kind in () if a.no_transformers else ("bf16", "int8"):
        commands[f"transformers {kind}"] = [sys.executable, str(Path(__file__).with_name("transformers_worker.py")), kind, str(a.model),
                                            str(a.threads)]
    for runtime, places in (("openvino", a.openvino), ("onnxruntime", a.onnxruntime)):
        for at in places:
            commands[f"{runtime} genai {at.name}"] = [str(a.genai), str(Path(__file__).with_name("genai_worker.py")), runtime, str(at),
                                                      str(a.threads)]
    workers = {n: Worker(c) for n, c in commands.items()}
    figures: dict[str, dict[str, list[float]]] = {n: {k: [] for k in SETTINGS} for n in workers}
    extra: dict[str, dict[str, Any]] = {}
    began, roof = time.strftime("%Y-%m-%dT%H:%M:%S"), Roof()
    if not a.one_at_a_time:
        for w in workers.values():
            w.start()
    try:
        for r in range(a.rounds + 1):
            for name, w in workers.items():
                if a.one_at_a_time and r == 0:
                    continue
                if a.one_at_a_time:
                    w.start()
                    for prompt, new in SETTINGS.values():
                        w.turn(prompt, min(new, 8))
                for key, (prompt, new) in SETTINGS.items():
                    got = w.turn(prompt, new)
                    if r:
                        figures[name][key].append(got[key])
                    extra[name] = {k: got[k] for k in ("load_s", "rss_over_import", "bytes_per_token") if k in got}
                if a.one_at_a_time:
                    w.end()
            roof.look(a.threads)
    finally:
        for w in workers.values():
            w.end()
    read = roof.gives("bandwidth")
    for name, by in figures.items():
        for key, values in by.items():
            low, mid, high = statistics.quantiles(values, n=4)
            prompt, new = SETTINGS[key]
            row = {"recipe": name, "model": a.model.name, "setting": f"prompt {prompt}, {new} new", "metric": key, "value": round(mid, 2),
                   "quartiles": [round(low, 2), round(high, 2)], "seed": 0, "methods": {}, "rounds": a.rounds, "threads": a.threads,
                   "read_gb_s": round(read / 1e9, 2), "one_at_a_time": a.one_at_a_time, "began": began,
                   "machine": machine(), "isa": native.level(), "date": time.strftime("%Y-%m-%d"),
                   **extra[name], **skipped.get(name, {}), **({"table": a.table} if a.table else {})}
            if name in skipped:
                row.pop("bytes_per_token", None)  # what is not skipped is not known here
            with a.out.open("a", encoding="utf-8") as f:
                f.write(json.dumps(row, sort_keys=True) + "\n")
        decode, prefill = (statistics.median(by[k]) for k in SETTINGS)
        print(f"{name:28}{decode:9.1f} decode{prefill:10.1f} prefill  {extra[name]}", flush=True)
    print(roof)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(main())
