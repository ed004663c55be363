"""Packed directories: what is written, what opens them, and what refuses to."""
from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tools import fuzz
from torch import nn

from tests import tiny
from trimtab import api, cli
from trimtab.core import pack
from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import Codes, nearest
from trimtab.methods.factors import Factors, rank_of
from trimtab.methods.format.dense import dense
from trimtab.network.checkpoint import Checkpoint, SafeFile
from trimtab.network.stream import load_module
from trimtab.prove.proof import answer
from trimtab.runtime import layouts, native, packed
from trimtab.runtime.decoder import NoKernel, open_decoder
from trimtab.runtime.modules import PackedLinear

FAST = ["--samples", "4", "--seq-len", "32", "--proof-tokens", "64", "--no-speed", "-q"]
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def proof_in_this_process(monkeypatch, request):
    if "fresh" not in request.keywords:
        monkeypatch.setattr("trimtab.prove.proof.run_fresh", answer)


@pytest.fixture(scope="module")
def every_format(tmp_path_factory) -> Path:
    """A model packed in every format, n:m along the output among them, which has no kernel."""
    with pytest.warns(UserWarning, match="saves bytes, not time"):
        return fuzz.sample(tmp_path_factory.mktemp("packed"))


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def trim(capsys, model, recipe, out, calib, *more: object) -> tuple[int, str, str]:
    return run(capsys, "trim", model, recipe, "-o", out, "--calib", calib, "--text", calib, *FAST, *more)


def weights(path: Path) -> dict[str, torch.Tensor]:
    c = Checkpoint.open(path)
    return {n: c.read(n) for n in c.tensors}


# ---- what is written --------------------------------------------------------------------------
def test_codes_are_those_of_the_recipe_and_the_head_is_int8(capsys, tiny_lm, tmp_path, calib):
    code, out, err = trim(capsys, tiny_lm, "rtn(bits=4,group=32)", tmp_path / "o", calib, "--pack", "--json")
    assert code == 0, err
    result, source, got = json.loads(out), weights(tiny_lm), packed.open(tmp_path / "o", verify=True)
    for name, p in got.linears.items():
        w = source[f"{name}.weight" if name != "lm_head" else "model.embed_tokens.weight"].float()
        want = nearest(w, 8) if name == "lm_head" else nearest(w, 4, 32)
        assert (p.format, p.type, p.group) == ("dense", f"i{want.bits}", want.group)
        assert torch.equal(layouts.restored(p), want.weight()), name
    assert len(got.linears) == 3 * 7 + 1 and set(got.tensors) == {n for n in source if "_proj" not in n}
    assert all(torch.equal(t, source[n]) for n, t in got.tensors.items())
    assert got.config["tie_word_embeddings"] is False
    files = {p.name for p in (tmp_path / "o").iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "recipe.yaml", "README.md",
            "trimtab.json"} <= files
    assert "trimtab.safetensors" not in files and not (tmp_path / "o.partial").exists()
    assert "import trimtab" in (tmp_path / "o" / "README.md").read_text() and "--pack" in (tmp_path / "o" / "README.md").read_text()
    # What the proof counted: bytes of the files, and of the packed layers the weights they stand for, the new head among them.
    head = 4096 * 32
    assert result["after"]["params"] == result["before"]["params"] + head and result["packed"] is None
    assert result["after"]["bytes"] == (tmp_path / "o" / "model.safetensors").stat().st_size
    assert result["after"]["nonzero"] == sum(int(t.count_nonzero()) for t in weights(tmp_path / "o").values())


def test_the_row_dense_is_packed_as_it_was(capsys, tiny_lm, tmp_path, calib):
    code, out, _ = trim(capsys, tiny_lm, "dense", tmp_path / "o", calib, "--pack", "--json")
    result = json.loads(out)
    assert code == 0 and result["recovery"] == pytest.approx(1, abs=1e-6) and result["zero_share"] < 0.01
    source = weights(tiny_lm)
    assert all(torch.equal(t, source[n]) for n, t in weights(tmp_path / "o").items())
    assert "lm_head" not in packed.open(tmp_path / "o").linears  # it is the table of embeddings, which stays
    model = api.load(tmp_path / "o").module
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("more, want", [
    (("--head", "keep"), {"head": None, "up": ("dense", "i8")}),
    (("--pack-dtype", "float32"), {"head": ("dense", "i8"), "up": ("dense", "i8")})])
def test_head_and_float_type_are_the_users(capsys, tiny_lm, tmp_path, calib, more, want):
    recipe = "mlp: rtn(bits=8,group=0)"
    assert trim(capsys, tiny_lm, recipe, tmp_path / "o", calib, "--pack", *more)[0] == 0
    linears = packed.open(tmp_path / "o").linears
    found = {k: (linears[n].format, linears[n].type) if n in linears else None for k, n in (("head", "lm_head"), ("up", UP))}
    assert found == want
    asked = "f32" if "float32" in more else "bf16"
    assert linears["model.layers.0.self_attn.q_proj"].type == asked  # no pass went over it: dense, in the files' own type


def test_a_table_stored_under_the_heads_name_alone_is_not_lost(capsys, tiny_lm, tmp_path, calib):
    shutil.copytree(tiny_lm, tmp_path / "a")
    tensors = {n: t for f in tiny_lm.glob("*.safetensors") for n, t in load_file(f).items()}
    for f in [*(tmp_path / "a").glob("*.safetensors"), tmp_path / "a" / "model.safetensors.index.json"]:
        f.unlink()
    table = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": table}, tmp_path / "a" / "model.safetensors")
    code, _, err = trim(capsys, tmp_path / "a", "rtn", tmp_path / "o", calib, "--pack")
    assert code == 0, err
    got = packed.open(tmp_path / "o")
    assert torch.equal(got.tensors["model.embed_tokens.weight"], table) and got.linears["lm_head"].type == "i8"
    model = load_module(tmp_path / "o")
    assert torch.equal(model.model.embed_tokens.weight, table.float()) and isinstance(model.lm_head, PackedLinear)


def test_a_later_rtn_keeps_the_zeros_and_their_format(capsys, tiny_lm, tmp_path, calib):
    both = "nm(n=2,m=4) | wanda ; rtn(bits=4,group=32)"
    assert trim(capsys, tiny_lm, "nm(n=2,m=4) | wanda", tmp_path / "one", calib, "--pack")[0] == 0
    assert trim(capsys, tiny_lm, both, tmp_path / "two", calib, "--pack")[0] == 0
    assert trim(capsys, tiny_lm, both, tmp_path / "plain", calib)[0] == 0
    one, two, plain = (weights(tmp_path / n) for n in ("one", "two", "plain"))
    p = packed.open(tmp_path / "two").linears[UP]
    assert (p.format, p.n, p.m, p.type) == ("nm", 2, 4, "i4")
    for name in (n for n in one if "_proj" in n):
        assert (one[name] == 0).float().mean() >= 0.5
        assert not two[name][one[name] == 0].any(), name
        assert torch.equal(two[name].bfloat16(), plain[name])  # the ordinary directory holds what the codes stand for
    parts = SafeFile(tmp_path / "plain" / "trimtab.safetensors")
    assert {"1.mlp.up:codes", "1.mlp.up:scales", "1.mlp.up:grid", "1.mlp.up:mask"} <= set(parts.names)
    notes = json.loads((tmp_path / "plain" / "trimtab.json").read_text())
    assert notes["formats"]["1.mlp.up"] == "nm i4" and notes["packed"]["format"] == "nm i4"
    assert notes["packed_bytes"]["1.mlp.up"] == p.nbytes  # what an ordinary run counts is what a packed one writes


