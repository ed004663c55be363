"""The built-in corpus: the running interpreter's own standard library, split by module name.

A module's place is decided by a hash of its dotted name alone, so a module that is held out on one
Python version is held out on every other one, whatever its text became.
"""
from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SPLITS = ("train", "calibration", "validation")
HELD_OUT = 4  # per cent of the modules for calibration, and as many again for validation
# Generated tables and deliberately broken sources: not prose, not code anybody wrote.
_SKIP_DIRS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "encodings", "pydoc_data"}
_SKIP_STEMS = ("bad", "nocaret")


def split_of(module: str) -> str:
    """Which split a module belongs to, from its dotted name only."""
    bucket = int(hashlib.sha256(module.encode()).hexdigest()[:8], 16) % 100
    if bucket < HELD_OUT:
        return "validation"
    return "calibration" if bucket < 2 * HELD_OUT else "train"


def modules(split: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, source text) of one split, in order of name."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; splits are {', '.join(SPLITS)}")
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        rel = path.relative_to(root)
        if any(p in _SKIP_DIRS or p.startswith("config-") for p in rel.parts[:-1]):
            continue
        if path.stem.startswith(_SKIP_STEMS):
            continue
        parts = rel.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        if split_of(name) == split:
            found.append((name, path))
    for name, path in sorted(found):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield name, text


def text(split: str) -> list[str]:
    """The module sources of one split, in order of module name."""
    return [t for _, t in modules(split)]
