"""How large a checkpoint is: bytes as the file system counts them, and parameters as the files hold them."""
from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from trimtab.network.checkpoint import Entry, SafeFile

CHUNK = 16 << 20
_SIGNLESS = {1: (torch.int8, 0x7F), 2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF),
             8: (torch.int64, 0x7FFFFFFFFFFFFFFF)}


def _weights(file: Path) -> list[Entry]:
    return [e for e in SafeFile(file).entries.values() if e.dtype.is_floating_point]


def parameters(files: Iterable[Path]) -> int:
    """Floating point entries stored, without reading them; tied tensors are stored once and counted once."""
    return sum((e.end - e.begin) // e.dtype.itemsize for f in files for e in _weights(f))


def sizes(files: Iterable[Path]) -> dict[str, int]:
    """`bytes` (os.stat), `params`, `nonzero` of weight files, read 16 MB at a time. Minus zero is a zero."""
    size = params = nonzero = 0
    for file in files:
        size += os.stat(file).st_size
        with open(file, "rb") as f:
            for e in _weights(file):
                f.seek(e.begin)
                params, left = params + (e.end - e.begin) // e.dtype.itemsize, e.end - e.begin
                dtype, magnitude = _SIGNLESS[e.dtype.itemsize]  # as integers, so that any float format counts alike
                while left:
                    part = bytearray(min(CHUNK, left))
                    if (got := f.readinto(part)) != len(part):
                        raise OSError(f"{file}: ends {len(part) - (got or 0)} bytes early")
                    nonzero += int(torch.count_nonzero(torch.frombuffer(part, dtype=dtype) & magnitude))
                    left -= len(part)
    return {"bytes": size, "params": params, "nonzero": nonzero}
