"""What a repair adds to biases: written, kept through later passes and a packed directory, refused where there is none."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import trimtab as tt
from tests import tiny
from trimtab import cli
from trimtab.network.stream import Network, load_module
from trimtab.runtime import packed

pytestmark = pytest.mark.usefixtures("proof_in_this_process")


def trim(model, recipe, out, *more: object) -> int:
    text = model.parent / "inputs.safetensors"
    save_file(tiny.inputs(model.name, rows=16), text)
    given = ("trim", model, recipe, "-o", out, "--calib", text, "--text", text, "--samples", "16", "--no-speed", "-q")
    return cli.main([str(a) for a in (*given, *more)])


@pytest.mark.parametrize("recipe", [
    "int(bits=2,group=0) | rtn | bias",
    "row | wanda | mask | bias ; int(bits=2,group=0) | gptq | gain | bias",
    "svd(rank=4) | bias",
])
def test_every_output_has_its_mean_again(tmp_path, recipe):
    """Of the queries, over the tokens that are no padding: what the dense ones have of the same inputs. Their biases alone make it so."""
    model = tiny.save("bert", tmp_path / "bert")
    assert trim(model, recipe, tmp_path / "o") == 0
    batch, off = tiny.inputs("bert", rows=16), []
    here = batch["attention_mask"].bool()
    module, dense = load_module(tmp_path / "o"), load_module(model)
    for block, other in zip(module.encoder.layer, dense.encoder.layer, strict=True):
        new, old = block.attention.self.query, other.attention.self.query
        new.register_forward_hook(lambda m, x, y, old=old: off.append(((y - old(x[0]))[here].mean(0), m.bias - old.bias)))
    with torch.no_grad():
        module(**batch)
    for mended, shift in off[:1 if ";" in recipe else 2]:  # behind a first pass, later blocks' inputs are another network's again
        assert float(mended.abs().max()) < 1e-5 and float((mended - shift).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "qwen2"])
def test_a_site_takes_it_in_its_own_rows(tmp_path, name):
    """Stacked ones leave their neighbours alone; what the file cannot hold is not there either."""
    net = Network.open(tiny.save(name, tmp_path / name, dtype=torch.bfloat16))
    module, sites = net.block(1), [s for s in net.sites_of(1) if net.has_bias(s)]
    want = {s.name: net.bias(module, s) for s in sites}
    assert [s.role for s in sites] == (["q", "k", "v"] if name == "qwen2" else [s.role for s in net.sites_of(1)])
    for k, s in enumerate(sites):
        delta = torch.linspace(0.1, 1, s.shape[0]) + k
        file = net.add_to_bias(module, s, delta)
        want[s.name] = (want[s.name] + delta).bfloat16().float()
        assert all(torch.equal(net.bias(module, other), want[other.name]) for other in sites)
        assert all(t.dtype == torch.bfloat16 for t in net.stored(module, 1, {file}).values())


def test_packed_and_plain_have_the_same_biases(tmp_path):
    model = tiny.save("qwen2", tmp_path / "qwen2")
    recipe = "*.q,*.k,*.v: int(bits=4,group=0) | rtn | bias"
    assert trim(model, recipe, tmp_path / "plain") == 0
    assert trim(model, recipe, tmp_path / "packed", "--pack", "--head", "keep") == 0
    name = "model.layers.1.self_attn.v_proj.bias"
    plain, before = (load_module(p).get_parameter(name) for p in (tmp_path / "plain", model))
    assert torch.equal(packed.open(tmp_path / "packed", verify=True).tensors[name], plain) and not torch.equal(plain, before)
    ids = tiny.inputs("qwen2")["input_ids"]
    want, got = (tt.load(tmp_path / n).module(ids).logits.detach() for n in ("plain", "packed"))
    torch.testing.assert_close(got, want, rtol=0, atol=0.05 * float(want.std()))


def test_stopped_and_resumed_it_is_the_same(tmp_path, monkeypatch):
    from trimtab.core.journal import Journal

    model = tiny.save("bert", tmp_path / "bert")
    recipe = "int(bits=3,group=0) | rtn | bias"
    assert trim(model, recipe, tmp_path / "a") == 0
    write = Journal.write_block

    def once(self, *args):
        write(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write_block", once)
    assert trim(model, recipe, tmp_path / "b") == 1
    monkeypatch.setattr(Journal, "write_block", write)
    assert trim(model, recipe, tmp_path / "b", "--resume") == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_sites_without_a_bias_are_named(tmp_path, capsys):
    model = tiny.save("qwen2", tmp_path / "qwen2")
    assert trim(model, "int(bits=4,group=0) | rtn | bias", tmp_path / "o") == 2
    assert "0.attn.o, 0.mlp.gate, 0.mlp.up, ... have none; name sites that have one, such as *.attn.q:" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_repair_behind_it_would_leave_it(tmp_path, capsys):
    model = tiny.save("bert", tmp_path / "bert")
    assert trim(model, "int(bits=4,group=0) | rtn | bias | gain", tmp_path / "o") == 2
    assert "repair/gain would leave the bias of bias; put it in front of bias" in capsys.readouterr().err