NAMES = {**{r: f"self_attn.{r}_proj" for r in "qkvo"}, **{r: f"mlp.{r}_proj" for r in ("gate", "up", "down")}}
COLUMNS = "*.gate,*.up: block(rows=32,cols=1) | magnitude ; *.down: block(rows=1,cols=32) | magnitude"


@pytest.mark.parametrize("codes, type_", [("", "bf16"), (" ; *.gate,*.up: rtn(bits=8,group=0) ; *.down: rtn(bits=8,group=32)", "i8")])
def test_blocks_of_a_column_and_of_a_run_are_packed_as_they_were_pruned(capsys, tiny_lm, tmp_path, calib, codes, type_):
    code, _, err = trim(capsys, tiny_lm, COLUMNS + codes, tmp_path / "o", calib, "--pack", "--keep", "30%")
    assert code == 0, err
    assert trim(capsys, tiny_lm, COLUMNS + codes, tmp_path / "plain", calib, "--keep", "30%")[0] == 0
    plain, linears = weights(tmp_path / "plain"), packed.open(tmp_path / "o", verify=True).linears
    for name, rows, cols in ((UP, 32, 1), ("model.layers.0.mlp.gate_proj", 32, 1), ("model.layers.2.mlp.down_proj", 1, 32)):
        p, w = linears[name], plain[f"{name}.weight"]
        assert (p.format, p.type, p.rows, p.cols, p.group) == ("bsr", type_, rows, cols, 0 if not codes else 32)
        assert torch.equal(layouts.restored(p).bfloat16(), w)
        blocks = w.view(w.shape[0] // rows, rows, -1, cols).ne(0).any(3).any(1)
        assert int(blocks.sum()) == round(0.3 * blocks.numel())
        assert all(f"_bsr{rows}x{cols}-{type_}_" in k for k in native.Linear(p).kernels)


@pytest.mark.parametrize("recipe, kind", [
    ("row | magnitude ; rtn(bits=8,group=32)", ("bitmask", "i8")), ("row | magnitude ; rtn(bits=4,group=32)", ("dense", "i4")),
    ("ternary(group=20)", ("dense", "t")), ("row | magnitude ; ternary", ("dense", "t"))])
def test_a_grid_goes_into_the_pattern_s_format_where_that_stores_it(capsys, tiny_lm, tmp_path, calib, recipe, kind):
    assert trim(capsys, tiny_lm, recipe, tmp_path / "packed", calib, "--pack")[0] == 0
    assert trim(capsys, tiny_lm, recipe, tmp_path / "plain", calib)[0] == 0
    p, plain = packed.open(tmp_path / "packed", verify=True).linears[UP], weights(tmp_path / "plain")
    assert (p.format, p.type) == kind
    assert torch.equal(layouts.restored(p).bfloat16(), plain[f"{UP}.weight"])
    notes = json.loads((tmp_path / "plain" / "trimtab.json").read_text())
    assert notes["formats"]["1.mlp.up"] == " ".join(kind) and notes["packed_bytes"]["1.mlp.up"] == p.nbytes


@pytest.mark.parametrize(("recipe", "type_"), [("wanda(unit=4:8)", "bf16"), ("nm(n=4,m=8) | wanda ; rtn(bits=4,group=32)", "i4")])
def test_four_of_eight_is_packed_and_run_as_such(capsys, tiny_lm, tmp_path, calib, recipe, type_):
    code, _, err = trim(capsys, tiny_lm, recipe, tmp_path / "o", calib, "--pack")
    assert code == 0, err
    p = packed.open(tmp_path / "o").linears[UP]
    assert (p.format, p.n, p.m, p.type) == ("nm", 4, 8, type_)
    assert native.core() is None or any("nm8" in k for k in native.Linear(p).kernels)  # and without a warning


def test_factors_are_packed_as_the_recipe_left_them(capsys, tiny_lm, tmp_path, calib):
    recipe = "svd | owl"
    code, out, err = trim(capsys, tiny_lm, recipe, tmp_path / "packed", calib, "--pack", "--keep", "60%", "--json")
    assert code == 0, err
    result, notes = json.loads(out), json.loads((tmp_path / "packed" / "trimtab.json").read_text())
    assert trim(capsys, tiny_lm, recipe, tmp_path / "plain", calib, "--keep", "60%")[0] == 0
    assert trim(capsys, tiny_lm, recipe, tmp_path / "dense", calib, "--keep", "60%", "--pack", "dense")[0] == 0
    source, plain, parts = weights(tiny_lm), weights(tmp_path / "plain"), SafeFile(tmp_path / "plain" / "trimtab.safetensors")
    said, whole = (json.loads((tmp_path / n / "trimtab.json").read_text()) for n in ("plain", "dense"))
    assert said["ranks"] == notes["ranks"] == result["ranks"] == whole["ranks"] and len(set(notes["shares"].values())) > 1
    model, stored = packed.open(tmp_path / "packed", verify=True), packed.open(tmp_path / "dense").linears
    entries = 0
    for block in range(3):
        for site, name in (("mlp.up", "mlp.up_proj"), ("mlp.down", "mlp.down_proj"), ("attn.k", "self_attn.k_proj")):
            site, name = f"{block}.{site}", f"model.layers.{block}.{name}"
            p, w = model.linears[name], source[f"{name}.weight"].float()
            rank = rank_of(w.shape, notes["shares"][site])
            assert (p.format, p.type, p.shape, p.label) == ("lowrank", "bf16", tuple(w.shape), "lowrank") and notes["ranks"][site] == rank
            right, left = (layouts.restored(f) for f in p.factors)
            assert torch.equal(right, parts.read(f"{site}:right").bfloat16()) and torch.equal(left, parts.read(f"{site}:left").bfloat16())
            product = Factors(parts.read(f"{site}:left"), parts.read(f"{site}:right")).weight()
            assert torch.equal(plain[f"{name}.weight"], product.bfloat16())  # the ordinary directory holds the product
            u, s, vt = torch.linalg.svd(w)
            torch.testing.assert_close(product, u[:, :rank] * s[:rank] @ vt[:rank], rtol=1e-4, atol=1e-5)
            assert said["formats"][site] == "lowrank" and said["packed_bytes"][site] == p.nbytes == notes["packed_bytes"][name]
            assert stored[name].format == "dense" and torch.equal(layouts.restored(stored[name]), plain[f"{name}.weight"])
    entries = sum(f.shape[0] * f.shape[1] for p in model.linears.values() for f in p.factors)
    gone = sum(p.shape[0] * p.shape[1] for p in model.linears.values())
    assert result["after"]["params"] == result["after"]["nonzero"] == result["before"]["params"] - gone + entries
    assert result["factored_share"] == entries / gone < 0.6 and said["packed"]["format"] == "lowrank"
    low, high = min(notes["ranks"].values()), max(notes["ranks"].values())
    card = (tmp_path / "plain" / "README.md").read_text()
    assert f"Ranks of the layers in factors: {low} to {high}, with {100 * entries / gone:.1f}%" in card
    ours, ids = load_module(tmp_path / "packed"), torch.arange(3, 40)[None]
    with torch.no_grad():
        got, want = ours(ids).logits, load_module(tmp_path / "plain")(ids).logits
    assert float((got - want).norm() / want.norm()) < 0.02  # factors, products and what lies between rounded to bfloat16
    assert isinstance(ours.model.layers[0].mlp.up_proj, PackedLinear)


def test_a_layer_whose_factors_would_save_nothing_stays_whole(capsys, tiny_lm, tmp_path, calib):
    """The rank budget takes no more parameters than asked for; what it leaves whole is untouched, and packed as a weight."""
    recipe = "ranks(steps=4) | svdllm"
    code, out, err = trim(capsys, tiny_lm, recipe, tmp_path / "packed", calib, "--pack", "--keep", "80%", "--json")
    assert code == 0, err
    result, notes = json.loads(out), json.loads((tmp_path / "packed" / "trimtab.json").read_text())
    assert trim(capsys, tiny_lm, recipe, tmp_path / "plain", calib, "--keep", "80%")[0] == 0
    source, plain, linears = weights(tiny_lm), weights(tmp_path / "plain"), packed.open(tmp_path / "packed", verify=True).linears
    shapes = {n: tuple(linears[f"model.layers.{b}.{NAMES[role]}"].shape) for n in notes["ranks"] for b, _, role in [n.split(".")]}
    whole = {n for n, share in notes["shares"].items() if share == 1}
    assert 0 < len(whole) < len(shapes)
    kept = total = 0
    for n, shape in shapes.items():
        block, _, role = n.split(".")
        name = f"model.layers.{block}.{NAMES[role]}"
        size, rank = shape[0] * shape[1], notes["ranks"][n]
        kept, total = kept + (size if n in whole else rank * sum(shape)), total + size
        assert torch.equal(plain[f"{name}.weight"], source[f"{name}.weight"]) == (n in whole)
        assert linears[name].format == ("dense" if n in whole else "lowrank")
        assert n in whole or rank * sum(shape) < size
    assert result["factored_share"] == pytest.approx(kept / total) and 0.6 < kept / total <= 0.8
    assert result["after"]["params"] == result["before"]["params"] - total + kept
    ours, ids = load_module(tmp_path / "packed"), torch.arange(3, 40)[None]
    with torch.no_grad():
        got, want = ours(ids).logits, load_module(tmp_path / "plain")(ids).logits
    assert float((got - want).norm() / want.norm()) < 0.02


def test_all_of_the_parameters_are_the_weights_themselves(capsys, tiny_lm, tmp_path, calib):
    for recipe in ("svd", "svdllm"):
        code, out, err = trim(capsys, tiny_lm, recipe, tmp_path / recipe, calib, "--keep", "1", "--json")
        assert code == 0, err
        source, now = weights(tiny_lm), weights(tmp_path / recipe)
        assert json.loads(out)["factored_share"] == 1 and all(torch.equal(t, source[n]) for n, t in now.items())


def test_factors_in_float32_say_what_the_unpacked_model_says(capsys, tmp_path):
    """Nothing is rounded: transformers on the packed directory and the decoder agree with it in ordinary tensors, and in text."""
    save_file({"input_ids": torch.arange(3, 23).view(2, 10)}, tmp_path / "x.safetensors")
    how = {"speed": False, "fresh": False, "seq_len": 10, "text": (str(tmp_path / "x.safetensors"),), "keep": 0.7}
    model, ids = tiny.save("llama_tied", tmp_path / "a"), torch.arange(3, 40)
    api.trim(model, "mlp: svd ; *.q,*.o: svd(rank=5)", tmp_path / "plain", **how)
    api.trim(model, "mlp: svd ; *.q,*.o: svd(rank=5)", tmp_path / "packed", pack="recipe", **how)
    module, ours = load_module(tmp_path / "plain"), load_module(tmp_path / "packed")
    assert sum(bool(m.linear.factors) for m in ours.modules() if isinstance(m, PackedLinear)) == 2 * 5
    with torch.no_grad():
        want = module(ids[None]).logits[0]
        torch.testing.assert_close(ours(ids[None]).logits[0], want, rtol=1e-4, atol=1e-4)
    if native.core():
        decoder = open_decoder(tmp_path / "packed")
        assert decoder.narrowest == "f32" and float((decoder.logits(ids) - want).abs().max()) < 1e-4 * float(want.abs().max())
        assert list(decoder.generate(ids, 8)) == list(open_decoder(tmp_path / "plain").generate(ids, 8))


def test_every_format_is_read_back_through_memory_maps(every_format):
    model = packed.open(every_format, verify=True)
    kinds = {(p.format, p.type, p.dim, p.m) for p in model.linears.values()}
    assert kinds >= {("nm", "f32", "in", 4), ("nm", "f32", "out", 4), ("nm", "f32", "in", 8), ("bsr", "f32", "in", 1),
                     ("bitmask", "f32", "in", 1), ("sell", "f32", "in", 1), ("nm", "i4", "in", 4), ("nm", "i4", "in", 8),
                     ("bsr", "i8", "in", 1), ("dense", "i2", "in", 1), ("bitmask", "i8", "in", 1), ("dense", "t", "in", 1),
                     ("dense", "i8", "in", 1), ("lowrank", "f32", "in", 1)}
    assert {(p.rows, p.cols, p.type) for p in model.linears.values() if p.format == "bsr"} >= {
        (16, 16, "f32"), (32, 1, "f32"), (32, 1, "i8"), (1, 32, "i8"), (32, 32, "i8")}
    c = Checkpoint.open(every_format)
    raw = load_file(every_format / "model.safetensors")  # the library the ecosystem reads with agrees on what is in the file
    assert safe_open(every_format / "model.safetensors", "pt").metadata()["format"] == "pt"
    lines = Path("/proc/self/maps").read_text().splitlines() if sys.platform == "linux" else []
    mapped = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in lines if str(every_format) in line]
    for name, p in model.linears.items():
        assert torch.equal(layouts.restored(p), c.read(f"{name}.weight")) and layouts.restored(p).dtype == c.tensors[f"{name}.weight"].dtype
        for k, t in p.buffers.items():
            assert torch.equal(t, raw[c.place(name, k)].reshape(-1))
            if t.nbytes % 64 == 0:
                assert t.data_ptr() % 64 == 0, (name, k)
                assert not lines or not t.numel() or any(a <= t.data_ptr() < b for a, b in mapped), (name, k)  # not a copy


