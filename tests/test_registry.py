"""The registry refuses whatever is malformed, at import; and the method files keep to their corner."""
from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trimtab.methods
from trimtab.core import registry
from trimtab.core.registry import AXES, FACTS, KNOBS, SECTIONS, get, load_all, method, near, sections
from trimtab.core.types import BadInput

REG = load_all()


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(registry, "_REG", {})
    return registry._REG


def good(w: Any, gram: Any, *, damp: float = 0.01) -> Any:
    """Said in one line.

    Formula: first
        and second line
    Source: textbook
    Deviations: none

    Not a section any more: this.
    """
    return w, gram, damp


def documented(fn: Callable[..., Any]) -> Callable[..., Any]:
    fn.__doc__ = good.__doc__
    return fn


def test_the_signature_is_the_declaration(empty: dict[str, Any]) -> None:
    assert method("score", xfail={"rows": "why"})(good) is good
    m = empty["score/good"]
    assert (m.key, m.data, m.needs, m.knobs) == ("score/good", ("w", "gram"), ("gram",), {"damp": 0.01})
    assert m.xfail == {"rows": "why"}
    assert m({"w": 1, "gram": 2, "other": 3}, damp=0.5) == (1, 2, 0.5)
    assert m({"w": 1, "gram": 2}) == (1, 2, 0.01)


def test_a_trailing_underscore_is_not_part_of_the_name(empty: dict[str, Any]) -> None:
    @method("budget")
    @documented
    def global_(scores: Any, target: float) -> None: ...

    assert set(empty) == {"budget/global"}


def test_sections_run_over_lines_and_end_at_a_blank_one() -> None:
    assert sections(good) == {"what": "Said in one line.", "Formula": "first and second line", "Source": "textbook",
                              "Deviations": "none"}


def test_a_second_of_the_same_name_is_refused(empty: dict[str, Any]) -> None:
    method("score")(good)
    with pytest.raises(ValueError, match="registered twice"):
        method("score")(good)
    method("repair")(good)  # another axis is another name
    assert set(empty) == {"score/good", "repair/good"}


def undocumented(w: Any) -> None: ...
def half(w: Any) -> None:
    """One line.

    Formula: some
    Source: textbook
    """
@documented
def star(*w: Any) -> None: ...
@documented
def stars(w: Any, **knobs: Any) -> None: ...
@documented
def bare(w: Any, *, damp: float) -> None: ...
@documented
def stranger(w: Any, *, wobble: float = 1.0) -> None: ...


@pytest.mark.parametrize(("fn", "axis", "facts", "why"), [
    (undocumented, "score", {}, "lacks"), (half, "score", {}, "Deviations"), (star, "score", {}, "neither data"),
    (stars, "score", {}, "neither data"), (bare, "score", {}, "lack a default"),
    (stranger, "score", {}, "not in the vocabulary"), (good, "scores", {}, "no axis"),
    (good, "format", {}, "a format has an inverse"), (good, "score", {"inverse": good}, "only a format has"),
    (good, "score", {"free": True}, "cannot be declared"),
])
def test_what_is_malformed_is_refused(empty: dict[str, Any], fn: Any, axis: str, facts: dict[str, Any],
                                      why: str) -> None:
    with pytest.raises(ValueError, match=why):
        method(axis, **facts)(fn)
    assert not empty


@pytest.mark.parametrize(("joint", "why"), [((), "unknown statistics"), (("scores",), "unknown axes")])
def test_unknown_statistics_and_axes_are_refused(monkeypatch: pytest.MonkeyPatch, joint: tuple[str, ...],
                                                 why: str) -> None:
    monkeypatch.setattr(registry, "_REG", {} if not joint else {"stat/gram": REG["stat/gram"]})
    method("score", joint=joint)(good)
    with pytest.raises(ValueError, match=why):
        load_all.__wrapped__()


def test_facts_have_defaults_and_are_kept(empty: dict[str, Any]) -> None:
    method("budget", mean="block")(good)
    assert empty["budget/good"].facts == {**FACTS["budget"], "mean": "block"}
    assert FACTS["budget"]["mean"] == "weight"


