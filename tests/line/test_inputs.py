"""Inputs that are rounded where they meet codes: what plain files are measured with is what packed layers do."""
from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests import tiny
from trimtab import cli
from trimtab.core.types import BadInput
from trimtab.methods.codes import integers, rounded
from trimtab.methods.format.dense import dense
from trimtab.methods.rounding import Rounding, met_rounded
from trimtab.network.checkpoint import PARTS, SafeFile, write_safetensors
from trimtab.network.stream import Network
from trimtab.prove import quality
from trimtab.runtime import layouts, native, packed
from trimtab.runtime.decoder import open_decoder

FAST = ["--samples", "4", "--seq-len", "32", "--proof-tokens", "64", "--no-speed", "-q"]
# How far what packed layers give may be from what plain ones do with rounded inputs, as a share of what rounding does: next to nothing
# but where columns that were spared, or factors, meet inputs in eight bits by groups, as the runtime has it.
RECIPES = {
    "int(bits=8,group=0) | rtn | token(act_bits=3)": 0.001,
    "int(bits=4,group=32) | gptq | static(act_bits=4)": 0.001,
    "hadamard | int(bits=4,group=32) | gptq | token(act_bits=3)": 0.001,
    "incoherent | int(bits=4,group=32) | gptq | static(act_bits=3,clip=percentile,percentile=0.99)": 0.001,
    "smooth(steps=4) | int(bits=4,group=32,asymmetric=true) | gptq | token(act_bits=3)": 0.001,
    "channelwise(clip=mse) | int(bits=3,group=32) | rtn | static(act_bits=3,clip=max)": 0.001,
    "nm(n=2,m=4) | magnitude ; int(bits=4,group=32) | rtn | token(act_bits=3)": 0.001,
    "int(bits=4,group=32) | rtn | lorc(rank=4) | token(act_bits=3)": 0.05,
    "inputs | peak | spare(keep=0.2,bits=8) ; int(bits=8,group=0) | rtn | token(act_bits=3)": 0.1,
    "attn: int(bits=8,group=0) | rtn | token(act_bits=3) ; mlp: int(bits=4,group=32) | rtn": 0.05,
}


@pytest.fixture(scope="module")
def wide_lm(tiny_lm, tmp_path_factory):
    """The tiny model in float32: where files hold bfloat16, steps are not the same to the bit in both."""
    path = tmp_path_factory.mktemp("models") / "wide"
    transformers.LlamaForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_lm / name, path / name)
    return path


pytestmark = pytest.mark.usefixtures("proof_in_this_process")


def trim(capsys, model, recipe, out, calib, *more: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in ("trim", model, recipe, "-o", out, "--calib", calib, "--text", calib, *FAST, "--json", *more)])
    return code, *capsys.readouterr()


def apart(tmp_path, ids, *dirs) -> float:
    """How far the second model's predictions are from the first one's, by Kullback and Leibler."""
    nets = [Network.open(d) for d in dirs]
    return quality.compare(*nets, [{"input_ids": ids[None]}], None, tmp_path, None)["kl"]


@pytest.mark.parametrize(("recipe", "room"), RECIPES.items())
def test_plain_and_packed_round_alike(capsys, wide_lm, tmp_path, calib, recipe, room):
    without = re.sub(r" \| (token|static)\([^)]*\)", "", recipe)
    without = re.sub(r"^(smooth|channelwise)\([^)]*\) \| ", "", without)
    for name, text, more in (("plain", recipe, []), ("packed", recipe, ["--pack", "--head", "keep"]), ("without", without, [])):
        code, out, err = trim(capsys, wide_lm, text, tmp_path / name, calib, *more)
        assert code == 0, err
        if name == "plain":
            assert any("plain transformers runs the files without" in line for line in json.loads(out)["warnings"])
    ids = torch.arange(5, 40)
    does = apart(tmp_path, ids, tmp_path / "without", tmp_path / "plain")
    assert does > 1e-5  # it is no small thing
    assert apart(tmp_path, ids, tmp_path / "plain", tmp_path / "packed") < room * does
    assert any(" x a" in label for label in json.loads((tmp_path / "packed" / "trimtab.json").read_text())["formats"].values())
    linears = packed.open(tmp_path / "packed", verify=True).linears
    for name, p in linears.items():
        assert str(layouts.described(name, layouts.describe(p), p.buffers)) == str(p)
    whole = Network.open(tmp_path / "plain")
    want = whole_logits(whole, ids)
    got = open_decoder(tmp_path / "packed", "float32").logits(ids)
    assert float((got - want).abs().max()) < 0.05 * float(want.std())