def test_large_models_are_written_in_shards(every_format, tmp_path):
    shutil.copytree(every_format, tmp_path / "o")
    f = SafeFile(every_format / "model.safetensors")
    (tmp_path / "o" / "model.safetensors").unlink()
    fuzz.write(tmp_path / "o", f, 8_000)
    assert len(list((tmp_path / "o").glob("model-*.safetensors"))) > 2
    a, b = packed.open(every_format), packed.open(tmp_path / "o", verify=True)
    assert all(torch.equal(t, b.linears[n].buffers[k]) for n, p in a.linears.items() for k, t in p.buffers.items())
    assert a.tensors.keys() == b.tensors.keys()
    with pytest.warns(UserWarning, match="not time"):
        assert isinstance(load_module(tmp_path / "o").model.layers[0].mlp.up_proj, PackedLinear)


def test_a_stopped_run_continues_to_the_same_bytes(capsys, tiny_lm, tmp_path, calib, monkeypatch):
    recipe = "nm(n=2,m=4) | wanda ; rtn(bits=4)"

    def hashes(path: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir() if p.name not in ("trimtab.json", "README.md")}

    assert trim(capsys, tiny_lm, recipe, tmp_path / "whole", calib, "--pack")[0] == 0
    stage, seen = pack.stage, []
    for stop in (2, 4):  # while blocks are packed, and before the head is
        def dying(path, made, stop=stop):
            seen.append(path.name)
            if len(seen) == stop:
                raise KeyboardInterrupt
            stage(path, made)

        monkeypatch.setattr(pack, "stage", dying)
        code, _, err = trim(capsys, tiny_lm, recipe, tmp_path / "o", calib, "--pack", "--resume")
        assert code == 1 and "--resume" in err and not (tmp_path / "o").exists()
    monkeypatch.setattr(pack, "stage", stage)
    code, _, err = trim(capsys, tiny_lm, recipe, tmp_path / "o", calib, "--pack", "dense", "--resume")
    assert code == 2 and "another plan (differs in pack)" in err
    assert trim(capsys, tiny_lm, recipe, tmp_path / "o", calib, "--pack", "--resume")[0] == 0
    assert seen == [f"packed0000{i}.safetensors" for i in (0, 1, 1, 2)]  # what was packed was not packed again
    assert hashes(tmp_path / "o") == hashes(tmp_path / "whole") and not (tmp_path / "o.partial").exists()
    assert trim(capsys, tiny_lm, "rtn", tmp_path / "o", calib, "--pack")[0] == 2
    assert trim(capsys, tiny_lm, "rtn", tmp_path / "o", calib, "--pack", "--force")[0] == 0
    assert packed.open(tmp_path / "o").linears[UP].format == "dense"


