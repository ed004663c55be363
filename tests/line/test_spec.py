"""Recipes: what a user types, what it means, what is refused."""
from __future__ import annotations

import pytest

from trimtab.core import spec
from trimtab.core.types import BadInput, Site


def site(name: str) -> Site:
    block, group, role = name.split(".", 2)
    return Site(name, int(block), group, role, "p", (4, 4), "x")


def keys(text: str) -> list[list[str]]:
    return [[s.key for s in p.steps.values()] for p in spec.load(text).passes]


def test_axes_left_out_take_their_defaults():
    assert keys("row | wanda") == [["unit/row", "score/wanda", "budget/uniform", "edit/mask"]]


@pytest.mark.parametrize("name", sorted(spec.rows()))
def test_a_row_spelled_out_parses_back_to_itself(name):
    row = spec.load(name)
    assert spec.load(row.text).passes == row.passes


@pytest.mark.parametrize("text", [
    "row | wanda | owl(outlier=3.5) | mask | admm | bitmask", "mlp: nm(n=2,m=4) | wanda ; attn: sparsegpt(keep=0.7)",
    "*.down: wanda(unit=4:8)", "site | edit/admm(iters=3)", "block(rows=1,cols=32) | magnitude(keep=30%)",
    "mlp: svd(keep=0.4) | owl ; attn: svd(rank=8)", "knapsack(mean=3.2) | awq | int(bits=2/3/4,clip=max/mse) | rtn | clip",
])
def test_text_round_trips(text):
    first = spec.load(text)
    assert spec.load(first.text).passes == first.passes


def test_a_short_unit_is_nm_and_follows_the_row_along_the_output():
    p = spec.load("wanda(unit=2:4)").passes[0]
    assert str(p.steps["unit"]) == "unit/nm(m=4,n=2)"
    gate, down = spec.load("dass(unit=2:4)").passes[:2]
    assert dict(gate.steps["unit"].knobs)["dim"] == "out" and "dim" not in dict(down.steps["unit"].knobs)


def test_unit_model_decides_the_budget():
    p = spec.load("magnitude(unit=model)").passes[0]
    assert "budget" not in p.steps and p.budget.key == "budget/global"


def test_a_name_on_two_axes_means_the_one_still_open():
    assert "edit/admm" in keys("site | admm")[0]
    assert "repair/obs" in keys("row | obs | obs")[0] and "score/obs" in keys("row | obs | obs")[0]
    assert "repair/admm" in keys("row | wanda | uniform | mask | admm")[0]


def test_scopes():
    p = spec.load("mlp: row | wanda").passes[0]
    assert p.covers(site("0.mlp.down")) and not p.covers(site("0.attn.q"))
    p = spec.load("*.down,1.attn.*: row | wanda").passes[0]
    assert [p.covers(site(n)) for n in ("3.mlp.down", "1.attn.q", "0.attn.q", "1.mlp.up")] == [True, True, False, False]


def test_scope_option_limits_a_row_to_its_part():
    r = spec.load("dass").limited("mlp", None)
    covered = [[n for n in ("0.mlp.gate", "0.mlp.down", "0.attn.q") if p.covers(site(n))] for p in r.passes]
    assert covered == [["0.mlp.gate"], ["0.mlp.down"], []]
    assert not any(p.covers(site("0.mlp.down")) for p in spec.load("dass").limited("attn", None).passes)
    with pytest.raises(BadInput, match="use one of the two"):
        spec.load("mlp: wanda").limited("attn", None)


@pytest.mark.parametrize("text, words", [
    ("wnada", ["unknown method 'wnada'", "wanda"]),
    ("row | wanda | magnitude", ["both decide score"]),
    ("site | sparsegpt | least_squares", ["both decide repair"]),
    ("magnitude(unit=model) | owl", ["stands alone", "model | magnitude"]),
    ("model | wanda | owl", ["both decide budget"]),
    ("row | wanda(dmap=1)", ["no knob 'dmap'"]),
    ("row | wanda | owl(outlier=high)", ["outlier", "float"]),
    ("wanda(colour=3)", ["no knob 'colour'"]),
    ("wanda(unit=rwo)", ["unknown unit 'rwo'", "row"]),
    ("wanda(keep=0)", ["keep is 0"]),
    ("wanda(keep=1.5)", ["keep is 1.5"]),
    ("wanda(unit=2:4,keep=0.5)", ["fixes its own share"]),
    ("svd(rank=8,keep=0.5)", ["edit/svd(rank=8) fixes its own share"]),
    ("svd | least_squares", ["both decide repair"]),
    ("row | svd", ["both decide unit"]),
    ("row | uniform", ["no score"]),
    ("row | wanda(", ["unbalanced"]),
    ("int(bits=2/3) | gptq", ["several grids", "knapsack(mean=3)"]),
    ("knapsack(mean=3) | int(bits=3) | gptq", ["one of several grids", "int(bits=2/3/4)"]),
    ("knapsack(mean=3) | gptq", ["one of several grids"]),
    ("knapsack | int(bits=2/2) | gptq", ["twice"]),
    ("knapsack | int(bits=2/high) | gptq", ["bits", "int"]),
    ("knapsack | owl | int(bits=2/3) | gptq", ["both decide budget"]),
    ("knapsack | row | wanda", ["one of several grids"]),
    ("gptq(damp=0.1/0.2)", ["damp", "float"]),
    ("head: wanda", ["head", "not supported yet"]),
    ("", ["empty"]),
])
def test_refused_with_one_line(text, words):
    with pytest.raises(BadInput) as e:
        spec.load(text)
    message = str(e.value)
    assert "\n" not in message and all(w in message for w in words), message


def test_keep_where_nothing_is_free_and_keep_twice():
    with pytest.raises(BadInput, match="fixes its own share"):
        spec.load("wanda(unit=2:4)").limited(None, 0.5)
    with pytest.raises(BadInput, match=r"fixes its own share .*rank"):
        spec.load("svd(rank=8)").limited(None, 0.5)
    assert spec.load("svd").limited(None, 0.25).passes[0].keep == 0.25
    with pytest.raises(BadInput, match="use one of the two"):
        spec.load("wanda(keep=0.4)").limited(None, 0.5)
    with pytest.raises(BadInput, match="use one of the two"):
        spec.load("mlp: row | wanda").limited("attn", None)


def test_yaml(tmp_path):
    f = tmp_path / "r.yaml"
    f.write_text("recipe: row | wanda\nkeep: 0.25\nscope: mlp\n")
    p = spec.load(str(f)).passes[0]
    assert (p.keep, p.scope) == (0.25, "mlp")
    f.write_text("recpie: wanda\n")
    with pytest.raises(BadInput, match="recipe"):
        spec.load(str(f))
