"""Breaks packed directories in every way it can think of and opens them: each is refused in one line, or computes what it says.

    python tools/fuzz.py [--count 10000] [--seed 0]

Bytes flipped, files cut and lengthened, headers, descriptions and indices edited; all in one process, so that a crash is
seen as one. Prints how many were refused and how many ran; exits 1 at the first that did neither, and leaves it behind.
"""
from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trimtab.core import line, spec
from trimtab.core.types import BadInput
from trimtab.runtime import layouts, native, packed

FILE, CONFIG = "model.safetensors", "config.json"
RECIPE = ("0.*.q: nm(n=2,m=4) | magnitude ; 1.*.q: nm(n=2,m=4,dim=out) | magnitude ; *.k: block(b=16) | magnitude ; "
          "*.v: row | magnitude ; *.o: nm(n=4,m=8) | magnitude ; 1.*.o: rtn(bits=4,group=32,asymmetric=true) ; *.gate: nm(n=2,m=4) | magnitude ; *.gate: rtn(bits=4,group=32) ; "
          "*.up: block(b=32) | magnitude ; *.up: rtn(bits=8,group=32,asymmetric=true) ; *.down: rtn(bits=2,group=32)")
ODD = (0, 1, -1, 2, 3, 16, 31, 33, 64, 1024, 2**31 - 1, 2**31, 2**63, 10**30, 0.5, math.nan, True, None, "", "bsr", "nm", "bitmask",
       "dense", "i4", "f32", "bf16", "out", [], [32, 32], {}, [1, 2, 3], "F32", "U8", "I64", [0, 0], [0, 2**40])
LARGE = 1 << 24  # entries beyond which a description is believed and not run