# ---- who opens it -----------------------------------------------------------------------------
@pytest.mark.parametrize("first", ["trimtab", "transformers.quantizers.auto"])
def test_plain_transformers_opens_it_once_trimtab_is_imported(every_format, first):
    code = f"""
import sys, warnings
warnings.simplefilter("ignore")
import {first}
{"assert not {'transformers', 'torch'} & set(sys.modules)" if first == "trimtab" else ""}
import trimtab
from transformers import AutoModel, AutoModelForCausalLM
from trimtab.runtime.modules import PackedLinear
model = AutoModelForCausalLM.from_pretrained({str(every_format)!r})
assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 36
bare = AutoModel.from_pretrained({str(every_format)!r})
assert sum(isinstance(m, PackedLinear) for m in bare.modules()) == 35
"""
    env = {"PYTHONPATH": str(Path(pack.__file__).parents[2]), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "phi3", "opt", "gpt_neox", "bert", "vit", "qwen2_moe", "llama_classifier"])
def test_packed_layers_run_inside_every_kind_of_family(tmp_path, name):
    """Fused weights, biases, tied heads, renamed tensors, experts: the same output, exactly the weights there were."""
    x = {k: v[:2].contiguous() for k, v in tiny.inputs(name).items()}
    save_file(x, tmp_path / "x.safetensors")
    result = api.trim(tiny.save(name, tmp_path / "a"), "dense", tmp_path / "b", pack="recipe", speed=False, fresh=False, seq_len=10,
                      text=(str(tmp_path / "x.safetensors"),))
    plain, ours = load_module(tmp_path / "a"), load_module(tmp_path / "b")
    layers = [n for n, m in ours.named_modules() if isinstance(m, PackedLinear)]
    assert len(layers) >= 8 and all(type(plain.get_submodule(n)) is nn.Linear for n in layers)
    with torch.no_grad():
        torch.testing.assert_close(ours(**x)[0], plain(**x)[0], rtol=1e-4, atol=1e-4)
    assert result["after"]["params"] == result["before"]["params"] and result["recovery"] == pytest.approx(1, abs=1e-5)
    assert bool(result["warnings"]) == (name == "qwen2_moe")  # stacks of experts are no layers, and it says so


def test_rows_of_a_fused_weight_share_their_format(tmp_path):
    """Phi's q, k, v are one layer: packed as one where they were treated alike, dense where they were not."""
    x = {k: v[:2].contiguous() for k, v in tiny.inputs("phi3").items()}
    save_file(x, tmp_path / "x.safetensors")
    model, kinds = tiny.save("phi3", tmp_path / "a"), {}
    for recipe in ("rtn(bits=4,group=32)", "*.q: rtn(bits=4,group=32)", "nm(n=2,m=4) | magnitude",
                   "*.q: rtn(bits=4,asymmetric=true) ; *.k,*.v: rtn(bits=4)", "svd(rank=5)"):
        out = tmp_path / str(len(kinds))
        api.trim(model, recipe, out, pack="recipe", speed=False, fresh=False, seq_len=10, text=(str(tmp_path / "x.safetensors"),))
        p = packed.open(out).linears["model.layers.0.self_attn.qkv_proj"]
        plain = tmp_path / f"plain{len(kinds)}"
        api.trim(model, recipe, plain, speed=False, fresh=False, seq_len=10, text=(str(tmp_path / "x.safetensors"),))
        assert torch.equal(layouts.restored(p), Checkpoint.open(plain).read("model.layers.0.self_attn.qkv_proj.weight"))
        kinds[recipe] = f"{p.format} {p.type}"
        if "svd" in recipe:  # factors of some rows are none of the whole
            assert packed.open(out).linears["model.layers.0.self_attn.o_proj"].format == "lowrank"
            said = [json.loads((d / "trimtab.json").read_text()) for d in (out, plain)]
            assert said[1]["formats"]["0.attn.q"] == said[0]["formats"]["model.layers.0.self_attn.qkv_proj"] == "dense"
    assert list(kinds.values()) == ["dense i4", "dense f32", "nm f32", "dense f32", "dense f32"]


def runners(*measured: dict) -> bool:
    """Whether each was timed by all that can run it, and the faster one counts: which one that is, the machine decides."""
    return all(set(m["runners"]) == {"torch", *(["trimtab"] if native.core() else [])}
               and m["decode_tok_s"] == max(r["decode_tok_s"] for r in m["runners"].values()) for m in measured)


@pytest.mark.fresh
def test_commands_take_a_packed_directory(capsys, tiny_lm, tmp_path, calib):
    small = ("--text", calib, "--json", "-q", "--seq-len", 32, "--proof-tokens", 64)
    code, out, _ = run(capsys, "trim", tiny_lm, "rtn(bits=8)", "-o", tmp_path / "o", "--pack", *small)
    result = json.loads(out)
    assert code == 0 and runners(result["timing"]["before"], result["timing"]["after"]) and " with " in result["faster"]
    assert result["recovery"] > 0.99
    code, out, _ = run(capsys, "eval", tmp_path / "o", *small)
    assert code == 0 and json.loads(out)["score"] == pytest.approx(result["score"], rel=1e-5)
    code, out, _ = run(capsys, "inspect", tmp_path / "o", "--json", "-q", "--samples", 2, "--seq-len", 32)
    assert code == 0 and json.loads(out)["roles"]["mlp.up"]["sites"] == 3
    code, out, _ = run(capsys, "bench", tmp_path / "o", "--against", tiny_lm, "--prompt", 4, "--new", 2, "--json")
    assert code == 0 and runners(json.loads(out)["before"]) and json.loads(out)["decode_tok_s"] > 0
    code, out, _ = run(capsys, "generate", tmp_path / "o", "def f", "--max-new-tokens", 3, "--json")
    assert code == 0 and json.loads(out)["prompt"] == "def f"


