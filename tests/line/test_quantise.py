"""Grids, roundings and rewrites along the whole line: what is written, packed, folded, resumed."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trimtab import cli
from trimtab.core import edits, line, spec
from trimtab.core.registry import get
from trimtab.core.types import BadInput
from trimtab.methods.codes import Codes, Grid, rounded
from trimtab.methods.grid.int_ import int_
from trimtab.methods.solvers import errors
from trimtab.network.checkpoint import Checkpoint, SafeFile
from trimtab.runtime import layouts, packed

FAST = ["--samples", "4", "--seq-len", "32", "--proof-tokens", "64", "--no-speed", "-q"]
MADE = [("gptq(bits=3,group=32)", "i3"), ("gptq(act_order=true,asymmetric=true,group=32)", "i4"), ("gptq(bits=8,group=0)", "i8"),
        ("rtn(grid=nf,bits=3,group=32)", "l3"), ("fp(bits=4,exponent=2,group=32) | gptq", "l4"), ("kmeans(bits=2,group=32) | rtn", "l2"),
        ("sign(group=32) | gptq", "l1"), ("awq(group=32)", "i4"), ("fp(bits=8) | rtn", "l8"), ("ldlq(group=32)", "l2"),
        ("int(group=32) | adaround(iters=5) | greedy", "i4"),
        ("nf(group=32,bits=3) | adaquant(iters=5)", "l3")]


pytestmark = pytest.mark.usefixtures("proof_in_this_process")


def trim(capsys, model, recipe, out, calib, *more: object) -> dict:
    code = cli.main([str(a) for a in ("trim", model, recipe, "-o", out, "--calib", calib, "--text", calib, *FAST, "--json", *more)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def read(path: Path) -> dict[str, torch.Tensor]:
    c = Checkpoint.open(path)
    return {n: c.read(n) for n in c.tensors}


def codes_of(parts: SafeFile, site: str) -> Codes:
    levels, group = parts.read(f"{site}:grid").tolist()
    more = [parts.read(f"{site}:{k}") if f"{site}:{k}" in parts.names else None for k in ("zeros", "table")]
    return Codes(parts.read(f"{site}:codes"), Grid(parts.read(f"{site}:scales"), levels, *more), group)


@pytest.mark.parametrize(("recipe", "type_"), MADE)
@pytest.mark.filterwarnings("ignore:no kernel here takes")
def test_what_is_written_decodes_to_what_was_rounded(capsys, tiny_lm, tmp_path, calib, recipe, type_):
    """The plain tensors, the parts beside them, and the packed directory are one model."""
    result = trim(capsys, tiny_lm, recipe, tmp_path / "plain", calib)
    assert trim(capsys, tiny_lm, recipe, tmp_path / "packed", calib, "--pack", "--head", "keep")["recovery"] == pytest.approx(
        result["recovery"], rel=0.02)
    plain, parts = read(tmp_path / "plain"), SafeFile(tmp_path / "plain" / "trimtab.safetensors")
    linears = packed.open(tmp_path / "packed", verify=True).linears
    for i in range(3):
        for site, module in (("attn.q", "self_attn.q_proj"), ("attn.o", "self_attn.o_proj"), ("mlp.down", "mlp.down_proj")):
            name = f"model.layers.{i}.{module}"
            codes = codes_of(parts, f"{i}.{site}")
            assert codes.type == type_
            assert torch.equal(codes.weight().bfloat16(), plain[f"{name}.weight"])
            assert linears[name].type == type_ and torch.equal(layouts.restored(linears[name]), codes.weight())


def test_awq_folds_and_the_model_says_the_same_before_it_rounds(capsys, tiny_lm, tmp_path, calib):
    """At 8 bits next to nothing is lost, though norms and weights are others; one norm took the inverse of its readers' scale."""
    result = trim(capsys, tiny_lm, "awq(bits=8,group=0)", tmp_path / "o", calib)
    assert result["recovery"] > 0.995
    before, after = read(tiny_lm), read(tmp_path / "o")
    for name in ("model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"):
        assert not torch.equal(before[name], after[name])
    s = before["model.layers.1.input_layernorm.weight"].float() / after["model.layers.1.input_layernorm.weight"].float()
    for role in "qkv":
        old, new = (t[f"model.layers.1.self_attn.{role}_proj.weight"].float() for t in (before, after))
        if role != "v":  # whose rows o has scaled, too
            torch.testing.assert_close(new, old * s, rtol=0.05, atol=0.02 * float((old * s).abs().max()))
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_awq_leaves_alone_what_somebody_else_reads(capsys, tiny_lm, tmp_path, calib):
    """q alone is not scaled: k and v read the same norm. Nor is o, whose values nobody asked for, but the rest of its inputs are."""
    trim(capsys, tiny_lm, "*.q,*.down: awq(bits=8,group=0)", tmp_path / "o", calib)
    before, after = read(tiny_lm), read(tmp_path / "o")
    changed = {n.split(".", 3)[-1] for n, t in before.items() if not torch.equal(t, after[n])}
    assert changed == {"self_attn.q_proj.weight", "mlp.down_proj.weight", "mlp.up_proj.weight"}