def test_an_unknown_method_is_named_with_its_nearest() -> None:
    with pytest.raises(BadInput, match=r"score/wnada.*close: .*score/wanda"):
        get("score/wnada")
    assert get("score/wanda") is REG["score/wanda"]
    assert near("zzz", ["b", "a"]) == "; known: a, b"


@pytest.mark.parametrize(("key", "module", "text", "follows"), [
    ("score/wanda", "score.wanda", "in_sq.sqrt()", True), ("score/wanda", "score.obs", "def obs(", False),
    ("score/wanda", "score.wanda", "Formula:", False), ("score/wanda", "score.wanda", '@method("score"', False),
    ("unit/nm", "select", "def top(", True), ("budget/lamp", "budget.global_", "def global_(", True),
    ("format/bsr", "format.panels", "PANEL = 32", True), ("format/bsr", "format.panels", "def ternary_words(", False),
    ("edit/rtn", "codes", "def rounded(", True), ("edit/admm", "solvers", "def splitting(", True),
    ("edit/admm", "solvers", "def sweep(", False), ("edit/sparsegpt", "solvers", "def sweep(", True),
    ("repair/obs", "solvers", "def sweep(", True), ("edit/mask", "solvers", "def refit(", False),
    ("stat/act_norm", "stat.activations", "done=torch.", True), ("stat/act_norm", "stat.activations", 'of="sublayer"', False),
])
def test_the_version_follows_what_a_method_draws_on(monkeypatch: pytest.MonkeyPatch, key: str, module: str, text: str,
                                                    follows: bool) -> None:
    """What it does and what it calls, not what is said of it nor what stands beside it."""
    caches = (registry._version, registry._definitions)
    real, changed = inspect.getsource, sys.modules[f"trimtab.methods.{module}"]
    assert text in real(changed)
    before = REG[key].version
    assert len(before) == 12
    other = text + ("abs_or_" if text[-1] == "." else " ")
    monkeypatch.setattr(inspect, "getsource", lambda x: real(x).replace(text, other, 1) if x is changed else real(x))
    try:
        for c in caches:
            c.cache_clear()
        assert (REG[key].version != before) == follows
    finally:
        for c in caches:
            c.cache_clear()


def test_the_catalogue_is_sorted_and_complete() -> None:
    assert list(REG) == sorted(REG)
    assert {m.axis for m in REG.values()} <= set(AXES)
    assert all(m.doc.get(s) for m in REG.values() for s in ("what", *SECTIONS))
    used = {k for m in REG.values() for k in m.knobs}
    assert used <= set(KNOBS)


def test_every_format_states_its_bytes() -> None:
    for m in REG.values():
        if m.axis == "format":
            assert callable(m.facts["bytes"]), m.key


FILES = sorted(p for p in Path(trimtab.methods.__path__[0]).rglob("*.py") if p.name != "__init__.py")
ON_AN_AXIS = [p for p in FILES if p.parent.name in AXES]  # the others hold what several methods share
MAY_IMPORT = ("__future__", "math", "functools", "weakref", "itertools", "collections", "typing", "dataclasses", "torch",
              "trimtab.core.registry", "trimtab.core.types", "trimtab.methods")


@pytest.mark.parametrize("path", FILES, ids=lambda p: "/".join(p.with_suffix("").parts[-2:]))
def test_a_method_file_imports_tensors_and_the_contract_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert any(name == ok or name.startswith(ok + ".") for ok in MAY_IMPORT), name
            assert not name.startswith(("torch.nn.modules", "torch.cuda", "torch.optim", "torch.utils.data")), name
        assert not isinstance(node, ast.ImportFrom) or not node.level, "imports are absolute"


@pytest.mark.parametrize("path", ON_AN_AXIS, ids=lambda p: "/".join(p.with_suffix("").parts[-2:]))
def test_a_method_file_registers_on_the_axis_of_its_folder(path: Path) -> None:
    module = sys.modules[f"trimtab.methods.{path.parent.name}.{path.stem}"]
    axes = {m.axis for m in REG.values() if inspect.getmodule(m.fn) is module}
    assert axes <= {path.parent.name}