def test_bench_names_the_machine_the_spread_and_what_decoding_reads(capsys, tiny_lm, tmp_path, calib):
    assert trim(capsys, tiny_lm, "rtn(bits=4,group=32)", tmp_path / "o", calib, "--pack")[0] == 0
    line = ("bench", tmp_path / "o", "--against", tiny_lm, "--prompt", 4, "--new", 2, "-o", tmp_path / "rows.jsonl")
    code, out, err = run(capsys, *line, "--json")
    result = json.loads(out)
    assert code == 0 and err == "" and result["machine"]["cpu"] and result["rss_bytes"] > 0
    plain, ours = result["before"], result["after"]
    whole = sum(t.numel() for t in weights(tiny_lm).values())  # the table is the head too: all of it is read
    assert plain["runners"]["torch"]["weight_bytes"] == whole * 4 and plain["bytes"] == Checkpoint.open(tiny_lm).weight_bytes
    assert ours["recipe"].startswith("rtn") and plain["recipe"] == "dense"
    assert {k: r["dtype"] for k, r in ours["runners"].items()} == {"torch": "float32", **({"trimtab": "int8"} if native.core() else {})}
    assert all(side["dtype"] == side["runners"][side["runner"]]["dtype"] for side in (plain, ours))
    for side in (plain, ours):
        assert all(low <= side[k] <= high for k, (low, high) in side["quartiles"].items()) and side["resident_bytes"] >= 0
    if native.core():
        packed_bytes = sum(p.nbytes for p in packed.open(tmp_path / "o").linears.values())
        assert ours["runners"]["trimtab"]["weight_bytes"] == packed_bytes
        share = ours["decode_tok_s"] * ours["weight_bytes"] / result["read_gb_s"] / 1e9
        assert ours["share_of_read_bandwidth"] == pytest.approx(share, rel=1e-2)
        assert set(result["peak_gflop_s"]) == {"f32", "bf16", "i8"} and min(result["peak_gflop_s"].values()) > 0
    rows = [json.loads(x) for x in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(r["model"], r["metric"]) for r in rows] == [(n, m) for n in ("tiny", "o") for m in ("decode_tok_s", "prefill_tok_s")]
    assert [r["dtype"] for r in rows] == [side["dtype"] for side in (plain, ours) for _ in range(2)]
    assert all({"recipe", "setting", "value", "seed", "methods", "quartiles", "machine", "read_gb_s"} <= set(r) for r in rows)
    code, out, _ = run(capsys, *line[:2], "--prompt", 4, "--new", 2)
    assert code == 0 and "decode tokens/s" in out and "resident" in out and result["machine"]["cpu"] in out
    code, _, err = run(capsys, *line[:2], "-o", tmp_path / "gone" / "rows.jsonl")
    assert code == 2 and "is no folder; give --out a .jsonl file in one that exists" in err and err.count("\n") == 1


# ---- what is refused --------------------------------------------------------------------------
@pytest.mark.parametrize("recipe, more, told", [
    ("wanda", ("--head", "int8"), "give --pack with it"),
    ("wanda", ("--pack-dtype", "float32"), "give --pack with it"),
    ("wanda", ("--pack", "coo"), "no method 'format/coo'"),
    ("row | magnitude", ("--pack", "nm"), "keeps .* entries; use the unit of that name"),
    ("rtn", ("--pack", "bitmask"), "holds no codes"),
    ("block(b=32) | magnitude ; rtn(bits=4,group=16)", ("--pack",), "want groups of 32 inputs, not 16"),
    ("block(b=32) | magnitude ; rtn(bits=4,group=16)", (), "want groups of 32 inputs, not 16"),
    ("mlp: block(rows=32,cols=1) | magnitude ; mlp: rtn(bits=8,group=16)", ("--pack",), "quantise with group=0"),
    ("rtn ; row | magnitude", (), "would leave its grid"),
    ("rtn(bits=5)", (), "8, 4, 3, 2 bits, not 5"), ("rtn(grid=nf,bits=5)", (), "8, 4, 3 or 2 bits"),
    ("fp(exponent=7) | gptq", (), "not 4 and 7"),
    ("wanda ; sign", (), "zero is no value of grid/sign, and a pass before it drops weights"),
    ("rtn(clip=most)", (), "max, mse, percentile, entropy"),
    ("rtn(grid=oct)", (), "unknown grid 'oct'; known"), ("int | mask", (), "no score is named"),
    ("gptq | obs", (), "repair/obs would leave the codes of gptq; bias, clip"),
    ("int | sparsegpt", (), "sparsegpt rounds to no grid, and grid/int is named"),
    ("int | rtn(grid=nf)", (), "in a pipeline the grid is a step"),
    ("row | wanda | awq", (), "awq wants a grid to try"),
    ("ternary(group=32)", (), "in groups of whole words, not of 32 inputs"),
    ("rtn(grid=ternary,asymmetric=true)", (), "rtn has no knob 'asymmetric'"),
    ("ternary", ("--pack", "bsr"), "holds no codes of type t"),
    ("rtn", ("--keep", "0.5"), "fixes its own share"),
    ("svd(rank=33)", (), "a rank is 1 to 32 here .* not 33"),
    ("svd(rank=-1)", ("--pack",), "a rank is 1 to 32 here .* not -1"),
    ("*.k: svd(rank=17)", (), r"0.attn.k \[16, 32\]: a rank is 1 to 16"),
    ("svd(rank=8)", ("--keep", "0.5"), "fixes its own share"),
    ("ranks | svd(rank=8)", (), "ranks chooses the ranks of factors, and edit/svd.* fixes its own"),
    ("ranks | wanda", (), "ranks chooses the ranks of factors, and edit/mask leaves none"),
    ("ranks | svdllm", ("--keep", "1%"), "less than factors of the least rank take, 0.[0-9]+; keep more"),
    ("svd ; rtn", ("--pack",), "edit/svd leaves factors, .* no pass after it keeps; give it sites of its own"),
    ("svd ; mlp: row | wanda", (), "0.mlp.* leaves factors"),
    ("row | wanda ; svd", (), "leaves factors, which hold nothing of the passes before it"),
    ("svd ; svd", (), "leaves factors"),
    ("rtn ; svd", (), "would leave its grid"),
    ("svd", ("--pack", "nm"), "use the unit of that name"),
    ("wanda", ("--pack", "lowrank"), r"holds factors alone, .*; factorise it \(svd\)"),
    ("rtn", ("--pack", "lowrank"), "holds factors alone, no codes"),
])
def test_bad_input_is_one_line_and_nothing_written(capsys, tiny_lm, tmp_path, calib, recipe, more, told):
    code, _, err = trim(capsys, tiny_lm, recipe, tmp_path / "o", calib, *more)
    assert code == 2 and re.search(told, err) and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []


def test_a_packed_directory_is_not_trimmed_again(capsys, every_format, tmp_path, calib):
    code, _, err = trim(capsys, every_format, "magnitude", tmp_path / "o", calib)
    assert code == 2 and "trim the model it was made from" in err and list(tmp_path.iterdir()) == []


