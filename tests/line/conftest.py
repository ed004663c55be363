"""Tiny networks of every family on disk, and proofs that cost no process."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests import tiny
from trimtab.prove.proof import answer


@pytest.fixture
def proof_in_this_process(monkeypatch, request):
    """A fresh process for every proof takes seconds; the tests marked `fresh` pay for it, the others do not."""
    if "fresh" not in request.keywords:
        monkeypatch.setattr("trimtab.prove.proof.run_fresh", answer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[..., Path]:
    """The directory of a network of tests/tiny.py, by its name and what is other than there; made once."""
    root, made = tmp_path_factory.mktemp("saved"), {}

    def get(name: str, **how) -> Path:
        key = f"{name}{sorted(how.items())}"
        if key not in made:
            made[key] = tiny.save(name, root / str(len(made)), **how)
        return made[key]

    return get


@pytest.fixture
def ready(tmp_path) -> Callable[[str], str]:
    """Inputs of a network to calibrate and to prove on, as a file."""
    def get(name: str) -> str:
        save_file(tiny.inputs(name), tmp_path / "in.safetensors")
        return str(tmp_path / "in.safetensors")

    return get
