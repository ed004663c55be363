"""Every method has a worked example, gives its result, and is not its neighbour."""
from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

import tests.cases
from tests.cases import Case
from trimtab.core.registry import Method, get, load_all
from trimtab.methods.basis import Basis
from trimtab.methods.codes import Grid, rounded
from trimtab.methods.experts import Experts
from trimtab.methods.gates import Gate
from trimtab.methods.rounding import Rounding

CASES: dict[str, Case] = {}
for module in pkgutil.iter_modules(tests.cases.__path__):
    CASES |= importlib.import_module(f"tests.cases.{module.name}").CASES


def result(m: Method, case: Case):
    out = m(case.env, **{k: v for k, v in case.knobs.items() if k in m.knobs})
    if m.facts.get("done"):
        out = m.facts["done"](out)
    if m.facts.get("level") == "net":
        out = out("site", case.env["net"].new)
    if m.facts.get("of") == "run":  # what all of it became
        ((_, out),) = out
    if isinstance(out, Experts):
        return {k: v for k, v in vars(out).items() if v is not None}
    if m.facts.get("of") == "norm":
        return dict(zip(("which", "constants"), out, strict=True))
    if isinstance(out, Grid):
        w = case.env["w"]
        return rounded(w, out, case.knobs["group"] or w.shape[1]).weight()
    if isinstance(out, Rounding):
        return out.of(case.env["x"])
    if isinstance(out, Gate):
        return out.mask(case.env["x"]).double()
    if isinstance(out, Basis):
        return out.weight(case.env["w"]).abs()
    if getattr(out, "bias", None) is not None:
        return {"w": out.w, "bias": out.bias}
    return getattr(out, "w", getattr(out, "buffers", out))


def as_tensor(x) -> torch.Tensor:
    return x.double() if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64)


@pytest.mark.parametrize("key", sorted(CASES))
def test_worked_example(key):
    case = CASES[key]
    got = result(get(key), case)
    if isinstance(case.want, dict):
        assert set(got) == set(case.want)
        for name, value in case.want.items():
            if isinstance(value, str):
                assert got[name] == value
                continue
            torch.testing.assert_close(as_tensor(got[name]), as_tensor(value), rtol=case.tol, atol=case.tol)
    else:
        torch.testing.assert_close(as_tensor(got), as_tensor(case.want), rtol=case.tol, atol=case.tol)


@pytest.mark.parametrize("key", sorted(k for k, c in CASES.items() if c.differs))
def test_is_not_its_neighbour(key):
    case = CASES[key]
    ours, other = result(get(key), case), result(get(case.differs), case)
    if isinstance(ours, dict):
        assert set(ours) != set(other) or any(str(ours[k]) != str(other[k]) for k in ours)
    else:
        assert not torch.equal(as_tensor(ours), as_tensor(other))


def test_every_method_has_a_case():
    missing = [k for k in load_all() if k not in CASES]
    assert not missing, f"no worked example for {missing}"