def sample(where: Path) -> Path:
    """A small model packed in every format there is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                 max_position_embeddings=64)).save_pretrained(where / "model")
    save_file({"input_ids": torch.arange(32).view(1, 32)}, where / "text.safetensors")
    line.trim(where / "model", spec.load(RECIPE), where / "packed", line.Options(
        pack="recipe", text=(str(where / "text.safetensors"),), seq_len=32, speed=False, fresh=False), lambda *_: None)
    return where / "packed"


# ---- ways to break it -------------------------------------------------------------------------
def _header(raw: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:8 + size]), raw[8 + size:]


def _with_header(header: Any, data: bytes) -> bytes:
    head = json.dumps(header).encode()
    head += b" " * (-(8 + len(head)) % 64)
    return len(head).to_bytes(8, "little") + head + data


def flip(raw: bytes, rng: random.Random) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 4, 64))):
        out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def flip_head(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(int.from_bytes(raw[:8], "little") + 8)
    return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1:]


def cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[:rng.randrange(len(raw))]


def lengthen(raw: bytes, rng: random.Random) -> bytes:
    return raw + rng.randbytes(rng.choice((1, 8, 64, 4096)))


def edit_header(raw: bytes, rng: random.Random) -> bytes:
    header, data = _header(raw)
    name = rng.choice(list(header))
    how = rng.randrange(5)
    if how == 0:
        header.pop(name)
    elif how == 1:
        header[name + rng.choice(("x", ".packed_bits", ".packed_values"))] = header.pop(name)
    elif how == 2:
        other = rng.choice(list(header))
        header[name], header[other] = header[other], header[name]
    elif how == 3 and name != "__metadata__":
        header[name][rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(ODD)
    else:
        header[name] = rng.choice(ODD)
    return _with_header(header, data)


def edit_buffer(raw: bytes, rng: random.Random) -> bytes:
    """Indices, bits and scales of the right length that say something else."""
    header, data = _header(raw)
    name = rng.choice([n for n in header if ".packed_" in n])
    begin, end = header[name]["data_offsets"]
    fill = rng.choice((bytes(end - begin), b"\xff" * (end - begin), rng.randbytes(end - begin), data[begin:end][::-1]))
    return _with_header(header, data[:begin] + fill + data[end:])


def edit_config(raw: bytes, rng: random.Random) -> bytes:
    config = json.loads(raw)
    about = config["quantization_config"]
    name = rng.choice(list(about["linears"]))
    how = rng.randrange(6)
    if how == 0:
        about[rng.choice(list(about))] = rng.choice(ODD)
    elif how == 1:
        about["linears"].pop(name)
    elif how == 2:
        about["linears"][name + "x"] = about["linears"].pop(name)
    elif how == 3:
        other = rng.choice(list(about["linears"]))
        about["linears"][name], about["linears"][other] = about["linears"][other], about["linears"][name]
    elif how == 4:
        about["linears"][name].pop(rng.choice(list(about["linears"][name])))
    else:
        for _ in range(rng.choice((1, 1, 2))):
            about["linears"][name][rng.choice(list(about["linears"][name]))] = rng.choice(ODD)
    return json.dumps(config).encode()


WAYS: tuple[tuple[str, Callable[[bytes, random.Random], bytes]], ...] = (
    (FILE, flip), (FILE, flip_head), (FILE, cut), (FILE, lengthen), (FILE, edit_header), (FILE, edit_header), (FILE, edit_buffer),
    (FILE, edit_buffer), (CONFIG, flip), (CONFIG, cut), (CONFIG, edit_config), (CONFIG, edit_config), (CONFIG, edit_config),
)


# ---- what must hold ---------------------------------------------------------------------------
def runs(where: Path, verify: bool) -> bool:
    """Open it and run every layer once; False if it is refused. AssertionError if a layer computes what it does not say."""
    try:
        model = packed.open(where, verify=verify)
        for name, p in model.linears.items():
            if p.shape[0] * p.shape[1] > LARGE:
                continue
            x = torch.linspace(-1, 1, p.shape[1])[None]
            y, w = native.Linear(p)(x).double(), layouts.restored(p).double()
            want, room = x.double() @ w.T, 1e-4 * (x.double().abs() @ w.abs().T) + 1e-30
            sound = y.isfinite() & want.isfinite() & (room < 1e30)
            assert bool(((y - want).abs() <= room)[sound].all()), f"{name} ({p.format} {p.type}) does not compute what it says"
    except BadInput as e:
        assert "\n" not in str(e), e
        return False
    return True


def fuzz(whole: Path, count: int, seed: int, scratch: Path) -> Counter[str]:
    """Break a copy of the packed directory `whole` `count` times. How many of each way ran, and how many were refused."""
    rng, seen = random.Random(seed), Counter[str]()
    at = scratch / "broken"
    at.mkdir()
    original = {name: (whole / name).read_bytes() for name in (FILE, CONFIG)}
    for _ in range(count):
        name, way = rng.choice(WAYS)
        for n, raw in original.items():
            (at / n).write_bytes(way(raw, rng) if n == name else raw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ran = runs(at, verify=rng.random() < 0.1)
        seen[f"{way.__name__} {name}: {'ran' if ran else 'refused'}"] += 1
    shutil.rmtree(at)
    return seen


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--count", type=int, default=10000)
    ask.add_argument("--seed", type=int, default=0)
    a = ask.parse_args()
    where = Path(tempfile.mkdtemp(prefix="trimtab-fuzz-"))
    whole = sample(where)
    try:
        seen = fuzz(whole, a.count, a.seed, where)
    except Exception as e:
        print(f"{where / 'broken'}: {type(e).__name__}: {e}", file=sys.stderr)
        raise
    shutil.rmtree(where)
    for what, n in sorted(seen.items()):
        print(f"{n:6} {what}")
    print(f"{a.count} broken directories: {sum(n for w, n in seen.items() if w.endswith('refused'))} refused in a line, "
          f"{sum(n for w, n in seen.items() if w.endswith('ran'))} computed what they say, none crashed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
