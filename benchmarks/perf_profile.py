"""Where the time goes: a layer or a whole model under `perf`, by what the samples were taken in. Linux on x86-64.

    python benchmarks/perf_profile.py results/profiles.jsonl --layer "blocks 512 bsr32 bf16 5% kept" ...  as kernels.py has them
    python benchmarks/perf_profile.py results/profiles.jsonl --model DIR ... --what decode prefill                packed directories

A layer is named by its table, its rows of x and its name. Wants `perf` and `objdump`. The kernels are compiled once more, with
their symbols, into build/profile; what is profiled is otherwise what kernels.py and decode.py measure: every call takes the next
of enough copies, decode is 64 new tokens behind a prompt of 64, prefill a prompt of 512. Samples are taken by the clock and lie
at the instruction that the processor waits for. Inside the kernels they are divided by the kind of instruction.
"""
from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "profile"
SECONDS = 8
HERTZ = 2000
# What a function is part of; the first that fits. Functions of the extension that fit none are kernels.
PARTS = (
    ("waiting for the other thread", r"trimtab::parallel|Pool::|step_aside"),
    ("attention", r"attend_as|::attend\b|remember"),
    ("x made ready", r"::prepare|turn_rows|::turn<|to_bf16|to_codes"),
    ("norms, rotation, activation, sums", r"::rms\b|::rotate\b|::activate|::add\b"),
    ("sampling", r"Sampler"),
)
# Kinds of instructions inside the kernels; the first that fits.
KINDS = (
    ("multiplying", r"vfn?m(add|sub)|vdp|vpdp|vmul|vpmadd"),
    ("taking bits apart, converting", r"vcvt|vpmov[sz]x|vps[lr]l|vpand|vpor|vpxor|vptern|vpadd|vpsub"),
    ("storing", r"v?mov\w* .*,[^,]*\(%\w[^)]*\)$"),
    ("looking up, moving lanes", r"vperm|vpshuf|vpblend|vblend|vpexpand|vpbroadcast\w* %|vinsert|vextract|vgather|vpgather"),
    ("loading", r"v?p?(mov|broadcast|pmov)\w* .*\(%|prefetch"),
)