def test_a_later_sweep_keeps_what_an_earlier_one_folded(capsys, tiny_lm, tmp_path, calib):
    """Two orders, two sweeps: the norms that took a scale in the first one are in the files of the second."""
    result = trim(capsys, tiny_lm, "attn: awq(bits=8,group=0,order=dense) ; *.up: rtn(bits=8,group=0)", tmp_path / "o", calib)
    assert result["recovery"] > 0.99
    name = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(read(tiny_lm)[name], read(tmp_path / "o")[name])


def test_rows_that_are_rounded_already_take_no_scale(capsys, tiny_lm, tmp_path, calib):
    """What an earlier sweep left of up is codes, which a scale for down's inputs would leave behind."""
    recipe = "*.up: rtn(bits=8,group=0,order=dense) ; *.down: awq(bits=8,group=0)"
    assert trim(capsys, tiny_lm, recipe, tmp_path / "o", calib)["recovery"] > 0.99
    parts, plain = SafeFile(tmp_path / "o" / "trimtab.safetensors"), read(tmp_path / "o")
    for i in range(3):
        assert torch.equal(codes_of(parts, f"{i}.mlp.up").weight().bfloat16(), plain[f"model.layers.{i}.mlp.up_proj.weight"])


def test_behind_awq_a_site_hears_of_the_inputs_it_has(capsys, tiny_lm, tmp_path, calib, monkeypatch):
    """Weights and second moment are both of the scaled inputs: the outputs' power is what it was, to the last digits."""
    power: dict[str, dict[str, torch.Tensor]] = {}
    real = edits.edit_site

    def spy(p, site, w, share, stats, *more):
        power.setdefault(str(p.steps.get("rewrite")), {})[site.name] = ((w @ stats["gram"]) * w).sum(1)
        return real(p, site, w, share, stats, *more)

    monkeypatch.setattr(edits, "edit_site", spy)
    for i, recipe in enumerate(("int(group=32) | gptq(order=dense)", "awq | int(group=32) | gptq(order=dense)")):
        trim(capsys, tiny_lm, recipe, tmp_path / f"o{i}", calib)
    plain, scaled = power["None"], power["rewrite/awq"]
    for name in plain:
        if not name.endswith((".v", ".up")):  # whose own rows took a scale
            torch.testing.assert_close(scaled[name], plain[name], rtol=1e-3, atol=1e-5)


def test_awq_is_packed_with_its_norms_and_resumed(capsys, tiny_lm, tmp_path, calib, monkeypatch):
    first = trim(capsys, tiny_lm, "awq(group=32)", tmp_path / "a", calib, "--pack")
    from trimtab.core.journal import Journal

    write, stop = Journal.write_block, iter([False, True])

    def once(self, *args):
        write(self, *args)
        if next(stop):
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write_block", once)
    asked = ("trim", tiny_lm, "awq(group=32)", "-o", tmp_path / "b", "--calib", calib, "--text", calib, *FAST, "--pack")
    assert cli.main([str(a) for a in asked]) == 1
    monkeypatch.setattr(Journal, "write_block", write)
    capsys.readouterr()
    assert trim(capsys, tiny_lm, "awq(group=32)", tmp_path / "b", calib, "--pack", "--resume")["plan_hash"] == first["plan_hash"]
    a, b = packed.open(tmp_path / "a", verify=True), packed.open(tmp_path / "b", verify=True)
    assert all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())
    assert all(torch.equal(t, b.linears[n].buffers[k]) for n, p in a.linears.items() for k, t in p.buffers.items())
    assert not torch.equal(a.tensors["model.layers.0.input_layernorm.weight"], read(tiny_lm)["model.layers.0.input_layernorm.weight"])