def test_a_model_without_plain_layers_is_not_packed(tmp_path):
    save_file({"input_ids": torch.arange(20).view(2, 10)}, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="GPT2LMHeadModel has no plain linear layer"):
        api.trim(tiny.save("gpt2", tmp_path / "a"), "dense", tmp_path / "b", pack="recipe", fresh=False,
                 text=(str(tmp_path / "x.safetensors"),))


def test_float16_is_rounded_with_a_word_or_kept_in_float32(tmp_path):
    save_file({"input_ids": torch.arange(3, 23).view(2, 10)}, tmp_path / "x.safetensors")
    model = tiny.save("llama", tmp_path / "a", dtype=torch.float16)
    how = {"speed": False, "fresh": False, "seq_len": 10, "text": (str(tmp_path / "x.safetensors"),), "pack": "recipe"}
    told = api.trim(model, "row | magnitude", tmp_path / "b", **how)["warnings"]
    assert any("float16 weights are rounded to bfloat16" in t for t in told)
    assert packed.open(tmp_path / "b").linears[UP].type == "bf16"
    told = api.trim(model, "dense", tmp_path / "c", pack_dtype="float32", **how)["warnings"]
    assert not told and torch.equal(weights(tmp_path / "c")[f"{UP}.weight"], weights(model)[f"{UP}.weight"].float())


def changed(whole: Path, to: Path, **about: object) -> Path:
    shutil.copytree(whole, to)
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"] |= about
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_what_is_newer_not_packed_or_not_what_was_written_is_refused(every_format, tiny_lm, tmp_path):
    with pytest.raises(BadInput, match=r"packed by a newer trimtab \(layout 3; this one reads 2\); update trimtab"):
        packed.open(changed(every_format, tmp_path / "new", version=3))
    with pytest.raises(BadInput, match=r"old was packed by an older trimtab \(layout 1; this one reads 2\); pack it again"):
        packed.open(changed(every_format, tmp_path / "old", version=1))
    for k, about in enumerate(({"version": "1"}, {"linears": []}, {"linears": {}})):
        with pytest.raises(BadInput, match=r"corrupt|belongs to no packed layer"):
            packed.open(changed(every_format, tmp_path / f"odd{k}", **about))
    with pytest.raises(BadInput, match="is not packed"):
        packed.open(tiny_lm)
    shutil.copytree(every_format, tmp_path / "flipped")
    file = tmp_path / "flipped" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[SafeFile(file).entries["model.layers.0.mlp.down_proj.packed_values"].begin + 5] ^= 1
    file.write_bytes(raw)
    packed.open(tmp_path / "flipped")
    with pytest.raises(BadInput, match="its hash differs"):
        packed.open(tmp_path / "flipped", verify=True)


def test_factors_that_do_not_meet_are_refused(every_format, tmp_path):
    about = json.loads((every_format / "config.json").read_text())["quantization_config"]["linears"]
    name = "model.layers.2.self_attn.o_proj"
    whole = about[name]
    right, left = whole["factors"]
    assert (whole["shape"], right["shape"], left["shape"]) == ([32, 32], [8, 32], [32, 8])
    odd = [[], [right], [right, left, left], [left, right], [right, None], None, 5, [right, {**left, "shape": [32, 9]}],
           [{**right, "shape": [9, 32], "cols": 32}, left], [right, {**left, "shape": [64, 8]}], [right, {**left, "type": "bf16"}],
           [{**right, "format": "bitmask"}, left], [right, {**left, "format": "lowrank", "factors": [right, left]}],
           [right, {k: v for k, v in left.items() if k != "cols"}], [{**right, "rows": 16}, left], [right, {**left, "shape": 5}]]
    said = [{**whole, "factors": f} for f in odd]
    said += [{**whole, "shape": [32, 64]}, {**whole, "type": "bf16"}, {**whole, "format": "dense", "cols": 32},
             {k: v for k, v in whole.items() if k != "factors"}]
    for k, wrong in enumerate(said):
        at = changed(every_format, tmp_path / str(k), linears={**about, name: wrong})
        for use in (packed.open, lambda p: list(api.load(p).generate("w3", 1)), lambda p: Checkpoint.open(p).read(f"{name}.weight")):
            with pytest.raises(BadInput, match=f"packed layer {name}") as e:
                use(at)
            assert "\n" not in str(e.value), wrong
    at = changed(every_format, tmp_path / "swapped", linears={**about, "model.layers.2.self_attn.v_proj": whole})
    with pytest.raises(BadInput, match=r"v_proj .*is not stored as its config.json says"):
        packed.open(at)


def flipped(whole: Path, to: Path, file: str, at: int) -> Path:
    shutil.copytree(whole, to, dirs_exist_ok=True)
    raw = bytearray((whole / file).read_bytes())
    raw[at] ^= 1
    (to / file).write_bytes(raw)
    return to


@pytest.mark.parametrize("sharded", [False, True])
def test_every_flipped_byte_is_seen(every_format, tmp_path, sharded):
    whole = fuzz.in_shards(every_format, tmp_path / "shards") if sharded else every_format
    packed.open(whole, verify=True)
    rng, weights = random.Random(0), sorted(whole.glob("*.safetensors"))
    table = next(e for f in weights for n, e in SafeFile(f).entries.items() if n == "model.embed_tokens.weight")
    places = [(f.name, rng.randrange(f.stat().st_size)) for f in weights for _ in range(8)] + [(table.file.name, table.begin + 5)]
    for name in ("decoder.json", *(["model.safetensors.index.json"] if sharded else [])):
        places += [(name, rng.randrange((whole / name).stat().st_size)) for _ in range(8)]
    config = (whole / "config.json").read_text()
    places += [("config.json", config.index(text) + len(text) - 1) for text in ('"rms_norm_eps": 1', '"group": 3')]
    for k, (name, at) in enumerate(places):
        with pytest.raises(BadInput, match=str(tmp_path)) as e:
            packed.open(flipped(whole, tmp_path / str(k), name, at), verify=True)
        assert len(str(e.value).splitlines()) == 1
    packed.open(flipped(whole, tmp_path / "table", table.file.name, table.begin + 5))  # what is large is left to --verify


def test_what_says_where_the_rest_lies_is_compared_on_every_load(every_format, tmp_path):
    with pytest.raises(BadInput, match=r"decoder\.json is not what was written \(its hash differs\); fetch it again"):
        packed.open(flipped(every_format, tmp_path / "a", "decoder.json", 40))
    file = SafeFile(every_format / "model.safetensors")
    linears = packed.open(every_format).linears
    indices = {f"{n}.packed_{k}": t for n, p in linears.items() for k, t in p.buffers.items() if k in ("pointers", "windows", "columns")}
    assert {linears[n.rpartition(".packed_")[0]].format for n in indices} == {"bsr", "sell"}
    for k, name in enumerate(n for n, t in indices.items() if t.dtype != torch.uint8 and t.nbytes):
        with pytest.raises(BadInput, match=rf"{name} .* is not what was written"):
            packed.open(flipped(every_format, tmp_path / str(k), "model.safetensors", file.entries[name].begin))
    with pytest.raises(BadInput, match=r"config\.json does not say what its files hash to; pack or fetch it again"):
        packed.open(changed(every_format, tmp_path / "none", sha256=None))