def built() -> None:
    """The extension with its symbols."""
    tools = Path(sysconfig.get_path("scripts"))
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    where = subprocess.run([sys.executable, "-m", "nanobind", "--cmake_dir"], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([tools / "cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
                    f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", f"-DSKBUILD_PROJECT_VERSION={version[1]}",
                    f"-DPython_EXECUTABLE={sys.executable}", f"-Dnanobind_DIR={where}"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([tools / "cmake", "--build", BUILD], check=True, stdout=subprocess.DEVNULL)


def work(a: argparse.Namespace) -> None:
    """The child: says `ready`, then goes on until it is killed."""
    import torch

    torch.set_num_threads(a.threads)
    if a.model:
        from trimtab.runtime.decoder import open_decoder

        decoder = open_decoder(a.model[0])
        prompt, new = (64, 65) if a.what[0] == "decode" else (512, 1)
        ids = torch.randint(10, 1000, (prompt,), generator=torch.Generator().manual_seed(0))

        def once() -> None:
            for _ in decoder.generate(ids, new):
                pass
        calls = itertools.repeat(once)
    else:
        from kernels import candidates, copies, layer

        table, batch, name = a.layer[0].split(" ", 2)
        found = [c for c in candidates(table, *layer(a.shape, int(batch)), a.threads, None) if c.name == f"trimtab {name}"]
        if not found:
            raise SystemExit(f"no layer {name!r} in table {table}")
        calls = itertools.cycle([found[0].make() for _ in range(copies(found[0].bytes))])
    with torch.no_grad():
        until = time.perf_counter() + 1
        while time.perf_counter() < until:
            next(calls)()
        print("ready", flush=True)
        for call in calls:
            call()


@dataclass(frozen=True)
class Library:
    """An extension: where its functions begin and what they are called, by the names they are linked by, and its instructions."""

    path: Path
    begin: dict[str, int]
    names: dict[str, str]
    code: dict[int, str]

    @staticmethod
    def at(path: Path) -> Library:
        def said(*command: str | Path, given: str = "") -> list[str]:
            return subprocess.run(command, check=True, capture_output=True, text=True, input=given).stdout.splitlines()

        begin = {name: int(at, 16) for at, _, name in (line.split(" ", 2) for line in said("nm", "--defined-only", path))}
        names = dict(zip(begin, said("c++filt", given="\n".join(begin)), strict=True))
        lines = (re.match(r"\s*([0-9a-f]+):\s+(.*?)\s*(#.*)?$", line) for line in said("objdump", "-d", "--no-show-raw-insn", path))
        return Library(path, begin, names, {int(m[1], 16): m[2] for m in lines if m})


def first_of(rules: tuple[tuple[str, str], ...], text: str, otherwise: str) -> str:
    return next((name for name, rule in rules if re.search(rule, text)), otherwise)


def divided(samples: str, seen: Library) -> dict[str, float]:
    """The share of the samples in every part."""
    count: collections.Counter[str] = collections.Counter()
    for line in samples.splitlines():
        m = re.match(r"\s*[0-9a-f]+ (\S+?)(?:\+0x([0-9a-f]+))? \((.*)\)$", line)
        if not m:
            continue
        symbol, offset, where = m[1], int(m[2] or "0", 16), m[3]
        if Path(where).name != seen.path.name:
            count["operating system" if where.startswith("[") else "Python and torch"] += 1
            continue
        part = first_of(PARTS, seen.names.get(symbol, symbol), "")
        count[part or "kernels: " + first_of(KINDS, seen.code.get(seen.begin.get(symbol, 0) + offset, ""), "the rest")] += 1
    total = sum(count.values())
    return {part: round(n / total, 4) for part, n in count.most_common() if n / total >= 0.002}


def profile(command: list[str], seen: Library) -> dict[str, float]:
    env = {**os.environ, "SKBUILD_EDITABLE_SKIP": str(next(ROOT.glob("build/cp*"), "")),
           "PYTHONPATH": os.pathsep.join(map(str, (BUILD, ROOT / "src", ROOT / "benchmarks", sysconfig.get_path("purelib"))))}
    with tempfile.TemporaryDirectory() as scratch:
        child = subprocess.Popen([os.path.realpath(sys.executable), __file__, *command], stdout=subprocess.PIPE, text=True, env=env)
        try:
            assert child.stdout
            if child.stdout.readline().strip() != "ready":
                raise SystemExit(f"{' '.join(command)} did not start")
            data = f"{scratch}/perf.data"
            subprocess.run(["perf", "record", "-q", "-e", "cpu-clock", "-F", str(HERTZ), "-p", str(child.pid), "-o", data, "--",
                            "sleep", str(SECONDS)], check=True)
            samples = subprocess.run(["perf", "script", "-i", data, "--no-demangle", "-F", "ip,sym,symoff,dso"], check=True,
                                     capture_output=True, text=True).stdout
        finally:
            child.kill()
            child.wait()
    return divided(samples, seen)


def main() -> int:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("out", type=Path)
    ask.add_argument("--layer", nargs="+", default=[], metavar="TABLE_ROWS_NAME")
    ask.add_argument("--shape", default="8192x2048", help="out x in, of layers")
    ask.add_argument("--model", nargs="+", type=Path, default=[], metavar="DIR")
    ask.add_argument("--what", nargs="+", choices=("decode", "prefill"), default=["decode", "prefill"])
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = ask.parse_args()
    if a.child:
        work(a)
    from measure import green

    from trimtab.demo import machine
    from trimtab.runtime import native

    if not green("kernels", "decoder"):
        return 1
    built()
    seen = Library.at(next(BUILD.glob("_trimtab_kernels*.so")))
    shared = ["results", "--threads", str(a.threads), "--shape", a.shape, "--child"]
    asked: list[tuple[dict[str, Any], list[str]]] = []
    for layer in a.layer:
        table, batch, name = layer.split(" ", 2)
        asked.append(({"recipe": f"trimtab {name}", "model": f"one layer {a.shape}, cold", "shape": a.shape,
                       "setting": f"{table}-batch-{batch}"}, ["--layer", layer]))
    asked += [({"recipe": m.name, "model": m.parent.name.removesuffix("-packed"), "setting": what}, ["--model", str(m), "--what", what])
              for m in a.model for what in a.what]
    for row, command in asked:
        parts = profile([*shared, *command], seen)
        row |= {"metric": "share of the samples", "value": next(iter(parts.values())), "parts": parts, "seed": 0, "methods": {},
                "seconds": SECONDS, "threads": a.threads, "machine": machine(), "isa": native.level(), "date": time.strftime("%Y-%m-%d")}
        print(f"{row['model']} {row['recipe']} {row['setting']}: " + ", ".join(f"{p} {s:.0%}" for p, s in parts.items()), flush=True)
        with a.out.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
