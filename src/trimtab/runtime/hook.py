"""`from_pretrained` opens packed directories once trimtab is imported, whichever of the two libraries comes first.

Importing trimtab must not import transformers: where that is not there yet, a finder waits for its table of quantizers.
"""
from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLE = "transformers.quantizers.auto"


def register() -> None:
    importlib.import_module("trimtab.runtime.quantizer")  # enters itself


class _Waiting(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            register()

        loader.exec_module = exec_module
        return spec


def install() -> None:
    """Enter the quantizer now, or when transformers is imported."""
    if TABLE in sys.modules:
        register()
    elif not any(isinstance(f, _Waiting) for f in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
