"""How large a checkpoint is: bytes as the file system counts them, and parameters as the files hold them."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from trimtab.methods import composite
from trimtab.methods.entrywise import PRODUCTS
from trimtab.methods.format.lowrank import SIDES
from trimtab.methods.format.panels import Packed
from trimtab.network.checkpoint import Checkpoint, Entry, SafeFile
from trimtab.runtime.layouts import restored

CHUNK = 16 << 20
_SIGNLESS = {1: (torch.int8, 0x7F), 2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF),
             8: (torch.int64, 0x7FFFFFFFFFFFFFFF)}


def _weights(c: Checkpoint, file: Path) -> list[Entry]:
    """The floating point tensors of a file that are weights as they stand: no part of a packed layer, or of a quantised one."""
    hidden = {(e.file, e.begin) for buffers in c.buffers.values() for e in buffers.values()}
    hidden |= {(c.stored[n].file, c.stored[n].begin) for q in c.quantized.values() for n in q.stored.values()}
    return [e for e in SafeFile(file).entries.values() if e.dtype.is_floating_point and (e.file, e.begin) not in hidden]


def parameters(c: Checkpoint) -> int:
    """Floating point entries stored, without reading them; tied tensors are stored once and counted once, of packed and
    quantised layers what they stand for."""
    packed = sum(c.tensors[f"{name}.weight"].shape[0] * c.tensors[f"{name}.weight"].shape[1] for name in (*c.packed, *c.quantized))
    return packed + _plain(c)


def _plain(c: Checkpoint) -> int:
    return sum((e.end - e.begin) // e.dtype.itemsize for f in c.files for e in _weights(c, f))


def _maps(before: str, p: Packed) -> Iterator[tuple[str, Packed]]:
    """The maps that a packed weight is made of in the end, and what stands before their buffers' names."""
    if not p.factors:
        yield before, p
    sides = composite.names(p.format, len(p.factors)) if p.format in composite.FORMATS else PRODUCTS if p.format == "entrywise" else SIDES
    for side, f in zip(sides, p.factors, strict=False):
        yield from _maps(f"{before}{side}_", f)


def sizes(c: Checkpoint) -> dict[str, int]:
    """`bytes` (os.stat), `params`, `nonzero` of the weight files, read 16 MB or a packed layer at a time. Minus zero is a zero; of
    factors each one's entries count, and of what layers share once."""
    params, nonzero = _plain(c), 0
    seen: set[frozenset[str]] = set()
    for name in c.packed:
        for side, one in _maps("", c.linear(name)):
            at = frozenset(c.place(name, k) for k in c.buffers[name] if k.startswith(side))
            if at in seen:
                continue
            seen.add(at)
            w = restored(one)
            params += w.numel()
            nonzero += int(torch.count_nonzero(w))
    for name in c.quantized:
        w = c.read(f"{name}.weight")
        params += w.numel()
        nonzero += int(torch.count_nonzero(w))
    for file in c.files:
        with open(file, "rb") as f:
            for e in _weights(c, file):
                f.seek(e.begin)
                left = e.end - e.begin
                dtype, magnitude = _SIGNLESS[e.dtype.itemsize]  # as integers, so that any float format counts alike
                while left:
                    part = bytearray(min(CHUNK, left))
                    if (got := f.readinto(part)) != len(part):
                        raise OSError(f"{file}: ends {len(part) - (got or 0)} bytes early")
                    nonzero += int(torch.count_nonzero(torch.frombuffer(part, dtype=dtype) & magnitude))
                    left -= len(part)
    return {"bytes": c.weight_bytes, "params": params, "nonzero": nonzero}
