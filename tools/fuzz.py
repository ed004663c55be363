"""Breaks packed directories in every way it can think of and opens them: each is refused in one line, or computes what it says.

    python tools/fuzz.py [--count 10000] [--seed 0]

Bytes flipped, files cut and lengthened, headers, descriptions and indices edited, most of them with hashes that agree again,
so that more than the hashes is met; all in one process, so that a crash is seen as one. What opens runs: every layer by
itself, then the decoder and a token of text. Prints how many were refused and how many ran; exits 1 at the first that did
neither, and leaves it behind.
"""
from __future__ import annotations

import argparse
import hashlib
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
from torch import Tensor

from trimtab import api
from trimtab.core import line, spec
from trimtab.core.types import BadInput, Failed
from trimtab.methods import composite
from trimtab.methods.basis import Basis
from trimtab.methods.composite import BASED, STACK, SUM
from trimtab.methods.format.panels import Packed
from trimtab.methods.rounding import rounding_of
from trimtab.network.checkpoint import INDEX, SHARED, SINGLE, SafeFile, write_sharded
from trimtab.runtime import layouts, native, packed
from trimtab.runtime.decoder import open_decoder

CONFIG, DECODER, NOTES, GENERATION = "config.json", packed.DECODER, "trimtab.json", "generation_config.json"
SLOW = "1.*.q: nm(n=2,m=4,dim=out) | magnitude"  # has no kernel, and so no decoder
FAST = "1.*.q: nm(n=2,m=4) | magnitude"
RECIPE = (f"0.*.q: nm(n=2,m=4) | magnitude ; {SLOW} ; 0.*.k: block(b=16) | magnitude ; "
          "1.*.k: block(rows=32,cols=1) | magnitude ; 0.*.v: row | magnitude ; 1.*.v: block(rows=32,cols=1) | magnitude ; "
          "1.*.v: rtn(bits=8,group=0) ; 0.*.o: nm(n=4,m=8) | magnitude ; 1.*.o: ternary(group=40) ; "
          "0.*.gate: nm(n=2,m=4) | magnitude ; 0.*.gate: rtn(bits=4,group=32) ; 1.*.gate: row | magnitude ; "
          "1.*.gate: rtn(bits=8,group=0,asymmetric=true) ; 0.*.up: block(b=32) | magnitude ; "
          "0.*.up: rtn(bits=8,group=32,asymmetric=true) ; 1.*.up: nm(n=4,m=8) | magnitude ; 1.*.up: rtn(bits=4,group=32,asymmetric=true) ; "
          "0.*.down: rtn(bits=2,group=32) ; "
          "1.*.down: block(rows=1,cols=32) | magnitude ; 1.*.down: rtn(bits=8,group=32) ; "
          "2.*.q: row(keep=0.2) | magnitude ; "  # few enough for sell
          "2.*.k: vptq(vector=2,bits=5,residual=2,iters=2) ; 2.*.v: vptq(iters=2) ; "
          "2.*.o: svd(rank=8) ; 2.*.gate,2.*.down: svd(keep=0.5) ; 2.*.up: fp8 ; "
          "3.*.q: incoherent | int(bits=4,group=32) | gptq | token(act_bits=4) ; "  # maps of maps, and inputs that are rounded
          "3.*.k: int(bits=8,group=0) | rtn | static ; 3.*.v,4.*.v: int(bits=3,group=32) | rtn | lorc(rank=2) ; "
          "3.*.o: nf(bits=4,group=32) | adadim ; 3.*.gate: inputs | peak | spare(keep=0.2,bits=8) ; "
          "3.*.gate: hadamard | int(group=0) | gptq ; 3.*.up: hadamard | vptq(vector=2,bits=4,iters=2) ; "
          "3.*.down: site | spike | spare(keep=1%) ; 3.*.down: int(bits=2,group=32) | gptq")
ODD = (0, 1, -1, 2, 3, 16, 31, 33, 64, 1024, 2**31 - 1, 2**31, 2**63, 10**30, 0.5, math.nan, True, None, "", "bsr", "nm", "bitmask",
       "dense", "i4", "i8", "t", "f32", "bf16", "out", [], [32, 32], {}, [1, 2, 3], "F32", "U8", "I64", [0, 0], [0, 2**40])
LARGE = 1 << 24  # entries beyond which a description is believed and not run