def whole_logits(net: Network, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary], block by block with rounded inputs."""
    batch = {"input_ids": ids[None]}
    with torch.no_grad():
        hidden, context = net.embed(batch)
        for i in range(net.n_blocks):
            module = net.block(i)
            net.as_said(module, i, net.said(i))
            hidden = net.run(module, i, hidden, context)
        return net.finish(hidden, context, batch)[0]


@pytest.mark.parametrize("family", ["gpt2", "phi3", "bert"])
def test_families_that_store_weights_otherwise(capsys, family, tmp_path):
    """Transposed weights, several maps in one tensor, an encoder: what is measured moves with the bits."""
    model, seen, found = tiny.save(family, tmp_path / "model"), tmp_path / "seen.safetensors", []
    save_file(tiny.inputs(family, rows=4, length=32), seen)
    for bits in (8, 2):
        out = tmp_path / str(bits)
        code, said, err = trim(capsys, model, f"int(bits=8,group=0) | rtn | token(act_bits={bits})", out, seen)
        assert code == 0, err
        found.append(json.loads(said)["recovery"])
    assert found[1] < found[0] - 1e-4


@pytest.mark.parametrize("rounding", ["rtn", "gptq | bias"])
def test_inputs_behind_norms_with_a_bias_are_centred(capsys, tmp_path, rounding):
    """Biases take what was taken off: in eight bits next to nothing is lost, and in four less than where inputs stay where they are."""
    model, seen, lost = tmp_path / "model", tmp_path / "seen.safetensors", {}
    save_file(tiny.inputs("opt", rows=16, length=32), seen)
    lm, gen = tiny.build("opt"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if name.endswith("layer_norm.bias") and "layers." in name:
                p.add_(4 * torch.randn(p.shape, generator=gen))
    lm.save_pretrained(model)
    for bits in (8, 4):
        for centred in (True, False):
            out = tmp_path / f"{bits}{centred}"
            code, said, err = trim(
                capsys, model, f"*.q,*.k,*.v,*.up: channelwise(centred={str(centred).lower()}) | int(bits=8,group=0) | {rounding} | "
                f"static(act_bits={bits},clip=max)", out, seen)
            assert code == 0, err
            lost[bits, centred] = abs(1 - json.loads(said)["recovery"]), json.loads(said)["kl"]
    assert lost[8, True][0] < 0.002
    assert lost[4, True][1] < 0.2 * lost[4, False][1]
    norms = [SafeFile(tmp_path / f"8{c}" / "model.safetensors") for c in (True, False)]
    (name,) = (n for n in norms[0].names if n.endswith("layers.0.fc1.bias"))
    assert not torch.equal(*(f.read(name) for f in norms))


def test_later_blocks_see_what_rounded_inputs_made(capsys, tiny_lm, tmp_path, calib):
    """Calibration goes through them, and through blocks of the journal after a stop alike."""
    weights = []
    for name, step in (("with", " | token(act_bits=2)"), ("without", "")):
        assert trim(capsys, tiny_lm, f"int(bits=4,group=32) | gptq{step}", tmp_path / name, calib)[0] == 0
        f = SafeFile(tmp_path / name / PARTS)
        weights.append({n: f.read(n) for n in f.names if n.endswith(":codes")})
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0] if n.startswith("0.attn"))
    assert not all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0] if n.startswith("1."))


@pytest.mark.parametrize(("recipe", "message"), [
    ("row | wanda | token", "wanda.* leaves none|rounds inputs where they meet codes"),
    ("svd | token", "rounds inputs where they meet codes, and svd leaves none"),
    ("vptq | token", "rounds inputs where they meet codes, and vptq leaves none"),
    ("adadim | token", "groups along the outputs"),
    ("smoothquant | int | rtn", "is made for inputs that are rounded; say how, such as token or static"),
    ("int | rtn | token | static", "both decide input"),
    ("int | rtn | token(act_bits=9)", "rounded to 2 to 8 bits, not 9"),
    ("int | rtn | static(clip=most)", "max, mse, percentile, not most"),
    ("int | rtn | static(percentile=2.0,clip=percentile)", "a percentile is a share"),
    ("channelwise(clip=most) | int | rtn | token", "max, mse, percentile, not most"),
    ("kurtail | int | awq | token", "awq"),
])
def test_what_cannot_be_rounded_is_refused(capsys, tiny_lm, tmp_path, calib, recipe, message):
    code, _, err = trim(capsys, tiny_lm, recipe, tmp_path / "out", calib)
    assert code == 2
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_longer_its_parts_are_refused(capsys, tiny_lm, tmp_path, calib):
    out = tmp_path / "out"
    assert trim(capsys, tiny_lm, "w8a8", out, calib)[0] == 0
    f = SafeFile(out / PARTS)
    parts = {n: f.read(n) for n in f.names}
    parts["0.mlp.down:scales"] = parts["0.mlp.down:scales"] * 2
    write_safetensors(out / PARTS, {n: (t.dtype, tuple(t.shape)) for n, t in parts.items()}, parts.__getitem__, dict(f.metadata))
    assert cli.main(["eval", str(out), "--text", str(calib), "--seq-len", "32"]) == 2
    assert "are not those that trimtab.safetensors was written for" in capsys.readouterr().err


# ---- kernels ----------------------------------------------------------------------------------
@pytest.mark.skipif(native.core() is None, reason="native kernels not built")
@pytest.mark.parametrize("rounding", [Rounding(8), Rounding(4), Rounding(6, torch.tensor([0.05])), Rounding(2, torch.tensor([1.5]))])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_kernels_meet_rounded_inputs(bits, rounding):
    gen = torch.Generator().manual_seed(bits)
    w = torch.randn(70, 160, generator=gen)
    codes = rounded(w, integers(w, bits, 32, asymmetric=bits == 4), 32)
    p = met_rounded(dense(codes.change()), rounding)
    linear = native.Linear(p)
    x = torch.randn(33, 160, generator=gen) * torch.logspace(-2, 1, 33)[:, None]
    x[3] = 0
    want = rounding.of(x) @ codes.weight().T
    assert len(linear.kernels) >= 3 and all("_i8_" in k for k in linear.kernels)
    for rows in (1, 2, 7, 33):
        for kernel in (*linear.kernels, ""):
            for narrowest in ("", "f32", "i8"):
                got = linear(x[:rows], kernel=kernel, narrowest=narrowest)
                assert float((got - want[:rows]).abs().max()) <= 2e-5 * float(want[:rows].abs().max()), kernel
    x[2, 5] = torch.inf
    got = linear(x[:4])
    assert bool(got[[0, 1, 3]].isfinite().all()) and bool(got[2].isnan().all() if rounding.scale is None else got[2].isnan().any())


def test_a_layout_says_how_inputs_are_rounded():
    w = torch.randn(32, 64)
    p = met_rounded(dense(rounded(w, integers(w, 8, 0), 64).change()), Rounding(8, torch.tensor([0.5])))
    assert p.label == "dense i8 x a8" and p.nbytes == dense(rounded(w, integers(w, 8, 0), 64).change()).nbytes + 4
    about = layouts.describe(p)
    for wrong in ({**about, "act_bits": 9}, {**about, "act_bits": 1}, {**about, "act_bits": "8"}, {**about, "act_bits": True}):
        with pytest.raises(BadInput, match="is corrupt"):
            layouts.described("layer", wrong, p.buffers)
    for values in ([0.0], [-1.0], [torch.nan], [1.0, 2.0]):
        t = torch.tensor(values)
        with pytest.raises(BadInput, match="is corrupt"):
            layouts.described("layer", about, {**p.buffers, "act_scale": t})
    with pytest.raises(BadInput, match="meets no codes"):
        layouts.described("layer", {k: v for k, v in about.items() if k != "act_bits"}, p.buffers)
    with pytest.raises(BadInput, match="there are none here"):
        met_rounded(p.__class__("dense", (2, 2), "f32", {}), Rounding(8))
