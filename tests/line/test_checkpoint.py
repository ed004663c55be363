"""Checkpoint directories: read as they are, written as they were, refused in one line when damaged."""
from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from trimtab.core.types import BadInput
from trimtab.network import checkpoint
from trimtab.network.checkpoint import Checkpoint, SafeFile, write_like, write_safetensors

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.fixture
def one(tmp_path) -> Path:
    return tiny.save("llama", tmp_path / "one", dtype=torch.bfloat16)


@pytest.fixture
def many(tmp_path) -> Path:
    return tiny.save("llama", tmp_path / "many", shard="20KB")


def header(path: Path) -> dict:
    raw = path.read_bytes()
    return json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])


def rewrite(path: Path, change) -> None:
    """Change the header of a file and leave the data as it is."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8:8 + n])
    change(head)
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n:])


def test_reads_every_dtype_in_memory_of_its_own(tmp_path):
    gen = torch.Generator().manual_seed(0)
    want = {str(d): torch.randint(0, 2, (3, 5), generator=gen).to(d) for d in FLOATS + OTHERS}
    want |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(3.5)}
    write_safetensors(tmp_path / "f.safetensors", {n: (t.dtype, t.shape) for n, t in want.items()}, want.__getitem__, {"note": "n"})
    assert {n: (t.dtype, t.shape) for n, t in load_file(tmp_path / "f.safetensors").items()} \
        == {n: (t.dtype, t.shape) for n, t in want.items()}  # as the library reads it
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(tmp_path / "g.safetensors", {"scalar": (torch.float64, ())}, want.__getitem__, {})
    f = SafeFile(tmp_path / "f.safetensors")
    assert set(f.names) == set(want) and f.metadata == {"note": "n"}
    for name, t in want.items():
        got = f.read(name)
        assert got.dtype == t.dtype and got.shape == t.shape
        assert got.contiguous().view(-1).view(torch.uint8).equal(t.contiguous().view(-1).view(torch.uint8)), name
    got = f.read("torch.float32")
    got.fill_(7)
    assert torch.equal(f.read("torch.float32"), want["torch.float32"])


@pytest.mark.parametrize("which", ["one", "many"])
def test_opens_and_reads_what_safetensors_reads(which, request):
    path = request.getfixturevalue(which)
    c = Checkpoint.open(path)
    assert len(c.files) == (1 if which == "one" else len(list(path.glob("model-*.safetensors"))))
    assert c.config["model_type"] == "llama"
    assert c.weight_bytes == sum(f.stat().st_size for f in path.glob("*.safetensors"))
    want = {n: t for f in c.files for n, t in load_file(f).items()}
    assert set(c.tensors) == set(want) and all(torch.equal(c.read(n), t) for n, t in want.items())
    for f in c.files:
        begins = [e.begin for e in c.tensors.values() if e.file == f]
        assert begins == sorted(begins)


@pytest.mark.parametrize("which", ["one", "many"])
@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_an_unchanged_copy_is_equal_byte_for_byte(which, chunk, request, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK", chunk)
    path = request.getfixturevalue(which)
    (path / "sub" / "deep").mkdir(parents=True)
    (path / "sub" / "deep" / "x.json").write_text("{}")
    (path / ".cache").mkdir()
    for name in ("pytorch_model.bin", ".hidden", ".cache/y.txt", "consolidated.safetensors", "model.onnx"):
        (path / name).write_bytes(b"12345678")
    write_like(Checkpoint.open(path), tmp_path / "copy", lambda name: None)
    copied = {str(p.relative_to(tmp_path / "copy")): p.read_bytes() for p in (tmp_path / "copy").rglob("*") if p.is_file()}
    want = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    for name in ("pytorch_model.bin", ".hidden", ".cache/y.txt", "consolidated.safetensors", "model.onnx"):
        del want[name]
    assert copied == want and "sub/deep/x.json" in copied


def test_replaced_tensors_keep_name_place_and_dtype(one, tmp_path):
    c = Checkpoint.open(one)
    name = "model.layers.1.mlp.down_proj.weight"
    new = torch.randn(c.tensors[name].shape, generator=torch.Generator().manual_seed(3))
    write_like(c, tmp_path / "out", lambda n: new if n == name else None)
    d = Checkpoint.open(tmp_path / "out")
    assert {n: (e.dtype, e.shape, e.begin, e.end) for n, e in d.tensors.items()} == {
        n: (e.dtype, e.shape, e.begin, e.end) for n, e in c.tensors.items()} and list(d.tensors) == list(c.tensors)
    for n in c.tensors:
        assert torch.equal(d.read(n), new.bfloat16() if n == name else c.read(n))
    with pytest.raises(ValueError, match="down_proj"):
        write_like(c, tmp_path / "bad", lambda n: new.T if n == name else None)


def test_digest_sees_weights_and_config(one, tmp_path):
    first = Checkpoint.open(one).check(())
    assert first == Checkpoint.open(one).check(())
    (one / "notes.txt").write_text("not part of the model")
    assert Checkpoint.open(one).check(()) == first
    raw = bytearray((one / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (one / "model.safetensors").write_bytes(raw)
    second = Checkpoint.open(one).check(())
    (one / "config.json").write_text((one / "config.json").read_text() + "\n")
    assert len({first, second, Checkpoint.open(one).check(())}) == 3


@pytest.mark.parametrize("dtype, bad", [(d, b) for d in FLOATS for b in ("nan", "inf", "-inf")
                                        if b == "nan" or d != torch.float8_e4m3fn])  # which has no inf
def test_finite_finds_one_bad_entry_and_only_that(tmp_path, monkeypatch, dtype, bad):
    monkeypatch.setattr(checkpoint, "CHUNK", 64)
    (tmp_path / "config.json").write_text("{}")
    big = torch.full((9, 9), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)  # its sum overflows
    t = torch.ones(9, 9).to(dtype)
    t.view(-1)[80] = float(bad)
    save_file({"big": big, "t": t, "i": torch.ones(3, dtype=torch.int64)}, tmp_path / "model.safetensors")
    c = Checkpoint.open(tmp_path)
    c.check(["big", "i"])
    with pytest.raises(BadInput, match=r"tensor t of .* NaN or inf"):
        c.check(["big", "t"])


# ---- damage -----------------------------------------------------------------------------------
def set_config(text):
    return lambda p: (p / "config.json").write_text(text)


def set_weights(data):
    return lambda p: (p / "model.safetensors").write_bytes(data((p / "model.safetensors").read_bytes()))


def set_header(change):
    return lambda p: rewrite(p / "model.safetensors", change)


def _overlap(head):
    a, b = [k for k in head if k != "__metadata__"][:2]
    size = head[b]["data_offsets"][1] - head[b]["data_offsets"][0]
    begin = head[a]["data_offsets"][0] + 2
    head[b]["data_offsets"] = [begin, begin + size]


def _alter(field, value):
    def change(head):
        head[next(k for k in head if k.endswith("down_proj.weight"))][field] = value
    return change


def only_pickle(p):
    (p / "model.safetensors").unlink()
    (p / "pytorch_model.bin").write_bytes(b"x")


@pytest.mark.parametrize("harm, words", [
    (lambda p: (p / "config.json").unlink(), "has no config.json"),
    (set_config("{"), "config.json is not JSON"),
    (set_config("[]"), "not a JSON object"),
    (lambda p: (p / "model.safetensors").unlink(), "has no weights"),
    (only_pickle, r"holds only pickles \(pytorch_model.bin\); .*safe_serialization=True"),
    (set_weights(lambda b: b[:-10]), "truncated: tensor"),
    (set_weights(lambda b: b[:50]), "truncated: its header"),
    (set_weights(lambda b: b[:4]), "truncated"),
    (set_weights(lambda b: b""), "truncated"),
    (set_weights(lambda b: struct.pack("<Q", 1 << 60) + b[8:]), "truncated: its header"),
    (set_weights(lambda b: b[:8] + b"{" * 20 + b[28:]), "header is not JSON"),
    (set_weights(lambda b: b[:8] + b"\xff" * 20 + b[28:]), "header is not JSON"),
    (set_weights(lambda b: struct.pack("<Q", 100_000) + b"[" * 100_000), "header is not JSON"),
    (set_config("[" * 100_000), "config.json is not JSON"),
    (set_header(lambda h: h.update(none={"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]})), "tensor none is malformed"),
    (set_weights(lambda b: b + b"more"), "4 bytes follow"),
    (set_header(_overlap), "overlaps"),
    (set_header(lambda h: h.pop(next(k for k in h if k.endswith("down_proj.weight")))), "gap"),
    (set_header(_alter("dtype", "F32")), "takes .* bytes, F32 .* would take"),
    (set_header(_alter("dtype", "Q4")), "dtype Q4; trimtab reads"),
    (set_header(_alter("shape", [1, 2])), "would take"),
    (set_header(_alter("shape", [-1, 2])), "malformed"),
    (set_header(_alter("data_offsets", [0])), "malformed"),
], ids=lambda x: None if callable(x) else x[:20])
def test_damage_is_one_clear_line(one, harm, words):
    harm(one)
    with pytest.raises(BadInput, match=words) as e:
        Checkpoint.open(one)
    assert len(str(e.value).splitlines()) == 1 and str(one) in str(e.value)


def test_missing_directory_and_file_in_place_of_one(tmp_path):
    with pytest.raises(BadInput, match="missing"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "f").write_text("x")
    with pytest.raises(BadInput, match="not a directory"):
        Checkpoint.open(tmp_path / "f")


def edit_index(path: Path, change) -> None:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    change(index)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("harm, words", [
    (lambda p: sorted(p.glob("model-*"))[1].unlink(), "shard model-00002.* is missing"),
    (lambda p: edit_index(p, lambda i: i["weight_map"].update(ghost="model-00001" + next(p.glob("model-00001*")).name[11:])),
     "tensor ghost is missing from .*model-00001"),
    (lambda p: edit_index(p, lambda i: i["weight_map"].update({"lm_head.weight": "../x.safetensors"})), "weight_map"),
    (lambda p: edit_index(p, lambda i: i.pop("weight_map")), "weight_map"),
    (lambda p: save_file(load_file(sorted(p.glob("model-0*"))[0]), sorted(p.glob("model-0*"))[1]), "is in both"),
], ids=["shard", "ghost", "path", "no map", "twice"])
def test_damaged_shards_are_one_clear_line(many, harm, words):
    harm(many)
    with pytest.raises(BadInput, match=words) as e:
        Checkpoint.open(many)
    assert len(str(e.value).splitlines()) == 1