def test_roundings_rank_as_they_should(capsys, tiny_lm, tmp_path, calib):
    """Against the dense model's own outputs: GPTQ loses less than the nearest, and fewer bits lose more."""
    kl = {r: trim(capsys, tiny_lm, r, tmp_path / r.replace("(", "_"), calib)["kl"] for r in (
        "rtn(bits=3,group=32)", "gptq(bits=3,group=32)", "rtn(bits=2,group=32)", "gptq(bits=2,group=32)", "rtn(bits=4,group=32)")}
    assert kl["gptq(bits=3,group=32)"] < kl["rtn(bits=3,group=32)"] < kl["rtn(bits=2,group=32)"]
    assert kl["gptq(bits=2,group=32)"] < kl["rtn(bits=2,group=32)"]
    assert kl["rtn(bits=4,group=32)"] < kl["rtn(bits=3,group=32)"]


def test_the_range_of_least_surprise_cuts_an_outlier_and_keeps_what_is_even():
    """By entropy: of normal weights with one far off most of the range goes, zeros or not; of even ones none."""
    gen = torch.Generator().manual_seed(0)

    def kept(w: torch.Tensor) -> float:
        whole, cut = (int_(w, bits=8, group=0, clip=clip).scales for clip in ("max", "entropy"))
        return float(cut / whole)

    normal = torch.randn(1, 8192, generator=gen)
    normal[0, 5] = 2 * float(normal.abs().max())
    assert 0.25 < kept(normal) < 0.6
    mostly_zeros = torch.nn.functional.pad(normal, (0, 100_000))
    assert kept(mostly_zeros) == kept(normal)
    assert kept(torch.rand(1, 8192, generator=gen) * 2 - 1) > 0.95


def test_a_grid_is_a_step_of_its_own():
    assert spec.load("rtn").text == spec.load("int(bits=4,group=128) | rtn").text
    assert spec.load("gptq(grid=nf,bits=3)").text == "grid/nf(bits=3) | edit/gptq"
    assert spec.load("nf").passes == spec.load("nf | rtn").passes  # what rounds to a grid that stands alone
    assert spec.load("gptq(grid=fp(exponent=2),group=64)").text == "grid/fp(exponent=2,group=64) | edit/gptq"
    with pytest.raises(BadInput, match="both decide grid"):
        spec.load("int | nf | rtn")


@pytest.mark.parametrize("edit", ["adaround", "adaquant"])
def test_what_is_learned_is_no_worse_than_the_nearest_in_any_row(edit):
    """Of many steps and of few; codes that learn their scale may go anywhere, those that do not are the two beside the weight."""
    gen = torch.Generator().manual_seed(0)
    w, x = torch.randn(40, 32, generator=gen), torch.randn(64, 32, generator=gen) @ torch.randn(32, 32, generator=gen)
    grid = line.Gridded(spec.grid_step("int(bits=3,group=16)"), {})
    env = {"w": w, "mask": torch.ones_like(w, dtype=torch.bool), "gram": x.T @ x / 64, "grid": grid}
    near = get("edit/rtn")(env)
    for iters in (0, 3, 200):
        new = get(f"edit/{edit}")(env, iters=iters)
        lost, least = (errors(w, c.w, env["gram"]) for c in (new, near))
        assert bool((lost <= least).all())
        assert (iters < 200) or float(lost.sum()) < 0.6 * float(least.sum())
        if edit == "adaround":
            codes = Codes.among(new.parts)
            low = codes.grid.below(w.view(40, 2, 16)).view(40, 32)
            assert bool(((codes.codes == low) | (codes.codes == low + 1)).all())


def test_after_greedy_no_code_alone_is_better():
    """Every other value of every single weight costs its row more, on the second moment it works with."""
    gen = torch.Generator().manual_seed(0)
    w, x = torch.randn(6, 12, generator=gen), torch.randn(64, 12, generator=gen) @ torch.randn(12, 12, generator=gen)
    gram = x.T @ x / 64
    grid = line.Gridded(spec.grid_step("nf(bits=3,group=8)"), {})
    near = rounded(w, grid(w), 8)
    codes = Codes.among(get("repair/greedy")({"w": w, "new": near.change(), "gram": gram}, iters=100, damp=0.0).parts)
    least = errors(w, codes.weight(), gram)
    assert float(least.sum()) < 0.7 * float(errors(w, near.weight(), gram).sum())
    for j in range(12):
        for q in range(8):
            other = codes.codes.clone()
            other[:, j] = q
            assert bool((errors(w, replace(codes, codes=other).weight(), gram) >= least * (1 - 1e-5)).all())
