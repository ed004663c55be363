"""The residual stream in its principal directions: exact as it is, and where channels go in front of `channel`."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.line.test_families import plain, stream
from tests.line.test_structure import trim
from tests.line.test_wiring import proof_in_this_process, ready, saved, without  # noqa: F401  (fixtures)
from trimtab.network.stream import Network

TURNED = ("llama", "llama_tied", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("name", TURNED)
def test_a_turned_stream_computes_the_same_everywhere(saved, name, tmp_path, ready, capsys):
    path, batch = saved(name), tiny.inputs(name)
    code, result, err = trim(capsys, path, "principal", tmp_path / "out", ready(name))
    assert code == 0, err
    want = stream(Network.open(path), batch)
    torch.testing.assert_close(stream(Network.open(tmp_path / "out"), batch), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain(tmp_path / "out", batch), want, atol=1e-5, rtol=1e-5)
    assert result["structure"] == [{"turned": 32, **({"untied": True} if Network.open(path).tied_head else {})}]
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert all(bool((t == 1).all()) for n, t in held.items() if n.endswith(("layernorm.weight", "model.norm.weight")))


def test_a_turned_stream_without_a_sublayer_and_in_bfloat16(saved, tmp_path, ready, capsys):
    path = without(saved("llama", dtype=torch.bfloat16), tmp_path / "cut", 1)
    batch = tiny.inputs("llama")
    code, _, err = trim(capsys, path, "principal", tmp_path / "out", ready("llama"))
    assert code == 0, err
    small = Network.open(tmp_path / "out")
    assert not [s for s in small.sites_of(1) if s.group == "attn"]
    want = stream(Network.open(path), batch)
    assert float((stream(small, batch) - want).abs().max()) <= 1e-2 * float(want.abs().max())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_channels_that_carry_nothing_go_from_a_turned_stream(saved, name, tmp_path, ready, capsys):
    """Of 32 channels the stream is in 24 directions, none of them a channel: with these alone it computes the same."""
    path, gen = tmp_path / "flat", torch.Generator().manual_seed(3)
    path.mkdir()
    for f in saved(name).iterdir():
        (path / f.name).write_bytes(f.read_bytes())
    held = load_file(path / "model.safetensors")
    project = torch.linalg.qr(torch.randn(32, 24, generator=gen))[0]
    project = project @ project.T
    for n, t in held.items():
        if n.endswith("embed_tokens.weight"):
            held[n] = t @ project
        elif n.endswith(("o_proj.weight", "down_proj.weight")):
            held[n] = project @ t
    save_file(held, path / "model.safetensors", {"format": "pt"})
    code, _, err = trim(capsys, path, "principal ; channel(keep=0.75,multiple=1) | activation", tmp_path / "out", ready(name))
    assert code == 0, err
    small, batch = Network.open(tmp_path / "out"), tiny.inputs(name)
    assert small.config.hidden_size == 24
    torch.testing.assert_close(plain(tmp_path / "out", batch), plain(path, batch), atol=1e-4, rtol=1e-4)


def test_slicegpt_loses_less_than_channels_as_they_are(tiny_lm, calib, tmp_path, capsys):
    found = {}
    for recipe in ("slicegpt", "channel | activation"):
        code, result, err = trim(capsys, tiny_lm, recipe, tmp_path / "out", calib, "--keep", "0.7", "--force")
        assert code == 0, err
        found[recipe] = result["after"]["perplexity"]
        before = result["before"]["perplexity"]
    assert abs(found["slicegpt"] - before) < abs(found["channel | activation"] - before)
