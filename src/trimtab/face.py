"""Packages that are functions of the library's face as well: `trimtab.prove` and `trimtab.export` are called, and have modules."""
from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module("trimtab.api"), self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(package: str) -> None:
    """Importing a package puts it in the place of the function of its name: let it do what the function does."""
    sys.modules[package].__class__ = _Package
