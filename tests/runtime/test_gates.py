"""Gates in the runtime: the native ones decide as `Gate` does, and what runs behind them is the masked dense reference."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.runtime.test_decoder import HIDDEN as STREAM
from tests.runtime.test_decoder import VOCABULARY, Net, ids_of
from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import Codes, nearest
from trimtab.methods.composite import based, summed
from trimtab.methods.format.bitmask import bitmask
from trimtab.methods.format.columns import columns
from trimtab.methods.format.dense import dense
from trimtab.methods.format.nm import nm
from trimtab.methods.format.panels import Packed
from trimtab.methods.gates import EVERYTHING, HIDDEN, ROUTER, Core, Gate, Router, met_gated
from trimtab.runtime import layouts, native
from trimtab.runtime.decoder import Decoder

native_only = pytest.mark.skipif(not native.kernels(), reason="the native kernels were not built")
HIDDEN_SIZE, WIDE = 64, 96
GIVEN = 40  # outputs of the maps here, and what their sublayers are given


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
    by_router = native.Linear(met_gated(dense(Change(random(HIDDEN_SIZE, WIDE))), routers(WIDE, HIDDEN_SIZE)[0]))
    with pytest.raises(BadInput, match="an MLP alone runs no gate of a router; a decoder does"):
        native.Mlp(up, up, by_router, "silu")


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


# ---- routers ------------------------------------------------------------------------------------
def router(scores: int, width: int, rank: int = 0, biased: bool = False, seed: int = 0) -> Router:
    second = random(scores, rank or width, seed=seed + 1) / (rank or width) ** 0.5
    first = random(rank, width, seed=seed + 2) / width**0.5 if rank else None
    return Router(second, first, random(scores, seed=seed + 3) if biased else None)


def routers(inputs: int, width: int) -> list[Gate]:
    """By a threshold and by a count, with one map and two, with a bias and none, of one input and several, by one score and several."""
    n = inputs
    return [Gate(torch.tensor([0.1]), of=ROUTER, router=router(n, width, 5)), Gate(count=n // 3, of=ROUTER, router=router(n, width)),
            Gate(torch.tensor([-0.2]), of=ROUTER, router=router(n // 4, width, biased=True), group=4),
            Gate(count=2, of=ROUTER, router=router(n // 8 * 3, width, 7, biased=True), group=8, pool=3),
            Gate(count=2, of=ROUTER, router=router(n // 2 * 2, width, biased=True), group=2, pool=2),
            Gate(torch.tensor([0.4]), of=ROUTER, router=router(n * 2, width, 3), pool=2)]


def everything(inputs: int, width: int) -> list[Gate]:
    """Of routers that let all pass."""
    _, one, few, pooled, *_ = routers(inputs, width)
    return [Gate(torch.tensor([-1e30]), of=ROUTER, router=few.router, group=few.group), Gate(count=inputs, of=ROUTER, router=one.router),
            Gate(count=inputs // pooled.group, of=ROUTER, router=pooled.router, group=pooled.group, pool=pooled.pool)]


def passes(gate: Gate, s: Tensor) -> Tensor:
    """Of scores [rows, units * pool], in words of their own: one unit after the other."""
    rows = []
    for row in s.tolist():
        units = [row[i:i + gate.pool] for i in range(0, len(row), gate.pool)]
        largest = [float("inf") if any(map(math.isnan, u)) else max(u) for u in units]
        if gate.threshold is not None:
            kept = [i for i, v in enumerate(largest) if v > float(gate.threshold)]
        else:
            kept = sorted(range(len(largest)), key=lambda i: (-largest[i], i))[:gate.count]
        rows.append([i // gate.group in kept for i in range(len(units) * gate.group)])
    return torch.tensor(rows)


@native_only
@pytest.mark.parametrize("inputs", [24, 64, 1000])
def test_the_native_gate_decides_by_the_scores_of_a_router(inputs):
    for gate in [*routers(inputs, GIVEN), *everything(inputs, GIVEN)]:
        scores = len(gate.router.second)
        for rows in (1, 3, 70):
            x, scored = random(rows, inputs, seed=rows), strange(rows, scores)
            scored[0, 5], scored[0, 1] = torch.nan, -torch.inf
            want, y = torch.where(passes(gate, scored), x, 0), torch.full_like(x, 7)
            native._gate(gate).run(x, scored, y)
            assert torch.equal(y, want), gate
            native._gate(gate).run(x, scored, x)
            assert torch.equal(x, want), gate
    with pytest.raises(ValueError, match="of a router as its scores are"):
        native._gate(gate).run(x, scored[:, 1:].contiguous(), y)


def test_a_gate_decides_by_its_router():
    v = random(9, GIVEN, seed=5)
    for gate in [*routers(HIDDEN_SIZE, GIVEN), *everything(HIDDEN_SIZE, GIVEN)]:
        r = gate.router
        s = (v if r.first is None else v @ r.first.T) @ r.second.T + (0 if r.bias is None else r.bias)
        assert torch.equal(gate.mask(v), passes(gate, s))
        assert Gate.among(gate.parts()).same(gate)


@pytest.mark.filterwarnings("ignore::trimtab.runtime.native.RunsInTorch")
def test_a_map_behind_a_router_is_the_masked_dense_one():
    w = random(GIVEN, HIDDEN_SIZE)
    for p in packs(w):
        exact = layouts.restored(p).float()
        for gate in routers(HIDDEN_SIZE, GIVEN):
            gated = met_gated(p, gate)
            layouts.check(gated)
            assert torch.equal(layouts.restored(gated), layouts.restored(p))
            linear = native.Linear(gated)
            for rows in (1, 2, 5, 40):
                x, v = random(rows, HIDDEN_SIZE, seed=rows), random(rows, GIVEN, seed=rows + 1)
                passed = gate.mask(v)
                assert not bool(passed.all()) and bool(passed.any())
                torch.testing.assert_close(linear(x, scored=v), torch.where(passed, x, 0) @ exact.T, atol=2e-5, rtol=1e-4)
            for shaped in (v.view(4, 10, GIVEN), v):  # what a sublayer is given may lie flat
                assert torch.equal(linear(x.view(4, 10, HIDDEN_SIZE), scored=shaped), linear(x, scored=v).view(4, 10, GIVEN))
        for gate in everything(HIDDEN_SIZE, GIVEN):  # share 1 is the identity, bit for bit
            assert torch.equal(native.Linear(met_gated(p, gate))(x, scored=v), native.Linear(p)(x))
    for other in (None, v[1:]):
        with pytest.raises(BadInput, match="by what its sublayer is given, and this map is run without it; run the whole model"):
            linear(x, scored=other)
    with pytest.raises(BadInput, match="a router of 40 inputs is given 39"):
        linear(x, scored=v[:, 1:])


class Routed(Net):
    """A network whose sublayers end behind gates of routers: `gates` by the name of the map, and the `layouts` of these maps."""

    def __init__(self, of: list[Callable[[int, int], Gate]]):
        super().__init__(5)
        ends = [s[r] for layer in self.description["layers"] for step in layer for s in step.get("branches", [step])
                for r in ("o", "down") if isinstance(s.get(r), str)]
        made = [lambda w: columns(Change(w)), lambda w: dense(Change(w)), lambda w: summed(dense(Change(w / 4)), columns(Change(w * 0.75))),
                lambda w: based(summed(dense(Change(w / 2)), dense(Change(w / 2))), w.shape[1])]
        self.layouts = {n: made[i % len(made)](self.weights[n]) for i, n in enumerate(ends)}
        self.gates = {n: of[i % len(of)](self.weights[n].shape[1], STREAM) for i, n in enumerate(ends)}

    def decoder(self, gated: bool = True, **options: Any) -> Decoder:
        mine = {n: met_gated(p, self.gates[n] if gated else None) for n, p in self.layouts.items()}
        return Decoder(self.description, {n: mine.get(n, dense(Change(w))) for n, w in self.weights.items()}, self.tensors, **options)

    def sublayer(self, s: dict[str, Any], x: Tensor) -> Tensor:
        if "norm" in s:
            self.given = self.normed(s["norm"], x)
        return super().sublayer(s, x)

    def apply(self, m: Any, x: Tensor) -> Tensor:
        if isinstance(m, str) and m in self.gates:
            x = x * self.gates[m].mask(self.given)
        return super().apply(m, x)


def any_width(k: int) -> Callable[[int, int], Gate]:
    """Gates of routers for maps of any number of inputs, each unlike the one before."""
    rank, biased, counts, pool = [(5, False, False, 1), (0, True, True, 1), (0, False, True, 2), (7, True, False, 3), (0, True, False, 1),
                                  (3, False, True, 1)][k]

    def gate(inputs: int, width: int) -> Gate:
        group = 1 if k == 5 else next((g for g in (4, 3, 2) if inputs % g == 0), 1)
        units = inputs // group
        return Gate(None if counts else torch.tensor([0.1]), units // 2 if counts else 0, of=ROUTER, group=group, pool=pool,
                    router=router(units * pool, width, rank, biased, seed=k))

    return gate


@native_only
def test_a_decoder_behind_routers_is_the_masked_dense_one():
    ids = ids_of(60, most=VOCABULARY)
    net = Routed([any_width(k) for k in range(6)])
    kinds = {(g.threshold is None, g.router.first is None, g.router.bias is None, g.group > 1, g.pool > 1) for g in net.gates.values()}
    assert len(net.gates) > 6 and len(kinds) > 5
    want, dense_one = net.logits(ids), Net(5).logits(ids)
    decoder = net.decoder()
    whole = decoder.logits(ids)
    for chunk in (1, 7, 60):
        got = decoder.logits(ids, chunk=chunk)
        assert float((got.double() - want).abs().max() / want.abs().max()) < 1e-5
        assert torch.equal(got, whole)
    assert float((want - dense_one).abs().max() / want.abs().max()) > 0.1  # they do something
    together = list(decoder.generate_batch([ids[:5], ids[3:50], ids[20:21]], 8))
    alone = [list(decoder.generate(p, 8)) for p in (ids[:5], ids[3:50], ids[20:21])]
    assert [list(c) for c in zip(*together, strict=True)] == alone


@native_only
def test_threads_change_nothing_behind_routers():
    ids = ids_of(300, most=VOCABULARY)
    decoder, before = Routed([any_width(k) for k in range(6)]).decoder(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = {n: decoder.logits(ids, narrowest=n) for n in ("f32", "bf16")}
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for n, y in want.items():
                assert torch.equal(decoder.logits(ids, narrowest=n, chunk=300), y)
    finally:
        torch.set_num_threads(before)


@native_only
def test_a_decoder_behind_routers_that_let_all_pass_is_the_one_without():
    ids = ids_of(60, most=VOCABULARY)
    net = Routed([lambda n, width: Gate(count=n, of=ROUTER, router=router(n, width)),
                  lambda n, width: Gate(torch.tensor([-1e30]), of=ROUTER, router=router(n, width, 3))])
    for narrowest in ("f32", "bf16"):
        assert torch.equal(net.decoder().logits(ids, narrowest=narrowest), net.decoder(gated=False).logits(ids, narrowest=narrowest))


@native_only
@pytest.mark.parametrize(("role", "gate", "why"), [
    ("down", {"of": "neighbours"}, "unknown source neighbours; there are input, hidden and router"),
    ("down", {"of": "router", "count": 3}, "router is missing"),
    ("down", {"of": "router", "count": 3, "router": ["none"]}, "linear map none is missing"),
    ("down", {"of": "router", "count": 3, "router": ["fits", "fits"]}, "takes 48 features and is given 56"),
    ("down", {"of": "router", "count": 3, "router": ["fits"], "group": 2}, "56 scores, 1 for every 2 of 56 inputs are wanted"),
    ("down", {"of": "router", "count": 3, "router": ["fits"], "group": 3, "pool": 3}, "56 scores, 3 for every 3 of 56 inputs are wanted"),
    ("down", {"of": "router", "router": ["fits"]}, "a threshold or a count"),
    ("up", {"of": "router", "count": 3, "router": ["fits"]}, "is for what the sublayer ends in"),
])
def test_a_described_router_that_does_not_fit_is_refused(role, gate, why):
    net = Net(5)
    mlp = net.description["layers"][0][1]
    if role == "up":  # as wide as what it is given: the place alone is wrong
        gate = {**gate, "router": ["square"]}
    mlp[role] = {"sum": [{"maps": mlp[role], "gate": gate}]}
    maps = {**net.weights, "fits": random(56, STREAM), "square": random(STREAM, STREAM)}
    with pytest.raises(BadInput, match=why):
        Decoder(net.description, {n: dense(Change(w)) for n, w in maps.items()}, net.tensors)


def test_packed_routers_travel_and_damaged_ones_are_refused():
    gate = routers(HIDDEN_SIZE, GIVEN)[3]
    plain = columns(Change(random(GIVEN, HIDDEN_SIZE)))
    p = met_gated(plain, gate)
    assert p.nbytes - plain.nbytes == sum(t.nbytes for t in gate.parts().values())
    for q in (p, based(summed(p, plain), HIDDEN_SIZE)):
        back = layouts.described("0.mlp.down", layouts.describe(q), q.buffers)
        assert back.nbytes == q.nbytes
        while back.format != "columns":
            back = back.factors[0]
        assert native.Linear(back).gate.same(gate)

    def damaged(why: str, **changed: Tensor | None) -> None:
        buffers = {**p.buffers, **{f"gate_{k}": t for k, t in changed.items()}}
        with pytest.raises(BadInput, match=why) as e:
            layouts.described("0.mlp.down", layouts.describe(p), {k: t for k, t in buffers.items() if t is not None})
        assert "packed layer 0.mlp.down is corrupt" in str(e.value) and "\n" not in str(e.value)

    router = gate.router
    for part in ("first", "second", "bias", "count", "group"):
        damaged("has 6 of its 7 parts; trim the model again", **{part: None})
    damaged("the router of its gate makes 21 scores, 3 for every 8 of 64 inputs are wanted", second=router.second[:21],
            bias=router.bias[:21])
    damaged("the router of its gate makes 24 scores, 3 for every 4 of 64 inputs are wanted", group=torch.tensor([4], dtype=torch.int32))
    damaged("the router of its gate takes 39 features, its sublayer is given 40", first=router.first[:, 1:].clone())
    damaged("the maps of a router do not fit each other", first=router.first[1:])
    damaged("the maps of a router do not fit each other", second=router.second.flatten())
    damaged("float32 and finite", second=router.second.double())
    damaged("float32 and finite", bias=router.bias.log())
    damaged("units of 8 inputs and 5 scores each", pool=torch.tensor([5], dtype=torch.int32))
    damaged("where it has one; trim the model again", of=torch.tensor([0], dtype=torch.uint8))
    sentence = Gate(core=Core(3, 4))
    step = Gate(of=ROUTER, router=routers(HIDDEN_SIZE, GIVEN)[0].router, counts=torch.tensor([3], dtype=torch.int32))
    for other in (sentence, step):
        with pytest.raises(BadInput, match="does not decide for every token alone"):
            layouts.check(met_gated(plain, other))
