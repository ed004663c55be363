"""Keys and values in codes, against a few lines of torch that round the same pages in the same way."""
from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.runtime.test_decoder import LONG, NET, VOCABULARY, Net, ids_of
from trimtab.core.types import BadInput, Failed
from trimtab.runtime import native

pytestmark = pytest.mark.skipif(not native.core(), reason="the native kernels were not built")

PAGE = 128
BITS = {"i8": 8, "i4": 4}
IDS = ids_of(400, seed=1, most=VOCABULARY)  # three full pages
ROPE = {"inverse_frequencies": [1.0, 0.5, 0.2, 0.1, 0.03, 0.01], "scaling": 1.1, "style": "half"}
# heads, key heads, width of a head, and what else
SHAPES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "64": (2, 2, 64, {}), "80, shared": (4, 2, 80, {"rope": ROPE}), "128, shared": (3, 1, 128, {"rope": ROPE}),
    "7": (3, 3, 7, {}), "64, a window inside a page": (2, 1, 64, {"window": 40, "rope": ROPE}),
    "36, a window over pages": (4, 2, 36, {"window": 200}), "64, a window of one": (2, 1, 64, {"window": 1}),
    "64, biases, norms": (2, 1, 64, {"biased": True, "q_norm": 64, "k_norm": 64, "rope": ROPE}),
}


def coded(x: Tensor, bits: int, dim: int) -> Tensor:
    """What is left of x when what lies along `dim` shares scale * (base + code), the scale in bfloat16 and the base whole."""
    x, top = x.float(), 2**bits - 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = torch.maximum((high - low) / top, x.abs().amax(dim, keepdim=True) / 32000).bfloat16().float()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    base = (low * inverse).round()
    return (scale * (base + ((x * inverse).round() - base).clamp(0, top))).double()