def sample(where: Path, recipe: str = RECIPE) -> Path:
    """A small model packed in every format there is."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2,
                                         max_position_embeddings=64))
    # Of layers that are alike the codes are stored once.
    model.model.layers[4].self_attn.v_proj.load_state_dict(model.model.layers[3].self_attn.v_proj.state_dict())
    model.save_pretrained(where / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(48)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(where / "model" / "tokenizer.json"))
    save_file({"input_ids": torch.arange(32).view(1, 32)}, where / "text.safetensors")
    line.trim(where / "model", spec.load(recipe), where / "packed", line.Options(
        pack="recipe", text=(str(where / "text.safetensors"),), seq_len=32, speed=False, fresh=False), lambda *_: None)
    return where / "packed"


def write(to: Path, whole: SafeFile, limit: int) -> None:
    """The tensors of a packed file in shards of about so many bytes, in a directory that is sealed again."""
    def about(sums: dict[str, str]) -> dict[str, str]:
        return {"trimtab": json.dumps({"sha256": sums})}

    (to / CONFIG).write_bytes(json.dumps(packed.sealed(to, write_sharded(
        to, {n: (e.dtype, e.shape) for n, e in whole.entries.items()}, whole.read, about, limit), json.loads(
            (to / CONFIG).read_text()))).encode())


def in_shards(whole: Path, to: Path) -> Path:
    """A packed directory once more, in a few shards."""
    shutil.copytree(whole, to)
    (to / SINGLE).unlink()
    write(to, SafeFile(whole / SINGLE), 20_000)
    return to


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
    name = rng.choice([n for n in header if n != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    fill = rng.choice((bytes(end - begin), b"\xff" * (end - begin), rng.randbytes(end - begin), data[begin:end][::-1]))
    return _with_header(header, data[:begin] + fill + data[end:])


def edit_config(raw: bytes, rng: random.Random) -> bytes:
    config = json.loads(raw)
    about = config["quantization_config"]
    name = rng.choice(list(about["linears"]))
    how = rng.randrange(7)
    if how == 6 and about.get(SHARED):
        which = rng.choice(list(about[SHARED]))
        about[SHARED][which] = rng.choice((*ODD, which, *about[SHARED], *about[SHARED].values()))
    elif how == 0:
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


def edit_json(raw: bytes, rng: random.Random) -> bytes:
    """Something else at one place of an object."""
    whole: Any = json.loads(raw)
    at, key = whole, ""
    while True:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if not (isinstance(at[key], dict | list) and at[key]) or rng.random() < 0.2:
            break
        at = at[key]
    how = rng.randrange(3)
    if how == 0:
        at.pop(key)
    elif how == 1 and isinstance(at, list):
        at.append(at[key])
    else:
        at[key] = rng.choice((*ODD, [at[key]], [[at[key]]], {"linear": at[key]}, "model.norm.weight", "lm_head"))
    return json.dumps(whole).encode()


def nest(raw: bytes, rng: random.Random) -> bytes:
    """Lists in lists, where one is read or as the whole."""
    deep = b"[" * (n := rng.choice((90, 900, 100_000))) + b"]" * n
    return deep if rng.random() < 0.5 else raw.replace(b'"lm_head"', deep).replace(b"null", deep)


def edit_text(raw: bytes, rng: random.Random) -> bytes:
    odd = {k: rng.choice(ODD) for k in rng.sample(("eos_token_id", "proof", "recipe", "header"), 2)}
    return json.dumps({**json.loads(raw), **odd}).encode()


Way = Callable[[bytes, random.Random], bytes]
OF_WEIGHTS: tuple[Way, ...] = (flip, flip_head, cut, lengthen, edit_header, edit_header, edit_buffer, edit_buffer)
WAYS: dict[str, tuple[Way, ...]] = {
    CONFIG: (flip, cut, nest, edit_json, edit_config, edit_config, edit_config),
    DECODER: (flip, cut, nest, edit_json, edit_json, edit_json, edit_json),
    NOTES: (flip, cut, nest, edit_json, edit_text), GENERATION: (flip, cut, nest, edit_json, edit_text),
    INDEX: (flip, cut, nest, edit_json, edit_json),
}


def _hash(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _rehashed(raw: bytes) -> bytes:
    """A weight file whose header says what its tensors hash to."""
    header, data = _header(raw)
    sums = {n: _hash(data[slice(*e["data_offsets"])]) for n, e in header.items() if n != "__metadata__"}
    return _with_header({**header, "__metadata__": {"trimtab": json.dumps({"sha256": sums})}}, data)


def seal(at: Path, name: str) -> None:
    """Let the hashes agree again, where the broken file can be read at all."""
    try:
        if name.endswith(".safetensors"):
            (at / name).write_bytes(_rehashed((at / name).read_bytes()))
        files = sorted(at.glob("*.safetensors"))
        (at / CONFIG).write_bytes(json.dumps(packed.sealed(at, files, json.loads((at / CONFIG).read_bytes()))).encode())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        pass


# ---- what must hold ---------------------------------------------------------------------------
def said(p: Packed, x: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer says it gives of x [1, in] float64, and how far from that it may be, where x may be off by `room`."""
    if p.format == SUM:
        each = [said(f, x, room) for f in p.factors]
        return sum((y for y, _ in each), torch.zeros_like(each[0][0])), sum((r for _, r in each), torch.zeros_like(each[0][1]))
    if p.format == STACK:
        each = [said(f, x, room) for f in p.factors]
        return torch.cat([y for y, _ in each], 1), torch.cat([r for _, r in each], 1)
    if p.format == BASED:
        taken, inside, outside = composite.around(p)
        x, room = (x, room) if taken is None else (x[:, taken.long()], room[:, taken.long()])
        if inside is not None:
            x, room = inside.of(x.float()).double(), sizes(inside).of((room + 1e-5 * x.abs()).float()).double()
        x, room = said(p.factors[0], x, room)
        if outside is not None:
            x, room = outside.straight(x.float()).double(), sizes(outside).straight((room + 1e-5 * x.abs()).float()).double()
        return x, room
    for f in p.factors or (p,):
        w, rounding = layouts.restored(f).double(), rounding_of(f)
        if rounding is not None:  # who lies between two steps may go to either
            step = x.abs().amax() / rounding.last if rounding.scale is None else rounding.scale.double()
            x, room = rounding.of(x.float()).double(), room + step
        x, room = x @ w.T, room @ w.abs().T + 1e-30
    return x, room


