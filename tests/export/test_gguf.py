"""GGUF files, read back by the format's own reader: the values are ours, the descriptions the models'."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType, quants
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import trimtab as tt
from tests.tiny import save
from trimtab.core.types import BadInput
from trimtab.export import gguf_blocks as blocks
from trimtab.export.gguf_blocks import Type
from trimtab.export.gguf_tokens import CUTS, GPT2
from trimtab.export.source import Source
from trimtab.methods.codes import Codes, Grid, nearest
from trimtab.network.checkpoint import read_json

ROLES = {"attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up",
         "mlp.down": "ffn_down"}


class File:
    """A GGUF file: `types` and `values` of its tensors by name, and its fields."""

    def __init__(self, path: Path):
        self.reader = GGUFReader(path)
        self.types = {t.name: t.tensor_type for t in self.reader.tensors}
        self.values = {t.name: torch.from_numpy(np.array(quants.dequantize(t.data, t.tensor_type)).reshape(t.shape[::-1].tolist()))
                       for t in self.reader.tensors}

    def __getitem__(self, key: str) -> Any:
        return self.reader.fields[key].contents()

    def __contains__(self, key: str) -> bool:
        return key in self.reader.fields


def export(model: Path, out: Path, **options: Any) -> tuple[dict[str, Any], File]:
    result = tt.export(model, "gguf", out / "m.gguf", force=True, **options)
    return result, File(out / "m.gguf")


def straight(w: Tensor, heads: int) -> Tensor:
    """Rows of q or k in the order of Hugging Face, from that of llama.cpp: neighbours are the halves of a head."""
    return w.view(heads, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


@pytest.mark.parametrize(("recipe", "kind", "off"), [
    ("rtn(bits=8,group=32)", Type.Q8_0, 0), ("gptq(bits=4,group=32)", Type.Q4_0, 0), ("rtn(bits=3,group=32)", Type.Q4_0, 0),
    ("gptq(bits=4,group=32,asymmetric=true)", Type.Q4_1, 15 * 2**-11),
    ("rtn(bits=8,group=0)", Type.Q8_0, 127 * 2**-11), ("ternary", Type.Q4_0, 2**-11), ("awq(group=32)", Type.Q4_1, 15 * 2**-11),
])
def test_codes_are_stored_as_they_are(trimmed, tmp_path, recipe, kind, off):
    """Scales of groups are float16 in both, so that values are equal; minima and scales of rows are rounded, by less than `off` steps."""
    model = trimmed(recipe)
    result, file = export(model, tmp_path)
    source = Source(model)
    assert result["sites_as_codes"] == 21 and result["types"][kind.name] == 21
    assert bool(off) == any("rounds to float16" in w for w in result["warnings"])
    for i in range(3):
        for role, name in ROLES.items():
            codes = source.codes(f"{i}.{role}")
            found = file.values[f"blk.{i}.{name}.weight"]
            found = straight(found, 4 if role == "attn.q" else 2) if role in ("attn.q", "attn.k") else found
            steps = (found - codes.weight()).abs().amax(-1) / codes.grid.scales.float().amax(-1)
            assert file.types[f"blk.{i}.{name}.weight"] == kind and float(steps.max()) <= off
    assert file.types["token_embd.weight"] == Type.BF16 and "output.weight" not in file.types
    assert torch.equal(file.values["token_embd.weight"], source.read("model.embed_tokens.weight").float())


@pytest.mark.parametrize("recipe", ["rtn(grid=nf,bits=4,group=32)", "rtn(bits=4,group=16)", "rtn(bits=8,group=32,asymmetric=true)"])
def test_codes_that_the_format_does_not_have(trimmed, tmp_path, recipe):
    """They are numbers, as the directory has them, and the result says so."""
    model = trimmed(recipe)
    result, file = export(model, tmp_path)
    assert result["sites_as_codes"] == 0 and any("no codes of GGUF" in w for w in result["warnings"])
    assert torch.equal(file.values["blk.1.ffn_up.weight"], Source(model).read("model.layers.1.mlp.up_proj.weight").float())


def test_codes_in_another_type_that_holds_them(trimmed, tmp_path):
    """Four bits fit eight exactly; eight do not fit four, and are rounded again."""
    four, eight = trimmed("gptq(bits=4,group=32)"), trimmed("rtn(bits=8,group=32)")
    result, file = export(four, tmp_path, type="q8_0")
    assert result["sites_as_codes"] == 21 and file.types["token_embd.weight"] == Type.Q8_0
    assert torch.equal(file.values["blk.0.attn_v.weight"], Source(four).codes("0.attn.v").weight())
    result, file = export(eight, tmp_path, type="q4_0")
    assert result["sites_as_codes"] == 0 and any("rounded a second time, to Q4_0" in w for w in result["warnings"])
    assert file.types["blk.0.attn_v.weight"] == Type.Q4_0


def test_factors_are_their_product(trimmed, tmp_path):
    result, file = export(trimmed("svd"), tmp_path)
    assert any("21 layers of factors" in w for w in result["warnings"]) and file.types["blk.0.attn_v.weight"] == Type.BF16


# ---- blocks -----------------------------------------------------------------------------------
def test_six_bits_in_large_blocks():
    """Exact where they hold codes; rounded, off by a step of 16 neighbours at most, and by what eight bits for their scale cost."""
    w = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1, 0, 30, 1, 1])[:, None]
    found = torch.from_numpy(quants.dequantize(blocks.as_type(w, Type.Q6_K, ""), Type.Q6_K))
    step = w.view(6, 2, 16, 16).abs().amax(-1, keepdim=True) / 32
    assert bool(((found - w).view(6, 2, 16, 16).abs() <= 1.02 * step + 0.13 * step.amax(2, keepdim=True)).all())
    assert float((found - w)[1].square().mean().sqrt()) < 0.35 * float(step[1].mean())
    codes = nearest(w, 4, 256)
    assert Type.Q6_K in blocks.fitting(codes)
    assert torch.equal(torch.from_numpy(quants.dequantize(blocks.of_codes(codes, Type.Q6_K), Type.Q6_K)), codes.weight())


def test_a_group_is_several_blocks_and_the_last_may_be_shorter():
    w = torch.randn(3, 160, generator=torch.Generator().manual_seed(0))
    for bits, kind in ((8, Type.Q8_0), (4, Type.Q4_0)):
        codes = nearest(w, bits, 128)
        assert blocks.fitting(codes)[0] == kind and blocks.exact(codes, kind)
        assert torch.equal(torch.from_numpy(quants.dequantize(blocks.of_codes(codes, kind), kind)), codes.weight())


def test_scales_that_float16_cannot_hold_do_not_fit():
    at = torch.randint(0, 256, (2, 32), dtype=torch.uint8)
    assert blocks.fitting(Codes(at, Grid(torch.tensor([[1e-3], [2.0]]), 256), 32)) == (Type.Q8_0,)
    for scale in (1e-7, 1e5):
        assert blocks.fitting(Codes(at, Grid(torch.tensor([[scale], [2.0]]), 256), 32)) == ()


# ---- models -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "arch"), [("llama", "llama"), ("llama_tied", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"),
                                              ("qwen3", "qwen3")])
def test_families(tmp_path, family, arch):
    """Every tensor is there under its name, biases and norms of heads among them, and the description is config.json's."""
    model = save(family, tmp_path / "m", dtype=torch.bfloat16)
    result, file = export(model, tmp_path, type="bf16")
    source, c = Source(model), read_json(model / "config.json")
    kept = set(source.checkpoint.tensors)
    assert len(file.values) == len(kept) and file["general.architecture"] == arch
    d = c.get("head_dim") or 8
    for i in range(2):
        for role, name in ROLES.items():
            module = f"model.layers.{i}.{'self_attn' if role[:4] == 'attn' else 'mlp'}.{role[5:]}_proj"
            for kind in ("weight", "bias"):
                if f"{module}.{kind}" in kept:
                    found = file.values[f"blk.{i}.{name}.{kind}"]
                    found = straight(found, len(found) // d) if arch == "llama" and role in ("attn.q", "attn.k") else found
                    assert torch.equal(found, source.read(f"{module}.{kind}").float())
        norm = source.read(f"model.layers.{i}.post_attention_layernorm.weight")
        assert torch.equal(file.values[f"blk.{i}.ffn_norm.weight"], norm.float())
    assert ("output.weight" in file.values) == (not c["tie_word_embeddings"])
    assert [file[f"{arch}.{k}"] for k in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count",
                                          "attention.head_count_kv", "attention.key_length", "vocab_size")] == [2, 32, 48, 4, 2, d, 80]
    assert file[f"{arch}.context_length"] == (4 if family == "mistral" else 64)
    assert any("sliding window" in w for w in result["warnings"]) == (family == "mistral")
    assert file["tokenizer.ggml.model"] == "none" and any("takes token ids alone" in w for w in result["warnings"])


