"""Weights that are more than one matrix of codes: in a basis of their own, with a product beside them, with weights spared."""
from __future__ import annotations

import json

import pytest
import torch

import trimtab as tt
from trimtab import cli
from trimtab.core.types import BadInput
from trimtab.methods.composite import based, summed
from trimtab.methods.terms import Terms
from trimtab.network.checkpoint import Checkpoint, SafeFile
from trimtab.runtime import layouts, packed
from trimtab.runtime.decoder import open_decoder

FAST = ["--samples", "4", "--seq-len", "32", "--proof-tokens", "64", "--no-speed", "-q"]
MADE = {
    "incoherent | int(bits=4,group=32) | gptq": "dense i4",
    "hadamard | nf(bits=4,group=32) | rtn": "dense l4",
    "int(bits=4,group=32) | rtn | lorc(rank=4)": "dense i4 + lowrank",
    "incoherent | int(bits=3,group=32) | gptq | lorc(rank=4,whiten=true)": "dense i3 + lowrank",
    "site | spike | spare(keep=0.5%) ; int(bits=4,group=32) | gptq": "dense i4 + sell",
    "site | magnitude | spare(keep=2%,single=4) ; int(bits=4,group=32) | gptq | greedy | gain": "dense i4 + sell",
    "inputs | peak | spare(keep=0.2,bits=8) ; sign(group=0) | rtn": "dense l1 + dense i8",
    "inputs | peak | spare(keep=0.2,bits=4) ; hadamard | int(bits=4,group=0) | gptq | lorc(rank=2)": "dense i4 + lowrank + dense i4",
    "ptq161": "dense l1 + lowrank + dense i4",
    "onebit": "dense l1",
    "int(bits=3,group=32) | adadim(feedback=true)": "",
    "nf(bits=4,group=32) | adadim": "",
    "vptq(residual=1,iters=2)": "book",
    "incoherent | vptq(vector=2,bits=3,iters=2)": "book",
    "inputs | peak | spare(keep=0.2,bits=8) ; hadamard | vptq(iters=2)": "book + dense i8",
}


pytestmark = pytest.mark.usefixtures("proof_in_this_process")


def trim(capsys, model, recipe, out, calib, *more: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in ("trim", model, recipe, "-o", out, "--calib", calib, "--text", calib, *FAST, "--json", *more)])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(("recipe", "label"), MADE.items())
@pytest.mark.filterwarnings("ignore:no kernel here takes")
def test_plain_and_packed_are_one_model(capsys, tiny_lm, tmp_path, calib, recipe, label):
    """The tensors, the parts, the packed layers and the decoder all say the same."""
    for name, more in (("plain", []), ("packed", ["--pack", "--head", "keep"])):
        code, _, err = trim(capsys, tiny_lm, recipe, tmp_path / name, calib, *more)
        assert code == 0, err
    labels = set(json.loads((tmp_path / "packed" / "trimtab.json").read_text())["formats"].values())
    assert labels == {label} if label else any(" + " in x for x in labels)  # groups of outputs: a map each
    plain = Checkpoint.open(tmp_path / "plain")
    parts = SafeFile(tmp_path / "plain" / "trimtab.safetensors")
    linears = packed.open(tmp_path / "packed", verify=True).linears
    for site, module in (("attn.q", "self_attn.q_proj"), ("mlp.down", "mlp.down_proj")):
        name = f"model.layers.1.{module}"
        mine = {n.rpartition(":")[2]: parts.read(n) for n in parts.names if n.startswith(f"1.{site}:")}
        w = Terms.among(mine).weight()
        assert torch.equal(w.bfloat16(), plain.read(f"{name}.weight"))
        torch.testing.assert_close(layouts.restored(linears[name]), w, rtol=1e-5, atol=1e-6)
    ids = torch.arange(5, 30)
    want = tt.load(tmp_path / "plain").module(ids[None]).logits[0].detach()
    size = float(want.std())
    assert float((open_decoder(tmp_path / "packed", "float32").logits(ids) - want).abs().max()) < 0.05 * size
    ours = tt.load(tmp_path / "packed").module(ids[None]).logits[0].detach()  # in transformers, x in eight bits
    assert float((ours - want).abs().max()) < 0.5 * size
    assert "".join(tt.load(tmp_path / "packed").generate("a", max_new_tokens=3)) is not None


