"""One layer, weights cold: our kernels beside the fastest dense layer of the same precision that other runtimes have.

    python benchmarks/kernels.py results/kernels.jsonl [--table dense codes blocks zeros pairs mlp] [--batch 1 16 512]
                                 [--shape 8192x2048] [--rounds 5] [--deepsparse PYTHON]

Table mlp is a SwiGLU MLP of three such layers (the last one turned around) as one operation.

The kernels' tests run first, and nothing is timed when they are red. Each candidate owns enough copies of its layer to cover
more than four times the last-level cache, and every call takes the next one. All candidates take turns in one run; before
its turn is timed each one waits until the threads of the one before sleep, and runs for a few milliseconds. Figures are
medians over all timed calls (20 or more), the spread is the first and third quartile. Read bandwidth, and the operations a
second of each type of x (a multiplication and its addition are two), are measured in the same run. A target in "times the
fastest dense" is bounded by 85 % of the roofline: by what it takes to read the bytes we store, or to multiply the entries we
store, not those of the dense layer; the row says which bound applied. Other runtimes than torch take part where they are
installed (openvino, onnxruntime with onnx); `--deepsparse`: an interpreter that has it (see deepsparse_worker.py), which runs
the same zeros in float32, in a process of its own.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peers import (
    Call,
    Maker,
    deepsparse,
    openvino_dense,
    openvino_mlp,
    ort_int8,
    ort_nbits,
    prepacked_mlp,
    torch_int8,
    torch_mlp,
    torch_plain,
    torch_prepacked,
)
from torch import Tensor

from trimtab.core.registry import load_all
from trimtab.core.types import Change
from trimtab.demo import machine
from trimtab.methods.codes import nearest
from trimtab.methods.format.bitmask import bitmask
from trimtab.methods.format.bsr import bsr
from trimtab.methods.format.sell import sell
from trimtab.methods.format.dense import dense
from trimtab.methods.format.nm import nm
from trimtab.methods.format.panels import Packed
from trimtab.runtime import names, native

REST = 0.02      # seconds in which the threads of the one before go to sleep
WARM = 0.004     # seconds in which those of this one wake up
NEAR = 0.85      # of the roofline counts as reached
TABLES = ["dense", "codes", "blocks", "zeros", "pairs", "mlp"]
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass
class Candidate:
    name: str
    make: Maker
    bytes: int                       # a call reads
    flops: int                       # a call takes
    x: str                           # what x is multiplied as: f32, bf16 or i8
    baseline: str = ""               # ours: the class of peers it is measured against
    target: float | None = None      # times the fastest of them
    of: str = ""                     # peers: their class
    times: list[float] = field(default_factory=list)
    remote: Callable[[int], list[float]] | None = None  # seconds of so many calls in another process, instead of `make`


def cache_bytes() -> int:
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(*sizes, 32 << 20)


def thinned(w: Tensor, how: str, share: float) -> Tensor:
    gen = torch.Generator().manual_seed(int(share * 1000))
    out, inputs = w.shape
    if how == "bsr":
        return w * (torch.rand(out // 32, inputs // 32, generator=gen) < share).repeat_interleave(32, 0).repeat_interleave(32, 1)
    if ":" in how:
        n, m = map(int, how.split(":"))
        return w * (torch.rand(out, inputs // m, m, generator=gen).argsort(-1) < n).reshape(w.shape)
    return w * (torch.rand(w.shape, generator=gen) < share)


def copied(p: Packed) -> native.Linear:
    return native.Linear(Packed(**{**vars(p), "buffers": {k: t.clone() for k, t in p.buffers.items()}}))


def flops_of(p: Packed, rows: int) -> int:
    return 2 * load_all()[f"format/{p.format}"].facts["stored"](p) * rows


def ours(name: str, p: Packed, x: Tensor, narrowest: str, threads: int, baseline: str, target: float | None) -> Candidate:
    given, y = x.numpy(), torch.zeros(len(x), p.shape[0]).numpy()  # weights are cold, memory for results is there

    def make() -> Call:
        linear = copied(p)
        return lambda: linear._native.run(given, y, threads, "", narrowest)
    kernel = names.parse(native.Linear(p)._native.best(narrowest, len(x)))
    return Candidate(f"trimtab {name}", make, p.nbytes, flops_of(p, len(x)), kernel.activation, baseline, target)


def our_mlp(name: str, ps: list[Packed], x: Tensor, narrowest: str, threads: int, target: float | None) -> Candidate:
    given, y = x.numpy(), torch.zeros(len(x), ps[2].shape[0]).numpy()

    def make() -> Call:
        mlp = native.Mlp(*map(copied, ps), "silu")
        return lambda: mlp._native.run(given, y, threads, narrowest)
    return Candidate(f"trimtab {name}", make, sum(p.nbytes for p in ps), sum(flops_of(p, len(x)) for p in ps), narrowest, narrowest, target)


def mlps(w: Tensor, x: Tensor, threads: int, sparse: Path | None) -> list[Candidate]:
    found = []
    whole = [w, w.flip(0), w.T.contiguous()]
    size, flops = 3 * w.numel(), 6 * w.numel() * len(x)
    for dtype in (torch.float32, torch.bfloat16):
        short, ws, its = SHORT[dtype], [t.to(dtype) for t in whole], x.to(dtype)
        peers = {"torch": torch_mlp(ws, its), "torch oneDNN prepacked": prepacked_mlp(ws, its), "openvino": openvino_mlp(ws, x, threads)}
        found += [Candidate(f"{name} {short}", m, size * dtype.itemsize, flops, short, of=short) for name, m in peers.items() if m]
        found.append(our_mlp(f"dense mlp {short}", [dense(Change(t)) for t in ws], x, short, threads, None))
        for kept, target in ((0.2, None), (0.05, 16.7)):
            found.append(our_mlp(f"bsr32 mlp {short} {kept:.0%} kept", [bsr(Change(thinned(t, "bsr", kept))) for t in ws], x, short,
                                 threads, target))
    if sparse:
        for kept in (0.2, 0.05):
            found.append(remote(f"deepsparse f32 {kept:.0%} kept, blocks", [thinned(t, "bsr", kept) for t in whole], x, threads, sparse))
    return found


def remote(name: str, ws: list[Tensor], x: Tensor, threads: int, python: Path) -> Candidate:
    kept = sum(int((t != 0).sum()) for t in ws)
    call = deepsparse(python, ws, x, threads, 4)
    return Candidate(name, lambda: lambda: None, 4 * kept, 2 * kept * len(x), "f32", of="deepsparse", remote=call)


def candidates(table: str, w: Tensor, x: Tensor, threads: int, sparse: Path | None) -> list[Candidate]:
    """Peers and ours for one table, for these rows of x."""
    if table == "mlp":
        return mlps(w, x, threads, sparse)
    found: list[Candidate] = []
    batch = len(x)

    def peer(name: str, of: str, maker: Maker | None, size: int) -> None:
        if maker is not None:
            found.append(Candidate(name, maker, size, 2 * w.numel() * batch, "i8" if of == "i4" else of, of=of))

    def add(name: str, p: Packed, narrowest: str, baseline: str, target: float | None = None) -> None:
        found.append(ours(name, p, x, narrowest, threads, baseline, target))

    for dtype in (torch.float32, torch.bfloat16):
        short, t = SHORT[dtype], w.to(dtype)
        if table in ("dense", "blocks", "zeros", "pairs"):
            peer(f"torch {short}", short, torch_plain(t, x.to(dtype)), t.nbytes)
            peer(f"torch oneDNN prepacked {short}", short, torch_prepacked(t, x.to(dtype)), t.nbytes)
            peer(f"openvino {short}", short, openvino_dense(t, x, threads), t.nbytes)
        if table == "dense":
            add(f"dense {short}", dense(Change(t)), short, short, 0.9 if batch >= 512 else None)
        if table == "blocks":
            for kept, target in ((0.5, 1.6), (0.2, 4.2), (0.05, 15.0 if batch >= 512 else 16.7)):
                add(f"bsr32 {short} {kept:.0%} kept", bsr(Change(thinned(t, "bsr", kept))), short, short, target)
        if table == "pairs" and short == "bf16":
            add("dense bf16", dense(Change(t)), short, short)
            add("2:4 bf16", nm(Change(thinned(t, "2:4", 0.5))), short, short, 1.6 if batch == 1 else None)
            add("4:8 bf16", nm(Change(thinned(t, "4:8", 0.5)), n=4, m=8), short, short)
        if table == "zeros":
            for kept, target in ((0.5, 1.5), (0.3, 2.4), (0.1, 5.0)):
                add(f"bitmask {short} {kept:.0%} kept", bitmask(Change(thinned(t, "", kept))), short, short,
                    target if short == "bf16" and batch == 1 else None)
            for kept, target in ((0.3, None), (0.2, 2.5), (0.1, None), (0.05, 6.0)):
                few = 5.0 if kept == 0.1 and short == "bf16" and batch == 1 else None
                add(f"sell {short} {kept:.0%} kept", sell(Change(thinned(t, "", kept))), short, short,
                    target if short == "f32" and batch == 16 else few)
    if sparse and table in ("zeros", "blocks") and batch > 1:
        how = "bsr" if table == "blocks" else ""
        found += [remote(f"deepsparse f32 {kept:.0%} kept", [thinned(w, how, kept)], x, threads, sparse) for kept in (0.2, 0.05)]
    if table == "codes":
        eight, four = w.numel(), w.numel() // 2
        peer("torch.ao int8", "i8", torch_int8(w, x), eight)
        peer("onnxruntime int8 dynamic", "i8", ort_int8(w, x, threads), eight)
        peer("onnxruntime int8 b32", "i8", ort_nbits(w, x, 8, 32, threads), eight)
        peer("onnxruntime int4 b32", "i4", ort_nbits(w, x, 4, 32, threads), four)
        peer("onnxruntime int4 b128", "i4", ort_nbits(w, x, 4, 128, threads), four)
        goal = 1.3 if batch == 1 else 0.9 if batch >= 512 else None
        add("int8 by row, x int8", dense(nearest(w, 8).change()), "i8", "i8", goal)
        add("int8 by row, x f32", dense(nearest(w, 8).change()), "f32", "i8")
        add("int4 g128, x int8", dense(nearest(w, 4, 128).change()), "i8", "i4", 1.3 if batch == 1 else None)
        add("int4 g32, x int8", dense(nearest(w, 4, 32).change()), "i8", "i4")
        add("int4 g128, x f32", dense(nearest(w, 4, 128).change()), "f32", "i4")
        add("int2 g64, x int8", dense(nearest(w, 2, 64).change()), "i8", "i4")
        add("ternary by row, x int8", dense(nearest(w, 2, ternary=True).change()), "i8", "i4")
        for kept in (0.5, 0.3, 0.1):
            add(f"bitmask int8 {kept:.0%} kept, x int8", bitmask(nearest(thinned(w, "", kept), 8).change()), "i8", "i8")
        half, four = thinned(w, "2:4", 0.5), thinned(w, "4:8", 0.5)
        add("2:4 int8, x int8", nm(nearest(half, 8).change()), "i8", "i8")
        add("2:4 int4 g128, x int8", nm(nearest(half, 4, 128).change()), "i8", "i4")
        add("4:8 int4 g128, x int8", nm(nearest(four, 4, 128).change(), n=4, m=8), "i8", "i4")
    return found


@dataclass
class Roof:
    """What the machine gave in this run: bytes read a second, and operations a second by what x is multiplied as."""

    found: dict[str, list[float]] = field(default_factory=lambda: {"bandwidth": [], "f32": [], "bf16": [], "i8": []})

    def look(self, threads: int) -> None:
        core = native.core()
        for what, found in self.found.items():
            found.append(core.read_bandwidth(400 << 20, threads, 2) if what == "bandwidth" else core.peak_flops(what, threads, 10))

    def gives(self, what: str) -> float:
        return statistics.median(self.found[what])

    def seconds(self, c: Candidate) -> dict[str, float]:
        """What a call takes at least, by the bound."""
        return {"bandwidth": c.bytes / self.gives("bandwidth"), "compute": c.flops / self.gives(c.x)}


def turns(these: list[Candidate], rounds: int, cold: float, threads: int) -> Roof:
    """Fills in the times; what the machine gave meanwhile."""
    calls: dict[str, list[Call]] = {c.name: [c.make() for _ in range(max(2, int(cold / c.bytes) + 1))] for c in these}
    at = dict.fromkeys(calls, 0)
    roof = Roof()

    def next_call(name: str) -> Call:
        at[name] += 1
        return calls[name][at[name] % len(calls[name])]

    with torch.no_grad():
        for r in range(rounds):
            for c in these:
                time.sleep(REST)
                if c.remote:
                    c.remote(3)
                    c.times += c.remote(20 // rounds + 1)
                    continue
                until = time.perf_counter() + WARM
                next_call(c.name)()
                while time.perf_counter() < until:
                    next_call(c.name)()
                began = time.perf_counter()
                for _ in range(max(20 // rounds + 1, min(len(calls[c.name]), 20))):
                    call = next_call(c.name)
                    start = time.perf_counter()
                    call()
                    c.times.append(time.perf_counter() - start)
                    if time.perf_counter() - began > 2 and len(c.times) > 20:
                        break
            if r % 2 == 0:
                roof.look(threads)
    return roof


def main() -> int:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("out", type=Path)
    ask.add_argument("--table", nargs="+", default=TABLES, choices=TABLES)
    ask.add_argument("--deepsparse", type=Path, help="an interpreter that has it")
    ask.add_argument("--shape", default="8192x2048", help="out x in")
    ask.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 128, 512])
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--threads", type=int, default=2)
    a = ask.parse_args()
    tests = [sys.executable, "-m", "pytest", "-q", "tests/runtime/test_kernels.py"]
    if subprocess.run(tests, check=False, stdout=subprocess.DEVNULL).returncode:
        print("the kernels' tests are red: nothing is timed")
        return 1
    torch.set_num_threads(a.threads)
    out, inputs = map(int, a.shape.split("x"))
    w = torch.randn(out, inputs, generator=torch.Generator().manual_seed(0)) / inputs**0.5
    print(machine(), native.level())
    for table in a.table:
        for batch in a.batch:
            these = candidates(table, w, torch.randn(batch, inputs, generator=torch.Generator().manual_seed(1)), a.threads, a.deepsparse)
            roof = turns(these, a.rounds, 4.5 * cache_bytes(), a.threads)
            report(these, table, batch, roof, a)
    return 0


def report(these: list[Candidate], table: str, batch: int, roof: Roof, a: argparse.Namespace) -> None:
    def took(c: Candidate) -> float:
        return statistics.median(c.times)

    for c in these:
        t, least = took(c), roof.seconds(c)
        low, _, high = statistics.quantiles(c.times, n=4)
        peers = [p for p in these if p.of == (c.of or c.baseline)]
        best = min(peers, key=took) if peers else None
        in_gb, in_gflop = roof.gives("bandwidth") / 1e9, roof.gives(c.x) / 1e9
        row = {"recipe": c.name, "model": f"one layer {a.shape}, cold", "setting": f"{table}-batch-{batch}", "seed": 0,
               "metric": "milliseconds",
               "methods": {}, "value": round(t * 1e3, 4), "quartiles": [round(low * 1e3, 4), round(high * 1e3, 4)],
               "bytes": c.bytes, "share_of_read_bandwidth": round(least["bandwidth"] / t, 3), "read_gb_s": round(in_gb, 2),
               "x": c.x, "flops": c.flops, "share_of_peak": round(least["compute"] / t, 3), "peak_gflop_s": round(in_gflop, 1),
               "threads": a.threads, "calls": len(c.times), "machine": machine(), "isa": native.level(), "date": time.strftime("%Y-%m-%d")}
        line = (f"{table:7} batch {batch:<4}{c.name:<32}{t * 1e3:9.3f} ms {least['bandwidth'] / t:6.0%} of {in_gb:.1f} GB/s"
                f" {least['compute'] / t:6.0%} of {in_gflop:.0f} GFLOP/s")
        if best is not None and c.baseline:
            times = took(best) / t
            row |= {"fastest_other": best.name, "times_fastest_other": round(times, 3)}
            line += f" {times:7.2f} x {best.name}"
            if c.target is not None:
                most = {"target": c.target} | {bound: NEAR * took(best) / s for bound, s in least.items()}
                bound = min(most, key=lambda k: most[k])
                wanted = most[bound]
                row |= {"target": c.target, "bound": bound, "wanted": round(wanted, 3), "met": times >= wanted}
                line += f" (wanted {wanted:.2f}, by {bound}: {'met' if times >= wanted else 'MISSED'})"
        print(line, flush=True)
        with a.out.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
