"""ONNX models in ONNX Runtime: the logits are those of transformers."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import trimtab as tt
from tests.export.conftest import FAST
from tests.tiny import save
from trimtab import cli
from trimtab.core.types import BadInput
from trimtab.export import onnx as writer
from trimtab.prove.proof import answer

IDS = torch.randint(3, 80, (3, 21), generator=torch.Generator().manual_seed(0))


def logits(model: Path, ids: Tensor) -> Tensor:
    """What ONNX Runtime computes, x in float32 where it fuses codes into its own kernels (by default it rounds x to 8 bits)."""
    onnx.checker.check_model(str(model), full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"input_ids": ids.numpy()})[0])


def ours(model: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits


LONG = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}


@pytest.mark.parametrize(("family", "changes", "dtype"), [
    ("llama", {"rope_parameters": LONG}, torch.float16), ("llama_tied", {"hidden_act": "gelu"}, torch.bfloat16),
    ("llama", {"hidden_act": "relu"}, torch.float32), ("mistral", {"hidden_act": "gelu_pytorch_tanh"}, torch.float32),
    ("qwen2", {}, torch.bfloat16), ("qwen3", {}, torch.float32)])
def test_families(tmp_path, family, changes, dtype):
    """Any batch, any length: shared heads, windows, biases, norms of heads, rotary positions, activations, stored types."""
    model = save(family, tmp_path / "m", dtype=dtype, **changes)
    tt.export(model, "onnx", tmp_path / "m.onnx")
    for ids in (IDS, IDS[:1, :1]):
        torch.testing.assert_close(logits(tmp_path / "m.onnx", ids), ours(model, ids), rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tiny_lm) -> Path:
    """The tiny language model in float32, where what is written is what was rounded."""
    path = tmp_path_factory.mktemp("wide") / "m"
    AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((tiny_lm / name).read_bytes())
    return path


@pytest.mark.parametrize(("recipe", "kind"), [
    ("rtn(bits=8,group=0)", "INT8"), ("rtn(bits=8,group=16,asymmetric=true)", "UINT8"), ("gptq(bits=4,group=32)", "INT4"),
    ("rtn(bits=4,group=16,asymmetric=true)", "UINT4"), ("svd", "")])
@pytest.mark.filterwarnings("ignore:.*did not pass its proof")
def test_codes_are_integers(wide, tmp_path, calib, monkeypatch, recipe, kind):
    """And the logits those of the model that the trim wrote."""
    monkeypatch.setattr("trimtab.prove.proof.run_fresh", answer)
    model = tmp_path / "m"
    assert cli.main(["trim", str(wide), recipe, "-o", str(model), "--calib", calib, "--text", calib, *FAST]) == 0
    result = tt.export(model, "onnx", tmp_path / "o")
    assert result["sites_as_codes"] == (21 if kind else 0) and result["types"].get(kind, 0) >= (21 if kind else 0)
    torch.testing.assert_close(logits(tmp_path / "o" / "model.onnx", IDS), ours(model, IDS), rtol=0, atol=1e-3)


def test_codes_that_are_no_integers(trimmed, tmp_path):
    for recipe in ("rtn(grid=nf,bits=4,group=32)", "rtn(bits=8,group=24)"):
        result = tt.export(model := trimmed(recipe), "onnx", tmp_path / "m.onnx", force=True)
        assert any("are no integers of ONNX" in w for w in result["warnings"])
        torch.testing.assert_close(logits(tmp_path / "m.onnx", IDS), ours(model, IDS), rtol=0, atol=1e-3)


def test_weights_in_a_file_of_their_own(trimmed, tmp_path, monkeypatch):
    """Where a protocol buffer cannot hold them: two files, so that -o has to be a directory."""
    model = trimmed("rtn(bits=8,group=32)")
    tt.export(model, "onnx", tmp_path / "one")
    monkeypatch.setattr(writer, "LARGEST", 10_000)
    result = tt.export(model, "onnx", tmp_path / "two")
    assert result["files"] == ["model.onnx", "model.onnx.data"] and (tmp_path / "two" / "model.onnx").stat().st_size < 100_000
    assert np.array_equal(*(logits(tmp_path / d / "model.onnx", IDS) for d in ("one", "two")))
    with pytest.raises(BadInput, match="give a directory as -o"):
        tt.export(model, "onnx", tmp_path / "m.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"one", "two"}


@pytest.mark.parametrize(("family", "said"), [("gpt2", "GPT2LMHeadModel"), ("llama_classifier", "LlamaForSequenceClassification")])
def test_what_onnx_is_not_written_of(tmp_path, family, said):
    save(family, tmp_path / "m")
    with pytest.raises(BadInput, match=f"{said}; trimtab writes ONNX of language models of llama"):
        tt.export(tmp_path / "m", "onnx", tmp_path / "m.onnx")