@pytest.mark.parametrize(("recipe", "message"), [
    ("hadamard | wanda", "stays in another basis as codes or factors"),
    ("row | wanda ; hadamard | int(bits=4,group=32) | gptq", "would bring back weights"),
    ("row | wanda ; int(bits=4,group=32) | rtn | lorc", "would bring back weights"),
    ("site | spike | spare(keep=1%) ; sign(group=0) | rtn", "zero is no value"),
    ("site | spike | spare ; int(bits=4,group=32) | rtn", "say how much"),
    ("site | spike | spare(keep=1%) ; row | wanda", "which rounds to codes"),
    ("site | spike | spare(keep=1%) ; inputs | peak | spare(keep=1%) ; rtn(group=32)", "spare once"),
    ("hadamard | awq | int(group=32) | rtn", "both decide rewrite"),
    ("incoherent | int(bits=4,group=32) | rtn | obs", "would leave the codes"),
    ("int(group=32) | rtn | lorc | greedy", "would leave the factors of lorc; put it in front of lorc"),
    ("int(group=32) | rtn | clip | gain | clip", "both decide repair/clip"),
    ("int(group=32) | rtn | bias", "repair/bias changes biases, and 0.attn.q, 0.attn.k, 0.attn.v, ... have none; leave it out"),
    ("site | magnitude | spare(keep=2%,single=5) ; rtn(group=32)", "codes have"),
    ("hadamard | onebit", "a basis of its own"),
    ("int(group=32) | gptq | lorc(rank=0)", "a rank is 1 to"),
    ("row | wanda ; vptq", "zero is no value"),
    ("vptq ; *.down: int(group=32) | rtn", "would leave its grid"),
    ("vptq | lorc", "would leave the books"),
    ("vptq(vector=9)", "an index has bits * vector bits, 1 to 16, not 18"),
    ("vptq(vector=0)", "an index has bits * vector bits, 1 to 16, not 0"),
    ("inputs | peak | spare(keep=0.2,bits=5) ; rtn(group=32)", "codes have"),
])
def test_what_does_not_fit_is_refused(capsys, tiny_lm, tmp_path, calib, recipe, message):
    code, _, err = trim(capsys, tiny_lm, recipe, tmp_path / "o", calib)
    assert code == 2 and message in err, err
    assert not list(tmp_path.iterdir())


def test_maps_of_maps_that_contradict_each_other_are_refused(capsys, tiny_lm, tmp_path, calib):
    recipe = "inputs | peak | spare(keep=0.2,bits=4) ; hadamard | int(bits=4,group=0) | rtn | lorc(rank=2)"
    assert trim(capsys, tiny_lm, recipe, tmp_path / "o", calib, "--pack")[0] == 0
    p = packed.open(tmp_path / "o").linears["model.layers.0.mlp.down_proj"]
    layouts.check(p)
    first, second = p.factors
    inner, taken = first.factors[0], first.buffers["taken"]
    wrong = [
        summed(first, based(second.factors[0], p.shape[1], second.buffers["taken"].flip(0))),   # not rising
        summed(first, based(second.factors[0], p.shape[1], second.buffers["taken"] + p.shape[1])),  # not there
        summed(first, second.factors[0]),                                                        # another shape
        based(inner, p.shape[1], taken[:-1]),                                                    # too few
        type(p)(p.format, p.shape, "i8", p.buffers, factors=p.factors),                          # another type
        type(p)(p.format, p.shape, p.type, {**p.buffers, "more": taken}, factors=p.factors),     # nobody's buffer
        type(p)("based", p.shape, p.type, p.buffers, factors=p.factors),                         # one map too many
    ]
    for q in wrong:
        with pytest.raises(BadInput, match=r".{20,}"):
            layouts.check(q)
    about = layouts.describe(p)
    assert torch.equal(layouts.restored(layouts.described("x", about, p.buffers)), layouts.restored(p))
    for bad in ({**about, "factors": about["factors"][:1]}, {**about, "factors": None}, {**about, "factors": "many"}):
        with pytest.raises(BadInput, match="corrupt"):
            layouts.described("x", bad, p.buffers)
