"""`trimtab export`: where it writes, what it replaces, and what it refuses in one line."""
from __future__ import annotations

import json
import shutil
import sys

import pytest

import trimtab as tt
from tests.tiny import save
from trimtab import cli
from trimtab.core.types import BadInput
from trimtab.export import publish
from trimtab.network.checkpoint import read_json


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.main(["export", *map(str, argv)])
    return code, *capsys.readouterr()


def refused(capsys, folder, *argv: object) -> str:
    """The one line that says why; nothing in `folder` changed."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    code, out, err = run(capsys, *argv, "-q")
    assert code == 2 and not out and err.count("\n") == 1, err
    assert sorted(folder.rglob("*")) == before
    return err


def test_a_file_or_a_directory(capsys, tiny_lm, tmp_path):
    """A name with the format's ending is one file, any other a directory with the file and what it was made from."""
    code, out, err = run(capsys, tiny_lm, "--to", "gguf", "-o", tmp_path / "new" / "m.gguf", "--json")
    result = json.loads(out)
    assert code == 0 and err == "export to gguf\n"
    assert (tmp_path / "new" / "m.gguf").stat().st_size == result["bytes"] and result["files"] == ["m.gguf"]
    code, out, err = run(capsys, tiny_lm, "--to", "gguf", "-o", tmp_path / "d", "-q")
    assert code == 0 and not err and "written: " in out
    assert (tmp_path / "d" / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert read_json(tmp_path / "d" / "trimtab.json")["export"]["to"] == "gguf"
    assert {p.name for p in tmp_path.iterdir()} == {"new", "d"}


def test_force_replaces_and_nothing_else_does(capsys, tiny_lm, trimmed, tmp_path):
    file, folder = tmp_path / "m.gguf", tmp_path / "d"
    for out in (file, folder):
        tt.export(tiny_lm, "gguf", out)
        before = (out if out == file else folder / "model.gguf").read_bytes()
        assert "exists" in refused(capsys, tmp_path, tiny_lm, "--to", "gguf", "-o", out)
        assert run(capsys, tiny_lm, "--to", "gguf", "--type", "q8_0", "-o", out, "--force", "-q")[0] == 0
        assert (out if out == file else folder / "model.gguf").read_bytes() != before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("x")
    assert "no output of trimtab" in refused(capsys, tmp_path, tiny_lm, "--to", "gguf", "-o", tmp_path / "other", "--force")
    (tmp_path / "e.gguf").mkdir()
    assert "is a directory" in refused(capsys, tmp_path, tiny_lm, "--to", "gguf", "-o", tmp_path / "e.gguf", "--force")
    assert "inside the input" in refused(capsys, tiny_lm, tiny_lm, "--to", "gguf", "-o", tiny_lm / "m.gguf")


def test_a_package_of_a_functions_name_is_the_function(tiny_lm, tmp_path):
    """Whether or not its modules were imported."""
    import trimtab.prove.proof

    for function in (tt.export, tt.prove):
        with pytest.raises(BadInput, match="missing"):
            function(*[tmp_path / "none", "gguf", tmp_path / "o"][: 3 if function is tt.export else 2])
    assert callable(trimtab.prove.proof.answer)


def test_what_a_failure_leaves(capsys, tiny_lm, tmp_path, monkeypatch):
    """The earlier output, and nothing else."""
    tt.export(tiny_lm, "gguf", tmp_path / "m.gguf")
    before = (tmp_path / "m.gguf").read_bytes()
    target = publish.module("gguf")

    def full(model, out, **_):
        (out / "model.gguf").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(target, "write", full)
    assert run(capsys, tiny_lm, "--to", "gguf", "-o", tmp_path / "m.gguf", "--force", "-q")[0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"] and (tmp_path / "m.gguf").read_bytes() == before


def test_what_is_refused(capsys, tiny_lm, trimmed, tmp_path, monkeypatch):
    out = tmp_path / "o"
    assert "compressed-tensors, gguf, onnx" in refused(capsys, tmp_path, tiny_lm, "--to", "ggml", "-o", out)
    assert "it has auto, f16" in refused(capsys, tmp_path, tiny_lm, "--to", "gguf", "--type", "q5_0", "-o", out)
    assert "missing" in refused(capsys, tmp_path, tmp_path / "none", "--to", "gguf", "-o", out)
    packed = trimmed("rtn(bits=8)", "--pack")
    assert "without --pack" in refused(capsys, tmp_path, packed, "--to", "gguf", "-o", out)
    shutil.copytree(tiny_lm, tmp_path / "other")
    config = read_json(tmp_path / "other" / "config.json") | {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert "it was quantised with fbgemm_fp8" in refused(capsys, tmp_path, tmp_path / "other", "--to", "gguf", "-o", out)
    monkeypatch.delitem(sys.modules, "trimtab.export.gguf", raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'trimtab[gguf]'" in refused(capsys, tmp_path, tiny_lm, "--to", "gguf", "-o", out)


def test_weights_that_are_no_longer_those_of_the_parts(capsys, trimmed, tmp_path):
    """One flipped byte is seen; without the parts the directory is an ordinary one."""
    model = tmp_path / "m"
    shutil.copytree(trimmed("rtn(bits=8,group=32)"), model)
    shard = sorted(model.glob("model-*.safetensors"))[0]
    whole = bytearray(shard.read_bytes())
    whole[-1] ^= 1
    shard.write_bytes(whole)
    assert f"{shard.name} is not the file" in refused(capsys, tmp_path, model, "--to", "gguf", "-o", tmp_path / "o")
    (model / "trimtab.safetensors").unlink()
    assert tt.export(model, "gguf", tmp_path / "o")["sites_as_codes"] == 0


@pytest.mark.parametrize(("family", "changes", "said"), [
    ("gpt2", {}, "GPT2LMHeadModel"), ("llama_classifier", {}, "LlamaForSequenceClassification"), ("llama", {"hidden_act": "gelu"}, "gelu"),
    ("qwen3", {"attention_bias": True}, "biases of k, o, q, v"),
    ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
])
def test_what_gguf_cannot_express(capsys, tmp_path, family, changes, said):
    save(family, tmp_path / "m", **changes)
    assert said in refused(capsys, tmp_path, tmp_path / "m", "--to", "gguf", "-o", tmp_path / "o")
