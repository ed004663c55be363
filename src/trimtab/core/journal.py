"""What has been finished, on disk beside the output: kill -9 at any moment loses at most one block.

`OUT.partial/` holds the lock, `plan.json`, one safetensors file a finished block and sweep, and at the end the
finished directory that is renamed to OUT in one step.
"""
from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.core.types import BadInput, Failed


def write_json(path: Path, value: Any) -> None:
    """Atomically: the old file or the new one, never half of it."""
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, sort_keys=True)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def sync(path: Path) -> None:
    """What a file or a directory holds is on the disk when this returns."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """A safetensors file with `notes` in its metadata; atomically."""
    from safetensors.torch import save_file

    tmp = path.with_suffix(".tmp")
    save_file(tensors, tmp, metadata={"notes": json.dumps(notes, sort_keys=True)})
    sync(tmp)
    os.replace(tmp, path)
    sync(path.parent)


class Journal:
    """The staging directory of one output, held under a lock that dies with its holder."""

    def __init__(self, out: Path):
        self.out, self.dir = out, out.with_name(out.name + ".partial")
        self._lock: int | None = None

    @staticmethod
    def inside(parent: Journal, name: str) -> Journal:
        """That of a stage of the same run, under its lock."""
        its = Journal(parent.out)
        its.dir = parent.dir / name
        its.dir.mkdir(exist_ok=True)
        return its

    # ---- begin and end ------------------------------------------------------------------------
    def open(self, header: dict[str, Any], *, resume: bool, force: bool) -> bool:
        """Start or continue; True when an earlier run of the same plan is continued. Nothing is written on BadInput."""
        existed = self.dir.exists()
        if existed and not (resume or force):
            raise BadInput(f"{self.dir} is left from an unfinished run; continue it with --resume or discard it with --force")
        if existed and not (self.dir / "lock").exists() and any(self.dir.iterdir()):
            raise BadInput(f"{self.dir} was not made by trimtab; move it away or choose another -o")
        if existed:
            self._take()
            self.recover()
            old = self.plan()
            if resume and old is not None:
                if old["header"] != header and not force:
                    changed = sorted(k for k in header.keys() | old["header"].keys()
                                     if header.get(k) != old["header"].get(k))
                    raise BadInput(f"{self.dir} belongs to another plan (differs in {', '.join(changed)}); "
                                   f"give the same options, or discard it with --force")
                if old["header"] == header:
                    if force and not old.get("force"):
                        write_json(self.dir / "plan.json", {**old, "force": True})
                    return True
            self._wipe()
        else:
            self.dir.parent.mkdir(parents=True, exist_ok=True)
            self.dir.mkdir()
            self._take()
        write_json(self.dir / "plan.json", {"header": header, "force": force})
        return False

    def _take(self) -> None:
        fd = os.open(self.dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise BadInput(f"{self.dir} is in use by another run; wait for it or choose another -o") from None
        self._lock = fd

    def _wipe(self) -> None:
        for p in self.dir.iterdir():
            if p.name == "lock":
                continue
            if p.is_dir():
                shutil.rmtree(p)
            else:
                p.unlink()

    def publish(self, finished: Path) -> None:
        """Rename the finished directory to OUT; where --force was given an earlier OUT steps aside, removed only afterwards."""
        old = self.dir / "replaced"
        if self.out.exists() and not (self.plan() or {}).get("force"):
            raise Failed(f"{self.out} appeared while this ran; move it away and continue with --resume, or use --resume --force")
        if self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.out, old)
        os.rename(finished, self.out)
        sync(self.out.parent)

    def recover(self) -> None:
        """A kill between the two renames of `publish` left the earlier output aside: put it back."""
        old = self.dir / "replaced"
        if old.exists() and not self.out.exists():
            os.rename(old, self.out)

    def close(self, *, remove: bool) -> None:
        if remove:
            shutil.rmtree(self.dir, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # ---- what is in it ------------------------------------------------------------------------
    def plan(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.dir / "plan.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None

    def block_path(self, sweep: int, block: int) -> Path:
        return self.dir / f"sweep{sweep}-block{block:05d}.safetensors"

    def has_block(self, sweep: int, block: int) -> bool:
        return self.block_path(sweep, block).exists()

    def training_path(self, sweep: int) -> Path:
        return self.dir / f"sweep{sweep}-training.safetensors"

    def write_block(self, sweep: int, block: int, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """`tensors` in the checkpoint's own names and layout, parts under `trimtab:<site>:<part>`; atomically."""
        write_tensors(self.block_path(sweep, block), tensors, notes)
