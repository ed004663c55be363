"""Packed layers inside transformers models: the same numbers, fewer bytes."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.core.pack import Format
from trimtab.core.spec import Step
from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import nearest
from trimtab.methods.factors import Factors
from trimtab.methods.format.bitmask import bitmask
from trimtab.methods.format.bsr import bsr
from trimtab.methods.format.dense import dense
from trimtab.methods.format.lowrank import lowrank
from trimtab.methods.format.nm import nm
from trimtab.methods.format.panels import TYPES
from trimtab.runtime import layouts, native
from trimtab.runtime.modules import PackedLinear, pack_linears
from trimtab.runtime.native import Linear, Mlp, kind


def weight(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("thin, want", [
    (lambda w: w, "dense"),
    (lambda w: w * (weight(*w.shape, 1) > 0.5), "bitmask"),
    (lambda w: w * (weight(w.shape[0], w.shape[1] // 4 * 4, 1).reshape(-1, 4).argsort(-1) < 2).reshape(w.shape), "nm"),
    (lambda w: w * (weight(2, 4, 1) > 0.3).repeat_interleave(32, 0).repeat_interleave(32, 1), "bsr"),
])
def test_the_smallest_layout_is_chosen_and_loses_nothing(thin, want):
    for dtype in TYPES:
        w = thin(weight(64, 128)).to(dtype)
        packed = layouts.smallest(w)
        assert packed.format == want and torch.equal(layouts.restored(packed), w)
        others = [f(Change(w)) for f in (dense, bitmask, bsr, *([nm] if want == "nm" else []))]
        assert packed.nbytes <= min(p.nbytes for p in others) + 128


def test_few_single_weights_lie_in_steps_and_many_have_a_bit_each():
    w = weight(64, 96)
    for threshold, want in ((1.0, "format/sell"), (0.0, "format/bitmask")):  # 16 % and half are kept
        change = Change(w * (weight(64, 96, 1) > threshold))
        assert Format(Step("format/bitmask")).of(change) == Step(want)
        assert Format(Step("format/bitmask"), named=True).of(change) == Step("format/bitmask")
        assert Format(Step("format/nm")).of(change) == Step("format/nm")
        assert Format(Step("format/bitmask")).of(nearest(change.w, 8).change()) == Step("format/bitmask")  # steps hold no codes


def test_a_packed_layer_computes_what_the_layer_did():
    layer = nn.Linear(96, 64)
    for bias in (layer.bias.detach(), None):
        ours = PackedLinear(dense(Change(layer.weight.detach())), bias)
        x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(ours(x), nn.functional.linear(x, layer.weight, bias), rtol=1e-5, atol=1e-5)
        assert ours(x.bfloat16()).dtype == torch.bfloat16 and ours(x[:0]).shape == (0, 5, 64)
    assert "dense f32" in repr(ours)


def test_a_layer_of_factors_runs_them_in_turn(monkeypatch):
    for dtype in TYPES:
        factors = Factors(weight(64, 12), weight(12, 96, 1)).to(dtype)
        p, w, bias = lowrank(factors.change()), factors.weight(), weight(1, 64, 3)[0]
        assert torch.equal(layouts.restored(p), w)
        ours, x = PackedLinear(p, bias), torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(2))
        assert f"64, lowrank {p.type}" in repr(ours) and ours.linear.weight_bytes == p.nbytes and kind(p) == f"lowrank {p.type} (rank 12)"
        want = nn.functional.linear(x, w, bias)
        torch.testing.assert_close(ours(x), want, rtol=1e-5, atol=1e-4)
        assert ours(x.bfloat16()).dtype == torch.bfloat16 and ours(x[:0]).shape == (0, 5, 64)
        for name in ours.linear.kernels:
            assert float((ours.linear(x, name) + bias - want).norm() / want.norm()) < (1e-2 if "linear_bf16" in name else 1e-6), name
        with pytest.raises(BadInput, match="takes 96"):
            ours(x[..., :95])
        if ours.linear.kernels:
            with pytest.raises(BadInput, match="made of others"):
                Mlp(None, ours.linear, Linear(dense(Change(weight(96, 64)))), "silu")
        with monkeypatch.context() as m:
            m.setattr(native, "core", lambda: None)
            with pytest.warns(native.RunsInTorch) as said:
                plain = PackedLinear(p, bias)
            assert len({str(s.message) for s in said}) == 1 and not plain.linear.kernels
            torch.testing.assert_close(plain(x), want, rtol=1e-5, atol=1e-4)


def test_a_packed_model_says_what_the_model_says(tiny_lm):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32).eval()
    packed = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32).eval()
    names = [n for n, m in plain.named_modules() if type(m) is nn.Linear and ".layers." in n]
    with torch.no_grad():
        for model in (plain, packed):
            for n in names[::2]:
                model.get_submodule(n).weight.mul_(model.get_submodule(n).weight.abs() > 0.02)
    size = pack_linears(packed, names, torch.bfloat16)
    assert 0 < size < sum(2 * plain.get_submodule(n).weight.numel() for n in names)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="Embedding"):
        pack_linears(packed, ["model.embed_tokens"], torch.bfloat16)
    packed.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(BadInput, match=r"lm_head: .*finite"):
        pack_linears(packed, ["lm_head"], torch.bfloat16)


def test_what_no_kernel_takes_runs_in_torch_and_says_so_once():
    w = weight(48, 64) * (weight(48, 64, 1).reshape(-1, 16).argsort(-1) < 4).reshape(48, 64)
    tall = (weight(64, 48) * (weight(48, 64, 1).reshape(-1, 4).argsort(-1) < 2).reshape(48, 64).T)
    x = weight(3, 64, 2)
    codes = nearest(w, 4, 32).change(w != 0)
    for p, told in ((nm(Change(w), n=4, m=16), "4:16 along the input"), (nm(Change(tall), dim="out"), "2:4 along the output"),
                    (nm(codes, n=4, m=16), "4:16 along the input, groups of 32")):
        with pytest.warns(UserWarning, match=f"{told}.*saves bytes, not time") as said:
            layer = PackedLinear(p)
        assert len(said) == 1
        torch.testing.assert_close(layer(x[:, :p.shape[1]]), x[:, :p.shape[1]] @ layouts.restored(p).T)
    assert torch.equal(layouts.restored(p), codes.w)