def sizes(basis: Basis) -> Basis:
    """What it does at most to how far something is off."""
    return Basis(*(None if t is None else t.abs() for t in (basis.scale, basis.left, basis.right)))


def runs(where: Path, verify: bool, decodes: bool, talks: bool) -> bool:
    """Open it and run every layer once, then a step of the decoder where it `decodes`, and the library's way to text where it
    `talks`. False if it is refused. AssertionError if a layer computes what it does not say."""
    try:
        model = packed.open(where, verify=verify)
        for name, p in model.linears.items():
            if p.shape[0] * p.shape[1] > LARGE:
                continue
            x = torch.linspace(-1, 1, p.shape[1])[None]
            y, (want, room) = native.Linear(p)(x).double(), said(p, x.double(), 1e-4 * x.double().abs())
            sound = y.isfinite() & want.isfinite() & (room < 1e30)
            assert bool(((y - want).abs() <= room)[sound].all()), f"{name} ({p.format} {p.type}) does not compute what it says"
        handle = api.load(where)
        if decodes:
            next(open_decoder(where).generate([3, 4, 5], 1))
        if talks:
            list(handle.generate("w3 w4 w5", 2))
    except (BadInput, Failed) as e:  # Failed: numbers that overflow
        assert "\n" not in str(e), e
        return False
    return True


def fuzz(wholes: list[Path], count: int, seed: int, scratch: Path) -> Counter[str]:
    """Break copies of these packed directories `count` times. How many of each way ran, and how many were refused."""
    rng, seen = random.Random(seed), Counter[str]()
    at = scratch / "broken"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decodes = {whole: native.core() is not None and runs(whole, True, True, True) for whole in wholes}
        assert all(runs(whole, True, False, False) for whole in wholes) and any(decodes.values()) == (native.core() is not None)
    for _ in range(count):
        whole = rng.choice(wholes)
        shutil.copytree(whole, at)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = [p.name for p in sorted(at.glob("*.safetensors"))]
            name = rng.choice((*[rng.choice(weights)] * 5, CONFIG, CONFIG, *(n for n in WAYS if n != CONFIG and (at / n).exists())))
            way = rng.choice(OF_WEIGHTS if name in weights else WAYS[name])
            raw = (at / name).read_bytes()
            (at / name).write_bytes(broken := way(raw, rng))
            sealed = rng.random() < 0.7
            if sealed:
                seal(at, name)
            verify = rng.random() < 0.2
            # A config.json may ask for torch, and what that says is not ours.
            ran = runs(at, verify, decodes[whole], decodes[whole] and name != CONFIG)
        hashed = name in (*weights, DECODER, INDEX)
        assert not (ran and verify and hashed and not sealed and broken != raw), f"{way.__name__} of {name} is not seen by its hash"
        seen[f"{way.__name__} {'weights' if name in weights else name}: {'ran' if ran else 'refused'}"] += 1
        shutil.rmtree(at)
    return seen


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--count", type=int, default=10000)
    ask.add_argument("--seed", type=int, default=0)
    a = ask.parse_args()
    where = Path(tempfile.mkdtemp(prefix="trimtab-fuzz-"))
    try:
        for name, recipe in (("all", RECIPE), ("fast", RECIPE.replace(SLOW, FAST))):
            (where / name).mkdir()
            sample(where / name, recipe)
        fast = where / "fast" / "packed"
        seen = fuzz([where / "all" / "packed", fast, in_shards(fast, where / "shards")], a.count, a.seed, where)
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