class Coded(Net):
    """Attention alone, over full pages in codes and the page of the position itself as it is."""

    def __init__(self, name: str, bits: int):
        super().__init__(5)
        heads, kv, width, more = SHAPES[name]
        self.bits, self.description["layers"] = bits, [[self.attention(heads, kv, width, **more)]]

    def sublayer(self, s: dict[str, Any], x: Tensor) -> Tensor:
        d, n = s["head_dim"], len(x)
        q, k, v = (self.apply(s[r], self.normed(s["norm"], x)).view(n, -1, d) for r in "qkv")
        q, k = (self.normed(s[f"{r}_norm"], t) if f"{r}_norm" in s else t for r, t in (("q", q), ("k", k)))
        q, k = self.turned(s.get("rope"), q), self.turned(s.get("rope"), k)
        full = n // PAGE * PAGE
        pages = k[:full].unflatten(0, (-1, PAGE))
        old_k, old_v = torch.cat([coded(pages, self.bits, 1).flatten(0, 1), k[full:]]), coded(v, self.bits, -1)
        if not self.bits:
            old_k, old_v = k, v
        at = torch.arange(n)
        own, behind = at[:, None] // PAGE == at // PAGE, at[:, None] - at
        k, old_k, v, old_v = (t.repeat_interleave(s["heads"] // s["kv_heads"], 1) for t in (k, old_k, v, old_v))
        scores = torch.where(own, torch.einsum("qhd,khd->hqk", q, k), torch.einsum("qhd,khd->hqk", q, old_k)) * d**-0.5
        a = scores.masked_fill((behind < 0) | (behind >= s.get("window", n)), -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", a * own, v) + torch.einsum("hqk,khd->qhd", a * ~own, old_v)
        return self.apply(s["o"], mixed.reshape(n, -1))


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("cache", BITS)
@pytest.mark.parametrize("name", SHAPES)
def test_pages_of_codes_are_what_torch_makes_of_them(name, cache):
    net = Coded(name, BITS[cache])
    want, decoder = net.logits(IDS), net.decoder()
    net.bits = 0
    cost = off(net.logits(IDS), want)
    assert (cost > 1e-4) == (name != "64, a window of one")
    for isa in native.isas():
        for narrowest in ("f32", "bf16"):
            session = native.core().Session(decoder._core, 1, narrowest, 2, isa=isa, cache=cache)
            got = torch.full((len(IDS), VOCABULARY), float("nan"))
            session.feed([IDS], got)
            # A key between two codes may fall to either side.
            assert off(got, want) < (cost / 50 + 1e-6 if narrowest == "f32" else 2e-2), isa


@pytest.mark.parametrize("cache", BITS)
def test_what_is_fed_together_changes_nothing(cache):
    decoder = NET.decoder(cache=cache)  # several layers, a window of 40
    want = decoder.logits(IDS, chunk=len(IDS))
    assert not torch.equal(want, decoder.logits(IDS, cache="f32"))
    for chunk in (1, 7, 128, 129, 256):
        assert torch.equal(decoder.logits(IDS, chunk=chunk), want)
    prompts = [LONG[:5], LONG[5:140], IDS[:300], LONG[100:131]]
    alone = [list(decoder.generate(p, 12)) for p in prompts]
    for chunk in (3, 256):
        rows = list(decoder.generate_batch(prompts, 12, chunk=chunk))
        assert [list(column) for column in zip(*rows, strict=True)] == alone
    session = native.core().Session(decoder._core, 1, "f32", 1, cache=cache)
    one = torch.empty(1, VOCABULARY)
    for i in range(270):
        session.feed([IDS[i:i + 1]], one)
        assert torch.equal(one[0], want[i])


def test_floats_are_those_of_always():
    decoder = NET.decoder()
    for narrowest, same, other in (("f32", "f32", "bf16"), ("bf16", "bf16", "f32")):
        want = decoder.logits(LONG, narrowest=narrowest)
        assert torch.equal(decoder.logits(LONG, narrowest=narrowest, cache=same), want)
        assert not torch.equal(decoder.logits(LONG, narrowest=narrowest, cache=other), want)
    assert torch.equal(NET.decoder(cache="bf16").logits(LONG), decoder.logits(LONG, cache="bf16"))


@pytest.mark.parametrize(("cache", "narrowest"), [("f32", "bf16"), ("bf16", "f32"), ("i8", "f32"), ("i4", "f32"), ("i4", "bf16")])
@pytest.mark.parametrize(("kv", "width", "window"), [(2, 64, 0), (1, 80, 150), (3, 7, 0)])
def test_a_session_holds_the_bytes_it_says(cache, narrowest, kv, width, window):
    net = Net(1)
    net.description["layers"] = [[net.attention(kv, kv, width, **({"window": window} if window else {}))]]
    session = native.core().Session(net.decoder()._core, 2, narrowest, 1, cache=cache)
    session.feed([IDS[:100], IDS[:300]])
    bits, panels = BITS.get(cache, 0), -(-width // 32) * 32
    size = 4 if (narrowest if bits else cache) == "f32" else 2
    floats = kv * PAGE * (-(-width // 2) * 2 + panels) * size
    channels = -(-width // 16) * 16
    codes = kv * -(-(PAGE * (channels + panels) * bits // 8 + (channels + PAGE) * 4) // 64) * 64  # and a grid of four bytes each
    full = 1 if window else 2  # the first page is behind the window
    assert session.held == (2 * floats + full * codes if bits else (2 + full) * floats)
    if bits and width > 7:
        assert codes < floats * bits / 8 / size * 1.12


@pytest.mark.parametrize("cache", ["f32", "bf16", *BITS])
def test_a_key_that_is_not_finite_ends_it(cache):
    net = Net(2)
    net.tensors["table"][:, 0] = 0
    net.tensors["table"][7, 0] = 9.0
    net.description["layers"] = [[net.attention(2, 1, 16)]]
    net.weights[net.description["layers"][0][0]["k"]][:, 0] = 3e38
    prompt = IDS[:200][IDS[:200] != 7]
    assert len(list(net.decoder(cache=cache).generate(prompt, 1))) == 1
    prompt[20] = 7
    with pytest.raises(Failed, match="not finite"):
        list(net.decoder(cache=cache).generate(prompt, 1))


@pytest.mark.parametrize("cache", BITS)
def test_what_is_the_same_everywhere_loses_nothing(cache):
    """Channels of one value, however large or small, and heads of zeros."""
    net = Net(3)
    layer = net.attention(2, 1, 16, biased=True)
    net.description["layers"] = [[layer]]
    for r, size in (("k", 1e4), ("v", 1e-8)):
        net.weights[layer[r]["linear"]][:] = 0
        net.tensors[layer[r]["bias"]] = torch.randn(16, generator=net.gen).sign() * size
    decoder = net.decoder()
    assert off(decoder.logits(IDS, cache=cache), decoder.logits(IDS).double()) < 1e-5
    net.tensors[layer["v"]["bias"]][:] = 0
    assert torch.equal(net.decoder().logits(IDS, cache=cache), net.decoder().logits(IDS))


def test_an_offset_costs_a_channel_nothing():
    """Keys of Qwen2 stand off zero by many times what they vary."""
    net = Net(4)
    layer = net.attention(2, 1, 64, biased=True)
    net.description["layers"] = [[layer]]
    costs = []
    for size in (0.0, 100.0):
        net.tensors[layer["k"]["bias"]] = size * torch.randn(64, generator=net.gen)
        decoder = net.decoder()
        costs.append(off(decoder.logits(IDS, cache="i8"), decoder.logits(IDS).double()))
    assert 0 < costs[1] < 3 * costs[0]


# ---- what is asked for --------------------------------------------------------------------------
def test_a_cache_is_asked_for_by_its_name(capsys, tiny_lm, tmp_path):
    import trimtab as tt
    from trimtab.cli import main

    for cache in ("i2", "int8", "f64"):
        with pytest.raises(BadInput, match=f"kept as f32, bf16, i8 or i4, not {cache}"):
            NET.decoder().generate([1], cache=cache)
    handle = tt.load(tiny_lm)
    said = {c: "".join(handle.generate("def f(", 20, cache=c)) for c in ("", "f32", "bf16", "int8", "int4")}
    assert said[""] == said["f32"] == said["int4"]  # no page is full
    with pytest.raises(BadInput, match="cache 'i8' is not one of f32, bf16, int8, int4"):
        handle.generate("def f(", cache="i8")
    assert main(["generate", str(tiny_lm), "def f(", "--max-new-tokens", "20", "--cache", "int4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == said["int4"]
    for command in (["generate", str(tiny_lm), "x"], ["bench", str(tiny_lm)]):
        with pytest.raises(SystemExit) as e:
            main([*command, "--cache", "int3"])
        out, err = capsys.readouterr()
        assert e.value.code == 2 and out == "" and "int3" in err and err.count("\n") == 1
    path = tiny.save("gpt2", tmp_path, vocab_size=4096)
    with pytest.raises(BadInput, match="cache int8 is of the native decoder"):
        tt.load(path).generate("x", cache="int8")
    assert main(["bench", str(path), "--cache", "int8"]) == 2 and "cache int8 is of the native" in capsys.readouterr().err


def test_bench_times_a_cache_in_our_decoder_alone(capsys, tiny_lm, tmp_path):
    from trimtab.cli import main

    rows = tmp_path / "rows.jsonl"
    assert main(["bench", str(tiny_lm), "--cache", "int8", "--prompt", "8", "--new", "4", "-o", str(rows), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["cache"] == "int8" and list(said["before"]["runners"]) == ["trimtab"]
    assert all(json.loads(r)["setting"].endswith(", cache int8") for r in rows.read_text().splitlines())
