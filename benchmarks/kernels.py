"""One layer, weights cold: our kernels beside the fastest dense of the same precision that torch has.

    python benchmarks/kernels.py results/kernels.jsonl [--shape 8192x2048] [--batch 1 4 16] [--rounds 20]

The kernels' tests run first, and nothing is printed when they are red. Each candidate owns enough copies of its layer to
cover more than four times the last-level cache, and every call takes the next one. All candidates take turns in one run;
figures are medians over the rounds, the spread is the first and third quartile. Read bandwidth is measured in the same
run, best of several numbers of streams.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trimtab.core.types import Change
from trimtab.demo import machine
from trimtab.methods.format.bitmask import bitmask
from trimtab.methods.format.bsr import bsr
from trimtab.methods.format.dense import dense
from trimtab.methods.format.nm import nm
from trimtab.methods.format.panels import TYPES, Packed
from trimtab.runtime import native

Candidate = tuple[str, list[Callable[[Tensor], Tensor]], int]  # name, copies, bytes a call reads


def cache_bytes() -> int:
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(*sizes, 32 << 20)


def thinned(w: Tensor, how: str, share: float) -> Tensor:
    gen = torch.Generator().manual_seed(int(share * 1000))
    out, inputs = w.shape
    if how == "bsr":
        kept = torch.rand(out // 32, inputs // 32, generator=gen) < share
        return w * kept.repeat_interleave(32, 0).repeat_interleave(32, 1)
    if how == "nm":
        return w * (torch.rand(out, inputs // 4, 4, generator=gen).argsort(-1) < 2).reshape(w.shape)
    return w * (torch.rand(w.shape, generator=gen) < share)


def candidates(out: int, inputs: int, batch: int) -> list[Candidate]:
    """Every candidate with as many copies as it takes to be cold."""
    cold = 4.5 * cache_bytes()
    w = torch.randn(out, inputs, generator=torch.Generator().manual_seed(0)) / inputs**0.5
    found: list[Candidate] = []

    def add(name: str, size: int, make: Callable[[], Callable[[Tensor], Tensor]]) -> None:
        found.append((name, [make() for _ in range(max(2, int(cold / size) + 1))], size))

    for dtype in (torch.float32, torch.bfloat16):
        short = TYPES[dtype]
        plain = w.to(dtype)
        size = plain.nbytes

        def torch_plain(plain: Tensor = plain, dtype: torch.dtype = dtype) -> Callable[[Tensor], Tensor]:
            copy = plain.clone()
            return lambda x: torch.nn.functional.linear(x.to(dtype), copy)

        def torch_packed(plain: Tensor = plain, dtype: torch.dtype = dtype) -> Callable[[Tensor], Tensor]:
            weight = torch.ops.mkldnn._reorder_linear_weight(plain.to_mkldnn(), batch)
            return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, None, "none", [], "")

        add(f"torch dense {short}", size, torch_plain)
        add(f"torch oneDNN prepacked {short}", size, torch_packed)
        packs: list[tuple[str, Packed]] = [(f"dense {short}", dense(Change(plain)))]
        packs += [(f"bsr32 {short} {s:.0%} kept", bsr(Change(thinned(plain, "bsr", s)))) for s in (0.5, 0.2, 0.05)]
        packs += [(f"bitmask {short} {s:.0%} kept", bitmask(Change(thinned(plain, "bitmask", s)))) for s in (0.5, 0.3, 0.2, 0.1, 0.05)]
        packs += [(f"2:4 {short}", nm(Change(thinned(plain, "nm", 0.5))))]
        for name, p in packs:
            def ours(p: Packed = p) -> Callable[[Tensor], Tensor]:
                return native.Linear(Packed(**{**vars(p), "buffers": {k: t.clone() for k, t in p.buffers.items()}}))

            add(f"trimtab {name}", p.nbytes, ours)
    return found


def bandwidth(threads: int) -> float:
    """Bytes a second that can be read: sums over memory far larger than the caches, best of several chunkings."""
    x = torch.ones(256 << 20, dtype=torch.uint8).view(torch.int64)
    best = 0.0
    for streams in (1, 2, 4, 8):
        parts = x.view(streams, -1)
        for _ in range(4):
            began = time.perf_counter()
            parts.sum(1)
            best = max(best, x.nbytes / (time.perf_counter() - began))
    return best


def main() -> int:
    ask = argparse.ArgumentParser()
    ask.add_argument("out", type=Path)
    ask.add_argument("--shape", default="8192x2048", help="out x in")
    ask.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    ask.add_argument("--rounds", type=int, default=20)
    ask.add_argument("--threads", type=int, default=2)
    a = ask.parse_args()
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/runtime"], check=False, stdout=subprocess.DEVNULL).returncode:
        print("the kernels' tests are red: nothing is timed")
        return 1
    torch.set_num_threads(a.threads)
    out, inputs = map(int, a.shape.split("x"))
    for batch in a.batch:
        x = torch.randn(batch, inputs, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            these = candidates(out, inputs, batch)
            times: dict[str, list[float]] = {name: [] for name, _, _ in these}
            reads = []
            for r in range(a.rounds + 2):
                for name, copies, _ in these:
                    f = copies[r % len(copies)]
                    began = time.perf_counter()
                    f(x)
                    if r > 1:
                        times[name].append(time.perf_counter() - began)
                if r % 5 == 0:
                    reads.append(bandwidth(a.threads))
        read = max(reads)
        for name, _, size in these:
            t = statistics.median(times[name])
            short = name.split()[-1 if name.startswith("torch") else 2]
            dense = min(statistics.median(times[n]) for n in times if n.startswith("torch") and n.endswith(short))
            low, _, high = statistics.quantiles(times[name], n=4)
            row = {"recipe": name, "model": f"one layer {a.shape}, cold", "setting": f"batch {batch}", "metric": "milliseconds",
                   "value": round(t * 1e3, 4), "quartiles": [round(low * 1e3, 4), round(high * 1e3, 4)], "seed": 0, "methods": {},
                   "times_fastest_dense_of_torch": round(dense / t, 3), "bytes": size, "share_of_read_bandwidth": round(size / t / read, 3),
                   "read_bandwidth": round(read / 1e9, 2), "threads": a.threads, "rounds": a.rounds, "machine": machine(),
                   "isa": native.level(), "date": time.strftime("%Y-%m-%d")}
            print(f"batch {batch:<4}{name:<32}{t * 1e3:9.3f} ms {dense / t:7.2f} x dense torch "
                  f"{size / t / read:6.0%} of {read / 1e9:.1f} GB/s", flush=True)
            with a.out.open("a", encoding="utf-8") as f:
                f.write(json.dumps(row, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
