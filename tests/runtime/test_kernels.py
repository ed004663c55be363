"""Every kernel there is against the weight it was packed from, in double precision."""
from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import BITS, Codes, nearest
from trimtab.methods.format import bitmask as bitmask_file
from trimtab.methods.format import bsr as bsr_file
from trimtab.methods.format import csr as csr_file
from trimtab.methods.format import dense as dense_file
from trimtab.methods.format import nm as nm_file
from trimtab.methods.format.panels import TYPES, Packed
from trimtab.runtime import layouts, names, native

BUILT = native.kernels()


def change(w: Tensor | Codes) -> Change:
    return w.change() if isinstance(w, Codes) else Change(w)


def dense(w: Tensor | Codes) -> Packed:
    return dense_file.dense(change(w))


def csr(w: Tensor) -> Packed:
    return csr_file.csr(change(w))


def bitmask(w: Tensor) -> Packed:
    return bitmask_file.bitmask(change(w))


def bsr(w: Tensor | Codes, rows: int = 32, cols: int = 32) -> Packed:
    return bsr_file.bsr(change(w), rows=rows, cols=cols)


def nm(w: Tensor | Codes, n: int = 2, m: int = 4) -> Packed:
    return nm_file.nm(change(w), n=n, m=m)


SHAPES = [(32, 64), (100, 132), (1, 4), (33, 36), (64, 2060), (192, 320)]
BATCHES = (1, 5, 31)  # tiles of 24, 12, 6, 4, 3, 2 and 1 rows all come up


def test_the_kernels_are_built_where_there_is_a_compiler():
    assert BUILT or not shutil.which("c++"), "a compiler is here, yet the kernels are not: run make setup"


