"""How large a checkpoint is: bytes as the file system counts them, and parameters as the files hold them."""
from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

CHUNK = 16 << 20
_WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_SIGNLESS = {1: (torch.int8, 0x7F), 2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF),
             8: (torch.int64, 0x7FFFFFFFFFFFFFFF)}


def _tensors(file: Path) -> Iterator[tuple[int, int, int]]:
    """(entries, bytes per entry, offset in the file) of each floating point tensor of a safetensors file."""
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in _WIDTH:
            yield math.prod(entry["shape"]), _WIDTH[entry["dtype"]], 8 + length + entry["data_offsets"][0]


def parameters(files: Iterable[Path]) -> int:
    """Floating point entries stored, without reading them; tied tensors are stored once and counted once."""
    return sum(n for f in files for n, _, _ in _tensors(f))


def sizes(files: Iterable[Path]) -> dict[str, int]:
    """`bytes` (os.stat), `params`, `nonzero` of weight files, read 16 MB at a time. Minus zero is a zero."""
    size = params = nonzero = 0
    for file in files:
        size += os.stat(file).st_size
        with open(file, "rb", buffering=0) as f:
            for entries, width, offset in _tensors(file):
                f.seek(offset)
                params, left = params + entries, entries * width
                dtype, magnitude = _SIGNLESS[width]
                while left:
                    part = bytearray(min(CHUNK, left))
                    if (got := f.readinto(part)) != len(part):
                        raise OSError(f"{file}: ends {len(part) - (got or 0)} bytes early")
                    nonzero += int(torch.count_nonzero(torch.frombuffer(part, dtype=dtype) & magnitude))
                    left -= len(part)
    return {"bytes": size, "params": params, "nonzero": nonzero}
