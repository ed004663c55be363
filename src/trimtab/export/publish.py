"""`trimtab export`: a model in a format that others open, made beside its place and moved there when it is whole."""
from __future__ import annotations

import os
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from trimtab.core import line
from trimtab.core.journal import sync, write_json
from trimtab.core.types import BadInput
from trimtab.export.source import Source

# A module each, trimtab.export.<name with underscores>: `write(model, out, **options)` fills the fresh directory `out` and returns JSON
# data. FILE, where it has one, is the single file that may stand for the directory; TYPES are the values of --type.
TARGETS = ("compressed-tensors", "gguf", "onnx")
NOTES = "trimtab.json"


def export(model: Path, to: str, out: Path, *, force: bool = False, type: str = "auto") -> dict[str, Any]:
    """Write the directory `model` to `out` in the format `to`. Returns the result as JSON data.

    A name that ends in .gguf or .onnx is that one file, any other a directory. Raises BadInput, and then nothing is written.
    """
    target = module(to)
    types = getattr(target, "TYPES", ("auto",))
    if type not in types:
        raise BadInput(f"--to {to} has no --type {type}; " + (f"it has {', '.join(types)}" if len(types) > 1 else "leave it out"))
    source = Source(model)
    file = getattr(target, "FILE", "")
    single = bool(file) and out.suffix == Path(file).suffix
    check_out(model, out, file if single else "", force)
    where = next(p for p in out.absolute().parents if p.exists())
    try:
        staging = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=where))
    except OSError as e:
        raise BadInput(f"cannot write to {where} ({e.strerror}); choose a writable -o") from None
    try:
        finished = staging / "finished"
        finished.mkdir()
        result: dict[str, Any] = target.write(model, finished, **({"type": type} if type != "auto" else {}))
        files = sorted(str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file())
        if single and files != [file]:
            raise BadInput(f"the result is {len(files)} files ({', '.join(files[:3])}), and {out} is one; give a directory as -o")
        size = sum(os.stat(finished / f).st_size for f in files)
        result = {"to": to, "model": str(model), "out": str(out), "bytes": size, "model_bytes": source.checkpoint.weight_bytes,
                  "files": [out.name] if single else files, "warnings": [], **result}
        if source.gated:
            told = f"{source.gated} layers have gates, which trimtab alone runs: what was written computes everything, like the model"
            result["warnings"] = [*result["warnings"], f"{told} without them"]
        if not single:
            kept = {k: source.notes[k] for k in ("recipe", "pipeline", "plan_hash") if k in source.notes}
            write_json(finished / NOTES, {**kept, "export": {k: v for k, v in result.items() if k not in ("out", "model")}})
        move(finished / file if single else finished, out, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return result


def module(to: str) -> Any:
    """The module of a target. BadInput names the extra where what it needs is not installed."""
    if to not in TARGETS:
        raise BadInput(f"there is no format {to!r} to export to; there are {', '.join(TARGETS)}")
    try:
        return import_module(f"trimtab.export.{to.replace('-', '_')}")
    except ModuleNotFoundError as e:
        raise BadInput(f"--to {to} needs the package {e.name}, which is not installed; pip install 'trimtab[{to}]'") from None


def check_out(model: Path, out: Path, file: str, force: bool) -> None:
    """BadInput where `out` may not be written: it exists, and --force does not replace it, or it overlaps the model."""
    if file and out.is_dir():
        raise BadInput(f"{out} is a directory; -o names a {Path(file).suffix} file, or a directory under another name")
    if file and out.exists() and force:
        return
    line.check_out(model, out, line.Options(force=force))


def move(finished: Path, out: Path, staging: Path) -> None:
    """Rename to `out`; a directory that is there steps aside first, and is put back where the second rename fails."""
    for p in finished.rglob("*") if finished.is_dir() else [finished]:
        if p.is_file():
            sync(p)
    out.parent.mkdir(parents=True, exist_ok=True)
    old = staging / "replaced"
    if out.is_dir():
        os.rename(out, old)
    try:
        os.rename(finished, out)
    except OSError:
        if old.exists():
            os.rename(old, out)
        raise
    sync(out.absolute().parent)
