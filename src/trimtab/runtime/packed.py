"""A packed directory, mapped into memory: nothing is read before it is used, nothing is used that was not checked."""
from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.types import BadInput
from trimtab.methods.format.panels import Packed
from trimtab.network.checkpoint import INDEX, LINE, NOT_JSON, PACKED, Checkpoint, Entry, raw
from trimtab.runtime.layouts import described

DECODER = "decoder.json"
INDICES = (torch.int32, torch.int64)  # of blocks, windows and steps: a few bytes that say where the others lie
CHANGED = "is not what was written (its hash differs); fetch it again"


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
    flat = torch.frombuffer(memory, dtype=torch.uint8, offset=e.begin, count=e.end - e.begin)
    return (flat if e.begin % line == 0 else flat.clone()).view(e.dtype).view(e.shape)


def open(path: str | Path, *, verify: bool = False) -> PackedModel:
    """Map a packed directory. Every length and index is checked.

    Hashes are compared of what is small and says where the rest lies: decoder.json and the indices (int32 and int64). With
    `verify` of everything: all tensors, the headers of the weight files, the index of shards, decoder.json and config.json. That
    reads every byte, which opening otherwise leaves to its first use. BadInput for a directory that is not packed, was packed by
    another version, or is corrupt.
    """
    c = Checkpoint.open(Path(path))
    if not c.packed:
        raise BadInput(f"{path} is not packed; write it with trimtab trim ... --pack")
    said = c.config["quantization_config"].get("sha256")
    if not isinstance(said, dict):
        raise BadInput(f"{c.path / 'config.json'} does not say what its files hash to; pack or fetch it again")
    found = _files(c.path, c.files, c.config) if verify else _decoder(c.path)
    for name in sorted(found.keys() | (said if verify else {})):
        if found.get(name) != said.get(name):
            raise BadInput(f"{c.path / name} {CHANGED}")
    memory: dict[Path, mmap.mmap] = {}
    for file in c.files:
        with file.open("rb") as f:
            memory[file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants memory it could write to; nobody does
    plain = {n: e for n, e in c.tensors.items() if n.removesuffix(".weight") not in c.packed}
    tensors = {n: _mapped(e, memory[e.file], e.dtype.itemsize) for n, e in plain.items()}
    lying = {n: _mapped(e, memory[e.file], LINE) for n, e in c.stored.items() if PACKED in n}
    buffers = {name: {k: lying[c.place(name, k)] for k in its} for name, its in c.buffers.items()}
    hashed = {n: t for n, t in lying.items() if verify or t.dtype in INDICES}
    sums = _tensors(c)
    for full, t in (hashed | (tensors if verify else {})).items():
        if sums.get(full) != hashlib.sha256(raw(t)).hexdigest():
            raise BadInput(f"tensor {full} of {c.path} {CHANGED}")
    linears = {name: described(name, about, buffers[name]) for name, about in c.packed.items()}
    return PackedModel(c.path, c.config, tensors, linears)


def sealed(path: Path, files: list[Path], config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a packed directory whose other files are written, with what those and itself hash to."""
    return {**config, "quantization_config": {**config["quantization_config"], "sha256": _files(path, files, config)}}


def _decoder(path: Path) -> dict[str, str]:
    file = path / DECODER
    return {DECODER: hashlib.sha256(file.read_bytes()).hexdigest()} if file.exists() else {}


def _files(path: Path, files: list[Path], config: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of what describes the tensors: of a weight file its header, of config.json what it says but for these."""
    about = {k: v for k, v in config["quantization_config"].items() if k != "sha256"}
    sums = {"config.json": hashlib.sha256(json.dumps({**config, "quantization_config": about}, sort_keys=True).encode()).hexdigest()}
    for file in files:
        with file.open("rb") as f:
            head = f.read(8)
            sums[file.name] = hashlib.sha256(head + f.read(int.from_bytes(head, "little"))).hexdigest()
    if len(files) > 1:
        sums[INDEX] = hashlib.sha256((path / INDEX).read_bytes()).hexdigest()
    return sums | _decoder(path)


def _tensors(c: Checkpoint) -> dict[str, str]:
    """sha256 of every tensor, as the weight files say."""
    sums: dict[str, str] = {}
    for file, metadata in c.metadata.items():
        try:
            sums |= json.loads(metadata["trimtab"])["sha256"]
        except (*NOT_JSON, KeyError, TypeError):
            raise BadInput(f"{file} does not say what its tensors hash to; pack or fetch it again") from None
    return sums
