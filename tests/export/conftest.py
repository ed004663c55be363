"""Trimmed directories to export, made once a session."""
from __future__ import annotations

from pathlib import Path

import pytest

from trimtab import cli
from trimtab.prove.proof import answer

FAST = ["--samples", "4", "--seq-len", "32", "--proof-tokens", "64", "--no-speed", "-q"]


@pytest.fixture(scope="session")
def trimmed(tiny_lm, calib, tmp_path_factory):
    """The tiny model trimmed by a recipe, its tokenizer left out: a function of the recipe, and of further options."""
    where, made = tmp_path_factory.mktemp("trimmed"), {}

    def trim(recipe: str, *more: str) -> Path:
        if (recipe, more) not in made:
            out = where / str(len(made))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("trimtab.prove.proof.run_fresh", answer)
                assert cli.main(["trim", str(tiny_lm), recipe, "-o", str(out), "--calib", calib, "--text", calib, *FAST, *more]) == 0
            (out / "tokenizer.json").unlink()
            made[recipe, more] = out
        return made[recipe, more]

    return trim
