"""One layer, weights cold: our kernels beside the fastest dense layer of the same precision that other runtimes have.

    python benchmarks/kernels.py results/kernels.jsonl [--table dense codes blocks zeros pairs mlp gates] [--batch 1 4 16 128 512]
                                 [--shape 8192x2048] [--rounds 5] [--only NAME ...] [--deepsparse PYTHON]

Table mlp is a SwiGLU MLP of three such layers (the last one turned around) as one operation. Table gates is of rows of x in which a
gate left some inputs, other ones in every row, by columns, beside our own maps that read everything: so much of the ideal, one over what
the rows meet; and of such an MLP with gates before all three. Bytes are those of the columns that some row meets.

The kernels' tests run first, and nothing is timed when they are red. Each candidate owns enough copies of its layer to cover
more than four times the last-level cache, and every call takes the next one; results go to memory that all copies of a
candidate share and that was touched before. All candidates take turns in one run; before its turn is timed each one waits
until the threads of the one before sleep, and runs for a few milliseconds. Figures are medians over all timed calls (20 or
more), the spread is the first and third quartile. Read bandwidth, and the operations a second of each type of x (a
multiplication and its addition are two), are measured in the same run.

Every candidate of ours has its goals: so many times as fast as the fastest of a class of peers, or as another layer of ours,
but no more than what reading the bytes it stores at 85 % of the read bandwidth would be; or those 85 % themselves. With one row
of x the bandwidth is measured right after every turn of a candidate, for it changes within seconds, and its share is the median
over its turns; with more rows it is the median of the looks between the rounds. The row says what was wanted, by which bound, and
whether it was met. "error" is what x loses where it is rounded to be multiplied: against the same codes in float64, x normally
distributed.

What a peer computes is checked against the float product before it is timed. Other runtimes than torch take part where they
are installed (openvino, onnxruntime with onnx); `--deepsparse`: an interpreter that has it (see deepsparse_worker.py), which
runs the same zeros in float32, in a process of its own.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import NEAR, Roof, green, look
from peers import (
    Call,
    Maker,
    deepsparse,
    openvino_codes,
    openvino_dense,
    openvino_mlp,
    openvino_w8a8,
    ort_int8,
    ort_nbits,
    prepacked_mlp,
    torch_int4,
    torch_int8,
    torch_mlp,
    torch_plain,
    torch_prepacked,
)
from torch import Tensor

from trimtab.core.registry import load_all
from trimtab.core.types import Change
from trimtab.demo import machine
from trimtab.methods.books import Books, typed
from trimtab.methods.codes import LEVELS, nearest
from trimtab.methods.codes import rounded as on_grid
from trimtab.methods.format.bitmask import bitmask
from trimtab.methods.format.book import book
from trimtab.methods.format.bsr import bsr
from trimtab.methods.format.columns import columns
from trimtab.methods.format.dense import dense
from trimtab.methods.format.nm import nm
from trimtab.methods.format.panels import VECTORS, Packed
from trimtab.methods.format.sell import sell
from trimtab.methods.gates import Gate, met_gated
from trimtab.methods.grid.fp import fp
from trimtab.methods.grid.nf import nf
from trimtab.methods.grid.sign import sign
from trimtab.runtime import layouts, names, native

REST = 0.02      # seconds in which the threads of the one before go to sleep
WARM = 0.004     # seconds in which those of this one wake up
SHORT_CALLS = 60  # in one turn, of layers that are so small that they have as many copies
LIMIT = 0.97     # times a peer that is itself at the read bandwidth counts as level with it
WITHIN = {"f32": 1e-3, "bf16": 2e-2, "i8": 6e-2, "i4": 0.25}  # of the float product, for peers of these classes
TABLES = ["dense", "codes", "blocks", "zeros", "pairs", "mlp", "gates"]
ALL = [""]                 # what every name holds
PARTLY = ", some of them"  # a run of a few stands beside the whole table of a page, and does not replace it
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Goal:
    """At least `times` as fast as the fastest peer of a class, or as the candidate of that name; or READS."""

    times: float
    than: str


BANDWIDTH = "the read bandwidth"
READS, READS_TABLE = Goal(NEAR, BANDWIDTH), Goal(0.7, BANDWIDTH)


@dataclass
class Candidate:
    name: str
    make: Maker
    bytes: int                       # a call reads
    flops: int                       # a call takes
    x: str                           # what x is multiplied as: f32, bf16 or i8
    baseline: str = ""               # ours: the class of peers it is measured against
    goals: tuple[Goal, ...] = ()
    of: str = ""                     # peers: their class
    error: float | None = None       # ours, of codes: what x loses
    times: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)   # of the read bandwidth right after each of its turns
    remote: Callable[[int], list[float]] | None = None  # seconds of so many calls in another process, instead of `make`
    end: Callable[[], None] | None = None               # of that process


def cache_bytes() -> int:
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(*sizes, 32 << 20)


def layer(shape: str, batch: int) -> tuple[Tensor, Tensor]:
    """A weight of "OUTxIN", and so many rows of x."""
    out, inputs = map(int, shape.split("x"))
    w = torch.randn(out, inputs, generator=torch.Generator().manual_seed(0)) / inputs**0.5
    return w, torch.randn(batch, inputs, generator=torch.Generator().manual_seed(1))


def thinned(w: Tensor, how: str, share: float) -> Tensor:
    gen = torch.Generator().manual_seed(int(share * 1000))
    out, inputs = w.shape
    if how == "bsr":
        return w * (torch.rand(out // 32, inputs // 32, generator=gen) < share).repeat_interleave(32, 0).repeat_interleave(32, 1)
    if ":" in how:
        n, m = map(int, how.split(":"))
        return w * (torch.rand(out, inputs // m, m, generator=gen).argsort(-1) < n).reshape(w.shape)
    return w * (torch.rand(w.shape, generator=gen) < share)


def by_chance(out: int, inputs: int, vector: int, bits: int, second: int) -> Packed:
    """Indices into a book, and into a second one where its index has bits; no weight is nearest to them."""
    gen = torch.Generator().manual_seed(bits)

    def pair(bits: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(1 << bits, (-(-out // vector), inputs), generator=gen).to(typed(1 << bits))
        return index, torch.randn(1 << bits, vector, generator=gen).half()

    return book(Books(*pair(bits), torch.full((out,), inputs ** -0.5).half(), *(pair(second) if second else ())).change())


def copied(p: Packed) -> native.Linear:
    return native.Linear(Packed(**{**vars(p), "buffers": {k: t.clone() for k, t in p.buffers.items()}}))


def flops_of(p: Packed, rows: int) -> int:
    """Of the entries a kernel has to multiply: those it stores, what a layout is only filled up with not among them."""
    entries = int((layouts.restored(p) != 0).sum()) if p.format == "sell" else load_all()[f"format/{p.format}"].facts["stored"](p)
    return 2 * entries * rows


def off(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def ours(name: str, p: Packed, x: Tensor, narrowest: str, threads: int, baseline: str, goals: tuple[Goal, ...]) -> Candidate:
    y = torch.zeros(len(x), p.shape[0])
    given, to = x.numpy(), y.numpy()

    def make() -> Call:
        linear = copied(p)
        return lambda: linear._native.run(given, to, threads, "", narrowest)
    kernel = names.parse(native.Linear(p)._native.best(narrowest, len(x)))
    found = Candidate(f"trimtab {name}", make, p.nbytes, flops_of(p, len(x)), kernel.activation, baseline, goals)
    if p.type in {*LEVELS, VECTORS}:
        make()()
        found.error = off(y[:64], x[:64].double() @ layouts.restored(p).double().T)
    return found


def our_mlp(name: str, ps: list[Packed], x: Tensor, narrowest: str, threads: int, goals: tuple[Goal, ...]) -> Candidate:
    given, y = x.numpy(), torch.zeros(len(x), ps[2].shape[0]).numpy()

    def make() -> Call:
        mlp = native.Mlp(*map(copied, ps), "silu")
        return lambda: mlp._native.run(given, y, threads, narrowest)
    return Candidate(f"trimtab {name}", make, sum(p.nbytes for p in ps), sum(flops_of(p, len(x)) for p in ps), narrowest, narrowest, goals)


def gated(w: Tensor, x: Tensor, threads: int) -> list[Candidate]:
    """Our maps of three precisions as they are, and by columns with shares of every row left."""
    found, one = [], len(x) == 1
    row, four = nearest(w, 8).change(), nearest(w, 4, 128).change()
    for name, change, narrowest, part in (("bf16", Change(w.bfloat16()), "bf16", 0.85), ("int8 by row, x int8", row, "i8", 0.75),
                                          ("int4 g128, x int8", four, "i8", 0.75)):
        whole = ours(name, dense(change), x, narrowest, threads, "", ())
        found.append(whole)
        by_columns = columns(change)
        for kept in (1.0, 0.75, 0.5, 0.35, 0.2):
            left = x * (torch.rand(x.shape, generator=torch.Generator().manual_seed(int(kept * 100))) < kept)
            met = float((left != 0).any(0).float().mean())
            goals = (Goal(round(part / met, 3), whole.name),) if one and kept in (0.5, 0.35) else ()
            its = ours(f"columns {name}, {kept:.0%} of each row", by_columns, left.contiguous(), narrowest, threads, "", goals)
            its.bytes, its.flops = round(its.bytes * met), round(its.flops * kept)
            found.append(its)
    return found


def gated_mlps(w: Tensor, x: Tensor, threads: int) -> list[Candidate]:
    """The same of a SwiGLU MLP: one threshold for the inputs of gate and up, one for what they give, each passing such a share."""
    found, one, ws = [], len(x) == 1, [w, w.flip(0), w.T.contiguous()]
    for name, change, narrowest, part in (("bf16", lambda t: Change(t.bfloat16()), "bf16", 0.85),
                                          ("int8 by row, x int8", lambda t: nearest(t, 8).change(), "i8", 0.75),
                                          ("int4 g128, x int8", lambda t: nearest(t, 4, 128).change(), "i8", 0.75)):
        whole = our_mlp(f"mlp {name}", [dense(change(t)) for t in ws], x, narrowest, threads, ())
        found.append(whole)
        by_columns = [columns(change(t)) for t in ws]
        for kept in (0.5, 0.35):
            passed, thresholds, met = x, [], []
            for ends in (False, True):
                if ends:
                    passed = torch.nn.functional.silu(passed @ ws[0].T) * (passed @ ws[1].T)
                thresholds.append(passed.abs().flatten().kthvalue(round(passed.numel() * (1 - kept))).values.view(1))
                passed = torch.where(passed.abs() > thresholds[-1], passed, 0)
                met.append(float((passed != 0).any(0).float().mean()))
            ps = [met_gated(p, Gate(thresholds[k == 2])) for k, p in enumerate(by_columns)]
            share = (2 * met[0] + met[1]) / 3
            goals = (Goal(round(part / share, 3), whole.name),) if one else ()
            its = our_mlp(f"columns mlp {name}, {kept:.0%} of each row", ps, x, narrowest, threads, goals)
            its.bytes, its.flops = round(its.bytes * share), round(its.flops * kept)
            found.append(its)
    return found


def low_rank(w: Tensor, x: Tensor, threads: int) -> Candidate:
    """Two dense bfloat16 maps one after the other, between them a quarter of the inputs."""
    rank = w.shape[1] // 4
    first, second = (dense(Change(torch.randn(shape).to(torch.bfloat16))) for shape in ((rank, w.shape[1]), (w.shape[0], rank)))
    given, between, y = x.numpy(), torch.zeros(len(x), rank).numpy(), torch.zeros(len(x), w.shape[0]).numpy()

    def make() -> Call:
        down, up = copied(first), copied(second)

        def call() -> None:
            down._native.run(given, between, threads, "", "bf16")
            up._native.run(between, y, threads, "", "bf16")
        return call
    return Candidate("trimtab low rank bf16 25% (two maps)", make, first.nbytes + second.nbytes,
                     flops_of(first, len(x)) + flops_of(second, len(x)), "bf16", "bf16")


def checked(name: str, of: str, make: Maker, exact: Tensor) -> Maker:
    """The same maker, once it is seen to compute the product. RuntimeError where it does not."""
    lost = off(torch.as_tensor(make()()).view(exact.shape), exact)
    if not lost <= WITHIN[of]:
        raise RuntimeError(f"{name} computes something else: off by {lost:.3g}")
    return make


def mlps(w: Tensor, x: Tensor, threads: int, sparse: Path | None) -> list[Candidate]:
    found = []
    whole = [w, w.flip(0), w.T.contiguous()]
    size, flops = 3 * w.numel(), 6 * w.numel() * len(x)
    gate, up, down = whole
    exact = ((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T).double()
    for dtype in (torch.float32, torch.bfloat16):
        short, ws, its = SHORT[dtype], [t.to(dtype) for t in whole], x.to(dtype)
        peers = {"torch": torch_mlp(ws, its), "torch oneDNN prepacked": prepacked_mlp(ws, its), "openvino": openvino_mlp(ws, x, threads)}
        found += [Candidate(f"{name} {short}", checked(name, short, m, exact), size * dtype.itemsize, flops, short, of=short)
                  for name, m in peers.items() if m]
        found.append(our_mlp(f"dense mlp {short}", [dense(Change(t)) for t in ws], x, short, threads, ()))
        for kept, goals in ((0.2, ()), (0.05, (Goal(16.7, short),))):
            found.append(our_mlp(f"bsr32 mlp {short} {kept:.0%} kept", [bsr(Change(thinned(t, "bsr", kept))) for t in ws], x, short,
                                 threads, goals))
    if sparse:
        for kept in (0.2, 0.05):
            found.append(remote(f"deepsparse f32 {kept:.0%} kept, blocks", [thinned(t, "bsr", kept) for t in whole], x, threads, sparse))
    return found


def remote(name: str, ws: list[Tensor], x: Tensor, threads: int, python: Path) -> Candidate:
    """DeepSparse on these zeros, as many copies of it as others have."""
    kept = sum(int((t != 0).sum()) for t in ws)
    call, end = deepsparse(python, ws, x, threads, copies(4 * kept))
    return Candidate(name, lambda: lambda: None, 4 * kept, 2 * kept * len(x), "f32", of="deepsparse", remote=call, end=end)


def copies(size: int) -> int:
    """So many layers of this size are cold when their turn comes again."""
    return max(2, int(4.5 * cache_bytes() / size) + 1)


def candidates(table: str, w: Tensor, x: Tensor, threads: int, sparse: Path | None) -> list[Candidate]:
    """Peers and ours for one table, for these rows of x."""
    if table == "mlp":
        return mlps(w, x, threads, sparse)
    if table == "gates":
        return gated(w, x, threads) + gated_mlps(w, x, threads)
    found: list[Candidate] = []
    batch = len(x)
    one, exact = batch == 1, (x @ w.T).double()
    reads = (READS,) if one else ()

    def peer(name: str, of: str, maker: Maker | None, size: int) -> None:
        if maker is not None:
            found.append(Candidate(name, checked(name, of, maker, exact), size, 2 * w.numel() * batch, "i8" if of == "i4" else of, of=of))

    def add(name: str, p: Packed, narrowest: str, baseline: str, *goals: Goal) -> None:
        found.append(ours(name, p, x, narrowest, threads, baseline, goals))

    for dtype in (torch.float32, torch.bfloat16):
        short, t = SHORT[dtype], w.to(dtype)
        if table in ("dense", "blocks", "zeros", "pairs"):
            peer(f"torch {short}", short, torch_plain(t, x.to(dtype)), t.nbytes)
            peer(f"torch oneDNN prepacked {short}", short, torch_prepacked(t, x.to(dtype)), t.nbytes)
            peer(f"openvino {short}", short, openvino_dense(t, x, threads), t.nbytes)
            level = (Goal(0.9, short),) if batch >= 512 else ()
            add(f"dense {short}", dense(Change(t)), short, short, *(reads if short == "bf16" else ()), *level)
        if table == "blocks":
            for kept, target in ((0.5, 1.6), (0.2, 4.2), (0.05, 15.0 if batch >= 512 else 16.7)):
                add(f"bsr32 {short} {kept:.0%} kept", bsr(Change(thinned(t, "bsr", kept))), short, short, Goal(target, short))
        if table == "pairs" and short == "bf16":
            add("2:4 bf16", nm(Change(thinned(t, "2:4", 0.5))), short, short, *reads, *([Goal(1.6, "trimtab dense bf16")] if one else []))
            add("4:8 bf16", nm(Change(thinned(t, "4:8", 0.5)), n=4, m=8), short, short, *reads)
            found.append(low_rank(w, x, threads))
        if table == "zeros":
            few = {0.5: 1.5, 0.3: 2.4, 0.1: 5.0} if short == "bf16" and one else {}
            some = {0.2: 2.5, 0.05: 6.0} if short == "f32" and batch == 16 else {}
            for kept in (0.5, 0.3, 0.1):
                add(f"bitmask {short} {kept:.0%} kept", bitmask(Change(thinned(t, "", kept))), short, short,
                    *([Goal(few[kept], short)] if kept in few else []))
            for kept in (0.3, 0.2, 0.1, 0.05):
                goals = [Goal(g[kept], short) for g in (few, some) if kept in g]
                if short == "f32" and batch >= 128 and kept in (0.2, 0.05):
                    goals.append(Goal(1.0, f"deepsparse f32 {kept:.0%} kept"))
                add(f"sell {short} {kept:.0%} kept", sell(Change(thinned(t, "", kept))), short, short, *goals)
    if sparse and table in ("zeros", "blocks") and batch > 1:
        how = "bsr" if table == "blocks" else ""
        found += [remote(f"deepsparse f32 {kept:.0%} kept", [thinned(w, how, kept)], x, threads, sparse) for kept in (0.2, 0.05)]
    if table == "codes":
        eight, four = w.numel(), w.numel() // 2
        peer("torch.ao int8", "i8", torch_int8(w, x), eight)
        peer("onnxruntime int8 dynamic", "i8", ort_int8(w, x, threads), eight)
        peer("onnxruntime int8 b32", "i8", ort_nbits(w, x, 8, 32, threads), eight)
        peer("openvino int8", "i8", openvino_codes(w, x, 8, 0, threads), eight)
        peer("openvino w8a8", "i8", openvino_w8a8(w, x, threads), eight)
        peer("torch int4 g128", "i4", torch_int4(w, x, 128), four)
        peer("onnxruntime int4 b32", "i4", ort_nbits(w, x, 4, 32, threads), four)
        peer("onnxruntime int4 b128", "i4", ort_nbits(w, x, 4, 128, threads), four)
        peer("openvino int4 g128", "i4", openvino_codes(w, x, 4, 128, threads), four)

        def both(name: str, p: Packed, baseline: str, *goals: Goal) -> None:
            """x rounded to 8 bits, and the variant without beside it: of weights of 8 bits that one has to read as fast."""
            add(f"{name}, x int8", p, "i8", baseline, *goals)
            add(f"{name}, x f32", p, "f32", baseline, *(g for g in goals if g is READS and baseline == "i8"))

        best8 = [Goal(1.3, "i8")] if one else [Goal(1.0, "openvino w8a8")] if batch >= 512 else []
        both("int8 by row", dense(nearest(w, 8).change()), "i8", *reads, *best8)
        both("int4 g128", dense(nearest(w, 4, 128).change()), "i4", *reads, *([Goal(1.3, "i4")] if one else []))
        both("int4 g32", dense(nearest(w, 4, 32).change()), "i4", *reads)
        both("int3 g128", dense(nearest(w, 3, 128).change()), "i4", *reads)
        both("int2 g64", dense(nearest(w, 2, 64).change()), "i4", *reads)
        by_table = [READS_TABLE] if one else []
        both("nf4 g64", dense(on_grid(w, nf(w), 64).change()), "i4", *by_table)
        both("fp4 g128", dense(on_grid(w, fp(w, exponent=2, clip="max"), 128).change()), "i4", *by_table)
        eight = fp(w, bits=8, group=0, exponent=4, clip="max")
        add("fp8 by row, x f32", dense(on_grid(w, eight, w.shape[1]).change()), "f32", "i8", *by_table)
        both("sign g128", dense(on_grid(w, sign(w), 128).change()), "i4", *by_table)
        for vector, bits, second in ((4, 8, 0), (6, 12, 0), (8, 8, 8), (8, 16, 0), (4, 8, 4)):
            its = by_chance(*w.shape, vector, bits, second)
            both(f"books of {vector}, {bits}{f' + {second}' if second else ''} bits", its, "i4", *by_table)
        both("ternary by row", dense(nearest(w, 2, ternary=True).change()), "i4", *reads)
        for kept in (0.5, 0.3, 0.1):
            both(f"bitmask int8 {kept:.0%} kept", bitmask(nearest(thinned(w, "", kept), 8).change()), "i8")
        half = thinned(w, "2:4", 0.5)
        both("2:4 int8", nm(nearest(half, 8).change()), "i8", *reads)
        both("2:4 int4 g128", nm(nearest(half, 4, 128).change()), "i4", *reads,
             *([Goal(1.15, "trimtab int4 g128, x int8")] if one else []))
        both("4:8 int4 g128", nm(nearest(thinned(w, "4:8", 0.5), 4, 128).change(), n=4, m=8), "i4", *reads)
    return found


def turns(these: list[Candidate], rounds: int, threads: int, reading: bool) -> Roof:
    """Fills in the times, and where `reading` is what counts the shares of the bandwidth; what the machine gave meanwhile."""
    calls: dict[str, list[Call]] = {c.name: [c.make() for _ in range(1 if c.remote else copies(c.bytes))] for c in these}
    at = dict.fromkeys(calls, 0)
    roof = Roof()

    def next_call(name: str) -> Call:
        at[name] += 1
        return calls[name][at[name] % len(calls[name])]

    with torch.no_grad():
        for _ in range(rounds):
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
                began, before = time.perf_counter(), len(c.times)
                for _ in range(max(20 // rounds + 1, min(len(calls[c.name]), SHORT_CALLS))):
                    call = next_call(c.name)
                    start = time.perf_counter()
                    call()
                    c.times.append(time.perf_counter() - start)
                    if time.perf_counter() - began > 2 and len(c.times) > 20:
                        break
                if reading:
                    c.shares.append(c.bytes / statistics.median(c.times[before:]) / look(threads))
            roof.look(threads)
    return roof


def main() -> int:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("out", type=Path)
    ask.add_argument("--table", nargs="+", default=TABLES, choices=TABLES)
    ask.add_argument("--deepsparse", type=Path, help="an interpreter that has it")
    ask.add_argument("--shape", default="8192x2048", help="out x in")
    ask.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 128, 512])
    ask.add_argument("--only", nargs="+", default=ALL, metavar="NAME",
                     help="those of ours whose names hold this, and all peers: no page shows these rows")
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--threads", type=int, default=2)
    a = ask.parse_args()
    if not green("kernels", *(["mlp"] if "mlp" in a.table else [])):
        return 1
    torch.set_num_threads(a.threads)
    began = time.strftime("%Y-%m-%dT%H:%M:%S")
    print(machine(), native.level())
    for table in a.table:
        for batch in a.batch:
            these = [c for c in candidates(table, *layer(a.shape, batch), a.threads, a.deepsparse)
                     if c.of or any(name in c.name for name in a.only)]
            roof = turns(these, a.rounds, a.threads, batch == 1)
            print(f"{table} batch {batch}: {roof}")
            report(these, table, batch, roof, began, a)
            for c in these:
                if c.end:
                    c.end()
    return 0


def took(c: Candidate) -> float:
    return statistics.median(c.times)


def share_of(c: Candidate, read: float) -> float:
    """Of the read bandwidth, which was `read` bytes a second in the run where it was not measured beside the candidate."""
    return statistics.median(c.shares) if c.shares else c.bytes / read / took(c)


def judged(goal: Goal, c: Candidate, these: list[Candidate], read: float) -> dict[str, Any]:
    """What was wanted, by which bound, what was got, and whether that is enough; `met` None where it cannot be said."""
    row: dict[str, Any] = {"than": goal.than, "target": goal.times, "met": None}
    share = share_of(c, read)
    if goal.than == BANDWIDTH:
        return row | {"wanted": goal.times, "got": round(share, 3), "bound": "target", "met": share >= goal.times}
    others = [p for p in these if goal.than in (p.of, p.name)]
    if not others:
        return row
    other = min(others, key=took)
    level = goal.times == 1 and share_of(other, read) >= NEAR
    got = took(other) / took(c)
    most = {"peer at the limit" if level else "target": LIMIT if level else goal.times, "bandwidth": got * NEAR / share}
    bound = min(most, key=lambda k: most[k])
    return row | {"than": other.name, "wanted": round(most[bound], 3), "got": round(got, 3), "bound": bound, "met": got >= most[bound]}


def said(goal: dict[str, Any]) -> str:
    if goal["met"] is None:
        return f"{goal['than']}: not measured"
    return f"{goal['got']:.2f} of {goal['than']}, wanted {goal['wanted']:.2f} ({goal['bound']}): {'met' if goal['met'] else 'MISSED'}"


def report(these: list[Candidate], table: str, batch: int, roof: Roof, began: str, a: argparse.Namespace) -> None:
    read = roof.gives("bandwidth")
    for c in these:
        t = took(c)
        low, _, high = statistics.quantiles(c.times, n=4)
        peers = [p for p in these if p.of == (c.of or c.baseline)]
        best = min(peers, key=took) if peers else None
        from_memory, from_peak = share_of(c, read), c.flops / roof.gives(c.x) / t
        row = {"recipe": c.name, "model": f"one layer {a.shape}, cold", "shape": a.shape,
               "setting": f"{table}-batch-{batch}{PARTLY * (a.only != ALL)}", "seed": 0, "metric": "milliseconds",
               "methods": {}, "value": round(t * 1e3, 4), "quartiles": [round(low * 1e3, 4), round(high * 1e3, 4)],
               "bytes": c.bytes, "share_of_read_bandwidth": round(from_memory, 3), "read_gb_s": round(c.bytes / t / from_memory / 1e9, 2),
               "x": c.x, "flops": c.flops, "share_of_peak": round(from_peak, 3), "peak_gflop_s": round(roof.gives(c.x) / 1e9, 1),
               "threads": a.threads, "calls": len(c.times), "machine": machine(), "isa": native.level(), "date": time.strftime("%Y-%m-%d"),
               "began": began}
        line = f"{table:7} batch {batch:<4}{c.name:<42}{t * 1e3:9.3f} ms {from_memory:6.0%} of bandwidth {from_peak:6.0%} of peak"
        if c.error is not None:
            row["error"] = float(f"{c.error:.3g}")
            line += f"  error of x {c.error:.1e}"
        if best is not None and c.baseline:
            row |= {"fastest_other": best.name, "times_fastest_other": round(took(best) / t, 3)}
            line += f" {took(best) / t:7.2f} x {best.name}"
        if c.goals:
            row["goals"] = goals = [judged(g, c, these, read) for g in c.goals]
            line += "; " + "; ".join(map(said, goals))
        print(line, flush=True)
        with a.out.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
