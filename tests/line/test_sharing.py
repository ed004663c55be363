"""Weights that several places of a network share: what is stored once, who takes whose, and what is refused."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny
from trimtab import cli
from trimtab.core.types import BadInput
from trimtab.network.checkpoint import Checkpoint
from trimtab.network.stream import load_module
from trimtab.prove.proof import answer
from trimtab.prove.size import sizes
from trimtab.runtime import layouts, packed

FAST = ["--no-speed", "--samples", "2", "--proof-tokens", "64", "--seq-len", "16", "-q"]


@pytest.fixture(autouse=True)
def proof_in_this_process(monkeypatch):
    monkeypatch.setattr("trimtab.prove.proof.run_fresh", answer)


@pytest.fixture
def ready(tmp_path):
    """Inputs to calibrate and to prove on, as a file."""
    def get(name: str) -> str:
        save_file(tiny.inputs(name), tmp_path / "in.safetensors")
        return str(tmp_path / "in.safetensors")

    return get


def trim(capsys, model: Path, recipe: str, out: Path, text: str, *more: object) -> tuple[int, dict, str]:
    code = cli.main(["trim", str(model), recipe, "-o", str(out), "--calib", text, "--text", text, *FAST, "--json", *map(str, more)])
    said = capsys.readouterr()
    return code, json.loads(said.out) if code == 0 else {}, said.err


def tensors(path: Path) -> dict[str, Tensor]:
    return {k: v for f in path.glob("model*.safetensors") for k, v in load_file(f).items()}


def tied(path: Path, *pairs: tuple[int, int], name: str = "llama", **how) -> Path:
    """A model in which blocks have the linear weights of others."""
    model = tiny.build(name, **how)
    for j, i in pairs:
        own, other = (dict(model.model.layers[k].named_parameters()) for k in (j, i))
        for n, p in own.items():
            if "proj.weight" in n:
                p.data.copy_(other[n])
    model.save_pretrained(path)
    return path


# ---- storage ----------------------------------------------------------------------------------
def test_what_is_equal_is_stored_and_mapped_once(capsys, tmp_path, ready):
    model = tied(tmp_path / "m", (2, 0), num_hidden_layers=3)
    code, result, err = trim(capsys, model, "dense", tmp_path / "o", ready("llama"), "--pack")
    assert code == 0, err
    untied = tiny.save("llama", tmp_path / "n", num_hidden_layers=3)
    code, other, err = trim(capsys, untied, "dense", tmp_path / "p", ready("llama"), "--pack")
    assert code == 0, err
    c, m = Checkpoint.open(tmp_path / "o"), packed.open(tmp_path / "o", verify=True)
    own = tensors(model)
    assert not any(n.startswith("model.layers.2.") and ".packed_" in n for n in c.stored)
    for name, p in m.linears.items():
        assert torch.equal(layouts.restored(p), own[f"{name}.weight"])
        if name.startswith("model.layers.2."):
            first = m.linears[name.replace("layers.2", "layers.0")]
            assert all(t.data_ptr() == first.buffers[k].data_ptr() for k, t in p.buffers.items())
    notes = json.loads((tmp_path / "o" / "trimtab.json").read_text())
    per_block = [sum(n for k, n in notes["packed_bytes"].items() if f"layers.{i}." in k) for i in range(3)]
    assert per_block[0] == per_block[1] > 0 == per_block[2]
    gone = sum(w.numel() for n, w in own.items() if n.startswith("model.layers.2.") and w.dim() == 2)
    assert sizes(Checkpoint.open(tmp_path / "p"))["params"] - sizes(c)["params"] == gone
    assert other["after"]["params"] - result["after"]["params"] == gone
    assert other["after"]["bytes"] - result["after"]["bytes"] > 4 * gone
    x = tiny.inputs("llama")
    with torch.no_grad():
        want = load_module(model)(**x).logits
        torch.testing.assert_close(load_module(tmp_path / "o")(**x).logits, want, atol=1e-4, rtol=1e-4)


def test_a_description_that_names_no_stored_buffer_is_refused(capsys, tmp_path, ready):
    model = tied(tmp_path / "m", (1, 0))
    assert trim(capsys, model, "dense", tmp_path / "o", ready("llama"), "--pack")[0] == 0
    said = json.loads((tmp_path / "o" / "config.json").read_text())
    shared = said["quantization_config"]["shared"]
    one, two = list(shared)[:2]
    assert len(shared) == 7 and one.startswith("model.layers.1.")
    for k, wrong in enumerate(({one: one}, {one: two, two: one}, {one: "model.layers.9.packed_values"}, {one: "model.norm.weight"},
                               {shared[one]: shared[two]}, {"lm_head.weight": shared[one]}, {one: 3}, [], 7, "x")):
        out = tmp_path / str(k)
        shutil.copytree(tmp_path / "o", out)
        about = {**said["quantization_config"], "shared": {**shared, **wrong} if isinstance(wrong, dict) else wrong}
        (out / "config.json").write_text(json.dumps({**said, "quantization_config": about}))
        for reads in (Checkpoint.open, packed.open, load_module):
            with pytest.raises(BadInput, match="fetch") as e:
                reads(out)
            assert len(str(e.value).splitlines()) == 1
