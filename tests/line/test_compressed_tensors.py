"""What compressed-tensors is given: opened in plain transformers it is the trimmed model, and what it cannot hold is refused."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from trimtab.core import line, spec
from trimtab.core.types import BadInput
from trimtab.export.compressed_tensors import words, write

W4, W8 = "rtn(bits=4,group=16)", "rtn(bits=8,group=0)"
HELD = [
    ("llama_tied", "wanda ; gptq(bits=4,group=16)", torch.bfloat16), ("llama", "rtn(bits=4,group=16,asymmetric=true)", torch.bfloat16),
    ("mistral", "rtn(bits=4,group=0,asymmetric=true)", torch.float32), ("qwen2", W8, torch.bfloat16),
    ("llama", "awq(bits=8,group=16)", torch.float16), ("llama_base", f"attn: {W4} ; mlp: {W8}", torch.float32),
    ("qwen3", f"*.1.*,1.*: {W4}", torch.bfloat16), ("phi3", W4, torch.bfloat16),
    ("gpt_neox", "rtn(bits=8,group=16,asymmetric=true)", torch.float32), ("opt", f"mlp: {W4}", torch.float32),
    ("bert_masked", W4, torch.float32), ("vit", W8, torch.float32),
    ("llama", "fp8", torch.bfloat16), ("gpt_neox", "mlp: fp8", torch.float32),
]
REFUSED = [
    ("llama", "rtn(bits=3,group=16)", r"0\.attn\.q: its codes are of 3 bits"), ("llama", "ternary | rtn", r"0\.attn\.q: .* ternary"),
    ("llama", "*.down: nf(bits=4,group=16) | rtn", r"0\.mlp\.down: its codes are steps of a table of 16"),
    ("llama", "fp(bits=8,exponent=5,group=0,clip=max) | rtn", r"those of e4m3, fp\(bits=8,exponent=4\)"),
    ("llama", "fp(bits=8,exponent=4,group=16) | rtn", "8 bits of e4m3 in groups of 16, and float8 layers have rows"),
    ("llama", "fp(bits=8,exponent=4,group=0) | rtn | token", "inputs rounded to whole numbers, and float8"),
    ("llama", "mlp: svd", r"0\.mlp\.gate: it has factors"),
    ("llama", "wanda", "has no codes"), ("llama", "rtn(bits=4,group=20)", "groups of 20 do not divide its 32 inputs"),
    ("llama", f"*.q: {W4}", r"0\.attn\.k: it has no codes and 0\.attn\.q has 4 bits in groups of 16; .* alike"),
    ("llama", f"*.up: {W8} ; *.gate: {W4}", r"0\.mlp\.up: it has 8 bits in rows and 0\.mlp\.gate"),
    ("llama", f"attn: {W4} ; mlp: rtn(bits=8,group=0,asymmetric=true)", r"0\.mlp\.gate: .* only where all layers have one"),
    ("phi3", f"*.q: {W4}", r"0\.attn\.k: it is part of .*qkv_proj\.weight"),
    ("phi3", f"*.gate: {W4} ; *.up: {W8}", r"0\.mlp\.gate: it shares .*gate_up_proj\.weight with rows on another grid"),
    ("gpt2", W4, r"0\.attn\.q: .* transposed"), ("mixtral", f"attn: {W4}", r"0\.mlp\.experts\.0\.gate: it is an expert"),
]


@pytest.fixture(autouse=True)
def no_proof(monkeypatch):
    monkeypatch.setattr(line, "prove", lambda *_: {})


def trimmed(name: str, recipe: str, where: Path, dtype: torch.dtype = torch.float32, **changes: int) -> Path:
    """A tiny model of a family, and what trim writes of it."""
    tiny.save(name, where / "model", dtype=dtype, **changes)
    save_file(tiny.inputs(name), where / "x.safetensors")
    x = (str(where / "x.safetensors"),)
    line.trim(where / "model", spec.load(recipe), where / "plain", line.Options(calib=x, text=x, samples=3, speed=False, fresh=False),
              lambda *_: None)
    return where / "plain"


def answers(name: str, path: Path) -> torch.Tensor:
    import transformers

    model = getattr(transformers, tiny.MODELS[name][0]).from_pretrained(path)
    with torch.no_grad():
        x = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in tiny.inputs(name).items()}
        return next(t for t in model(**x).values() if torch.is_tensor(t) and t.ndim > 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "recipe", "dtype"), HELD)
def test_it_opens_in_transformers_and_says_the_same(tmp_path, name, recipe, dtype):
    pytest.importorskip("compressed_tensors")
    plain = trimmed(name, recipe, tmp_path, dtype)
    told = write(plain, tmp_path / "out")
    assert told["quantized"] == sum(told["schemes"].values()) > 0
    assert told["bytes"] < sum(f.stat().st_size for f in plain.glob("model*.safetensors"))
    assert torch.equal(answers(name, tmp_path / "out"), answers(name, plain))


def test_what_is_written(tmp_path):
    """Packed layers, untouched neighbours, one group for all layers and the rest ignored; the recipe goes along, the proof stays."""
    plain = trimmed("llama_tied", "attn: wanda ; attn: rtn(bits=4,group=16,asymmetric=true)", tmp_path)
    write(plain, tmp_path / "out")
    before, after = load_file(plain / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    parts = load_file(plain / "trimtab.safetensors")
    stem = "model.layers.1.self_attn.k_proj"
    packed, zeros = after[f"{stem}.weight_packed"], after[f"{stem}.weight_zero_point"]
    assert (packed.shape, zeros.shape) == ((16, 4), (2, 2)) and after[f"{stem}.weight_shape"].tolist() == [16, 32]
    for i in range(8):  # by the definition: the first code in the lowest bits, codes along the inputs, zero points along the outputs
        assert torch.equal(packed >> 4 * i & 15, parts["1.attn.k:codes"][:, i::8].int())
        assert torch.equal(zeros >> 4 * i & 15, parts["1.attn.k:zeros"][i::8].int())
    assert f"{stem}.weight" not in after and torch.equal(after[f"{stem}.bias"], before[f"{stem}.bias"])
    assert torch.equal(after["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized" and config["quantization_status"] == "compressed" and "sparsity_config" not in config
    [group] = config["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["weights"] | {"num_bits": 4, "group_size": 16, "symmetric": False} == group["weights"]
    assert "lm_head" in config["ignore"] and "model.layers.0.mlp.gate_proj" in config["ignore"] and stem not in config["ignore"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "generation_config.json", "model.safetensors", "recipe.yaml"}


def test_groups_as_long_as_a_row_are_groups_where_others_have_them(tmp_path):
    """So that layers of other widths do not make a second scheme."""
    assert write(trimmed("llama", "rtn(bits=4,group=32)", tmp_path, intermediate_size=64), tmp_path / "out")["schemes"] == {
        "4 bits in groups of 32": 14}
    [group] = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("group", 32)


@pytest.mark.filterwarnings("ignore")
def test_activations_of_8_bits(tmp_path):
    """The weights are the same bytes less 128, and the logits those of x rounded token by token."""
    pytest.importorskip("compressed_tensors")
    import transformers

    plain = trimmed("llama", W8, tmp_path)
    assert write(plain, tmp_path / "out", type="w8a8")["format"] == "int-quantized"
    after, parts = load_file(tmp_path / "out" / "model.safetensors"), load_file(plain / "trimtab.safetensors")
    assert torch.equal(after["model.layers.0.mlp.up_proj.weight"].int() + 128, parts["0.mlp.up:codes"].int())

    model = transformers.LlamaForCausalLM.from_pretrained(plain)
    for name, m in model.named_modules():
        if name.endswith("_proj"):
            m.register_forward_pre_hook(lambda m, args: met(args[0], None))
    with torch.no_grad():
        want = model(**tiny.inputs("llama")).logits
    torch.testing.assert_close(answers("llama", tmp_path / "out"), want, rtol=0, atol=1e-4)
    assert not torch.allclose(answers("llama", plain), want, atol=1e-3)
    with pytest.raises(BadInput, match=r"0\.attn\.q: .* it has 4 bits in groups of 16"):
        write(trimmed("llama", W4, tmp_path / "4"), tmp_path / "no", type="w8a8")
    assert not (tmp_path / "no").exists()


def met(x: torch.Tensor, step: torch.Tensor | None) -> torch.Tensor:
    """Inputs as transformers rounds them: by the token's largest, or by a step; down to -128."""
    step = x.abs().amax(-1, keepdim=True) / 127.5 if step is None else step
    return (x / step).round().clamp(-128, 127) * step


