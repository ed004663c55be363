"""What this process and its children hold, and where activations go when they must not stay in memory."""
from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def _status(field: str) -> int:
    try:
        with open("/proc/self/status") as f:
            for line in f:
                if line.startswith(field):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss() -> int:
    """Resident bytes now."""
    return _status("VmRSS")


def peak_rss() -> int:
    """The most this process ever held, in bytes."""
    return _status("VmHWM")


def release() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def strict() -> None:
    """Every buffer of a megabyte or more gets its own mapping, so that freeing it returns it at once."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD; setting it also stops glibc from raising it


class Store:
    """Hidden states of all batches at one place of the network, in memory or in a file that is rewritten in place."""

    def __init__(self, path: Path | None = None):
        self._path, self._held = path, []  # type: tuple[Path | None, list[Tensor]]
        self._meta: list[tuple[int, torch.Size, torch.dtype]] = []
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600) if path else None

    def __len__(self) -> int:
        return len(self._meta) if self._fd is not None else len(self._held)

    def append(self, x: Tensor) -> None:
        if self._fd is None:
            self._held.append(x)
            return
        at = self._meta[-1][0] + self._meta[-1][1].numel() * self._meta[-1][2].itemsize if self._meta else 0
        self._meta.append((at, x.shape, x.dtype))
        self._write(at, x)

    def _write(self, at: int, x: Tensor) -> None:
        assert self._fd is not None
        view = x.detach().contiguous().view(torch.uint8).flatten().numpy().data
        while view:
            n = os.pwrite(self._fd, view, at)
            view, at = view[n:], at + n

    def __getitem__(self, i: int) -> Tensor:
        if self._fd is None:
            return self._held[i]
        at, shape, dtype = self._meta[i]
        x = torch.empty(shape, dtype=dtype)
        view = x.view(torch.uint8).flatten().numpy().data
        while view:
            n = os.preadv(self._fd, [view], at)
            if not n:
                raise OSError(f"{self._path} is shorter than it was written")
            view, at = view[n:], at + n
        return x

    def __setitem__(self, i: int, x: Tensor) -> None:
        if self._fd is None:
            self._held[i] = x
        else:
            assert (x.shape, x.dtype) == self._meta[i][1:]
            self._write(self._meta[i][0], x)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def close(self) -> None:
        self._held = []
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            assert self._path
            self._path.unlink(missing_ok=True)
