"""A packed directory, mapped into memory: nothing is read before it is used, nothing is used that was not checked."""
from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.types import BadInput
from trimtab.methods.format.panels import Packed
from trimtab.network.checkpoint import LINE, PACKED, Checkpoint, Entry, SafeFile
from trimtab.runtime.layouts import described


@dataclass(frozen=True)
class PackedModel:
    """`config`: config.json; `tensors`: what is no packed layer, under its stored name; `linears`: the packed layers by module.

    All of it lies in private mappings of the files, a few small buffers excepted that do not begin on a cache line.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    linears: dict[str, Packed]


def _mapped(e: Entry, memory: mmap.mmap, line: int) -> Tensor:
    """The tensor where it lies, or a copy of it where it does not begin on a multiple of `line` bytes."""
    if e.begin == e.end:
        return torch.empty(e.shape, dtype=e.dtype)
    raw = torch.frombuffer(memory, dtype=torch.uint8, offset=e.begin, count=e.end - e.begin)
    return (raw if e.begin % line == 0 else raw.clone()).view(e.dtype).view(e.shape)


def open(path: str | Path, *, verify: bool = False) -> PackedModel:
    """Map a packed directory. Every length and index is checked, and with `verify` the hash of every packed buffer.

    BadInput for a directory that is not packed, is packed by a newer version, or is corrupt.
    """
    c = Checkpoint.open(Path(path))
    if not c.packed:
        raise BadInput(f"{path} is not packed; write it with trimtab trim ... --pack")
    memory: dict[Path, mmap.mmap] = {}
    for file in c.files:
        with file.open("rb") as f:
            memory[file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants memory it could write to; nobody does
    linears = {}
    for name, about in c.packed.items():
        linears[name] = described(name, about, {k: _mapped(e, memory[e.file], LINE) for k, e in c.buffers[name].items()})
    plain = {n: e for n, e in c.tensors.items() if n.removesuffix(".weight") not in c.packed}
    tensors = {n: _mapped(e, memory[e.file], e.dtype.itemsize) for n, e in plain.items()}
    if verify:
        _verify(c, linears)
    return PackedModel(c.path, c.config, tensors, linears)


def _verify(c: Checkpoint, linears: dict[str, Packed]) -> None:
    sums: dict[str, str] = {}
    for file in c.files:
        try:
            sums |= json.loads(SafeFile(file).metadata.get("trimtab", "{}"))["sha256"]
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{file} does not say what its buffers hash to; fetch it again") from None
    for name, p in linears.items():
        for buffer, t in p.buffers.items():
            full = f"{name}{PACKED}{buffer}"
            if sums.get(full) != hashlib.sha256(t.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest():
                raise BadInput(f"tensor {full} of {c.path} is not what was written (its hash differs); fetch it again")