@pytest.mark.filterwarnings("ignore")
def test_float8_inputs_are_rounded_as_it_runs(tmp_path):
    pytest.importorskip("compressed_tensors")
    import transformers

    plain = trimmed("llama", "fp8", tmp_path)
    assert write(plain, tmp_path / "out", type="fp8")["format"] == "float-quantized"
    after = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert after.dtype == torch.float8_e4m3fn and float(after.float().abs().max()) == 448

    def met(m: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        step = args[0].abs().amax(-1, keepdim=True) / 448
        return (args[0] / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step

    model = transformers.LlamaForCausalLM.from_pretrained(plain)
    for name, m in model.named_modules():
        if name.endswith("_proj"):
            m.register_forward_pre_hook(met)
    with torch.no_grad():
        want = model(**tiny.inputs("llama")).logits
    torch.testing.assert_close(answers("llama", tmp_path / "out"), want, rtol=0, atol=1e-4)
    for recipe, type_ in ((W8, "fp8"), ("fp8", "w8a8")):
        with pytest.raises(BadInput, match="with --type fp8, and it has 8 bits"):
            write(trimmed("llama", recipe, tmp_path / type_), tmp_path / "no", type=type_)


@pytest.mark.parametrize(("step", "strategy"), [("token", "token"), ("static(clip=max)", "tensor")])
def test_inputs_that_the_recipe_rounds_are_rounded_there(tmp_path, step, strategy):
    """By the token, or by the step that calibration found."""
    pytest.importorskip("compressed_tensors")
    import transformers

    plain = trimmed("llama", f"int(bits=8,group=0) | rtn | {step}", tmp_path)
    assert write(plain, tmp_path / "out")["format"] == "int-quantized"
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert scheme["input_activations"]["strategy"] == strategy
    after, model = load_file(tmp_path / "out" / "model.safetensors"), transformers.LlamaForCausalLM.from_pretrained(plain)
    parts = load_file(plain / "trimtab.safetensors")
    for name, m in model.named_modules():
        if name.endswith("_proj"):
            given = after.get(f"{name}.input_scale")
            assert (given is not None) == (strategy == "tensor")
            m.register_forward_pre_hook(lambda m, args, given=given: met(args[0], given))
    if strategy == "tensor":
        assert torch.equal(after["model.layers.0.mlp.up_proj.input_scale"], parts["0.mlp.up:act_scale"])
    with torch.no_grad():
        want = model(**tiny.inputs("llama")).logits
    torch.testing.assert_close(answers("llama", tmp_path / "out"), want, rtol=0, atol=1e-4)
    with pytest.raises(BadInput, match="rounded to 6 bits, and those of compressed-tensors here have 8"):
        write(trimmed("llama", "w8a8(act_bits=6)", tmp_path / "6"), tmp_path / "no")


@pytest.mark.parametrize(("name", "recipe", "why"), REFUSED)
def test_what_it_cannot_hold_is_refused_in_one_line(tmp_path, name, recipe, why):
    with pytest.raises(BadInput, match=why) as e:
        write(trimmed(name, recipe, tmp_path), tmp_path / "out")
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_weights_that_changed_are_refused(tmp_path):
    plain = trimmed("llama", W4, tmp_path)
    weights = (plain / "model.safetensors").read_bytes()
    (plain / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(BadInput, match="its hash differs"):
        write(plain, tmp_path / "out")
    (plain / "model.safetensors").write_bytes(weights)
    write(plain, tmp_path / "out")
    parts = load_file(plain / "trimtab.safetensors")
    for metadata in (None, {"trimtab": "[]"}, {"trimtab": "{}"}):
        save_file(parts, plain / "trimtab.safetensors", metadata)
        with pytest.raises(BadInput, match="which weights it belongs to"):
            write(plain, tmp_path / "out")
    (plain / "trimtab.safetensors").unlink()
    with pytest.raises(BadInput, match="without --pack"):
        write(plain, tmp_path / "out")
    shutil.rmtree(plain)
    with pytest.raises(BadInput, match="missing"):
        write(plain, tmp_path / "out")


@pytest.mark.parametrize("shape", [(1, 8), (3, 9), (2, 1), (5, 32)])
@pytest.mark.parametrize("bits", [4, 8])
def test_words(bits, shape):
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    got = words(codes, bits)
    assert got.dtype == torch.int32 and got.shape == (shape[0], -(-shape[1] * bits // 32))
    fields = torch.stack([got >> bits * i & (1 << bits) - 1 for i in range(32 // bits)], -1).flatten(1)
    assert torch.equal(fields[:, : shape[1]], codes.int()) and not fields[:, shape[1]:].any()