def test_neighbours_turn_as_halves_did(tmp_path):
    """The rotation of pairs that llama.cpp applies to its rows is that of halves, which transformers applies to ours."""
    model = save("llama", tmp_path / "m")
    _, file = export(model, tmp_path, type="f16")
    w = Source(model).read("model.layers.0.self_attn.q_proj.weight").half().float()
    x, angle = torch.randn(32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 1.1, 2.0, 2.9])
    q, pairs = (w @ x).view(4, 2, 4), (file.values["blk.0.attn_q.weight"] @ x).view(4, 4, 2)
    cos, sin = angle.cos(), angle.sin()
    ours = torch.stack([q[:, 0] * cos - q[:, 1] * sin, q[:, 1] * cos + q[:, 0] * sin], 1)
    theirs = torch.stack([pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin], 1)
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_widths_that_differ_from_layer_to_layer(tmp_path, family):
    """As an array, under the name of the architecture for which llama.cpp reads one; there is none for Qwen."""
    model = save(family, tmp_path / "m")
    source = Source(model)
    tensors = {n: source.read(n) for n in source.checkpoint.tensors}
    for part, cut in (("gate_proj", slice(40)), ("up_proj", slice(40)), ("down_proj", (slice(None), slice(40)))):
        name = f"model.layers.1.mlp.{part}.weight"
        tensors[name] = tensors[name][cut].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    if family == "qwen2":
        with pytest.raises(BadInput, match="differ from layer to layer"):
            export(model, tmp_path)
        return
    _, file = export(model, tmp_path)
    assert list(file["deci.feed_forward_length"]) == [48, 40] and list(file["deci.attention.head_count"]) == [4, 4]
    assert file["general.architecture"] == "deci"
    assert file.values["blk.1.ffn_down.weight"].shape == (32, 40)


