"""The built-in models and corpus: the main job needs neither a download nor an account."""
from __future__ import annotations

from pathlib import Path

from trimtab.core.types import BadInput

LM = "builtin:lm"
NAMES = (LM, "builtin:lm-relu")


def model_path(name: str = LM) -> Path:
    """Directory of a built-in model."""
    if name not in NAMES:
        raise BadInput(f"no built-in model {name!r}; there are {' and '.join(NAMES)}")
    path = Path(__file__).parent / name.removeprefix("builtin:")
    if not (path / "config.json").exists():
        raise BadInput(f"{name} is not in this installation; reinstall trimtab, or train it with tools/train_builtin.py")
    return path


def name_of(path: Path) -> str | None:
    """The name of the built-in model in a directory, if there is one."""
    return next((n for n in NAMES if path.resolve() == (Path(__file__).parent / n.removeprefix("builtin:")).resolve()), None)
