"""The built-in model and corpus: the main job needs neither a download nor an account."""
from __future__ import annotations

from pathlib import Path

from trimtab.core.types import BadInput


def model_path() -> Path:
    """Directory of `builtin:lm`."""
    path = Path(__file__).parent / "lm"
    if not (path / "config.json").exists():
        raise BadInput("builtin:lm is not in this installation; reinstall trimtab, or train it with tools/train_builtin.py")
    return path