def test_inspect_verifies_what_is_packed(capsys, tiny_lm, tmp_path, calib):
    assert trim(capsys, tiny_lm, "rtn(bits=4,group=32)", tmp_path / "o", calib, "--pack")[0] == 0
    look = ("inspect", tmp_path / "o", "--verify", "-q", "--samples", 2, "--seq-len", 32)
    code, out, _ = run(capsys, *look)
    assert code == 0 and "verified: 52 tensors and what describes them are what was written" in out
    # values and scales of 3 x 7 layers and the head; the table and 7 norms
    assert json.loads(run(capsys, *look, "--json")[1])["verified"] == 52
    file = tmp_path / "o" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[SafeFile(file).entries[f"{UP}.packed_values"].begin + 5] ^= 1
    file.write_bytes(raw)
    code, out, err = run(capsys, *look)
    assert (code, out, err.count("\n")) == (2, "", 1) and f"{UP}.packed_values" in err and "its hash differs); fetch it again" in err
    code, _, err = run(capsys, "inspect", tiny_lm, *look[2:])
    assert code == 2 and "is not packed; write it with trimtab trim ... --pack" in err and err.count("\n") == 1


@pytest.mark.parametrize("command", [("generate", "x"), ("bench",), ("eval",), ("inspect",), ("trim", "magnitude", "-o", "OUT")])
def test_a_newer_directory_is_one_line_everywhere(capsys, every_format, tmp_path, command):
    new = changed(every_format, tmp_path / "new", version=3)
    name, *more = command
    code, out, err = run(capsys, name, new, *(tmp_path / "o" if m == "OUT" else m for m in more))
    assert (code, out, err.count("\n")) == (2, "", 1) and "newer trimtab (layout 3; this one reads 2); update trimtab" in err
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial").exists()
    with pytest.raises(BadInput, match="update trimtab"):
        api.load(new)


@pytest.mark.parametrize(("recipe", "tensor"), [("dense", f"{UP}.packed_values"), ("rtn(bits=4,group=32)", f"{UP}.packed_scales"),
                                                ("dense", "model.norm.weight"), ("dense", "model.embed_tokens.weight")])
def test_nan_in_a_packed_directory_is_named(capsys, tiny_lm, tmp_path, calib, recipe, tensor, monkeypatch):
    assert trim(capsys, tiny_lm, recipe, tmp_path / "o", calib, "--pack")[0] == 0
    file = tmp_path / "o" / "model.safetensors"
    raw, at = bytearray(file.read_bytes()), SafeFile(file).entries[tensor].begin
    raw[at:at + 4] = b"\xff\x7f\xff\x7f"  # in float16 and bfloat16
    file.write_bytes(raw)
    for command, *more in (("generate", "x"), ("bench", "--new", 2, "--prompt", 4), ("eval", "--text", calib)):
        code, out, err = run(capsys, command, tmp_path / "o", *more)
        assert (code, out, err.count("\n")) == (2, "", 1) and "NaN or inf; only finite weights can be" in err, (command, err)
        assert tensor.removesuffix(".weight").replace("packed_", "") in err.replace("packed_", "")
    monkeypatch.setattr(native, "core", lambda: None)
    with pytest.warns(native.RunsInTorch, match="not built") as said:
        code, _, err = run(capsys, "generate", tmp_path / "o", "x")
    assert code == 2 and "only finite weights can be run" in err and len({str(w.message) for w in said}) == 1


def test_what_no_kernel_takes_runs_in_torch_with_one_warning(capsys, tiny_lm, tmp_path, calib):
    with pytest.warns(native.RunsInTorch):
        code, out, err = trim(capsys, tiny_lm, "nm(n=8,m=16) | magnitude", tmp_path / "o", calib, "--pack", "--json")
    told = "no kernel here takes nm bf16 (8:16 along the input): it saves bytes, not time, and runs in torch"
    if native.core() is None:
        told = f"{native.NONE}; {native.SLOWLY}"
    assert code == 0 and told in json.loads(out)["warnings"], err  # in the proof, which others read too
    line = [sys.executable, "-m", "trimtab.cli", "generate", str(tmp_path / "o"), "def f(", "--max-new-tokens", "3"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == f"trimtab: warning: {told}\n" and done.stdout
    with pytest.warns(native.RunsInTorch, match="not time|not built"):
        module = load_module(tmp_path / "o")
    with pytest.warns(native.RunsInTorch, match="not time|not built"):
        handle = api.load(tmp_path / "o")
        ids = list(handle.generate("def f(", 3, return_ids=True))
    prompt = handle.tokenizer("def f(", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = module(torch.cat([prompt, torch.tensor([ids])], 1)).logits[0].argmax(-1)
    assert want[prompt.shape[1] - 1:-1].tolist() == ids


@pytest.mark.skipif(not native.core(), reason="the native kernels were not built")
def test_the_decoder_itself_refuses_what_no_kernel_takes(capsys, tiny_lm, tmp_path, calib):
    with pytest.warns(native.RunsInTorch):
        assert trim(capsys, tiny_lm, "nm(n=8,m=16) | magnitude", tmp_path / "o", calib, "--pack")[0] == 0
    with pytest.raises(NoKernel, match=r"q_proj: no kernel here takes nm bf16 \(8:16 along the input\), .* with transformers"):
        open_decoder(tmp_path / "o")


@pytest.mark.parametrize(("line", "told"), [
    (("generate", ""), "the prompt is empty"), (("generate", "x " * 200), "tokens, the model takes at most 128; give a shorter one"),
    (("bench", "--batch", 0), "argument --batch: '0' is not a whole number above 0"),
    (("bench", "--prompt", 120, "--new", 20), "--prompt 120 and --new 20 take 140 positions, .* has 128; give fewer"),
])
def test_bad_input_of_a_packed_directory_is_one_line(capsys, tiny_lm, tmp_path, calib, line, told):
    assert trim(capsys, tiny_lm, "rtn", tmp_path / "o", calib, "--pack")[0] == 0
    try:
        code, out, err = run(capsys, line[0], tmp_path / "o", *line[1:])
    except SystemExit as e:
        code, (out, err) = e.code, capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1) and re.search(told, err), err


def test_transformers_is_told_too(every_format, tmp_path):
    from transformers import AutoModelForCausalLM

    with pytest.raises(BadInput, match="newer trimtab"):
        AutoModelForCausalLM.from_pretrained(changed(every_format, tmp_path / "new", version=3))
    config = json.loads((every_format / "config.json").read_text())
    other = changed(every_format, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(BadInput, match="no linear layer of"):
        AutoModelForCausalLM.from_pretrained(other)


def test_broken_directories_are_refused_or_compute_what_they_say(every_format, tmp_path):
    fast = fuzz.sample(tmp_path, fuzz.RECIPE.replace(fuzz.SLOW, fuzz.FAST))
    seen = fuzz.fuzz([every_format, fast, fuzz.in_shards(fast, tmp_path / "shards")], 300, 1, tmp_path)
    assert sum(n for what, n in seen.items() if what.endswith("refused")) > 100
    assert sum(n for what, n in seen.items() if what.endswith("ran")) > 20


def test_parts_that_are_not_the_weight_are_a_failure(capsys, tiny_lm, tmp_path, calib, monkeypatch):
    change = Codes.change
    monkeypatch.setattr(Codes, "change", lambda self, mask=None: replace(change(self, mask), w=self.weight() * 2))
    code, _, err = trim(capsys, tiny_lm, "rtn", tmp_path / "o", calib)
    assert code == 1 and "parts that do not decode to its weight" in err and not (tmp_path / "o").exists()
    product = Factors.change
    monkeypatch.setattr(Factors, "change", lambda self: replace(product(self), w=self.weight() * 2))
    code, _, err = trim(capsys, tiny_lm, "svd", tmp_path / "p", calib)
    assert code == 1 and "parts that do not decode to its weight" in err and not (tmp_path / "p").exists()


def test_a_dry_run_names_the_ranks(capsys, tiny_lm, tmp_path, calib):
    code, out, err = trim(capsys, tiny_lm, "mlp: svd", tmp_path / "o", calib, "--dry-run", "--keep", "0.5", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["ranks"] == dict.fromkeys(("0.mlp.down", "0.mlp.gate", "0.mlp.up"), 10)  # 0.5 * 32 * 64 / 96
    assert result["factored_share"] == 10 * 96 / (32 * 64) and list(tmp_path.iterdir()) == []


# ---- the decoder ------------------------------------------------------------------------------
@pytest.mark.skipif(not native.core(), reason="the native kernels were not built")
@pytest.mark.parametrize("recipe, more, narrowest", [
    ("dense", ("--pack-dtype", "float32"), "f32"), ("dense", (), "bf16"), ("rtn(bits=4,group=32)", (), "i8"),
    (COLUMNS, ("--keep", "40%"), "bf16"), (COLUMNS + " ; *.gate,*.up: rtn(bits=8,group=0) ; *.down: rtn(bits=8,group=32)", (), "i8"),


    ("svd", ("--pack-dtype", "float32", "--keep", "80%"), "f32"), ("svd(rank=12)", (), "bf16"), ("mlp: svd ; attn: rtn(bits=8)", (), "i8"),
    ("ternary", (), "i8"), ("magnitude ; rtn(bits=8,group=32)", ("--pack", "bitmask"), "i8"),
    ("mlp: magnitude(unit=2:4)", ("--head", "keep"), "bf16"),  # attention and a tied head are outside the recipe's scope
])
def test_the_decoder_says_what_transformers_says(capsys, tiny_lm, tmp_path, calib, recipe, more, narrowest):
    code, _, err = trim(capsys, tiny_lm, recipe, tmp_path / "o", calib, "--pack", *more)
    assert code == 0, err
    decoder, ids = open_decoder(tmp_path / "o"), torch.arange(3, 40)
    assert decoder.narrowest == narrowest
    module = load_module(tmp_path / "o", torch.float32, False)
    for m in module.modules():
        if isinstance(m, PackedLinear):
            m.narrowest = ""
    with torch.no_grad():
        want = module(ids[None]).logits[0].float()
    assert float((decoder.logits(ids, narrowest="f32") - want).abs().max()) < 1e-4 * float(want.abs().max())
    assert float((decoder.logits(ids) - want).norm() / want.norm()) < 0.03  # as it is run: x rounded where that pays
    exact = open_decoder(tmp_path / "o", "float32")
    assert exact.narrowest == "f32"
    code, out, err = run(capsys, "generate", tmp_path / "o", "def f(x):", "--max-new-tokens", "3", "--json")
    assert code == 0 and json.loads(out)["text"] is not None, err


@pytest.mark.skipif(not native.core(), reason="the native kernels were not built")
def test_a_packed_layer_of_codes_rounds_x_as_the_decoder_does():
    layer = PackedLinear(dense(nearest(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), 4, 32).change()))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), layer.linear(x, narrowest="i8")) and not torch.equal(layer(x), layer.linear(x))


