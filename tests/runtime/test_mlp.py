"""An MLP as one operation is what its three maps and the function between them are."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import nearest
from trimtab.methods.format.bsr import bsr
from trimtab.methods.format.dense import dense
from trimtab.methods.format.panels import Packed
from trimtab.runtime import native

pytestmark = pytest.mark.skipif(not native.kernels(), reason="the native kernels were not built")
FUNCTIONS = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "relu": nn.ReLU()}
HIDDEN, WIDE = 64, 96


def weights() -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    shapes = ((WIDE, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE))
    return [torch.randn(s, generator=gen) / s[1] ** 0.5 for s in shapes]


def blocks(w: Tensor) -> Packed:
    kept = torch.rand(w.shape[0] // 32, w.shape[1] // 32, generator=torch.Generator().manual_seed(1)) < 0.5
    return bsr(Change(w * kept.repeat_interleave(32, 0).repeat_interleave(32, 1)))


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_it_is_its_maps_and_the_function_between_them(activation, gated):
    f = FUNCTIONS[activation]
    for pack in (lambda w: dense(Change(w)), blocks, lambda w: dense(nearest(w, 8).change())):
        gate, up, down = (native.Linear(pack(w)) for w in weights())
        mlp = native.Mlp(gate if gated else None, up, down, activation)
        for rows in (1, 7, 48, 200):  # 200: more than all threads take together, so that each one goes through all of it
            x = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows))
            for narrowest in ("f32", "bf16"):
                middle = f(gate(x, narrowest=narrowest)) * up(x, narrowest=narrowest) if gated else f(up(x, narrowest=narrowest))
                want = down(middle, narrowest=narrowest)
                got = mlp(x, narrowest=narrowest)
                # x is rounded once more in the middle: a value on the edge of two goes either way
                assert torch.allclose(got, want, atol=2e-6 if narrowest == "f32" else 2e-3, rtol=1e-5), (rows, narrowest)


def test_who_computes_a_row_changes_nothing():
    mlp = native.Mlp(*(native.Linear(blocks(w)) for w in weights()), "silu")
    x = torch.randn(150, HIDDEN, generator=torch.Generator().manual_seed(3))
    assert torch.equal(mlp(x, threads=1), mlp(x, threads=2)) and torch.equal(mlp(x, threads=3), mlp(x, threads=1))
    assert torch.equal(mlp(x[:0]), x[:0]) and mlp(x.view(2, 75, HIDDEN)).shape == (2, 75, HIDDEN)


def test_what_does_not_meet_is_refused():
    gate, up, down = (native.Linear(dense(Change(w))) for w in weights())
    for maps, word in (((gate, down, up), "one shape"), ((None, up, up), "down takes 64 features, up gives 96")):
        with pytest.raises(BadInput, match=word):
            native.Mlp(*maps, "silu")
    with pytest.raises(BadInput, match="there are silu"):
        native.Mlp(gate, up, down, "tanh")
    with pytest.raises(BadInput, match="takes 64"):
        native.Mlp(gate, up, down, "silu")(torch.ones(2, 63))
