"""Checkpoints of GPTQ, AWQ and compressed-tensors, packed here from the description of their layouts: they open as what they stand for."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimtab as tt
from tests import tiny
from trimtab import cli
from trimtab.core import line, spec
from trimtab.core.types import BadInput
from trimtab.evaluate import compare
from trimtab.export.compressed_tensors import write
from trimtab.methods.codes import Codes
from trimtab.network.checkpoint import Checkpoint
from trimtab.network.stream import Network, load_module
from trimtab.prove import proof
from trimtab.prove.speed import measure
from trimtab.runtime import layouts, packed
from trimtab.runtime.decoder import open_decoder

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
KINDS = ("gptq", "gptq_v2", "gptq_asym", "gptq_mislabelled", "gptq_rows", "gptq2", "gptq3", "gptq8", "gptq_act_order", "awq", "packed4",
         "packed4_asym", "packed8_rows", "int8", "int8_asym", "float8", "float8_tensor")


def stream(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, rows] as one number a column, cut into words of 32 bits: int32 [n * bits / 32, rows]. Slow and plain."""
    columns = []
    for column in codes.T.tolist():
        whole = sum(c << bits * i for i, c in enumerate(column))
        words = [whole >> 32 * k & 0xFFFFFFFF for k in range(-(-len(column) * bits // 32))]
        columns.append([w - (1 << 32) if w >> 31 else w for w in words])
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def made(kind: str, w: Tensor, gen: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """A layer's tensors by their last part, of codes near w [out, in] float32; and what they stand for, float32."""
    out, inputs = w.shape
    bits = int(kind[-1]) if kind in ("gptq2", "gptq3", "gptq8") else 8 if kind.startswith(("packed8", "int8")) else 4
    group = inputs if "rows" in kind or kind.startswith("int8") else 16
    groups, levels = inputs // group, 1 << bits
    order = torch.arange(inputs) // group
    if kind == "gptq_act_order":
        order = order[torch.randperm(inputs, generator=gen)]
    scales = (w.abs().amax() * 2 / levels * (0.5 + torch.rand(out, groups, generator=gen))).half()
    zeros = torch.full((out, groups), levels // 2)
    if "asym" in kind or kind == "awq":
        zeros = torch.randint(0, levels, (out, groups), generator=gen)
    if kind.startswith("float8"):
        scale = (w.abs().amax(1, keepdim=True) if kind == "float8" else w.abs().amax().reshape(1)) / 448
        weight = (w / scale).to(torch.float8_e4m3fn)
        return {"weight": weight, "weight_scale": scale}, weight.float() * scale
    codes = ((w / scales.float()[:, order]).round() + zeros[:, order]).clamp(0, levels - 1).long()
    means = (codes - zeros[:, order]) * scales.float()[:, order]
    if kind.startswith("gptq"):
        less = 0 if kind in ("gptq_v2", "gptq_mislabelled") else 1
        return {"qweight": stream(codes.T, bits), "qzeros": stream((zeros - less) % levels, bits).T.contiguous(),
                "scales": scales.T.contiguous(), "g_idx": order.int()}, means
    if kind == "awq":
        def awq(t: Tensor) -> Tensor:
            return stream(t.T.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1).T, 4).T.contiguous()

        return {"qweight": awq(codes), "qzeros": awq(zeros), "scales": scales.T.contiguous()}, means
    if kind.startswith("packed"):
        tensors = {"weight_packed": stream(codes.T, bits).T.contiguous(), "weight_shape": torch.tensor([out, inputs])}
        return tensors | {"weight_scale": scales} | ({"weight_zero_point": stream(zeros, bits)} if "asym" in kind else {}), means
    tensors = {"weight": (codes - 128).to(torch.int8), "weight_scale": scales}
    return tensors | ({"weight_zero_point": (zeros - 128).to(torch.int8)} if "asym" in kind else {}), means


def says(kind: str) -> dict[str, Any]:
    if kind.startswith("gptq"):
        return {"quant_method": "gptq", "bits": int(kind[-1]) if kind[-1] in "38" else 4, "group_size": -1 if "rows" in kind else 16,
                "sym": "asym" not in kind, "desc_act": "act" in kind, "checkpoint_format": "gptq_v2" if kind == "gptq_v2" else "gptq"}
    if kind == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
    form = "pack-quantized" if kind.startswith("packed") else "int-quantized" if kind.startswith("int") else "float-quantized"
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"targets": ["Linear"]}}}


def checkpoint(kind: str, where: Path, dtype: torch.dtype = torch.float32) -> Path:
    """`where`/plain of one block with the decoded weights in `dtype`, and `where`/made with the codes."""
    plain = tiny.save("llama", where / "plain", dtype=dtype, num_hidden_layers=1)
    gen = torch.Generator().manual_seed(0)
    tensors, codes = load_file(plain / "model.safetensors"), {}
    for n in list(tensors):
        if n.removesuffix(".weight").endswith(LINEAR):
            mine, means = made(kind, tensors[n].float(), gen)
            tensors[n] = means.to(dtype)
            codes |= {f"{n.removesuffix('.weight')}.{k}": t for k, t in mine.items()}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    shutil.copytree(plain, out := where / "made")
    rest = {n: t for n, t in tensors.items() if not n.removesuffix(".weight").endswith(LINEAR)}
    save_file(rest | codes, out / "model.safetensors", {"format": "pt"})
    change(out, **says(kind))
    (out / "quantize_config.json").write_text("{}")
    return out


def change(path: Path, **says: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {**config.get("quantization_config", {}), **says}
    (path / "config.json").write_text(json.dumps(config))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**tiny.inputs("llama")).logits.float()


@pytest.fixture
def no_proof(monkeypatch):
    monkeypatch.setattr(line, "prove", lambda *_: {})


def trim(model: Path, recipe: str, out: Path, **options: Any) -> dict[str, Any]:
    save_file(tiny.inputs("llama"), out.with_suffix(".safetensors"))
    x = (str(out.with_suffix(".safetensors")),)
    line.trim(model, spec.load(recipe), out, line.Options(calib=x, text=x, samples=3, speed=False, fresh=False, **options), lambda *_: None)
    return json.loads((out / "trimtab.json").read_text())


@pytest.mark.filterwarnings("ignore:no kernel here takes")
@pytest.mark.parametrize("kind", KINDS)
def test_it_opens_as_what_it_stands_for_and_is_packed_as_it_is(tmp_path, no_proof, kind):
    """Torch and the native decoder say what the decoded plain model says; a packed copy holds the same codes, not others."""
    path = checkpoint(kind, tmp_path)
    before, net = load_file(tmp_path / "plain" / "model.safetensors"), Network.open(path)
    assert all(torch.equal(net.checkpoint.read(n), t) for n, t in before.items())
    assert set(net.checkpoint.tensors) == set(before) and net.n_params == sum(t.numel() for t in before.values())
    want = logits(load_module(tmp_path / "plain"))
    assert torch.equal(logits(load_module(path)), want)
    ids = tiny.inputs("llama")["input_ids"][0]
    decoder = open_decoder(path)
    torch.testing.assert_close(decoder.logits(ids), want[0], rtol=1e-3, atol=1e-3)

    notes = trim(path, "dense", tmp_path / "packed", pack="recipe")
    linears = packed.open(tmp_path / "packed", verify=True).linears
    told = [x for x in notes["warnings"] if "act_order" in x]
    for name in net.checkpoint.quantized:
        codes = net.checkpoint.decoded(f"{name}.weight")
        if kind == "gptq_act_order":
            assert linears[name].type == "f32" and told and "7 layers" in told[0]
            continue
        assert isinstance(codes, Codes) and not told
        assert linears[name].type == codes.type and torch.equal(layouts.restored(linears[name]), codes.weight())
        assert ("zeros" in linears[name].buffers) == (kind == "awq" or "asym" in kind)
    assert notes["formats"]["lm_head"] == "dense" and not (tmp_path / "packed" / "quantize_config.json").exists()


def test_the_native_decoder_runs_the_codes_where_a_kernel_takes_them(tmp_path):
    """Rows of 4 bits are read as such: an eighth of the floats."""
    path = checkpoint("gptq_rows", tmp_path)
    head = 80 * 32 * 4
    assert open_decoder(path).weight_bytes - head < (open_decoder(tmp_path / "plain").weight_bytes - head) / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoded_weights_have_the_type_of_the_model(tmp_path, dtype):
    path = checkpoint("awq", tmp_path, dtype=dtype)
    assert Checkpoint.open(path).tensors["model.layers.0.mlp.up_proj.weight"].dtype == dtype
    assert torch.equal(logits(load_module(path)), logits(load_module(tmp_path / "plain")))


def test_another_recipe_takes_it_as_the_dense_model(tmp_path, no_proof):
    """Trimmed, it is what the decoded model becomes, a plain directory; packed, layers that no pass changed keep their codes."""
    path = checkpoint("gptq_asym", tmp_path)
    for source in (path, tmp_path / "plain"):
        trim(source, "mlp: wanda", tmp_path / f"{source.name}.out")
    one, other = tmp_path / "made.out", tmp_path / "plain.out"
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert "quantization_config" not in json.loads((one / "config.json").read_text()) and not (one / "quantize_config.json").exists()
    assert torch.equal(logits(load_module(one)), logits(load_module(other)))
    assert json.loads((one / "trimtab.json").read_text())["rest_bytes"] > 0
    trim(path, "mlp: wanda", tmp_path / "packed", pack="recipe")
    types = {n: p.type for n, p in packed.open(tmp_path / "packed").linears.items()}
    assert types["model.layers.0.self_attn.q_proj"] == "i4" and types["model.layers.0.mlp.up_proj"] == "f32"


def test_sizes_and_speed(tmp_path, capsys, monkeypatch):
    """What eval, inspect and bench say of it: its size is that of its files, its parameters those it stands for."""
    monkeypatch.setattr("trimtab.prove.proof.run_fresh", proof.answer)
    path = checkpoint("packed4", tmp_path)
    x = str(tmp_path / "x.safetensors")
    save_file(tiny.inputs("llama"), x)
    result = compare(path, tmp_path / "plain", (x,), 64, 32, speed=False)
    assert result["recovery"] == 1 and result["top1_agreement"] == 1
    assert result["after"]["bytes"] == (path / "model.safetensors").stat().st_size < result["before"]["bytes"]
    assert [result[k]["params"] for k in ("before", "after")] == [result["before"]["params"]] * 2
    assert result["after"]["nonzero"] == result["before"]["nonzero"]
    assert cli.main(["inspect", str(path), "--calib", x, "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["roles"]["attn.q"]["sites"] == 1
    timed = measure(Network.open(path), None, prompt=4, new=2, batch=1, repeats=1, seconds=0.1, ours=True)
    assert {"torch", "trimtab"} <= set(timed["before"]["runners"]) and timed["before"]["decode_tok_s"] > 0
    assert tt.load(path).module.config.model_type == "llama"


def test_shards(tmp_path):
    """A layer's tensors may lie in different files, and one that is missing from its file is named."""
    path = checkpoint("gptq", tmp_path)
    tensors, names = load_file(path / "model.safetensors"), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {n: names[n.endswith((".scales", "norm.weight"))] for n in tensors}
    for file in names:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, path / file)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert torch.equal(logits(load_module(path)), logits(load_module(tmp_path / "plain")))
    lost = "model.layers.0.mlp.up_proj.scales"
    save_file({n: t for n, t in tensors.items() if where[n] == names[1] and n != lost}, path / names[1])
    with pytest.raises(BadInput, match=r"up_proj: its tensor scales is missing"):
        Checkpoint.open(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [k for k in KINDS if "gptq" not in k])
def test_another_program_decodes_the_same(kind):
    """compressed-tensors itself: its own layouts, and AWQ, which it converts."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    gen = torch.Generator().manual_seed(3)
    mine, means = made(kind, torch.randn(64, 96, generator=gen), gen)
    if kind == "awq":
        given = {f"a.{k}": t.clone() for k, t in mine.items()}
        mine = {k.removeprefix("a."): t for k, t in AutoAWQConverter.from_autoawq_config(says(kind)).process(given).items()}
    grouped = kind in ("awq", "packed4", "packed4_asym")
    args = QuantizationArgs(num_bits=4 if grouped else 8, type="float" if "float" in kind else "int", group_size=16 if grouped else None,
                            symmetric=kind != "awq" and "asym" not in kind,
                            strategy="group" if grouped else "tensor" if "tensor" in kind else "channel")
    form = says(kind).get("format", "pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    got = BaseCompressor.get_value_from_registry(form).decompress({**mine, "weight_scale": mine["weight_scale"].float()}, scheme)
    assert torch.equal(got["weight"], means)


def test_ours_come_back_as_they_went(tmp_path, no_proof):
    """What is written as compressed-tensors opens here with the weights of the directory it was made from."""
    tiny.save("llama", tmp_path / "plain", dtype=torch.bfloat16)
    trim(tmp_path / "plain", "rtn(bits=4,group=16,asymmetric=true)", tmp_path / "out")
    write(tmp_path / "out", tmp_path / "ct")
    plain, again = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tmp_path / "ct")
    assert len(again.quantized) == 14 and all(torch.equal(plain.read(n), again.read(n)) for n in plain.tensors)


def broken(path: Path, **changes: Any) -> None:
    """The tensors of a layer replaced, or removed where they are None; `says` changes config.json."""
    change(path, **changes.pop("says", {}))
    tensors = load_file(path / "model.safetensors")
    for part, t in changes.items():
        name = f"model.layers.0.self_attn.k_proj.{part}"
        tensors = {n: x for n, x in tensors.items() if n != name} | ({} if t is None else {name: t})
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


I32 = torch.int32
DAMAGED: list[tuple[str, dict[str, Any], str]] = [
    ("gptq", {"scales": None}, r"layer model\.layers\.0\.self_attn\.k_proj: its tensor scales is missing"),
    ("gptq", {"qweight": None}, "its tensor qweight is missing"),
    ("gptq", {"qzeros": torch.zeros(2, 3, dtype=I32)}, r"its tensor qzeros is int32 \[2, 3\], and int32 \[2, 2\] is wanted"),
    ("gptq", {"scales": torch.ones(2, 15)}, r"its tensor scales is float32 \[2, 15\]"),
    ("gptq", {"scales": torch.ones(5, 16).half(), "qzeros": torch.zeros(5, 2, dtype=I32)}, "5 groups, which do not divide its 32 inputs"),
    ("gptq", {"qweight": torch.zeros(5, 16, dtype=I32)}, r"its qweight \[5, 16\] holds no codes"),
    ("gptq", {"qweight": torch.zeros(4, 16)}, r"its tensor qweight is float32 \[4, 16\]"),
    ("gptq", {"g_idx": torch.full((32,), 2, dtype=I32)}, "names groups from 2 to 2, and there are 2"),
    ("gptq", {"g_idx": torch.tensor(0, dtype=I32)}, r"its tensor g_idx is int32 \[\]"),
    ("gptq", {"scales": torch.full((2, 16), torch.nan)}, "NaN"),
    ("gptq", {"says": {"checkpoint_format": "marlin"}}, "gptq in the layout marlin; trimtab reads"),
    ("gptq", {"says": {"quant_method": "bitsandbytes"}}, "it was quantised with bitsandbytes; trimtab reads"),
    ("gptq", {"says": {"quant_method": "awq"}}, r"its tensor scales is|its tensor qweight|do not divide|is wanted"),
    ("awq", {"says": {"version": "gemv"}}, "awq in the layout gemv"),
    ("awq", {"says": {"bits": 3}}, "awq stores codes of 4 bits, and config.json says 3"),
    ("awq", {"qzeros": None}, "its tensor qzeros is missing"),
    ("packed4", {"weight_scale": None}, "its tensor weight_scale is missing"),
    ("packed4", {"weight_shape": torch.tensor([16, 99])}, r"holds no codes of 8, 4, 3 or 2 bits of \[16, 99\]"),
    ("packed4", {"weight_packed": None}, r"self_attn\.k_proj\.weight .* is missing"),
    ("packed4", {"says": {"format": "nvfp4-pack-quantized"}}, "compressed-tensors as nvfp4-pack-quantized"),
    ("packed4", {"says": {"sparsity_config": {"format": "sparse-24-bitmask"}}}, "sparse-24-bitmask sparsity"),
    ("packed4", {"says": {"config_groups": [1]}}, "malformed"),
    ("int8", {"weight_scale": torch.ones(3, 1)}, r"its tensor weight_scale is float32 \[3, 1\], and float16 \[16, 1\] is wanted"),
    ("float8", {"weight": torch.full((16, 32), torch.nan).to(torch.float8_e4m3fn)}, "NaN"),
]


@pytest.mark.parametrize(("kind", "damage", "why"), DAMAGED)
def test_damage_is_one_line(tmp_path, kind, damage, why):
    path = checkpoint(kind, tmp_path)
    broken(path, **damage)
    with pytest.raises(BadInput, match=why) as e:
        net = Network.open(path)
        net.block(0)
    assert "\n" not in str(e.value)


def test_transposed_families_are_refused(tmp_path):
    """A square weight would be read the wrong way round, and nobody would see it."""
    path = tiny.save("gpt2", tmp_path / "gpt2")
    stored, tensors = "transformer.h.0.attn.c_proj", load_file(path / "model.safetensors")
    mine, _ = made("gptq", tensors.pop(f"{stored}.weight"), torch.Generator().manual_seed(0))
    save_file(tensors | {f"{stored}.{k}": t for k, t in mine.items()}, path / "model.safetensors", {"format": "pt"})
    change(path, **says("gptq"))
    with pytest.raises(BadInput, match="stored transposed"):
        Network.open(path)