@pytest.mark.skipif(not native.core(), reason="the native kernels were not built")
def test_a_damaged_description_is_one_line(capsys, tiny_lm, tmp_path, calib):
    out = tmp_path / "o"
    assert trim(capsys, tiny_lm, "dense", out, calib, "--pack")[0] == 0
    whole = json.loads((out / "decoder.json").read_text())
    for broken in ("{", "[]", json.dumps(whole | {"version": 99}), json.dumps({k: v for k, v in whole.items() if k != "layers"}),
                   json.dumps(whole | {"head": ["lm_head", "nothing"]}), json.dumps(whole | {"embedding": "nothing"}),
                   "[" * 100_000, json.dumps(whole).replace('"lm_head"', "[" * 900 + "]" * 900)):
        (out / "decoder.json").write_text(broken)
        code, _, err = run(capsys, "generate", out, "def f(x):")
        assert code == 2 and "decoder.json is not what was written (its hash differs)" in err and err.count("\n") == 1
        fuzz.seal(out, "decoder.json")
        code, _, err = run(capsys, "generate", out, "def f(x):")
        assert code == 2 and len(err.strip().splitlines()) == 1 and "hash" not in err, (broken[:40], err)
        assert run(capsys, "bench", out, "--prompt", 4, "--new", 2)[::2] == (code, err)
    (out / "decoder.json").unlink()
    with pytest.raises(BadInput, match=r"decoder\.json"):
        open_decoder(out)
    assert run(capsys, "generate", out, "def f(x):", "--max-new-tokens", "2")[0] == 0  # in torch


def test_a_decoder_of_another_dtype_is_one_line(every_format, tiny_lm):
    for path in (every_format, tiny_lm):
        with pytest.raises(BadInput, match="dtype 'float16' is not one of float32, bfloat16"):
            open_decoder(path, "float16")


@pytest.mark.skipif(not native.core(), reason="the native kernels were not built")
def test_too_many_threads_are_bad_input():
    linear = native.Linear(dense(Change(torch.ones(32, 64))))
    for wrong in ({"threads": 2000}, {"threads": -1}, {"kernel": "linear_f32_dense-f32_abacus"}, {"narrowest": "i4"}):
        with pytest.raises(BadInput):
            linear(torch.ones(64), **wrong)
    mlp = native.Mlp(None, linear, native.Linear(dense(Change(torch.ones(64, 32)))), "relu")
    with pytest.raises(BadInput):
        mlp(torch.ones(64), threads=2000)


class Unloadable:
    """Finds the extension first, and that it does not load."""

    def find_spec(self, name, *_):
        if name == "_trimtab_kernels":
            raise ImportError("libc is too\nold")


@pytest.mark.parametrize(("found", "told"), [
    (None, "the native kernels were not built (no C++ compiler"),
    (SimpleNamespace(VERSION="0.0.1"), "were built for trimtab 0.0.1, this is"),
    (Unloadable(), "were built and do not load here (libc is too old)")])
def test_why_there_are_no_kernels_is_said(monkeypatch, found, told):
    if isinstance(found, Unloadable):
        monkeypatch.delitem(sys.modules, "_trimtab_kernels", raising=False)
        monkeypatch.setattr(sys, "meta_path", [found, *sys.meta_path])
    else:
        monkeypatch.setitem(sys.modules, "_trimtab_kernels", found)
    native._found.cache_clear()
    try:
        assert native.core() is None and told in native.absent() and "install trimtab again" in native.absent()
        with pytest.warns(native.RunsInTorch) as said:
            native.Linear(dense(Change(torch.ones(32, 64))))
        assert told in str(said[0].message) and "slowly" in str(said[0].message) and "\n" not in str(said[0].message)
    finally:
        native._found.cache_clear()
