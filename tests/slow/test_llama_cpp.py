"""GGUF files in llama.cpp itself: TRIMTAB_LLAMA names an interpreter that has llama_cpp."""
from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import trimtab as tt
from tests.conftest import LM
from tests.export.test_gguf import byte_level
from tests.tiny import save
from trimtab.builtin import corpus
from trimtab.export.gguf_tokens import CUTS
from trimtab.export.source import Source
from trimtab.prove.proof import answer
from trimtab.runtime.decoder import open_plain
from trimtab.runtime.text import open_tokenizer

LLAMA = os.environ.get("TRIMTAB_LLAMA")
pytestmark = pytest.mark.skipif(not LLAMA, reason="TRIMTAB_LLAMA names no interpreter with llama_cpp")
LENGTH, COUNT = 256, 32


def llama_cpp(model: Path, windows: list[list[int]], texts: list[str] | None = None, logits: bool = False) -> dict[str, Any]:
    asked = {"model": str(model), "windows": windows, "texts": texts or [], "logits": logits}
    found = subprocess.run([str(LLAMA), Path(__file__).with_name("llama_scores.py")], input=json.dumps(asked), capture_output=True,
                           text=True, check=False, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    """Held-out text as the built-in tokenizer cuts it."""
    tokenizer = open_tokenizer(LM)
    ids = tokenizer.encode("".join(corpus.text("validation"))[: 16 * LENGTH * COUNT], add_special_tokens=False).ids
    step = LENGTH - 1
    return [[0, *ids[i * step:(i + 1) * step]] for i in range(COUNT)]


def perplexity(model: Path, windows: list[list[int]]) -> float:
    decoder = open_plain(model)
    losses = [torch.nn.functional.cross_entropy(decoder.logits(w)[:-1], torch.tensor(w[1:])) for w in windows]
    return float(torch.stack(losses).mean().exp())


@pytest.mark.parametrize(("recipe", "kind"), [
    ("", "F16"), ("rtn(bits=8,group=32)", "Q8_0"), ("gptq(bits=4,group=32)", "Q4_0"), ("gptq(bits=4,group=32,asymmetric=true)", "Q4_1")])
def test_perplexity_is_ours(tmp_path, monkeypatch, windows, recipe, kind):
    """On the same token ids, within 0.5 %."""
    monkeypatch.setattr("trimtab.prove.proof.run_fresh", answer)
    model = LM
    if recipe:
        model = tmp_path / "trimmed"
        tt.trim(LM, recipe, model, samples=32, proof_tokens=512, speed=False)
    result = tt.export(model, "gguf", tmp_path / "m.gguf", type="auto" if recipe else "f16")
    assert result["types"][kind] == 42 + (not recipe) and result["sites_as_codes"] == 42 * bool(recipe)
    ours, theirs = perplexity(model, windows), math.exp(llama_cpp(tmp_path / "m.gguf", windows)["loss"])
    print(f"{recipe or 'dense'} as {kind}: {ours:.4f} ours, {theirs:.4f} in llama.cpp, {result['bytes'] / 1e6:.1f} MB")
    assert theirs == pytest.approx(ours, rel=0.005)


@pytest.mark.parametrize("kind", ["q8_0", "q6_k"])
def test_what_is_rounded_here_runs_there(tmp_path, windows, kind):
    """Eight and six bits cost little."""
    tt.export(LM, "gguf", tmp_path / "m.gguf", type=kind)
    assert math.exp(llama_cpp(tmp_path / "m.gguf", windows)["loss"]) == pytest.approx(perplexity(LM, windows), rel=0.005)


LONG = {"rope_theta": 500.0}
MODELS = {
    "llama": {}, "llama_tied": {}, "mistral": {"sliding_window": 40}, "qwen2": {}, "qwen3": {},
    "llama, linear": {"rope_parameters": {**LONG, "rope_type": "linear", "factor": 4.0}},
    "qwen2, linear": {"rope_parameters": {**LONG, "rope_type": "linear", "factor": 4.0}},
    "llama, llama3": {"rope_parameters": {**LONG, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                          "original_max_position_embeddings": 32}},
    "qwen3, yarn": {"rope_parameters": {**LONG, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "llama, yarn": {"rope_parameters": {**LONG, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path, name):
    """Names, permutations, biases, norms of heads and rotary positions: random models of every family, rounded to float16."""
    model = save(name.split(",")[0], tmp_path / "m", **MODELS[name])
    tt.export(model, "gguf", tmp_path / "m.gguf", type="f16")
    ids = torch.randint(3, 80, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits[0]
    theirs = torch.tensor(llama_cpp(tmp_path / "m.gguf", ids.tolist(), logits=True)["logits"])
    torch.testing.assert_close(theirs, ours, rtol=0.02, atol=0.02 * float(ours.abs().max()))
    assert float((theirs - ours).square().mean().sqrt() / ours.std()) < 0.004


@pytest.mark.parametrize("recipe", ["inner | wanda | mask | least_squares", "layer | block_influence", "channel | minitron",
                                    "mlp: neuron | wanda | global | mask | least_squares", "sublayer | influence"])
def test_smaller_shapes_agree(tmp_path, monkeypatch, windows, recipe):
    """The same next token in 99 of 100 places, and the same perplexity."""
    monkeypatch.setattr("trimtab.prove.proof.run_fresh", answer)
    model = tmp_path / "trimmed"
    tt.trim(LM, recipe, model, samples=32, proof_tokens=512, speed=False, keep=0.8)
    tt.export(model, "gguf", tmp_path / "m.gguf", type="f16")
    decoder = open_plain(model)
    theirs = torch.cat([torch.tensor(llama_cpp(tmp_path / "m.gguf", [w], logits=True)["logits"]) for w in windows[:8]])
    ours = torch.cat([decoder.logits(w) for w in windows[:8]])
    same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    print(f"{recipe}: the same next token in {same:.2%} of {len(ours)} places")
    assert same > 0.99


def test_widths_that_differ_from_layer_to_layer(tmp_path):
    """Read from an array, and computed as the native decoder does."""
    model = save("llama", tmp_path / "m")
    source = Source(model)
    tensors = {n: source.read(n) for n in source.checkpoint.tensors}
    for part, cut in (("gate_proj", slice(32)), ("up_proj", slice(32)), ("down_proj", (slice(None), slice(32)))):
        name = f"model.layers.1.mlp.{part}.weight"
        tensors[name] = tensors[name][cut].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    tt.export(model, "gguf", tmp_path / "m.gguf", type="f16")
    ids = torch.randint(3, 80, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    theirs = torch.tensor(llama_cpp(tmp_path / "m.gguf", [ids], logits=True)["logits"])
    ours = open_plain(model).logits(ids)
    assert float((theirs - ours).square().mean().sqrt() / ours.std()) < 0.004


@pytest.mark.parametrize("name", CUTS)
def test_text_is_cut_as_our_tokenizer_cuts_it(tmp_path, name):
    """Every way of cutting that is written by name, on text of the kind it was trained on and on other text."""
    model = save("llama", tmp_path / "m", vocab_size=410, bos_token_id=0, eos_token_id=1)
    byte_level(model, CUTS[name])
    tt.export(model, "gguf", tmp_path / "m.gguf")
    texts = ["def name_12(self, Value=1234567):\n\n    return self.Value's + 3  # don't DON'T\n", "Ünïcode – ΑΒΓ 日本 \t 12,5 % ²",
             "a  b   c\n\n\n  d",
             *(t[:1500] for _, t in zip(range(20), (t for _, t in corpus.modules("validation")), strict=False))]
    tokenizer = open_tokenizer(model)
    found = llama_cpp(tmp_path / "m.gguf", [], texts)["ids"]
    assert [t for t, ids in zip(texts, found, strict=True) if tokenizer.encode(t).ids != ids] == []


def test_the_built_in_tokenizer_is_cut_otherwise_and_the_result_says_so(tmp_path):
    result = tt.export(LM, "gguf", tmp_path / "m.gguf")
    text = "def foo_bar(x1):\n    return x1"
    assert llama_cpp(tmp_path / "m.gguf", [], [text])["ids"][0] != open_tokenizer(LM).encode(text).ids
    assert any("no name for the way this tokenizer cuts" in w for w in result["warnings"])
