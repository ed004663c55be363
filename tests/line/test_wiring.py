"""The network rewritten as a whole: what is exact is, what is not is said, and what cannot be is refused in one line."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.line.test_families import stream
from tests.line.test_structure import trim
from trimtab.network import graph
from trimtab.network.stream import Network
from trimtab.network.surgery import Cut, apply
from trimtab.prove.proof import answer


@pytest.fixture(autouse=True)
def proof_in_this_process(monkeypatch):
    monkeypatch.setattr("trimtab.prove.proof.run_fresh", answer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("wiring"), {}

    def get(name: str, **how) -> Path:
        key = f"{name}{sorted(how.items())}"
        if key not in made:
            made[key] = tiny.save(name, root / str(len(made)), **how)
        return made[key]

    return get


@pytest.fixture
def ready(tmp_path):
    """Inputs to calibrate and to prove on, as a file."""
    def get(name: str) -> str:
        save_file(tiny.inputs(name), tmp_path / "in.safetensors")
        return str(tmp_path / "in.safetensors")

    return get


def without(path: Path, out: Path, *blocks: int) -> Path:
    """The network without the attention of these blocks."""
    net = Network.open(path)
    apply(net, Cut(skips=dict.fromkeys(blocks, frozenset({"attn"}))), out, lambda i: {})
    return out


def changed(path: Path, *names: str) -> None:
    """Zeros in place of these tensors."""
    held = load_file(path / "model.safetensors")
    for n in held:
        if any(part in n for part in names):
            held[n] = torch.zeros_like(held[n])
    save_file(held, path / "model.safetensors", {"format": "pt"})


# ---- fusion -----------------------------------------------------------------------------------
FUSED = ("llama", "llama_tied", "mistral", "qwen3", "phi3", "gpt_neox_serial", "vit", "llama_base")
DEEP = {"num_hidden_layers": 5}


@pytest.mark.parametrize("name", FUSED)
def test_fusion_is_exact_where_no_mlp_depends_on_another(saved, name, tmp_path, ready, capsys):
    """The first two of three add nothing, so that all read the same; the last block keeps its attention."""
    path = without(saved(name, **DEEP), tmp_path / "cut", 2, 3)
    net = Network.open(path)
    roots = {".".join(graph.files_of(net.family, s.param, s.shape, True)[0].file.split(".")[:-1]) for s in net.sites if s.role == "down"}
    changed(path, *(f".{i}.{r}." for i in (1, 2) for r in {*roots, *(s.param.rpartition(".")[0] for s in net.sites if s.role == "down")}))
    code, result, _ = trim(capsys, path, "fusion", tmp_path / "out", ready(name))
    assert code == 0
    batch, small = tiny.inputs(name), Network.open(tmp_path / "out")
    want = stream(Network.open(path), batch)
    torch.testing.assert_close(stream(small, batch), want, atol=1e-5, rtol=1e-5)
    assert small.n_blocks == 3 and result["structure"] == [{"fused": [[1, 2, 3]]}]
    assert small.config_of(1).intermediate_size == 3 * 48 and small.config_of(0).intermediate_size == 48