def thin(out: int, inputs: int, gen: torch.Generator) -> Iterator[tuple[str, float, Tensor]]:
    """Patterns of zeros, from none kept to all kept: name of the layout, share, what is kept [out, in]."""
    for share in (0.0, 0.2, 1.0):
        for rows, cols in ((16, 16), (32, 32), (64, 64), (32, 1), (16, 4), (32, inputs)):
            if out % rows == 0 and inputs % cols == 0:
                blocks = torch.rand(out // rows, inputs // cols, generator=gen) < share  # 0.0: all empty; 0.2: empty block rows
                yield f"bsr {rows} {cols}", share, blocks.repeat_interleave(rows, 0).repeat_interleave(cols, 1)


def packs(out: int, inputs: int, type_: str) -> Iterator[Packed]:
    gen = torch.Generator().manual_seed(out * inputs)
    w = torch.randn(out, inputs, generator=gen)
    if type_ in BITS:
        yield from packs_of_codes(w, BITS[type_], gen)
        return
    w = w.to(dtype(type_))
    yield dense(w)
    yield dense(w[:, :max(1, inputs - 1)])  # an odd number of inputs: half a pair is left
    for share in (0.0, 0.07, 0.5, 1.0):
        few = w * (torch.rand(w.shape, generator=gen) < share)
        yield from (bitmask(few), csr(few))
    for n in (1, 2, 3):
        kept = torch.rand(out, inputs // 4, 4, generator=gen).argsort(-1) < n
        yield nm(w * kept.reshape(w.shape), n, 4)
    yield nm(w * 0)
    for name, _, kept in thin(out, inputs, gen):
        yield bsr(w * kept, *map(int, name.split()[1:]))


def packs_of_codes(w: Tensor, bits: int, gen: torch.Generator) -> Iterator[Packed]:
    out, inputs = w.shape
    for asymmetric in (False, True):
        for group in (0, 32, 64, 128):
            if group < inputs:
                yield dense(nearest(w, bits, group, asymmetric=asymmetric))
                half = torch.rand(out, inputs // 4, 4, generator=gen).argsort(-1) < 2
                if bits > 2:
                    yield nm(nearest(w * half.reshape(w.shape), bits, group, asymmetric=asymmetric))
        yield dense(nearest(w[:, :max(1, inputs - 1)], bits, asymmetric=asymmetric))
        if bits > 2:
            yield nm(nearest(w * 0, bits, asymmetric=asymmetric))
            for name, _, kept in thin(out, inputs, gen):
                rows, cols = map(int, name.split()[1:])
                if rows == 32 and cols % 32 == 0:
                    yield bsr(nearest(w * kept, bits, cols, asymmetric=asymmetric), rows, cols)


def dtype(type_: str) -> torch.dtype:
    return next(d for d, name in TYPES.items() if name == type_)


def rounded(x: Tensor, p: Packed, activation: str) -> Tensor:
    """x as a kernel with this activation multiplies it, float64."""
    if activation == "bf16":
        return x.bfloat16().double()
    if activation == "f32":
        return x.double()
    group = p.group if p.group < p.shape[1] or p.format == "bsr" else min(256, p.shape[1])
    grouped = torch.nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    top = grouped.abs().amax(-1, keepdim=True)
    codes = (grouped * torch.where(top > 1e-30, 127 / top, 0)).round()
    return (codes.double() * (top / 127).double()).flatten(1)[:, : x.shape[1]]


def guarded(batch: int, width: int) -> tuple[Tensor, Tensor]:
    """A poisoned output inside memory whose edges are watched."""
    edge = 64
    whole = torch.full((edge + batch * width + edge,), float("nan"))
    whole[:edge] = whole[-edge:] = 12345.0
    return whole, whole[edge:-edge].view(batch, width)


def edges_are_whole(whole: Tensor) -> bool:
    return bool((whole[:64] == 12345.0).all() and (whole[-64:] == 12345.0).all())


def close(got: Tensor, want: Tensor, terms: int) -> bool:
    """Float32 sums of `terms` products: the bound grows with their number, not faster."""
    room = 4e-7 * terms**0.5 * want.abs().max().clamp_min(1.0) + 1e-30
    return bool(((got.double() - want).abs() <= room).all())


@pytest.mark.skipif(not BUILT, reason="the native kernels were not built")
@pytest.mark.parametrize("type_", names.TYPES)
def test_every_kernel_agrees_with_the_weight_it_was_packed_from(type_):
    ran = set()
    for out, inputs in SHAPES:
        for p in packs(out, inputs, type_):
            linear, w = native.Linear(p), layouts.restored(p).double()
            gen = torch.Generator().manual_seed(1)
            for batch in BATCHES:
                x = torch.randn(batch, p.shape[1], generator=gen)
                for kernel in linear.kernels:
                    want = rounded(x, p, names.parse(kernel).activation) @ w.T  # what it says it multiplies
                    first = None
                    for threads in (1, 3):
                        whole, y = guarded(batch, out)
                        linear._native.run(x, y, threads, kernel)
                        assert close(y, want, p.shape[1]) and edges_are_whole(whole), (kernel, p.shape, p.rows, p.cols, batch, threads)
                        first = y if first is None else first
                        assert torch.equal(y, first), (kernel, threads)  # who computes a panel changes nothing
                    ran.add(kernel)
    assert ran == {k["name"] for k in BUILT if k["here"] and k["type"] == type_}  # not one was left out


@pytest.mark.skipif(not BUILT, reason="the native kernels were not built")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_is_not_lost(value):
    for type_ in names.TYPES:
        for p in packs(64, 128, type_):
            linear, w = native.Linear(p), layouts.restored(p)
            x = torch.ones(14, p.shape[1])
            x[5, 17] = value
            for kernel in linear.kernels:
                y = linear(x, kernel)
                met = w[:, 17] != 0  # a stored weight meets it; what is not stored may or may not
                assert not torch.isfinite(y[5][met]).any(), kernel
                assert torch.isfinite(y[torch.arange(14) != 5]).all(), kernel


@pytest.mark.parametrize("type_", names.TYPES)
def test_packing_loses_nothing(type_):
    gen = torch.Generator().manual_seed(3)
    for out, inputs in SHAPES:
        w = torch.randn(out, inputs, generator=gen)
        few = w * (torch.rand(w.shape, generator=gen) < 0.3)
        pair = w * (torch.rand(out, inputs // 4, 4, generator=gen).argsort(-1) < 2).reshape(w.shape)
        wide = w * (torch.rand(out, inputs // 2, 2, generator=gen).argsort(-1) < 1).reshape(w.shape)
        if type_ in BITS:
            for asymmetric in (False, True):
                for group in (0, 32, 64):
                    if group < inputs:
                        for pack, t in ((dense, w), (dense, few), (nm, pair)):
                            if pack is dense or type_ != "i2":
                                codes = nearest(t, BITS[type_], group, asymmetric=asymmetric)
                                assert torch.equal(layouts.restored(pack(codes)), codes.weight())
            continue
        w, few, pair, wide = (t.to(dtype(type_)) for t in (w, few, pair, wide))
        assert torch.equal(layouts.restored(dense(w)), w)
        assert torch.equal(layouts.restored(bitmask(few)), few) and torch.equal(layouts.restored(csr(few)), few)
        assert torch.equal(layouts.restored(nm(pair)), pair)
        assert torch.equal(layouts.restored(nm(wide, 1, 2)), wide)
        for p in packs(out, inputs, type_):
            again = layouts.restored(p)
            assert again.shape == p.shape and again.dtype == dtype(type_) and again.is_contiguous()


def test_what_is_restored_some_panels_at_a_time_is_the_same(monkeypatch):
    w = torch.randn(200, 68, generator=torch.Generator().manual_seed(4))
    packs = [dense(w), dense(w.bfloat16()), dense(nearest(w, 4, 32, asymmetric=True)), dense(nearest(w, 8))]
    at_once = [layouts.restored(p) for p in packs]
    monkeypatch.setattr(dense_file, "SOME", 3)
    assert all(torch.equal(layouts.restored(p), t) for p, t in zip(packs, at_once, strict=True))
    assert torch.equal(at_once[0], w)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_codes_stand_for_the_nearest_weight_they_can(bits, asymmetric):
    w = torch.randn(24, 200, generator=torch.Generator().manual_seed(bits))
    w[:, ::7] = 0
    for group in (0, 32):
        codes = nearest(w, bits, group, asymmetric=asymmetric)
        again = codes.weight()
        assert bool((again[:, ::7] == 0).all())  # a zero stays one, whatever the grid
        step = codes.each(codes.scales.float())
        # half a step, and as much again where a zero point was rounded or a scale lost its last bits
        assert bool(((again - w).abs() <= step * (1.01 if asymmetric else 0.51) + 1e-6).all())
        assert bits < 8 or float((again - w).norm() / w.norm()) < 0.01


def test_bytes_of_codes_are_what_they_say():
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    assert dense(nearest(w, 8)).nbytes == 64 * 256 + 64 * 4
    assert dense(nearest(w, 4, 128)).nbytes == 64 * 256 // 2 + 64 * 2 * 2
    assert dense(nearest(w, 4, 128, asymmetric=True)).nbytes == 64 * 256 // 2 + 64 * 2 * 3
    assert dense(nearest(w, 2, 64)).nbytes == 64 * 256 // 4 + 64 * 4 * 2
    pair = w * (torch.rand(64, 64, 4, generator=torch.Generator().manual_seed(1)).argsort(-1) < 2).reshape(w.shape)
    assert nm(nearest(pair, 4, 128)).nbytes == 64 * 128 // 2 + 64 * 128 // 4 + 64 * 2 * 2
    block = torch.zeros(64, 256)
    block[:32, 64:96] = w[:32, :32]
    assert bsr(nearest(block, 4, 32)).nbytes == 32 * 32 // 2 + 32 * 2 + 4 + 3 * 8


def test_bytes_are_what_the_layout_says():
    w = torch.zeros(64, 128, dtype=torch.bfloat16)
    w[:32, :64] = 1
    assert dense(w).nbytes == 64 * 128 * 2
    assert bitmask(w).nbytes == 64 * 128 // 8 + 2 * 32 * 64 + 64
    assert csr(w).nbytes == (2 + 2) * 32 * 64 + 8 * 65
    assert bsr(w).nbytes == 2 * (2 * 32 * 32 + 4) + 8 * 3
    half = w.clone()
    half[:, ::2] = 0
    assert nm(half).nbytes == 64 * 64 * 2 + 64 * 64 // 4


def test_what_does_not_fit_is_refused():
    w = torch.ones(48, 64)
    for refused in (lambda: bsr(w), lambda: bsr(w, 16, -1), lambda: nm(w), lambda: nm(w, 2, 5),
                    lambda: dense(w.half()), lambda: dense(w[0]), lambda: dense(w[:0]),
                    lambda: nm(nearest(w, 4), 2, 4), lambda: nm(nearest(w * 0, 4, 6), 2, 4),
                    lambda: bsr(nearest(w, 4, 64), 16, 32), lambda: nearest(w / 0, 4),
                    lambda: Codes(torch.full((2, 32), 16, dtype=torch.uint8), torch.ones(2, 1), 4, 32),
                    lambda: Codes(torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 2), 4, 32),
                    lambda: Codes(torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1), 4, 32, torch.zeros(2, 1))):
        with pytest.raises(BadInput):
            refused()
    with pytest.raises(BadInput, match="features"):
        native.Linear(dense(w))(torch.ones(2, 63))


@pytest.mark.skipif(not BUILT, reason="the native kernels were not built")
def test_buffers_that_contradict_each_other_are_refused():
    w = torch.randn(64, 128) * (torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) < 0.5)
    blocks = bsr(torch.ones(64, 128))

    def broken(p: Packed, **buffers: Tensor) -> Packed:
        return replace(p, buffers={**p.buffers, **buffers})

    columns, pointers = blocks.buffers["columns"], blocks.buffers["pointers"]
    kept, each = bitmask(w), csr(w)
    pairs = nm(torch.ones(64, 128) * torch.tensor([1.0, 1, 0, 0]).repeat(32))
    bad = [
        broken(blocks, columns=columns + 1), broken(blocks, columns=columns - 1), broken(blocks, columns=columns[1:]),
        broken(blocks, pointers=pointers + 1), broken(blocks, pointers=pointers.flip(0)), broken(blocks, pointers=pointers * 2),
        broken(blocks, values=blocks.buffers["values"][1:]), broken(kept, values=kept.buffers["values"][:-17]),
        broken(each, columns=each.buffers["columns"].int()), broken(each, columns=(each.buffers["columns"].int() + 1).to(torch.uint16)),
        broken(each, pointers=each.buffers["pointers"].flip(0)), broken(each, pointers=each.buffers["pointers"] + 1),
        broken(each, values=each.buffers["values"][1:]), replace(each, rows=32), replace(each, type="i8"),
        broken(kept, bits=kept.buffers["bits"][1:]), broken(kept, bits=torch.full_like(kept.buffers["bits"], 255)),
        broken(pairs, bits=pairs.buffers["bits"][1:]), broken(pairs, values=pairs.buffers["values"][:1]),
        replace(pairs, m=8), replace(pairs, n=5), replace(blocks, rows=0), replace(blocks, cols=129), replace(blocks, format="csr"),
        replace(dense(w), shape=(64, 256)), replace(dense(w), shape=(0, 128)),
        broken(blocks, pointers=torch.tensor([0, 2**62, 8])),
    ]
    four = dense(nearest(w, 4, 32, asymmetric=True))
    two = nm(nearest(w * torch.tensor([1.0, 1, 0, 0]).repeat(32), 4, 32))
    bad += [
        broken(four, values=four.buffers["values"][1:]), broken(four, scales=four.buffers["scales"][1:]),
        broken(four, scales=four.buffers["scales"].float()[:, :2]), broken(four, scales=four.buffers["scales"].double()),
        broken(four, zeros=four.buffers["zeros"][1:]), replace(four, group=16), replace(four, group=0), replace(four, group=256),
        replace(four, type="i8"), replace(four, type="i3"), replace(four, type="f16"), replace(four, format="bitmask"),
        broken(two, bits=two.buffers["bits"][1:]), replace(two, n=1), replace(two, type="i2"),
        broken(dense(w), scales=torch.ones(64)),
        replace(bsr(nearest(torch.ones(64, 128), 4, 32)), group=64),
    ]
    for p in bad:
        with pytest.raises(BadInput):
            native.Linear(p)
        with pytest.raises(BadInput):  # where there is no compiler nobody else looks
            layouts.check(p)
    linear = native.Linear(dense(w))
    for x, y in (((2, 127), (2, 64)), ((2, 128), (3, 64)), ((2, 128), (2, 63))):
        with pytest.raises(ValueError):
            linear._native.run(torch.zeros(x), torch.zeros(y), 1, "")
    for wrong in ({"kernel": "linear_f32_dense-f32_abacus"}, {"narrowest": "i4"}, {"threads": 0}):
        with pytest.raises(ValueError):
            linear._native.run(torch.zeros(2, 128), torch.zeros(2, 64), **{"threads": 1, **wrong})
    assert native.Linear(dense(w))(torch.zeros(0, 128)).shape == (0, 64)


@pytest.mark.skipif(not BUILT, reason="the native kernels were not built")
def test_every_name_follows_the_grammar():
    assert len({k["name"] for k in BUILT}) == len(BUILT)
    for k in BUILT:
        name = names.parse(k["name"])
        assert str(name) == k["name"] and (name.op, name.activation, name.type, name.isa) == (k["op"], k["activation"], k["type"], k["isa"])
        assert name.format.rstrip("0123456789") == k["format"]
    ours = Path(__file__).parents[2] / "src" / "trimtab" / "kernels"
    assert set(names.of_source(ours)) >= {k["name"] for k in BUILT}  # all of them, where the build is for x86-64
    for wrong in ("linear_f32_dense-f32", "linear_f32_bsr8-f32_avx2", "linear_f32_dense-f32_avx2_x"):
        with pytest.raises(ValueError, match="no kernel name"):
            names.parse(wrong)


@pytest.mark.skipif(not BUILT, reason="the native kernels were not built")
def test_x_is_rounded_only_where_that_loses_nothing():
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(20, 128, generator=torch.Generator().manual_seed(1))
    linear = native.Linear(dense(w))
    exact = x.double() @ w.double().T
    assert close(linear(x), exact, 128)  # float32 in: no kernel that rounds is taken
    assert close(linear(x.bfloat16()), x.bfloat16().double() @ w.double().T, 128)
    rounding = [k for k in linear.kernels if names.parse(k).activation == "bf16"]
    assert all(not close(linear(x, k), exact, 128) for k in rounding)
    four = native.Linear(dense(nearest(w, 4, 32)))
    exact = x.double() @ layouts.restored(four.packed).double().T
    assert close(four(x), exact, 128) and close(four(x.bfloat16()), x.bfloat16().double() @ layouts.restored(four.packed).double().T, 128)
    assert not close(four(x, narrowest="i8"), exact, 128)
    error = (four(x, narrowest="i8") - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.01  # eight bits: half a step of max / 127, over inputs that are not all the largest


@pytest.mark.skipif(not BUILT, reason="the native kernels were not built")
def test_what_the_machine_gives_is_asked_by_type_and_instruction_set():
    core = native.core()
    for isa in ("", *core.isas()):
        for x in ("f32", "bf16", "i8"):
            assert core.peak_flops(x, 2, 1, isa) > 0
    assert core.read_bandwidth(1 << 21, 2, 1) > 0
    for wrong in (("i4", 1, 1), ("f32", 0, 1), ("f32", 1, 1, "abacus")):
        with pytest.raises(ValueError):
            core.peak_flops(*wrong)


def test_without_the_extension_torch_does_it_and_says_so(monkeypatch):
    monkeypatch.setattr(native, "core", lambda: None)
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match="not built"):
        linear = native.Linear(dense(w))
    torch.testing.assert_close(linear(x), x @ w.T)
    assert native.kernels() == [] and native.isas() == [] and "not built" in native.level()


@pytest.mark.skipif(not BUILT, reason="the native kernels were not built")
def test_a_forked_child_has_threads_of_its_own():
    code = ("import os, torch\nfrom trimtab.runtime import layouts, native\n"
            "w, x = torch.ones(256, 64), torch.ones(2, 64)\nlinear = native.Linear(layouts.smallest(w))\n"
            "linear(x, threads=4)\npid = os.fork()\n"
            "assert (linear(x, threads=4) == 64).all()\nif not pid: os._exit(0)\n"
            "assert os.waitpid(pid, 0)[1] == 0")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