@pytest.mark.parametrize(("rope", "fields"), [
    ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
     {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 32}),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}, {}),
])
def test_rotary_positions(tmp_path, rope, fields):
    model = save("llama", tmp_path / "m", rope_parameters={"rope_theta": 500.0, **rope})
    _, file = export(model, tmp_path)
    assert file["llama.rope.freq_base"] == 500.0
    assert {k: file[f"llama.{k}"] for k in fields} == fields
    if rope["rope_type"] == "llama3":
        factors = file.values["rope_freqs.weight"]
        assert float(factors[0]) == pytest.approx(1) and float(factors[-1]) == pytest.approx(8)


def test_matrices_whose_rows_are_no_whole_blocks(tmp_path):
    """Rows of 32 are no block of 256, rows of 48 none of 32: what llama.cpp falls back to, and the result says it."""
    result, file = export(save("llama", tmp_path / "m"), tmp_path, type="q6_k")
    assert file.types["blk.0.attn_q.weight"] == file.types["token_embd.weight"] == Type.Q8_0
    assert file.types["blk.0.ffn_down.weight"] == Type.F16
    assert any("14 matrices" in w and "Q8_0 in place of Q6_K" in w for w in result["warnings"])
    assert any("2 matrices" in w and "F16 in place of Q6_K" in w for w in result["warnings"])


