"""Publishing an output over an earlier one, cut off at the worst moment."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from trimtab.core.journal import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model").write_text("earlier")
    j = Journal(out)
    j.open({"plan": 1}, resume=False, force=True)
    (j.dir / "finished").mkdir()
    (j.dir / "finished" / "model").write_text("new")
    return j


def test_publishing_replaces_the_whole_directory(journal: Journal) -> None:
    (journal.out / "leftover").write_text("of the earlier one")
    journal.publish(journal.dir / "finished")
    journal.close(remove=True)
    assert [p.name for p in journal.out.iterdir()] == ["model"]
    assert (journal.out / "model").read_text() == "new"
    assert not journal.dir.exists()


def test_cut_off_between_the_renames_the_earlier_output_comes_back(journal: Journal,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def cut(a: Path, b: Path) -> None:
        if b == journal.out:
            raise KeyboardInterrupt
        real(a, b)

    with monkeypatch.context() as m:
        m.setattr(os, "rename", cut)
        with pytest.raises(KeyboardInterrupt):
            journal.publish(journal.dir / "finished")
    journal.close(remove=False)
    again = Journal(journal.out)
    assert again.open({"plan": 1}, resume=True, force=False)
    assert (journal.out / "model").read_text() == "earlier"
    again.publish(again.dir / "finished")
    assert (journal.out / "model").read_text() == "new"
    again.close(remove=True)
