"""Gates in the runtime: the native ones decide as `Gate` does, and what runs behind them is the masked dense reference."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import Codes, nearest
from trimtab.methods.format.bitmask import bitmask
from trimtab.methods.format.columns import columns
from trimtab.methods.format.dense import dense
from trimtab.methods.format.nm import nm
from trimtab.methods.format.panels import Packed
from trimtab.methods.gates import EVERYTHING, HIDDEN, Gate, met_gated
from trimtab.runtime import layouts, native

native_only = pytest.mark.skipif(not native.kernels(), reason="the native kernels were not built")
HIDDEN_SIZE, WIDE = 64, 96


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gates(inputs: int, of: str = "input") -> list[Gate]:
    scale = random(inputs, seed=9).abs()
    scale[3] = 0
    return [Gate(torch.tensor([0.7]), of=of), Gate(torch.tensor([0.4]), scale=scale, of=of), Gate(count=inputs // 3, of=of),
            Gate(count=7, scale=scale, of=of), Gate(torch.tensor([EVERYTHING]), of=of), Gate(torch.tensor([1e30]), of=of),
            Gate(count=inputs, of=of)]


def strange(rows: int, inputs: int) -> Tensor:
    """Equal magnitudes, zeros, and what is no number among the others."""
    x = random(rows, inputs, seed=rows)
    x[0, :20] = 0.5
    x[0, 1:20:2] *= -1
    x[-1, ::7] = 0
    x[-1, 2], x[-1, 5] = torch.nan, torch.inf
    return x


@native_only
@pytest.mark.parametrize("inputs", [21, 64, 1000])
def test_the_native_gate_decides_as_the_other_does(inputs):
    for gate in gates(inputs):
        for rows in (1, 3, 70):
            x, scored = strange(rows, inputs), strange(rows, inputs).flip(1).contiguous()
            for seen in (x, scored):
                y = torch.full_like(x, 7)
                native._gate(gate).run(x, seen, y)
                want = torch.where(gate.mask(seen), x, 0)
                assert torch.equal(y.nan_to_num(-1.0), want.nan_to_num(-1.0)), gate


def packs(w: Tensor) -> list[Packed]:
    few = w * (w.abs() > 0.5)
    return [dense(Change(w)), columns(Change(w)), columns(Change(w.bfloat16())), columns(nearest(w, 8, 32).change()),
            columns(nearest(w, 4, 32).change()),
            bitmask(Change(few)), nm(Change(few.view(len(w), -1, 4).mul(torch.tensor([1, 0, 1, 0])).view(w.shape)))]


@pytest.mark.filterwarnings("ignore::trimtab.runtime.native.RunsInTorch")
def test_a_gated_map_is_the_masked_dense_one():
    w = random(40, HIDDEN_SIZE)
    for p in packs(w):
        exact = layouts.restored(p).float()
        for gate in gates(HIDDEN_SIZE):
            gated = met_gated(p, gate)
            layouts.check(gated)
            assert torch.equal(layouts.restored(gated), layouts.restored(p))
            linear = native.Linear(gated)
            for rows in (1, 2, 5, 40):
                x = random(rows, HIDDEN_SIZE, seed=rows)
                torch.testing.assert_close(linear(x), torch.where(gate.mask(x), x, 0) @ exact.T, atol=2e-5, rtol=1e-4)
        everything = native.Linear(met_gated(p, Gate(torch.tensor([EVERYTHING]))))
        assert torch.equal(everything(x), native.Linear(p)(x))  # share 1 is the identity, bit for bit


@native_only
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu_tanh"])
def test_a_gated_mlp_is_the_masked_dense_one(activation):
    f = {"silu": nn.SiLU(), "relu": nn.ReLU(), "gelu_tanh": nn.GELU(approximate="tanh")}[activation]
    ws = [random(*s, seed=k) / s[1] ** 0.5 for k, s in enumerate(((WIDE, HIDDEN_SIZE), (WIDE, HIDDEN_SIZE), (HIDDEN_SIZE, WIDE)))]
    for pack in (lambda w: columns(Change(w)), lambda w: dense(Change(w)), lambda w: columns(nearest(w, 8, 32).change())):
        packed = [pack(w) for w in ws]
        g, u, d = (layouts.restored(p).float() for p in packed)
        for reads, hidden in zip([None, *gates(HIDDEN_SIZE)], [*gates(WIDE, HIDDEN), None], strict=True):
            for other in (reads, gates(HIDDEN_SIZE)[2]):  # gate and up read alike, or not
                mlp = native.Mlp(*(native.Linear(met_gated(p, x)) for p, x in zip(packed, (reads, other, hidden), strict=True)), activation)
                for rows in (1, 4, 6, 90):
                    x = random(rows, HIDDEN_SIZE, seed=rows)

                    def read(gate: Gate | None, x: Tensor = x) -> Tensor:
                        return x if gate is None else torch.where(gate.mask(x), x, 0)

                    inner = f(read(reads) @ g.T)
                    h = inner * (read(other) @ u.T)
                    if hidden is not None:
                        # A neuron on the edge of the threshold goes either way: none of these is.
                        h = torch.where(hidden.mask(inner), h, 0)
                    torch.testing.assert_close(mlp(x), h @ d.T, atol=3e-5, rtol=1e-3)


@native_only
def test_what_an_mlp_cannot_gate_is_refused():
    up, down = (native.Linear(dense(Change(random(*s)))) for s in ((WIDE, HIDDEN_SIZE), (HIDDEN_SIZE, WIDE)))
    by_gate = native.Linear(met_gated(dense(Change(random(HIDDEN_SIZE, WIDE))), gates(WIDE, HIDDEN)[0]))
    with pytest.raises(BadInput, match="it has none"):
        native.Mlp(None, up, by_gate, "relu")
    with pytest.raises(BadInput, match="what an MLP ends in"):
        native.Mlp(native.Linear(met_gated(dense(Change(random(WIDE, HIDDEN_SIZE))), gates(HIDDEN_SIZE, HIDDEN)[0])), up, down, "silu")
    with pytest.raises(BadInput, match="run without it; run the whole model"):
        by_gate(random(2, WIDE))


def test_a_packed_gate_that_says_too_little_is_refused():
    p = met_gated(columns(Change(random(40, HIDDEN_SIZE))), gates(HIDDEN_SIZE)[1])
    for name, word in (("gate_of", "does not say what it scores"), ("gate_threshold", "has 2 of its 3 parts")):
        with pytest.raises(BadInput, match=word):
            layouts.check(Packed(**{**p.__dict__, "buffers": {k: t for k, t in p.buffers.items() if k != name}}))
    with pytest.raises(BadInput, match="its gate is of 10 inputs, it has 64"):
        layouts.check(Packed(**{**p.__dict__, "buffers": {**p.buffers, "gate_scale": torch.ones(10)}}))


def test_columns_hold_no_other_codes():
    with pytest.raises(BadInput, match="holds no codes of type i2"):
        columns(nearest(random(40, HIDDEN_SIZE), 2, 32).change())
    assert Codes.among(nearest(random(40, HIDDEN_SIZE), 4, 32).change().parts) is not None