def test_what_overflows_float16_is_refused(tmp_path):
    model = save("llama", tmp_path / "m")
    source = Source(model)
    tensors = {n: source.read(n) for n in source.checkpoint.tensors}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"up_proj\.weight overflows float16; use --type bf16"):
        export(model, tmp_path)
    export(model, tmp_path, type="bf16")


# ---- vocabularies -----------------------------------------------------------------------------
def byte_level(path: Path, cut: tuple[str | None, ...], added: tuple[str, ...] = ()) -> None:
    """A small byte-level BPE tokenizer that cuts text so, and whose texts begin with <s>."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Digits(individual_digits=True) if s is None else pre_tokenizers.Split(Regex(s), "isolated") for s in cut),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    text = [f"def name_{i}(self, Value={i * 7}):\n\n    return self.Value's + {i}  # don't\n" for i in range(300)]
    t.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"],
                                                    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.add_tokens(list(added))
    about = json.loads(t.to_str())
    about["post_processor"] = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                               {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
                               "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}
    (path / "tokenizer.json").write_text(json.dumps(about))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ 1 }}"}))


@pytest.mark.parametrize("name", CUTS)
def test_a_vocabulary(tmp_path, name):
    model = save("llama", tmp_path / "m", vocab_size=410, bos_token_id=0, eos_token_id=[1, 7])
    byte_level(model, CUTS[name], added=("<tool>",))
    result, file = export(model, tmp_path)
    about = read_json(model / "tokenizer.json")
    tokens, types = file["tokenizer.ggml.tokens"], file["tokenizer.ggml.token_type"]
    assert not result["warnings"]
    assert file["tokenizer.ggml.model"] == "gpt2" and file["tokenizer.ggml.pre"] == name
    n = len(about["model"]["vocab"])
    assert len(tokens) == 410 and {t: i for i, t in enumerate(tokens[:n])} == about["model"]["vocab"]
    assert (tokens[n], types[n]) == ("<tool>", TokenType.USER_DEFINED) and (tokens[409], types[409]) == ("[PAD409]", TokenType.UNUSED)
    assert types[:3] == [TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL]
    assert file["tokenizer.ggml.merges"] == [" ".join(m) for m in about["model"]["merges"]]
    assert [file[f"tokenizer.ggml.{k}"] for k in ("bos_token_id", "eos_token_id", "eot_token_id", "add_bos_token", "add_eos_token")] == \
        [0, 1, 7, True, False]
    assert file["tokenizer.chat_template"] == "{{ 1 }}"


def test_a_way_of_cutting_that_llama_cpp_has_no_name_for(tiny_lm, tmp_path):
    """The nearest is written, and how far off it is."""
    result, file = export(tiny_lm, tmp_path)
    assert file["tokenizer.ggml.pre"] in CUTS and any("no name for the way this tokenizer cuts" in w for w in result["warnings"])
    model = tmp_path / "near"
    shutil.copytree(tiny_lm, model)
    byte_level(model, (GPT2 + r"|\s",))  # says the same in another way
    result, file = export(model, tmp_path)
    assert file["tokenizer.ggml.pre"] == "gpt-2" and any("gpt-2, the nearest, which gives other tokens for 0%" in w
                                                         for w in result["warnings"])


def test_more_tokens_than_embeddings(tmp_path):
    model = save("llama", tmp_path / "m")
    byte_level(model, CUTS["gpt-2"])
    with pytest.raises(BadInput, match=r"tokens up to .*, the model has embeddings for 80"):
        export(model, tmp_path)
