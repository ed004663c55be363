"""Every registered method, every law of its axis. A method is tested the moment its file exists.

Nothing here names a score, an edit or a repair: what a method gets follows from its signature, what it must do from
its axis and its declared facts. A law a method cannot meet is declared on it, `xfail={"law": "reason"}`, strict.
"""
from __future__ import annotations

import itertools
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests import tiny
from trimtab.core import train
from trimtab.core.calibrate import Collector
from trimtab.core.registry import AXES, Method, get, load_all
from trimtab.core.train import Net
from trimtab.core.types import BadInput, Change, Choices, Ranking, Site, Spectrum, Summary
from trimtab.methods import select
from trimtab.methods.basis import Basis
from trimtab.methods.books import Books, typed
from trimtab.methods.codes import LEVELS, TABLES, Codes, Grid, grouped, nearest, rounded, steps
from trimtab.methods.edit.share import adapted
from trimtab.methods.entrywise import Entrywise
from trimtab.methods.experts import Experts
from trimtab.methods.factors import Factors, losses_of_ranks, rank_of
from trimtab.methods.format.panels import Packed
from trimtab.methods.gates import Gate
from trimtab.methods.rounding import Rounding
from trimtab.methods.terms import Spared, Terms
from trimtab.network.stream import Network
from trimtab.runtime.layouts import check

REG = load_all()
SHARES = (0.3, 0.7)  # not symmetric, so that kept and dropped cannot be mistaken for each other
# Knobs larger than the sites below; 8 leaves a remainder of 4.
SMALL = {"b": 4, "block": 8, "group": 8, "limit": 0.1, "iters": 100, "vector": 2, "prompt": 8}
TINY = 1e-12
HEADS = torch.tensor([4, 2])  # what inputs are: four query heads, two of which share a key

# --- a small world: five unequal sites in three unequal blocks ------------------------------------------------------
SITES = {s.name: s for s in (
    Site("0.mlp.gate", 0, "mlp", "gate", "gate", (24, 20), "mlp.in", consumer="0.mlp.down"),
    Site("0.mlp.down", 0, "mlp", "down", "down", (20, 24), "mlp.mid"),
    Site("1.attn.q", 1, "attn", "q", "q", (16, 20), "attn.in"),
    Site("1.attn.o", 1, "attn", "o", "o", (12, 28), "attn.mid"),
    Site("2.attn.o", 2, "attn", "o", "o", (8, 12), "attn.mid"),
)}
THREE = ("0.mlp.gate", "0.mlp.down", "2.attn.o")  # where all five would only take longer


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heavy(seed: int, *shape: int) -> Tensor:
    """Student's t with three degrees of freedom: a few entries far above the rest, as in real weights."""
    g = generator(seed)
    return torch.randn(shape, generator=g) / (torch.randn((3, *shape), generator=g).square().mean(0)).sqrt()


@cache
def weight(name: str) -> Tensor:
    return heavy(10 + list(SITES).index(name), *SITES[name].shape) * 0.1


def made(name: str, x: Tensor) -> Tensor:
    """What a site is given, [tokens, in], where its sublayer is given x [tokens, 20]; but for what changes from token to token. One half
    of it is large where the first of x is above zero, and the other one where it is below."""
    h = (x @ torch.randn(20, SITES[name].shape[1], generator=generator(7))).relu()
    return h * (1 + 4 * torch.cat([x[..., :1] > 0, x[..., :1] < 0], -1)).repeat_interleave(h.shape[-1] // 2, -1)


@cache
def batches(name: str, of: str, poor: bool = False) -> list[tuple[Tensor, ...]]:
    """What the statistics of a site see, batch by batch. `poor`: fewer tokens than inputs, one input always zero."""
    site, seed = SITES[name], 100 + 10 * list(SITES).index(name)
    sizes = (3, 5) if poor else (30, 18, 48)
    if of == "grad":
        out = [(heavy(seed + k, *site.shape) * 0.01 + 0.002,) for k in range(3 if poor else 40)]
    elif of == "hidden":
        out = [(heavy(seed + k, n, site.shape[1]), heavy(seed + 60 + k, n, site.shape[1]) * 0.5) for k, n in enumerate(sizes)]
    elif of == "fed":
        out = []
        for k, n in enumerate(sizes):
            x = torch.randn(n, 20, generator=generator(seed + k))
            out.append((x, made(name, x) * torch.randn(n, site.shape[1], generator=generator(seed + 60 + k)).exp()))
    elif of in ("sublayer", "block"):
        out = []
        for k, n in enumerate(sizes):
            x = heavy(seed + k, n, 20)
            out.append((x, x + heavy(seed + 50 + k, n, 20) * 0.3 * (1 + site.block)))
    else:
        width = site.shape[0] if of == "mid" and site.consumer else site.shape[1]
        mix = torch.randn(width, width, generator=generator(seed)) * 0.5 / width ** 0.5 + 0.3 * torch.eye(width)
        gain = (0.8 * torch.randn(width, generator=generator(seed + 1))).exp()
        out = [((heavy(seed + 2 + k, n, width) + 0.2) @ mix * gain,) for k, n in enumerate(sizes)]
    if poor and of not in ("sublayer", "block", "hidden", "fed"):
        for (x,) in out:
            x[..., 1] = 0
    return out


def accumulate(m: Method, seen: list[tuple[Tensor, ...]]) -> Tensor:
    """What the engine does with a statistic's batches."""
    values = [m.fn(*x) for x in seen]
    merge = {"sum": lambda v: torch.stack(v).sum(0), "max": lambda v: torch.stack(v).amax(0), "stack": torch.stack, "cat": torch.cat}
    out = merge[m.facts["merge"]](values)
    if m.facts["mean"]:
        out = out / (len(seen) if m.facts["of"] == "grad" else sum(len(x[0]) for x in seen))
    return m.facts["done"](out) if m.facts["done"] else out


@cache
def stats(name: str, poor: bool = False) -> dict[str, Tensor]:
    return {m.name: accumulate(m, batches(name, m.facts["of"], poor)) for m in REG.values() if m.axis == "stat"}


class Unit:
    """A unit with its knobs: what a joint edit is given."""

    def __init__(self, m: Method, /, **knobs: Any):
        self.m, self.knobs = m, {**small(m), **knobs}
        self.free: bool = m.facts["free"]
        self.period: int | None = m.facts["period"](self.knobs) if m.facts["period"] else None

    def __call__(self, s: Tensor, keep: float) -> Tensor:
        return self.m({"s": s, "keep": keep, "heads": HEADS}, **self.knobs)

    def __repr__(self) -> str:
        return f"{self.m.name}({','.join(f'{k}={v}' for k, v in self.knobs.items())})"


class OnGrid:
    """A grid with its knobs, and the statistics of a site: what an edit and a rewrite are given."""

    def __init__(self, m: Method, stats: dict[str, Tensor], /, **knobs: Any):
        self.m, self.stats, self.knobs = m, stats, {**small(m), **knobs}
        of = m.facts["of"]
        self.whole: bool = (of(self.knobs) if callable(of) else of) == "site"
        self.blind = not m.needs

    def group(self, w: Tensor) -> int:
        return min(self.knobs["group"], w.shape[1]) or w.shape[1]

    def __call__(self, w: Tensor) -> Grid:
        return self.m({"w": w, **self.stats}, **self.knobs)

    def __repr__(self) -> str:
        return f"{self.m.name}({','.join(f'{k}={v}' for k, v in self.knobs.items())})"


def grids(stats: dict[str, Tensor]) -> list[OnGrid]:
    """Every grid, in groups of 8 inputs and in rows."""
    return [OnGrid(m, stats, group=group) for m in REG.values() if m.axis == "grid" for group in (8, 0)]


def small(m: Method) -> dict[str, Any]:
    return {k: min(v, SMALL[k]) if k in SMALL else v for k, v in m.knobs.items()}


@cache
def units() -> list[Unit]:
    """What edits and repairs are tried with: every unit that decides nothing else, in its first two variants."""
    return [Unit(m, **knobs) for m in REG.values() if m.axis == "unit" and not m.joint and (m.facts["free"] or not m.facts["whole"])
            and not m.facts["ends"] for knobs in variants(m)[:2]]


def variants(m: Method) -> list[dict[str, Any]]:
    """Complete knobs: the small ones, and for a method whose knobs are the pattern itself more patterns."""
    tries: list[dict[str, Any]] = [{}]
    if {"n", "m", "dim"} <= set(m.knobs):
        tries += [{"dim": "out"}, {"n": 1}, {"n": 3, "m": 4, "dim": "out"}]
    if {"rows", "cols"} <= set(m.knobs):
        tries += [{"rows": 2, "cols": 4}, {"rows": 4, "cols": 1}]
    if m.axis == "format" and {"n", "m"} <= set(m.knobs):
        tries += [{"n": 4, "m": 8}, {"n": 1, "m": 2}]
    return [{**small(m), **t} for t in tries]


def plain(name: str = "row") -> Unit:
    return Unit(get(f"unit/{name}"))


@cache
def summaries(of: Callable[[Tensor], Tensor] | None, wild: bool = False) -> dict[str, Summary]:
    """Scores as a budget sees them. `wild`: one site a thousand times the rest, one half zero."""
    out = {}
    for name, site in SITES.items():
        s = weight(name).abs() * stats(name)["in_sq"].sqrt()
        if wild:
            s = s * 1000 if name == "2.attn.o" else s
            s = s.where(s > s.median(), torch.zeros_like(s)) if name == "1.attn.q" else s
        out[name] = Summary.of(site, of(s) if of else s)
    return out


class Trying:
    """A block of these sites as a budget tries shares on it: the squares of what each one's own outputs are off add up."""

    def __init__(self, sites: dict[str, Site], like: dict[str, str]):
        self.sites, self.like, self.known = sites, like, dict[tuple[str, float], float]()

    def error(self, shares: Any) -> float:
        return math.sqrt(sum(self.off(self.like[n], float(keep)) for n, keep in shares.items()))

    def off(self, name: str, keep: float) -> float:
        if (name, keep) not in self.known:
            x, w = stats(name)["sample"], weight(name)
            dropped = x.abs() <= x.abs().flatten().sort().values[max(0, round((1 - keep) * x.numel()) - 1)]
            self.known[name, keep] = float((x * dropped @ w.T).square().sum()) if keep < 1 else 0.0
        return self.known[name, keep]


@cache
def trial() -> Trying:
    return Trying(SITES, dict(zip(SITES, SITES, strict=True)))


@cache
def choices() -> dict[str, Choices]:
    """Three grids for every site: what they take, and what rounding to the nearest of their values loses."""
    out = {}
    for name, site in SITES.items():
        losses = tuple(error(weight(name), nearest(weight(name), bits, 8).weight(), stats(name)["gram"]) for bits in (2, 3, 4))
        out[name] = Choices(site, ("two", "three", "four"), tuple(site.size * bits // 8 for bits in (2, 3, 4)), losses)
    return out


@cache
def spectra() -> dict[str, Spectrum]:
    """What is lost at every rank of every site."""
    return {n: Spectrum(s, losses_of_ranks(weight(n), stats(n)["gram"], stats(n)["grad_sq"])) for n, s in SITES.items()}


@cache
def rankings() -> dict[str, Ranking]:
    """Scores of the singular values of every site: some went, a tenth of all at a time, and some stayed."""
    sizes = {n: torch.linalg.svdvals(weight(n)) for n in SITES}
    gone = {n: (10 - (10 * t / t.max()).floor()) * (t < t.max() / 2) for n, t in sizes.items()}
    return {n: Ranking(SITES[n], tuple((t / 10 - gone[n]).tolist())) for n, t in sizes.items()}


def env(m: Method, name: str = "0.mlp.gate", *, dtype: torch.dtype = torch.float32, keep: float = 0.5,
        unit: Unit | None = None, poor: bool = False, **given: Any) -> dict[str, Any]:
    """Everything the method's signature may name, for one site; `given` replaces it."""
    w = given.get("w", weight(name).to(dtype))
    unit = unit or plain()
    have = dict(stats(name, poor))
    if m.axis == "format":
        return {"new": next(held(m, small(m), dtype)), **given}
    if m.facts.get("level") == "net":
        return {"net": edited(), **given}
    if m.axis == "wiring":
        return {**{k: v() for k, v in GROUPS.items()}, "keep": keep, **given}
    pattern = unit(w.float().abs(), keep)
    if m.axis == "budget":
        have = {k: {n: stats(n, poor)[k] for n in SITES} for k in have}
        return {"scores": summaries(m.facts["of"]), "target": keep, "options": choices(), "trial": trial(),
                "spectra": spectra(), "ranking": rankings(), **have, **given}
    if m.axis == "stat":
        of = m.facts["of"]
        return {**dict(zip(m.data, batches(name, of)[0], strict=True)), **given}
    mask = torch.ones_like(pattern) if m.joint else pattern
    new = Change(w * pattern, mask=pattern)
    if "codes" in m.facts.get("keeps", ()):
        new = nearest(new.w, 3, 8).change(pattern) if "mask" in m.facts["keeps"] else nearest(w, 3, 8).change()
        new = replace(new, w=new.w.to(dtype))
    return {"w": w, "other": -w.roll(1, 1), "s": w.float().abs(), "keep": keep, "unit": unit, "mask": mask,
            "grid": OnGrid(get("grid/int"), stats(name)),
            "new": new, "rounded": Rounding(4).of, "heads": HEADS, "depth": torch.tensor(0.25),
            "feeders": {r: heavy(60 + k, SITES[name].shape[1], 20) for k, r in enumerate(("gate", "up"))}, "act": torch.nn.functional.silu,
            "gate": lambda w, keep: Gate(w.new_full((1,), 1 - keep, dtype=torch.float32)), **have, **given}


def mlps() -> list[dict[str, Tensor]]:
    """Three MLPs of one width and of different sizes, with norms and biases."""
    found = []
    for k, n in enumerate((24, 16, 20)):
        shapes = {"gate": (n, 20), "up": (n, 20), "down": (20, n), "norm": (20,), "norm.bias": (20,), "gate.bias": (n,), "up.bias": (n,),
                  "down.bias": (20,)}
        found.append({name: heavy(300 + 10 * k + j, *shape) * 0.3 for j, (name, shape) in enumerate(shapes.items())})
    return found


# What a rewiring is given, by name: a group of every kind.
GROUPS: dict[str, Callable[[], Any]] = {
    "mlps": mlps, "apart": lambda: torch.tensor([[0.0, 0.0, 0.0], [0.05, 0.0, 0.0], [0.3, 0.2, 0.0]]),
    "gram": lambda: stats("0.mlp.gate")["gram"], "writes": lambda: heavy(330, 20, 12),
    "mlp": lambda: {r: mlps()[0][r] for r in ("gate", "up", "down")},
    "source": lambda: torch.randn(400, 20, generator=generator(71)), "fed": lambda: hidden(GROUPS["mlp"](), GROUPS["source"]()),
    "embed": lambda: heavy(340, 30, 20), "head": lambda: heavy(350, 30, 20),
    "damage": lambda: heavy(331, 12).abs(), "sizes": lambda: heavy(332, 12, 40).abs() + 0.1, "means": lambda: heavy(333, 12, 40),
}


def hidden(mlp: dict[str, Tensor], x: Tensor) -> Tensor:
    """The hidden values of an MLP without biases, of x [tokens, width]."""
    return torch.nn.functional.silu(x @ mlp["gate"].T) * (x @ mlp["up"].T)


def call(m: Method, at: dict[str, Any], /, **knobs: Any) -> Any:
    out = m(at, **{**small(m), **knobs})
    if m.facts.get("level") == "net":
        with watching(False):
            return mended(at["net"], out)
    return out


# --- a small network: two blocks of 32, all sites in two bits, and samples that repeat ------------------------------
class Guarded(Net):
    """What a method hands over is watched as the method is; the network's own work is not."""

    def fit(self, *given: Any, **knobs: Any) -> Any:
        def watched(f: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                with watching(True):
                    return f(*args)
            return run

        with watching(False):
            return super().fit(*map(watched, given), **knobs)


@cache
def small_network() -> tuple[Network, dict[int, dict[str, Tensor]], dict[int, dict[str, Tensor]]]:
    """A network, the tensors of its blocks with all sites rounded to two bits, and the parts."""
    path = tiny.save("llama", Path(tempfile.mkdtemp()) / "model")
    net, stored, parts = Network.open(path), {}, {}
    for i in range(net.n_blocks):
        module, parts[i] = net.block(i), {}
        for s in net.sites_of(i):
            change = nearest(net.weight(module, s), 2, 8).change()
            net.set_weight(module, s, change.w)
            parts[i] |= {f"{s.name}:{k}": t for k, t in change.parts.items()}
        stored[i] = net.stored(module, i)
    return net, stored, parts


def edited(room: float = 2e9, spill: int | None = None, state: Path | None = None) -> Guarded:
    net, stored, parts = small_network()
    samples = [{"input_ids": torch.randint(3, 80, (1, 12), generator=generator(k % 2))} for k in range(6)]
    return Guarded(net, net.sites, lambda i: (stored[i], parts[i]), samples, Path(tempfile.mkdtemp()), spill, room, state)


def mended(net: Net, mend: Callable[[str, Change], Change]) -> dict[str, Change]:
    """Every site's change."""
    out = {}
    for i, sites in net.of_block.items():
        stored, parts = net.read(i)
        module = net.net.block(i, stored)
        for s in sites:
            its = {n.rpartition(":")[2]: t for n, t in parts.items() if n.rpartition(":")[0] == s.name}
            out[s.name] = mend(s.name, Change(net.net.weight(module, s), its))
    return out


def held_out(net: Net, changes: dict[str, Change]) -> tuple[float, float]:
    """The mean next-token loss of the samples held out, and how far the last hidden states are from the dense network's."""
    net._groups([])
    own = {name: {"w": change.w} for name, change in changes.items()}
    seen = [net._measure(own, lambda new, its: its["w"], f) for f in (
        lambda s: torch.nn.functional.cross_entropy(s.logits, s.following), lambda s: (s.hidden - s.dense).square().mean())]
    return seen[0], seen[1]


def tensors(x: Any) -> Iterator[Tensor]:
    """Every tensor of a result or an argument, in a fixed order."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for k in sorted(x):
            yield from tensors(x[k])
    elif isinstance(x, Packed):
        yield from tensors(x.buffers)
    elif isinstance(x, Basis):
        yield from tensors([x.scale, x.left, x.right])
    elif isinstance(x, Rounding | Gate):
        yield from tensors(x.parts())
    elif isinstance(x, Grid):
        yield from tensors([x.scales, x.zeros, x.table, x.levels])
    elif isinstance(x, Net):
        for i in x.of_block:
            yield from tensors(list(map(dict, x.read(i))))
    elif isinstance(x, Change):
        yield from tensors([x.w, x.parts, x.mask, x.bias])
    elif isinstance(x, Summary):
        yield from tensors([x.hist, x.total, x.count])
    elif isinstance(x, list | tuple):
        for v in x:
            yield from tensors(v)
    elif isinstance(x, Experts):
        yield from tensors(vars(x))
    elif isinstance(x, Choices):
        yield from tensors([x.bytes, x.losses])
    elif isinstance(x, Spectrum):
        yield from tensors(x.lost)
    elif isinstance(x, int | float):
        yield torch.tensor(x, dtype=torch.float64)
    elif isinstance(x, str):
        yield torch.tensor(list(x.encode()))


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    a, b = list(tensors(a)), list(tensors(b))
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def error(w: Tensor, new: Tensor, gram: Tensor) -> float:
    """The calibration error tr((w' - w) G (w' - w)^T)."""
    d = new.double() - w.double()
    return float(((d @ gram.double()) * d).sum())


def lost(w: Tensor, new: Change, name: str, poor: bool = False) -> float:
    """The calibration error of a change, E |W x - W' x - b|^2."""
    off = error(w, new.w, stats(name, poor)["gram"])
    if new.bias is None:
        return off
    b, mean = new.bias.double(), stats(name, poor)["in_mean"].double()
    return off - 2 * float(b @ ((w.double() - new.w.double()) @ mean)) + float(b @ b)


def close(a: Tensor, b: Tensor, tol: float = 1e-5) -> None:
    a, b = a.double(), b.double()
    torch.testing.assert_close(a, b, rtol=tol, atol=tol * float(b.abs().max()))


# --- laws of every axis ---------------------------------------------------------------------------------------------
def law_repeatable(m: Method) -> None:
    """The same input gives the same bytes."""
    first, second = call(m, env(m)), call(m, env(m))
    assert list(tensors(first))
    assert same(first, second)


def law_leaves_inputs_alone(m: Method) -> None:
    at = env(m)
    before = {k: [t.clone() for t in tensors(v)] for k, v in at.items()}
    call(m, at)
    for k, v in before.items():
        assert same(list(tensors(at[k])), v), k


FACTORIES = {
    torch.zeros, torch.ones, torch.empty, torch.full, torch.eye, torch.arange, torch.linspace, torch.logspace,
    torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.rand, torch.randn, torch.randint, torch.randperm,
    torch.tril_indices, torch.triu_indices, torch.empty_strided,
}
DRAWS = {f for place, names in (
    (torch, "rand randn randint randperm rand_like randn_like randint_like normal bernoulli multinomial poisson"),
    (Tensor, "normal_ uniform_ bernoulli bernoulli_ exponential_ random_ cauchy_ geometric_ log_normal_ multinomial"),
) for f in (getattr(place, n) for n in names.split())}
MOVES = {Tensor.cpu, Tensor.cuda, Tensor.numpy, Tensor.__array__}


class OwnDeviceOnly(TorchFunctionMode):
    """Refuses tensors made without a device, draws without a generator, and moves to a device by name."""

    watching = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.watching:
            return func(*args, **kwargs)
        if func in FACTORIES:
            assert kwargs.get("device") is not None or (func is torch.as_tensor and isinstance(args[0], Tensor)), \
                f"{func.__name__} without a device"
        if func in DRAWS:
            assert kwargs.get("generator") is not None, f"{func.__name__} without a generator"
        assert func not in MOVES, f"{func.__name__}: a method stays where its input is"
        return func(*args, **kwargs)


@contextmanager
def watching(on: bool) -> Iterator[None]:
    before, OwnDeviceOnly.watching = OwnDeviceOnly.watching, on
    try:
        yield
    finally:
        OwnDeviceOnly.watching = before


def law_own_device_and_generator(m: Method) -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    at, before = env(m), states()
    with OwnDeviceOnly():
        out = call(m, at)
    assert states() == before, "drew from a global generator"
    assert {t.device for t in tensors(out)} == {torch.device("cpu")}


def law_uses_data(m: Method) -> None:
    """Each weight, statistic and share it names changes the result somewhere."""
    turned = 1 if m.axis in ("rewrite", "gate") else 0  # the order of the outputs is nothing to a scale of the inputs
    fresh = {"w": lambda t: t.flip(turned), "target": lambda t: t / 2, "keep": lambda t: t / 2}
    if m.axis in ("wiring", "score", "edit", "repair", "budget", "unit", "grid", "rewrite", "input", "gate"):
        for d in (d for d in m.data if d in m.needs or d in fresh):
            if (d == "keep" and m.axis == "unit" and not m.facts["free"]) or (d == "w" and m.facts.get("basis")):
                continue  # a basis may be one of so many inputs, whatever the weights
            changed = False
            alone = [{}, {"heads": torch.tensor([1, 1])}] if "heads" in m.data and m.axis == "score" else [{}]
            for name, given in itertools.product(THREE, alone):
                at = env(m, name, **{k: v * SITES[name].shape[1] for k, v in given.items()})
                halved = m.axis == "input" or (m.axis == "gate" and d in ("sample", "hidden_gate"))  # a range, a threshold: of all inputs
                other = at[d] / 2 if halved else fresh.get(d, jumbled)(at[d])
                beside = {"exact": False} if "exact" in m.knobs else {}  # where every token keeps as many, nothing was found by calibration
                beside |= {"refit": True} if "refit" in m.knobs else {}
                changed |= not same(call(m, at, **beside), call(m, {**at, d: other}, **beside))
            assert changed, f"{d} makes no difference"


def jumbled(t: Any) -> Any:
    """Another statistic of the same kind: the entries of its last dimension reversed, a square one on both sides."""
    if isinstance(t, dict):
        return dict(zip(t, reversed(t.values()), strict=True))
    t = t.flip(-1) if t.numel() > 1 else t / 2
    return t.flip(-2) if t.dim() == 2 and t.shape[0] == t.shape[1] else t


def law_uses_knobs(m: Method) -> None:
    """Each knob changes the result somewhere."""
    for k, v in small(m).items():
        words = ["out", "in", "max", "mse", "percentile", "entropy", "rms", "first", "coactive", "weights", "order", "random"]
        tries = {bool: [not v] if isinstance(v, bool) else [], str: words}.get(type(v))
        if tries is None:
            tries = [v + 1, 2 * v, v // 2, 1, 4] if isinstance(v, int) else [3 * v, v / 3, v + 0.1, v + 10]
        given = [env(m, new=new) for new in held(m, small(m), torch.float32)] if m.axis == "format" else \
            [env(m, name) for name in THREE]
        with_it = {"clip": k} if k == "percentile" else {"whiten": True} if k == "damp" and "whiten" in m.knobs else {}
        with_it = {"clip": "mse"} if k == "act_bits" and "clip" in m.knobs else with_it  # who else looks at steps
        with_it = {"feedback": True} if k == "damp" and "feedback" in m.knobs else with_it
        with_it = {"lr": 0.03} if k == "epochs" and m.axis == "wiring" else with_it  # of so few tokens, in larger steps
        if m.facts.get("spares"):  # which has knobs for whole inputs too
            given += [env(m, name, unit=Unit(get("unit/inputs"))) for name in THREE]
        assert any(differs(m, at, {k: t}, with_it) for t in tries if t != v for at in given), f"{k} makes no difference"


def differs(m: Method, at: dict[str, Any], knobs: dict[str, Any], beside: dict[str, Any]) -> bool:
    try:
        if (centre := m.facts.get("centre")) and (centre(at["sample"], {**small(m), **knobs}) is None) != (not m.knobs["centred"]):
            return True
        return not same(call(m, at, **beside), call(m, at, **beside, **knobs))
    except BadInput:  # a value that does not fit the other knobs or the shape
        return False


# --- stat -----------------------------------------------------------------------------------------------------------
def numpy_stat(m: Method, seen: list[tuple[Tensor, ...]]) -> np.ndarray:
    """Each statistic in one go, in float64, from its definition: what it is of, and what it makes of that."""
    x, *rest = (np.concatenate([b[i].double().numpy() for b in seen]) for i in range(len(seen[0])))
    if m.facts["of"] == "grad":
        x = np.stack([b[0].double().numpy() for b in seen])
    definition: dict[str, tuple[str, Callable[[], np.ndarray]]] = {
        "in_sq": ("input", lambda: (x ** 2).mean(0)), "gram": ("input", lambda: x.T @ x / len(x)),
        "absmax": ("input", lambda: abs(x).max(0)), "in_abs": ("input", lambda: abs(x).mean(0)), "in_mean": ("input", lambda: x.mean(0)),
        "act_norm": ("mid", lambda: np.sqrt((x ** 2).mean(0))),
        "grad_sq": ("grad", lambda: (x ** 2).mean(0)), "grad": ("grad", lambda: x.mean(0)), "grads": ("grad", lambda: x),
        "source": ("fed", lambda: x), "fed": ("fed", lambda: rest[0]), "hidden_gate": ("hidden", lambda: x),
        "hidden_up": ("hidden", lambda: abs(rest[0]).mean(0)),
        "firings": ("sentence", lambda: np.stack([fires(b[0].double().numpy()) for b in seen])),
        "sample": ("input", lambda: x), "cosine": ("sublayer", lambda: np.array([np.mean(
            (x * rest[0]).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(rest[0], axis=1))])),
        "block_cosine": ("block", lambda: np.array([np.mean(
            (x * rest[0]).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(rest[0], axis=1))])),
        "stream_sq": ("sublayer", lambda: np.stack([(x ** 2).mean(0), (rest[0] ** 2).mean(0)])),
        "stream_std": ("sublayer", lambda: np.stack([x.std(0), rest[0].std(0)])),
        "sentence_abs": ("sentence", lambda: np.sqrt(sum(abs(b[0].double().numpy()).mean(0) ** 2 for b in seen))),
    }
    assert m.name in definition, f"write the definition of {m.name} here"
    what, make = definition[m.name]
    assert m.facts["of"] == what
    return make()


def fires(x: np.ndarray) -> np.ndarray:
    """How many tokens have an input in their core, by a loop."""
    count = np.zeros(x.shape[1])
    for token in x:
        above = sorted((j for j in range(len(token)) if token[j] > 0), key=lambda j: (-token[j], j))
        for j in above[:math.ceil(len(above) * 2 / 5)]:
            count[j] += 1
    return count


def law_stat_is_its_definition(m: Method) -> None:
    for name in SITES:
        seen = batches(name, m.facts["of"])
        close(accumulate(m, seen), torch.from_numpy(numpy_stat(m, seen)))


def law_stat_order_of_batches(m: Method) -> None:
    seen = batches("0.mlp.gate", m.facts["of"])
    a, b = accumulate(m, seen), accumulate(m, seen[::-1])
    if m.facts["merge"] == "cat":
        a, b = (t.sort(0).values for t in (a, b))
    close(a, b.flip(0) if m.facts["merge"] == "stack" else b)


def law_stat_size_of_batches(m: Method) -> None:
    """Tokens may come in any number of batches; a gradient is of one sequence, whole, and so is what is told of sentences."""
    if m.facts["of"] not in ("grad", "sentence"):
        seen = batches("0.mlp.gate", m.facts["of"])
        split = [tuple(t[a:b] for t in x) for x in seen for a, b in ((0, 1), (1, len(x[0])))]
        close(accumulate(m, seen), accumulate(m, split))


def law_stat_held_once(m: Method) -> None:
    """A mean takes the place of its sum, and asking again gives the same."""
    site = next(s for s in SITES.values() if s.block == 0)
    if m.facts["of"] != "input" or not m.facts["mean"]:
        return
    collect = Collector({site.name: {m.name}}, SITES)
    for x in batches(site.name, "input"):
        collect.see("input", site.input, *x)
    first = collect.of(site)[m.name]
    assert collect.sums[m.name, site.input] is first
    close(first, accumulate(m, batches(site.name, "input")))
    assert torch.equal(collect.of(site)[m.name], first)


def law_stat_same_in_the_engine(m: Method) -> None:
    """Taken together with all others, from one pass over a block."""
    every = {k.name for k in REG.values() if k.axis == "stat"}
    for block in (0, 1):
        inside = {n: s for n, s in SITES.items() if s.block == block}
        collect = Collector({n: every for n in inside}, SITES)
        for name, site in inside.items():
            for kind, key in (("input", site.input), ("hidden", site.input), ("fed", site.input), ("sentence", site.input),
                              ("sublayer", site.group)):
                if kind != "sublayer" or name == min(n for n in inside if SITES[n].group == site.group):  # once a group
                    for x in batches(name, kind):
                        collect.see(kind, key, *x)
            if name == min(inside):  # once a block
                for x in batches(name, "block"):
                    collect.see("sublayer", "block", *x)
            for x in batches(name, "grad"):
                collect.see_gradient(site, *x)
        for name, site in inside.items():
            what = m.facts["of"]
            seen = {"mid": site.consumer or name, "sublayer": min(n for n in inside if SITES[n].group == site.group), "block": min(inside)}
            close(collect.of(site)[m.name],
                  accumulate(m, batches(seen.get(what, name), "input" if what == "mid" else what)))


def law_stat_adds_in_place_what_it_is(m: Method) -> None:
    for name in SITES if m.facts["into"] else ():
        (first, *_), (second, *_) = batches(name, m.facts["of"])[:2]
        total = m.fn(first)
        m.facts["into"](total, second)
        assert torch.equal(total, m.fn(first) + m.fn(second))
    if m.facts["into"]:  # many inputs, in strips
        x = torch.randn(7, 2100, generator=generator(1))
        total = m.fn(x[:3])
        m.facts["into"](total, x[3:])
        close(total, m.fn(x))
        assert torch.equal(total, total.T)


def law_stat_follows_its_inputs(m: Method) -> None:
    """Told of inputs that were divided, or that something was taken off, it is what it is of them."""
    for name in SITES if m.facts["of"] == "input" else ():
        seen = batches(name, "input")
        width = seen[0][0].shape[1]
        by = torch.randn(width, generator=generator(5))
        mean = torch.cat([x for (x,) in seen]).mean(0)
        if f := m.facts["rescaled"]:
            close(f(accumulate(m, seen), by.exp()), accumulate(m, [(x / by.exp(),) for (x,) in seen]))
        if f := m.facts["moved"]:
            close(f(accumulate(m, seen), by, mean), accumulate(m, [(x - by,) for (x,) in seen]), 1e-4)


def law_stat_half_precision_input(m: Method) -> None:
    """Sums are taken in float32 whatever the network runs in."""
    seen = [tuple(t.bfloat16() for t in x) for x in batches("0.mlp.gate", m.facts["of"])]
    out = accumulate(m, seen)
    assert out.dtype == torch.float32
    close(out, accumulate(m, [tuple(t.float() for t in x) for x in seen]))


# --- unit -----------------------------------------------------------------------------------------------------------
def top(values: list[float], k: int) -> set[int]:
    """Places of the k largest; of equals the earlier one."""
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


def slow_unit(u: Unit, s: Tensor, keep: float) -> Tensor | None:
    """The mask by plain loops over whoever competes, for the units that are defined by that; else None."""
    rows, cols = s.shape
    at = [[(i, j) for j in range(cols)] for i in range(rows)]
    whole = [p for line in at for p in line]
    groups = {"row": lambda: at, "site": lambda: [whole], "model": lambda: [whole],
              "column": lambda: [list(c) for c in zip(*at, strict=True)], "nm": lambda: nm_groups(u, at)}
    if u.m.facts["ends"]:
        if u.m.name == "select":
            steps = {math.floor(i * cols / round(keep * cols)) for i in range(round(keep * cols))}
            return torch.tensor([j in steps for j in range(cols)]).expand(rows, cols)
        h, kv = HEADS.tolist()
        counts = {"neuron": (cols, 1), "channel": (cols, 1), "kvgroup": (kv, 1), "head": (h, kv), "inner": (kv, 1),
                  "subclone": (cols, 1)}
        count, sets = counts.get(u.m.name, (1, 1))
        worth = [math.fsum(float(s[i, j]) for i in range(rows) for j in range(n * cols // count, (n + 1) * cols // count))
                 for n in range(count)]
        each = count // sets
        best = {g * each + n for g in range(sets) for n in top(worth[g * each:(g + 1) * each], round(keep * each))}
        return torch.tensor([j * count // cols in best for j in range(cols)]).expand(rows, cols)
    if u.m.facts["whole"]:
        worth = [math.fsum(float(s[i, j]) for i in range(rows)) for j in range(cols)]
        best = top(worth, round(keep * cols) if u.free else cols // 2)
        chosen = [j in best and (u.free or worth[j] / rows >= u.knobs["limit"]) for j in range(cols)]
        return torch.tensor(chosen).expand(rows, cols)
    if u.m.name not in groups:
        return None
    out = torch.zeros(s.shape, dtype=torch.bool)
    for g in groups[u.m.name]():
        k = u.knobs["n"] if u.m.name == "nm" else round(keep * len(g))
        for i in top([float(s[p]) for p in g], k):
            out[g[i]] = True
    return out


def nm_groups(u: Unit, at: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    lines = at if u.knobs["dim"] == "in" else [list(c) for c in zip(*at, strict=True)]
    return [line[k:k + u.knobs["m"]] for line in lines for k in range(0, len(line), u.knobs["m"])]


def of(m: Method) -> list[Unit]:
    return [Unit(m, **knobs) for knobs in variants(m)]


def added(mlp: dict[str, Tensor], x: Tensor) -> Tensor:
    """What an MLP adds to x [tokens, width]."""
    z = (x - x.mean(1, True)) / x.var(1, correction=0, keepdim=True).sqrt() * mlp["norm"] + mlp["norm.bias"]
    h = torch.nn.functional.silu(z @ mlp["gate"].T + mlp["gate.bias"]) * (z @ mlp["up"].T + mlp["up.bias"])
    return h @ mlp["down"].T + mlp["down.bias"]


def law_wiring_run_adds_what_all_do(m: Method) -> None:
    """Each member of a run is in one of those that come of it, which add the same to what all are given."""
    if m.facts["of"] != "run":
        return
    its, x = mlps(), heavy(70, 30, 20)
    want = torch.stack([added(mlp, x) for mlp in its]).sum(0)
    for knobs in ({}, {"length": 2}, {"dependency": 0.1}):
        found = call(m, env(m), **knobs)
        assert sum(count for count, _ in found) == len(its)
        assert (len(found) > 1) == bool(knobs)
        close(torch.stack([added(mlp, x) for _, mlp in found]).sum(0), want, 1e-4)


def law_wiring_axes_are_principal(m: Method) -> None:
    """A basis, in which the largest of the second moment comes first and nothing correlates."""
    if m.facts["of"] != "axes":
        return
    gram = env(m)["gram"]
    q = call(m, env(m)).double()
    close(q.T @ q, torch.eye(len(gram)), 1e-5)
    turned = q.T @ gram.double() @ q
    assert bool((turned.diagonal().diff() <= 1e-6 * turned.diagonal().max()).all())
    close(turned, turned.diagonal().diag(), 1e-5 * float(turned.diagonal().max()))


def law_wiring_stream_is_all_but_its_mean(m: Method) -> None:
    """What norms that take the mean off see stays, and there is none."""
    if m.facts["of"] != "stream":
        return
    w = GROUPS["writes"]()
    new = call(m, env(m))
    close(new - new.mean(0), w - w.mean(0), 1e-5)
    assert float(new.sum(0).abs().max()) < 1e-4
def of_experts(found: Experts, mlp: dict[str, Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """What experts add to tokens x [tokens, width], as the families have it that have experts, the maps behind stored in `dtype`."""
    down, h = (mlp["down"] if found.down is None else found.down), hidden(mlp, x)
    behind = [(down * gain).to(dtype).float() for gain in found.gains]
    most = torch.softmax(x @ found.router.T, -1).topk(found.active, -1)
    weights = torch.zeros(len(x), len(found.neurons)).scatter(1, most.indices, most.values / most.values.sum(-1, keepdim=True))
    y = torch.stack([weights[:, e, None] * (h[:, mine] @ behind[0][:, mine].T) for e, mine in enumerate(found.neurons)]).sum(0)
    return y if found.shared is None else y + 0.5 * (h[:, found.shared] @ behind[1][:, found.shared].T)


def law_wiring_mlp_adds_what_it_did(m: Method) -> None:
    """Where a token meets everything, in whatever type it is stored."""
    if m.facts["of"] != "mlp":
        return
    for (dtype, tol), knobs in itertools.product(((torch.float32, 1e-5), (torch.bfloat16, 1e-2)), ({}, {"always": 1}, {"parts": 6})):
        mlp, x = {r: w.to(dtype).float() for r, w in GROUPS["mlp"]().items()}, heavy(72, 30, 20)
        found = call(m, env(m, mlp=mlp, keep=1.0), **{k: v for k, v in knobs.items() if k in m.knobs})
        close(of_experts(found, mlp, x, dtype), hidden(mlp, x) @ mlp["down"].T, tol)


def law_wiring_mlp_parts_are_all_of_it(m: Method) -> None:
    """Each hidden neuron is in one place, or in each copy; those that a token meets are the share at most, and its router's choice."""
    if m.facts["of"] != "mlp":
        return
    at = env(m)
    for knobs in ({}, {"always": 1}, {"parts": 12, "always": 2}):
        found = call(m, at, **{k: v for k, v in knobs.items() if k in m.knobs})
        n, parts = at["mlp"]["down"].shape[1], {**m.knobs, **knobs}["parts"]
        if m.facts["overlap"]:
            assert bool((found.met(at["source"], n).sum(1) == n // 2).all())
            continue
        if found.copies:
            assert all(torch.equal(mine.sort().values, torch.arange(n)) for mine in found.neurons)
            continue
        shared = found.neurons.new_empty(0) if found.shared is None else found.shared
        assert torch.equal(torch.cat([found.neurons.flatten(), shared]).sort().values, torch.arange(n))
        met = found.met(at["source"], n)
        assert bool(met[:, shared].all())
        if "keep" in m.data:
            assert bool((met.sum(1) == n // parts * int(at["keep"] * parts)).all())


def law_wiring_mlp_mends(m: Method) -> None:
    """Fitted to what is met, the map behind comes nearer to what the MLP adds, and nearer than where neurons are met at random."""
    if m.facts["of"] != "mlp" or "refit" not in m.knobs:
        return
    at = env(m)
    want = at["fed"] @ at["mlp"]["down"].T

    def off(**knobs: Any) -> float:
        return float((call(m, at, **knobs).adds(at["source"], at["fed"], at["mlp"]["down"]) - want).square().sum())

    assert off() < 0.9 * off(refit=False)
    if "split" in m.knobs:
        assert off(refit=False) < off(refit=False, split="random")


def law_wiring_table_finds_the_map(m: Method) -> None:
    """The factors that there are between two tables, whatever is added to all words; of others those that leave the logits nearest."""
    if m.facts["of"] != "table":
        return
    at, d = env(m), heavy(351, 20)
    head = at["embed"] * d + heavy(352, 20)
    close(call(m, {**at, "head": head}, damp=0.0), d, 1e-3)
    e, o = (t - t.mean(0) for t in (at["embed"], at["head"]))
    best = call(m, at, damp=0.0)
    off = [error(o, e * f, at["gram"]) for f in (best, best * 1.01, torch.ones(20), torch.zeros(20), ((e * o).sum(0) / (e * e).sum(0)))]
    assert off[0] == min(off)


def law_wiring_layer_takes_the_share(m: Method) -> None:
    """By count, those that cost least, and more of them are the same and others."""
    if m.facts["of"] != "layer":
        return
    damage = GROUPS["damage"]()
    found = {share: call(m, env(m), share=share) for share in (0.25, 0.5, 1.0)}
    for share, its in found.items():
        assert int(its.sum()) == share * len(damage)
        assert share == 1 or float(damage[its].max()) <= float(damage[~its].min())
    assert bool((found[0.5] | ~found[0.25]).all())


def law_wiring_norm_is_exact_for_tokens_alike(m: Method) -> None:
    """Where all are of one size, that is what each is divided by; scaled by two, by half of it."""
    if m.facts["of"] != "norm":
        return
    alike = {"sizes": torch.full((12, 40), 0.25), "means": torch.full((12, 40), 3.0)}
    for share in (0.25, 1.0):
        which, constants = call(m, env(m, **alike), share=share)
        assert int(which.sum()) == share * 12
        close(constants, torch.tensor([4.0, 3.0]).expand(12, 2), 1e-5)
    sizes = GROUPS["sizes"]()
    close(call(m, env(m, sizes=2 * sizes))[1][:, 0], call(m, env(m, sizes=sizes))[1][:, 0] / 2, 1e-5)


def law_unit_mask(m: Method) -> None:
    for u in of(m):
        for name in THREE:
            mask = u(weight(name).abs(), 0.5)
            assert mask.dtype == torch.bool
            assert mask.shape == weight(name).shape


def law_unit_exact(m: Method) -> None:
    """Each group that competes keeps its count, its best, and of equals the first."""
    for u in of(m):
        for name in THREE:
            tied = (weight(name).abs() * 20).floor()
            for s in (weight(name).abs(), tied, torch.ones_like(tied)):
                for keep in SHARES:
                    want = slow_unit(u, s, keep)
                    if want is not None:
                        assert torch.equal(u(s, keep), want), (u, name, keep)
                    else:
                        check_blocks(u, u(s, keep), s, keep)


def check_blocks(u: Unit, mask: Tensor, s: Tensor, keep: float) -> None:
    """Units of rectangles (of one entry, unless the knobs say otherwise): whole, counted, and the better ones."""
    r, c = (u.knobs.get(k) or u.knobs.get("b") or 1 for k in ("rows", "cols"))
    blocks = mask.unfold(0, r, r).unfold(1, c, c).flatten(2)
    assert torch.equal(blocks.any(-1), blocks.all(-1)), "a block is kept or dropped whole"
    assert int(blocks.all(-1).sum()) == round(keep * blocks[..., 0].numel())
    whole = torch.arange(float(blocks[..., 0].numel())).reshape(blocks.shape[:2]).flip(1)  # no two blocks alike
    chosen = u(whole.repeat_interleave(r, 0).repeat_interleave(c, 1), keep)[::r, ::c]
    assert whole[chosen].min() > whole[~chosen].max(), "the better blocks"


def law_unit_prefers_the_larger(m: Method) -> None:
    for u in of(m) if "score" not in m.joint else ():  # or it looks at none
        s = weight("0.mlp.down").abs()
        mask = u(s, 0.5)
        assert s[mask].mean() > s[~mask].mean()


def law_unit_keeps_all_at_one(m: Method) -> None:
    if m.facts["free"]:
        for u in of(m):
            assert all(bool(u(weight(n).abs(), 1.0).all()) for n in THREE)


def law_unit_more_is_more(m: Method) -> None:
    """What a smaller share keeps, a larger one keeps too; a unit that is not free does not look at the share."""
    for u in of(m):
        few, many = (u(weight("0.mlp.gate").abs(), keep) for keep in ((0.2, 0.8) if m.facts["ends"] else SHARES))  # of two units, too
        assert bool((many | ~few).all())
        assert torch.equal(few, many) != m.facts["free"]


def law_unit_period(m: Method) -> None:
    """Columns of one period are decided without the others."""
    for u in of(m):
        s = weight("0.mlp.down").abs()
        if u.period and not u.free:
            for j in range(0, s.shape[1], u.period):
                part = slice(j, j + u.period)
                assert torch.equal(u(s, 0.5)[:, part], u(s[:, part].contiguous(), 0.5))
        elif not u.free and u.knobs.get("dim") != "out" and not m.facts["whole"]:
            pytest.fail(f"{u} fixes a pattern along the input, so it has a period")


def law_unit_needs_no_data(m: Method) -> None:
    """The engine asks it about a shape, without scores, before a run: it answers or refuses from the shape alone."""
    for u in of(m):
        assert u(torch.empty(24, 20, device="meta"), 0.5).shape == (24, 20)


def law_unit_refuses_what_does_not_divide(m: Method) -> None:
    if {"m", "b"} & set(m.knobs):
        for u in of(m):
            with pytest.raises(BadInput):
                u(torch.ones(7, 9), 0.5)


# --- score ----------------------------------------------------------------------------------------------------------
def law_score_shape(m: Method) -> None:
    for name in SITES:
        for dtype in (torch.float32, torch.bfloat16):
            s = call(m, env(m, name, dtype=dtype))
            assert s.dtype == torch.float32
            assert s.shape == {"weight": weight(name).shape, "input": weight(name).shape[1:], "sublayer": (1,)}[m.facts["of"]]
            assert bool(s.isfinite().all())
            assert bool((s >= 0).all())


def law_score_zero_is_least(m: Method) -> None:
    """Higher means keep: a weight that is zero already is the first to go."""
    for name in THREE if m.facts["of"] == "weight" else ():
        w = weight(name).clone()
        w[::3, ::4] = 0
        zero = w == 0
        s = call(m, env(m, name, w=w))
        assert s[zero].max() <= s.min()
        assert s[~zero].mean() > s[zero].mean()


def law_score_computes_in_float32(m: Method) -> None:
    w = weight("0.mlp.gate").bfloat16()
    assert same(call(m, env(m, w=w)), call(m, env(m, w=w.float())))


def law_score_survives_poor_statistics(m: Method) -> None:
    """A dead input and fewer tokens than inputs."""
    for name in THREE:
        s = call(m, env(m, name, poor=True))
        assert bool(s.isfinite().all())
        assert bool((s >= 0).all())
        assert m.facts["of"] == "sublayer" or s.std() > 0


def permuted(name: str, p: Tensor, along: str) -> dict[str, Tensor]:
    """The site's statistics as they would be with its outputs, or its inputs, in another order."""
    site, out = SITES[name], {}
    for k, t in stats(name).items():
        kind, dims = REG[f"stat/{k}"].facts["of"], []
        if kind == "grad":
            dims = [-2 if along == "out" else -1]
        elif (kind == "input" and along == "in") or (kind == "mid" and along == ("out" if site.consumer else "in")):
            dims = list(range(t.dim())) if k != "sample" else [1]
        elif kind == "sentence" and along == "in":
            dims = [t.dim() - 1]
        out[k] = t
        for d in dims:
            out[k] = out[k].index_select(d, p)
    return out


def law_score_rows(m: Method) -> None:
    """Another order of the outputs gives the same scores in that order."""
    for name in THREE:
        p = torch.randperm(SITES[name].shape[0], generator=generator(1))
        scores = call(m, env(m, name))
        close(call(m, env(m, name, w=weight(name)[p], **permuted(name, p, "out"))), scores[p] if scores.dim() == 2 else scores, 1e-4)


def law_score_inputs(m: Method) -> None:
    """Another order of the inputs gives the same scores in that order."""
    for name in THREE:
        p = torch.randperm(n := SITES[name].shape[1], generator=generator(2))
        alone = {"heads": torch.tensor([n, n])}  # every input by itself: heads would not stay together
        scores = call(m, env(m, name, **alone))
        close(call(m, env(m, name, w=weight(name)[:, p], **permuted(name, p, "in"), **alone)),
              scores[..., p] if m.facts["of"] != "sublayer" else scores, 1e-4)


# --- budget ---------------------------------------------------------------------------------------------------------
def averaged(m: Method, shares: dict[str, float]) -> float:
    if m.facts["mean"] == "weight":
        return sum(shares[n] * s.size for n, s in SITES.items()) / sum(s.size for s in SITES.values())
    assert m.facts["mean"] == "block"
    means = []
    for block in {s.block for s in SITES.values()}:
        inside = {n: s.size for n, s in SITES.items() if s.block == block}
        means.append(sum(shares[n] * size for n, size in inside.items()) / sum(inside.values()))
    return sum(means) / len(means)


def law_budget_chooses_the_best(m: Method) -> None:
    """Of all that a size allows the least loss: every way is tried. Sites of one input take the same; equal calls in any order agree."""
    if not m.facts["chooses"]:
        return
    have = {**choices(), "0.mlp.up": replace(choices()["0.mlp.gate"], site=replace(SITES["0.mlp.gate"], name="0.mlp.up", role="up"))}
    weights = sum(c.site.size for c in have.values())
    ways = []
    for way in itertools.product(range(3), repeat=len(SITES)):
        at = dict(zip(SITES, way, strict=True)) | {"0.mlp.up": way[list(SITES).index("0.mlp.gate")]}
        ways.append((sum(have[n].bytes[i] for n, i in at.items()), sum(have[n].losses[i] for n, i in at.items())))
    for mean in (2.0, 2.5, 3.1, 3.9, 9.0):
        names = call(m, {"options": have}, mean=mean)
        assert names == call(m, {"options": dict(reversed(have.items()))}, mean=mean)
        at = {n: have[n].names.index(name) for n, name in names.items()}
        assert set(at) == set(have)
        assert at["0.mlp.gate"] == at["0.mlp.up"]
        assert sum(have[n].bytes[i] for n, i in at.items()) * 8 <= mean * weights
        loss = sum(have[n].losses[i] for n, i in at.items())
        assert loss == pytest.approx(min(lost for size, lost in ways if size * 8 <= mean * weights))
    assert set(names.values()) == {"four"}
    with pytest.raises(BadInput, match="less than the smallest grids take"):
        call(m, {"options": have}, mean=1.0)


def law_budget_meets_the_target(m: Method) -> None:
    if m.facts["chooses"] or m.facts["spectra"] or m.facts["own"] or m.facts["learns"]:
        return
    for wild in (False, True):
        for target in (0.05, *SHARES, 0.95):
            shares = call(m, env(m, keep=target, scores=summaries(m.facts["of"], wild)))
            assert set(shares) == set(SITES)
            assert all(0 <= float(v) <= 1 for v in shares.values()), shares
            assert averaged(m, shares) == pytest.approx(target, abs=1e-6), (wild, target)


def law_budget_order_of_sites(m: Method) -> None:
    if m.facts["chooses"]:
        return
    at = env(m, keep=0.3)
    turned = {k: dict(reversed(v.items())) if isinstance(v, dict) else v for k, v in at.items()}
    turned["trial"] = Trying(dict(reversed(SITES.items())), trial().like)
    a, b = call(m, at), call(m, turned)
    assert {k: float(a[k]) for k in SITES} == pytest.approx({k: float(b[k]) for k in SITES}, abs=1e-9)


def law_budget_treats_equals_alike(m: Method) -> None:
    """Sites that do not differ in anything a budget sees get the same share, the target."""
    if m.facts["chooses"] or m.facts["spectra"] or m.facts["own"] or m.facts["learns"]:
        return
    scores = {f"{k}.attn.o": replace(summaries(m.facts["of"])["2.attn.o"], site=replace(SITES["2.attn.o"], block=k))
              for k in range(4)}
    have = {k: dict.fromkeys(scores, v) for k, v in stats("2.attn.o").items()}
    alike = Trying({n: s.site for n, s in scores.items()}, dict.fromkeys(scores, "2.attn.o"))
    shares = call(m, {"scores": scores, "target": 0.3, "trial": alike, **have})
    assert {k: float(v) for k, v in shares.items()} == pytest.approx(dict.fromkeys(scores, 0.3), abs=1e-6)


def law_budget_ranks_are_the_best(m: Method) -> None:
    """Of all that the parameters allow the least loss: every way is tried. No more parameters than asked for, and less by no more than a
    step; ranks come back from shares; a weight is left whole where factors would take as much."""
    if not m.facts["spectra"]:
        return
    sizes, losses = {}, {}
    for n, s in SITES.items():
        most = max(r for r in range(1, 99) if r * sum(s.shape) < s.size)
        some = [most // 3, most * 2 // 3, most]
        sizes[n] = [*(r * sum(s.shape) for r in some), s.size]
        losses[n] = [*(spectra()[n].lost[r] for r in some), 0.0]
    total = sum(s.size for s in SITES.values())
    ways = [(sum(sizes[n][i] for n, i in zip(SITES, way, strict=True)), sum(losses[n][i] for n, i in zip(SITES, way, strict=True)))
            for way in itertools.product(range(4), repeat=len(SITES))]
    gap = max(b - a for its in sizes.values() for a, b in pairwise(its))
    for target in (0.35, *SHARES, 0.95, 1.0):
        if target < min(size for size, _ in ways) / total:
            continue
        shares = call(m, {"spectra": spectra(), "target": target}, steps=3)
        taken = {}
        for n, s in SITES.items():
            taken[n] = s.size if shares[n] == 1 else rank_of(s.shape, shares[n]) * sum(s.shape)
            assert taken[n] == pytest.approx(shares[n] * s.size)
        assert target * total - gap < sum(taken.values()) <= target * total
        loss = sum(losses[n][sizes[n].index(taken[n])] for n in SITES)
        assert loss == pytest.approx(min(lost for size, lost in ways if size <= target * total))
    assert set(shares.values()) == {1.0}
    with pytest.raises(BadInput, match="keep more"):
        call(m, {"spectra": spectra(), "target": 0.05})
    with pytest.raises(BadInput, match="steps is 0"):
        call(m, {"spectra": spectra(), "target": 0.5}, steps=0)


def law_budget_takes_the_head_of_a_ranking(m: Method) -> None:
    """Of every site what scores highest of all, no more parameters than asked for, and no more that would fit; a smaller size lies within
    a larger one."""
    if m.facts["learns"] is None:
        return
    total, smaller = sum(s.size for s in SITES.values()), dict.fromkeys(SITES, 0.0)
    most = max(sum(s.shape) for s in SITES.values())
    for target in (0.35, 0.5, 0.7, 0.9, 1.0):
        shares = call(m, {"ranking": rankings(), "target": target})
        taken = {n: s.size if shares[n] == 1 else rank_of(s.shape, shares[n]) * sum(s.shape) for n, s in SITES.items()}
        assert all(taken[n] == pytest.approx(shares[n] * s.size) for n, s in SITES.items())
        assert target * total - most < sum(taken.values()) <= target * total or set(shares.values()) == {1.0}
        kept = {n: sorted(r.scores, reverse=True)[:taken[n] // sum(SITES[n].shape)] for n, r in rankings().items() if shares[n] < 1}
        gone = {n: sorted(r.scores, reverse=True)[len(kept[n]):] for n, r in rankings().items() if shares[n] < 1}
        assert min((k[-1] for k in kept.values() if len(k) > 1), default=1) >= max((g[0] for g in gone.values()), default=-1e9)
        assert all(shares[n] >= smaller[n] for n in SITES)
        smaller = shares
    with pytest.raises(BadInput, match="keep more"):
        call(m, {"ranking": rankings(), "target": 0.05})


def law_budget_tries_no_worse_than_one_share(m: Method) -> None:
    """What it makes of trials is never above the error of one share for all, and below it somewhere; asked for everything, it is that."""
    if "trial" not in m.data:
        return
    gains = []
    for target in (0.05, *SHARES, 0.95):
        for name in (None, *THREE):
            t = trial() if name is None else Trying({name: SITES[name]}, {name: name})
            found, even = (t.error(shares) for shares in (call(m, {"trial": t, "target": target}), dict.fromkeys(t.sites, target)))
            assert found <= even
            gains.append(found < 0.99 * even)
    assert any(gains)
    assert call(m, {"trial": trial(), "target": 1.0}) == dict.fromkeys(SITES, 1.0)
    for k, v in small(m).items():
        for bad in (0 * v, -v, 2.0, math.nan):
            with pytest.raises(BadInput, match=rf"{m.name}: {k} is "):
                call(m, {"trial": trial(), "target": 0.5}, **{k: bad})


# --- grid -----------------------------------------------------------------------------------------------------------
def on(m: Method, name: str, w: Tensor | None = None, **knobs: Any) -> Codes:
    """The site's weight, or this one, rounded to the grid."""
    given, knobs = weight(name) if w is None else w, {**small(m), **knobs}
    return rounded(given, m({"w": given, **stats(name)}, **knobs), min(knobs["group"], given.shape[1]) or given.shape[1])


def widths(m: Method, name: str) -> list[int]:
    """The bits it takes, most first."""
    found = []
    for bits in (8, 4, 3, 2, 1) if "bits" in m.knobs else ():
        try:
            on(m, name, bits=bits)
            found.append(bits)
        except BadInput as e:
            assert "bits" in str(e)
    return found


def law_grid_is_what_it_says(m: Method) -> None:
    """Its type, a scale a group in the type that is stored, a zero among its values or not."""
    for name in THREE:
        for group in (8, 0, 1000):
            for bits in widths(m, name) or [None]:
                knobs = {**small(m), "group": group, **({"bits": bits} if bits else {})}
                grid = on(m, name, **knobs).grid
                assert grid.type == m.facts["type"](knobs)
                assert grid.has_zero == m.facts["zero"]
                assert grid.scales.dtype == (torch.float16 if group else torch.float32)
                assert grid.scales.shape == (len(weight(name)), -(-weight(name).shape[1] // (min(group, weight(name).shape[1]) or 10**9)))


def law_grid_codes_are_the_nearest(m: Method) -> None:
    """No other code of the group stands for a value that is nearer; a value is its own nearest."""
    for name in THREE:
        codes = on(m, name)
        grid, w = codes.grid, grouped(weight(name), codes.group)
        every = torch.stack([grid.values(torch.full_like(w, c, dtype=torch.uint8)) for c in range(grid.levels)])
        near = (every - w).abs().amin(0)
        chosen = grid.values(grid.codes(w))
        assert bool(((chosen - w).abs() <= near * (1 + 1e-4) + 1e-6 * w.abs().max()).all())
        assert torch.equal(grid.values(grid.codes(chosen)), chosen)


def law_grid_finer_is_nearer(m: Method) -> None:
    """More bits are nearer, and shorter groups; a zero point of its own where signs are uneven; a range of the least error."""
    for name in THREE:
        w = weight(name)

        def off(w: Tensor = w, name: str = name, **knobs: Any) -> float:
            return float((on(m, name, w, **knobs).weight() - w).norm())

        by_bits = [off(bits=b) for b in widths(m, name)]
        assert all(a < 0.75 * b for a, b in pairwise(by_bits)), by_bits
        assert off(group=4) < off(group=0)
        if "asymmetric" in m.knobs:
            assert off(w.abs() + 0.01, asymmetric=True) < off(w.abs() + 0.01)
        if "clip" in m.knobs:
            assert off(clip="mse") < off(clip="max")
            assert off(clip="mse") < off(clip="percentile", percentile=0.9)


def law_grid_keeps_zeros(m: Method) -> None:
    """What an earlier pass dropped stays dropped, and a group of nothing but zeros is no reason for NaN."""
    for name in THREE:
        w = weight(name).clone()
        w[::2, ::3], w[1], w[:, 8:16] = 0, 0, 0
        for knobs in ({}, {"asymmetric": True}, {"clip": "mse"}, {"clip": "percentile"}, {"clip": "entropy"}, {"clip": "rms"}):
            if set(knobs) <= set(m.knobs):
                new = on(m, name, w, **knobs).weight()
                assert bool(new.isfinite().all())
                assert not m.facts["zero"] or not bool(new[w == 0].any())
    assert bool(on(m, name, torch.zeros(4, 12)).weight().isfinite().all() if not m.needs else True)


def law_grid_follows_the_scale(m: Method) -> None:
    """Weights four times as large have values four times as large; another order of the outputs gives that order."""
    for name in THREE:
        new, p = on(m, name).weight(), torch.randperm(len(weight(name)), generator=generator(1))
        assert torch.equal(on(m, name, weight(name) * 4).weight(), new * 4)
        close(on(m, name, weight(name)[p]).weight(), new[p])


def law_grid_refuses(m: Method) -> None:
    for name in THREE[:1]:
        wrong: list[dict[str, Any]] = [{"group": -1}, {"bits": 5}, {"bits": 0}, {"clip": "most"}, {"exponent": 9}, {"exponent": 0},
                                       {"clip": "percentile", "percentile": 0.0}, {"clip": "percentile", "percentile": 1.5}]
        for knobs in (k for k in wrong if set(k) <= set(m.knobs)):
            with pytest.raises(BadInput, match=r".{20,}"):
                on(m, name, **knobs)
        for value in (torch.nan, torch.inf):
            w = weight(name).clone()
            w[1, 2] = value
            with pytest.raises(BadInput, match="finite"):
                on(m, name, w)


# --- rewrite --------------------------------------------------------------------------------------------------------
def law_rewrite_basis_loses_nothing(m: Method) -> None:
    """In the basis a weight gives of turned inputs what it gave of them, and comes back as it was; from poor statistics too."""
    for name in SITES if m.facts["basis"] else ():
        for poor in (False, True):
            at = env(m, name, poor=poor)
            inside, w = call(m, at), weight(name)
            (x,) = batches(name, "input", poor)[0]
            turned = inside.weight(w)
            close(inside.of(x) @ turned.T, x @ w.T, 1e-4)
            close(inside.plain(turned), w)
            close(inside.straight(inside.of(x)), x)
            y = inside.of(x)
            close(inside.gram(x.T @ x), y.T @ y, 1e-4)
            assert inside.size == w.shape[1]
            if m.facts["outside"]:
                outside = m.facts["outside"](len(w), small(m), w.device)
                close(outside.straight(outside.of(w.T)), w.T)
                assert not torch.allclose(outside.of(w.T), w.T)


def law_rewrite_basis_spreads_outliers(m: Method) -> None:
    """One input that is far above the others is far above them no longer, and rows lose less by rounding."""
    for name in THREE if m.facts["basis"] else ():
        w = weight(name).clone()
        w[:, 3] *= 20
        gram = torch.eye(w.shape[1])
        inside = call(m, env(m, name, w=w, gram=gram))
        turned, grid = inside.weight(w), OnGrid(get("grid/int"), {}, bits=4, group=0)
        off = [float((rounded(t, grid(t), t.shape[1]).weight() - t).norm()) for t in (turned, w)]
        assert turned.abs().amax(1).mean() < 0.8 * w.abs().amax(1).mean()
        assert off[0] < off[1]


def law_rewrite_scales_inputs(m: Method) -> None:
    """A finite scale above zero for every input, from poor statistics too."""
    for name in SITES if not m.facts["basis"] else ():
        for poor in (False, True):
            s = call(m, env(m, name, poor=poor))
            assert s.shape == weight(name).shape[1:]
            assert s.dtype == torch.float32
            assert bool((s.isfinite() & (s > 0)).all())


def law_rewrite_helps_rounding(m: Method) -> None:
    """Rounding costs the outputs less behind it than without it."""
    for name in THREE if not (m.facts["basis"] or m.facts["rounded"]) else ():
        for bits in (4, 3):
            grid = OnGrid(get("grid/int"), stats(name), bits=bits)
            at, w = env(m, name, grid=grid), weight(name)
            s = call(m, at)
            new, plain_ = (rounded(t, grid(t), grid.group(t)).weight() for t in (w * s, w))
            assert error(w, new / s, at["gram"]) < error(w, plain_, at["gram"]), (name, bits)


def law_rewrite_helps_rounded_inputs(m: Method) -> None:
    """Where one input is far above the others, rounding all of them by one step costs the outputs less behind it than without it."""
    for name in THREE if m.facts["rounded"] else ():
        x, w = stats(name)["sample"].clone(), weight(name)
        x[:, 3] *= 30
        at = env(m, name, sample=x, absmax=x.abs().amax(0), grid=OnGrid(get("grid/int"), stats(name), bits=8, group=0))
        s, off = call(m, at), []
        for scale in (s, torch.ones_like(s)):
            met = Rounding(8, (x / scale).abs().max()[None] / 127).of(x / scale)
            new = rounded(w * scale, at["grid"](w * scale), w.shape[1]).weight()
            off.append(float((met @ new.T - x @ w.T).square().sum()))
        assert off[0] < 0.7 * off[1], name


def law_rewrite_centres(m: Method) -> None:
    """What is taken off an input first lets rounding by one step cost less where inputs lie far from zero; asked not to, nothing is."""
    for name in THREE if m.facts["centre"] else ():
        x, w = stats(name)["sample"] + 20 * torch.randn(weight(name).shape[1], generator=generator(7)), weight(name)
        z, off = m.facts["centre"](x, small(m)), []
        assert z.shape == w.shape[1:]
        assert m.facts["centre"](x, {**small(m), "centred": False}) is None
        for shift in (z, torch.zeros_like(z)):
            there = x - shift
            s = call(m, env(m, name, sample=there))
            met = Rounding(8, (there / s).abs().max()[None] / 127).of(there / s)
            off.append(float(((met * s + shift - x) @ w.T).square().sum()))
        assert off[0] < 0.5 * off[1], name


# --- input ----------------------------------------------------------------------------------------------------------
def law_input_has_so_many_steps(m: Method) -> None:
    """What is met are whole steps around zero, no more than the bits have, the nearest ones within the range."""
    for name in THREE:
        for bits in (8, 4, 2):
            r, last = call(m, env(m, name), act_bits=bits), (1 << (bits - 1)) - 1
            x = stats(name)["sample"]
            y = r.of(x)
            step = x.abs().amax(1, keepdim=True) / last if r.scale is None else r.scale
            codes = y / step
            close(codes.round(), codes, 1e-4)
            assert float(codes.abs().max()) <= last + 1e-3
            near = x.abs() <= last * step
            assert bool(((y - x).abs()[near] <= (step / 2 * (1 + 1e-4)).expand_as(x)[near]).all())
            assert bool((r.of(torch.zeros(2, 3)) == 0).all())


def law_input_parts_are_the_truth(m: Method) -> None:
    r = call(m, env(m))
    back = Rounding.among(r.parts())
    assert back is not None and back.same(r) and not back.same(Rounding(3))


def law_input_refuses(m: Method) -> None:
    for bits in (1, 9, 0, -8):
        with pytest.raises(BadInput, match="2 to 8 bits"):
            call(m, env(m), act_bits=bits)


# --- gate -----------------------------------------------------------------------------------------------------------
SCORED = {"input": "sample", "hidden": "hidden_gate", "router": "source"}
SEQUENCES = 4  # that the calibration tokens stand for, where these are decided for together


def scored(m: Method, name: str) -> Tensor:
    """What the gate of a site scores of its calibration tokens: [sequences, tokens, inputs]."""
    v = stats(name)[SCORED[m.facts["of"]]]
    return v.unflatten(0, (SEQUENCES, -1))


def rules(m: Method) -> list[dict[str, Any]]:
    """Knobs by which it decides in one way or the other."""
    return [{"exact": False}, {"exact": True}] if "exact" in m.knobs else [{}]


def law_gate_computes_the_share(m: Method) -> None:
    """Of the calibration tokens; where it keeps so many of the largest, of every one, in whole units."""
    for name in THREE if m.facts["free"] else ():
        v = scored(m, name)
        for keep in (*SHARES, 0.05, 0.95):
            for knobs in rules(m):
                gate = call(m, env(m, name, keep=keep), **knobs)
                passed = gate.mask(v).float()
                assert passed.shape == (*v.shape[:2], SITES[name].shape[1])
                if gate.core:
                    assert bool(passed[:, :8].all())
                    assert bool((passed[:, 8:].sum(2) == max(1, round(keep * passed.shape[2]))).all())
                elif gate.count:
                    assert bool((passed.sum(2) == max(1, round(keep * passed.shape[2] / gate.group)) * gate.group).all())
                else:
                    assert abs(float(passed.mean()) - keep) <= 1 / passed.numel() + 1e-9


def law_gate_is_one_set_for_a_step(m: Method) -> None:
    """For all its sequences, as many as it was told for so many; what it was not made for it refuses."""
    if m.facts["by"] != "step":
        return
    for batch in (1, 5, 8):
        gate, v = call(m, env(m), batch=batch), stats("0.mlp.gate")["source"].unflatten(0, (8, -1))
        assert gate.counts.shape == (batch,)
        assert bool((gate.counts.diff() >= 0).all())
        for size in range(1, 9):
            if size > batch:
                with pytest.raises(BadInput, match=rf"up to {batch} sequences is given {size}.*batch={size}"):
                    gate.mask(v[:size])
                continue
            passed, worth = gate.mask(v[:size]), gate.router(v[:size]).relu().sum(0)
            assert torch.equal(passed, passed[:1].expand_as(passed))
            assert torch.equal(passed[0], select.top(worth, int(gate.counts[size - 1])))


def law_gate_sentence_decides_once(m: Method) -> None:
    """Its first tokens for all that follow, whatever these are, and for no other sentence."""
    if m.facts["by"] != "sentence":
        return
    for name in THREE:
        for prompt in (1, 8, 23):
            gate, v = call(m, env(m, name, keep=0.3), prompt=prompt), scored(m, name)
            passed = gate.mask(v)
            assert torch.equal(passed[:, prompt:], passed[:, prompt:prompt + 1].expand_as(passed[:, prompt:]))
            other = torch.cat([v[:, :prompt], v[:, prompt:].flip(2)], 1)
            assert torch.equal(gate.mask(other), passed)
            assert torch.equal(torch.stack([gate.mask(one) for one in v]), passed)
            assert bool(gate.mask(v[:, :prompt]).all())
        if "clusters" not in m.knobs:  # its own
            want = [top(fires(one[:prompt].double().numpy()).tolist(), round(0.3 * v.shape[2])) for one in v]
            assert [set(one[-1].nonzero()[:, 0].tolist()) for one in passed] == want
        else:  # those of a cluster of calibration sentences
            gate = call(m, env(m, name, keep=0.3), clusters=1)
            often = stats(name)["firings"].sum(0)
            assert set(gate.mask(v)[0, -1].nonzero()[:, 0].tolist()) == top(often.tolist(), round(0.3 * v.shape[2]))
            assert len(call(m, env(m, name, keep=0.3), clusters=2).core.centres) == 2


def law_gate_finds_what_it_says(m: Method) -> None:
    """Where it says how much of what is active it finds: of the neurons that any of some sequences needs, on average."""
    if "recall" not in m.knobs:
        return
    for name in THREE:
        x, y = (stats(name)[n] for n in ("source", "fed"))
        for recall, keep in ((0.99, 0.2), (0.7, 0.2), (0.9, 0.6)):
            gate = call(m, env(m, name, keep=keep), recall=recall, epochs=60)
            wanted = y > y.flatten().sort().values[round((1 - keep) * y.numel()) - 1].clamp_min(0)
            for size in (1, 3, 8):
                draws = torch.randint(len(x) - 12, len(x), (size, 2000), generator=generator(size))  # of those it was not learned from
                union, worth = wanted[draws].any(0), gate.router(x[draws]).relu().sum(0)
                union, worth = union[union.any(1)], worth[union.any(1)]
                order = worth.sort(dim=1, descending=True, stable=True).indices
                found = [float((union.gather(1, order[:, :k]).sum(1) / union.sum(1)).mean()) for k in range(1, 1 + y.shape[1])]
                says, needs = int(gate.counts[size - 1]), 1 + next(k for k, f in enumerate(found) if f > recall - 1e-6)
                assert needs - 1 <= says <= needs + (4 if size == 3 else 1)  # as many as for 4 sequences


def law_gate_at_one_is_the_identity(m: Method) -> None:
    """Bit for bit, whatever comes: nothing, what is no number, what calibration never saw."""
    for name in THREE:
        for knobs in rules(m):
            gate, v = call(m, env(m, name, keep=1.0), **knobs), scored(m, name).clone()
            v[0, 0], v[0, 1, 1], v[1, 2, 2], v[3, 3] = 0, torch.nan, torch.inf, 1e30
            assert bool(gate.mask(v).all())


def law_gate_at_nothing_leaves_one(m: Method) -> None:
    """A budget may take all from a site: of the calibration tokens no score is above the largest, of each the largest one is kept."""
    for name in THREE:
        for knobs in rules(m):
            passed = call(m, env(m, name, keep=0.0), **knobs).mask(scored(m, name))
            if "exact" in knobs:
                assert bool((passed.sum(-1) == int(knobs["exact"])).all())


def law_gate_passes_what_is_no_number(m: Method) -> None:
    """It is not to be lost; a router that is given it can tell nothing of the token, and computes what it may."""
    for knobs in rules(m):
        gate, v = call(m, env(m, keep=0.3), **knobs), scored(m, "0.mlp.gate").clone()
        v[..., 5] = torch.nan
        passed = gate.mask(v)
        if m.facts["by"] == "sentence":  # which says what it is without
            assert torch.equal(passed, gate.mask(v.nan_to_num(0.0)))
        elif m.facts["of"] != "router":
            assert bool(passed[..., 5].all())
        else:
            assert bool(passed.all() if gate.threshold is not None else passed.any(2).all())


def law_gate_more_is_more(m: Method) -> None:
    for knobs in rules(m):
        few, many = (call(m, env(m, keep=keep), **knobs).mask(scored(m, "0.mlp.gate")) for keep in SHARES)
        assert bool((many | ~few).all())
        assert not torch.equal(few, many)


def law_gate_prefers_the_larger(m: Method) -> None:
    """A larger magnitude passes where a smaller one does; of what a router says, a larger score."""
    for knobs in rules(m):
        gate, v = call(m, env(m, keep=0.5), **knobs), scored(m, "0.mlp.gate")
        if m.facts["of"] == "router":
            worth = gate.router(v)
            worth = worth.relu().sum(0).expand_as(worth) if m.facts["by"] == "step" else worth.unflatten(2, (-1, gate.pool)).amax(3)
            passed = gate.mask(v)[..., ::gate.group]
            assert bool((worth.where(passed, torch.inf).amin(2) >= worth.where(~passed, -torch.inf).amax(2)).all())
            continue
        for j in range(3) if gate.core is None or gate.core.centres is None else ():  # where other sentences tell, nothing follows
            more = v.clone()
            more[..., j] *= 3
            assert bool((gate.mask(more)[..., j] | ~gate.mask(v)[..., j]).all())


def law_gate_router_finds_what_is_active(m: Method) -> None:
    """On tokens that it never saw: of what it lets pass a larger share is active than of all."""
    for name in THREE if m.facts["of"] == "router" else ():
        fresh = torch.randn(400, 20, generator=generator(3))[None]
        h = made(name, fresh)
        knobs = {"recall": 0.6} if "recall" in m.knobs else {}  # all of it would be nearly all neurons
        gate = call(m, env(m, name, keep=0.4 if gate_of_neurons(m) else 0.25), epochs=100, **knobs)
        wanted, found = h > 0, gate.mask(fresh)
        if gate_of_neurons(m):
            assert float(wanted[found].float().mean()) > float(wanted.float().mean()) + 0.25
        else:
            worth = h.square().unflatten(2, (-1, gate.group)).sum(3)
            assert float(worth[found[..., ::gate.group]].mean()) > 1.2 * float(worth.mean())


def gate_of_neurons(m: Method) -> bool:
    return "heads" not in m.data


def law_gate_units_stand_or_fall_together(m: Method) -> None:
    for name in THREE:
        gate = call(m, env(m, name, keep=0.3))
        passed = gate.mask(scored(m, name))
        units = passed.unflatten(2, (-1, gate.group))
        assert bool((units.all(3) == units.any(3)).all())
        assert gate.group == (1 if gate_of_neurons(m) else SITES[name].shape[1] // 2)


def law_gate_parts_are_the_truth(m: Method) -> None:
    for name in THREE:
        for knobs in rules(m):
            gate, v = call(m, env(m, name), **knobs), scored(m, name)
            back = Gate.among(gate.parts())
            assert back is not None
            assert back.of == m.facts["of"]
            assert torch.equal(back.mask(v), gate.mask(v))
            for missing in gate.parts():
                with pytest.raises(BadInput, match="trim the model again"):
                    Gate.among({k: t for k, t in gate.parts().items() if k != missing})


def law_gate_refuses_knobs_that_mean_nothing(m: Method) -> None:
    for knob, value in (("rank", -1), ("epochs", 0), ("lr", 0.0), ("batch", 0), ("recall", 0.0), ("recall", 1.5), ("prompt", 0),
                        ("clusters", 0)):
        if knob in m.knobs:
            with pytest.raises(BadInput, match=f"{knob}={value:g}"):
                m.facts["check"]({**m.knobs, knob: value})


# --- edit -----------------------------------------------------------------------------------------------------------
def pruned(m: Method, name: str, unit: Unit, keep: float, **given: Any) -> Change:
    return call(m, env(m, name, unit=unit, keep=keep, **given))


def law_edit_respects_its_mask(m: Method) -> None:
    for unit in units():
        for dtype in (torch.float32, torch.bfloat16):
            for name in THREE:
                new = pruned(m, name, unit, 0.3, dtype=dtype)
                assert new.w.dtype == dtype
                assert new.w.shape == weight(name).shape
                assert bool(new.w.isfinite().all())
                if new.mask is not None:
                    assert new.mask.dtype == torch.bool
                    assert not bool(new.w[~new.mask].any())


def law_edit_hits_the_share(m: Method) -> None:
    """As many entries as the unit keeps, row by row where rows compete, group by group where it is a pattern."""
    if not m.facts["drops"]:
        assert all(pruned(m, name, plain(), 0.3).mask is None for name in THREE)
        return
    if m.joint and "unit" not in m.data:
        for name in THREE:
            for keep in SHARES:
                new = pruned(m, name, plain(), keep)
                out, n = new.mask.shape  # of what is fused, whole inputs
                want = round(keep * n) * out if m.facts["fuses"] else round(keep * n * out)
                assert int(new.mask.sum()) == want, (name, keep)
        return
    for unit in units():
        for name in THREE:
            for keep in SHARES:
                want = unit(weight(name).abs(), keep)
                got = pruned(m, name, unit, keep).mask
                assert int(got.sum()) == int(want.sum()), (unit, name, keep)
                for d in (0, 1):  # the unit's own counts, where they do not depend on the scores
                    if len(set(want.sum(d).tolist())) == 1 and unit.m.name in ("row", "column", "nm"):
                        assert torch.equal(got.sum(d), want.sum(d)), (unit, name, keep, d)
                if unit.m.name == "nm":
                    lines = got if unit.knobs["dim"] == "in" else got.T
                    assert bool((lines.unfold(1, unit.knobs["m"], unit.knobs["m"]).sum(-1) == unit.knobs["n"]).all())
                r, c = (unit.knobs.get(k) or unit.knobs.get("b") or 1 for k in ("rows", "cols"))
                blocks = got.unfold(0, r, r).unfold(1, c, c).flatten(2)
                assert torch.equal(blocks.any(-1), blocks.all(-1)), (unit, name, keep)


def law_edit_keeps_earlier_zeros(m: Method) -> None:
    if "mask" not in m.data:
        return
    for name in THREE:
        earlier = torch.rand(weight(name).shape, generator=generator(3)) > 0.3
        for unit in units():
            given = {} if m.joint else {"keep": 1.0}
            new = call(m, {**env(m, name, unit=unit, keep=0.7, w=weight(name) * earlier), "mask": earlier, **given})
            assert not bool(new.w[~earlier].any()), unit
            assert bool(new.w.isfinite().all()), unit


def law_edit_keeps_all_at_one(m: Method) -> None:
    for unit in units() if m.facts["drops"] else ():
        if unit.free:
            for name in THREE:
                new = pruned(m, name, unit, 1.0)
                assert new.mask is None or bool(new.mask.all())
                torch.testing.assert_close(new.w, weight(name), rtol=1e-4, atol=1e-4 * float(weight(name).abs().max()))


def law_edit_parts_are_the_truth(m: Method) -> None:
    """Where an edit leaves codes or factors, its weight is what they decode to, to the last bit of its type."""
    for name in THREE:
        for dtype in (torch.float32, torch.bfloat16):
            new = pruned(m, name, plain(), 0.5, dtype=dtype)
            terms, spared = Terms.among(new.parts), Spared.among(new.parts)
            assert (terms is not None and terms.codes is not None) == bool(m.facts["codes"])
            assert m.facts["codes"] or (Factors.among(new.parts) is not None) == (m.facts["factors"] is True)
            products = Entrywise.among(new.parts)
            assert (products is not None) == (m.facts["factors"] == "entrywise")
            assert products is None or torch.equal(products.weight().to(dtype), new.w)
            assert (Books.among(new.parts) is not None) == m.facts["books"]
            if terms is not None:
                assert torch.equal(terms.weight().to(dtype), new.w)
            assert bool(spared) == m.facts["spares"]


def law_edit_spares(m: Method) -> None:
    """What it spares and what is left make its weight; single weights as they were, inputs in as many bits as asked; nothing of nothing."""
    for name in THREE if m.facts["spares"] else ():
        w = weight(name)
        mask = plain("site")(w.abs(), 0.1)
        new = call(m, {**env(m, name), "mask": mask})
        spared = Spared.among(new.parts)
        assert torch.equal(new.w, w) and len(spared.entries) == int(mask.sum())
        assert not bool(spared.rest(w)[mask].any()) and torch.equal(spared.rest(w)[~mask], w[~mask])
        near = []
        for bits in (2, 3, 4, 8):
            new = call(m, {**env(m, name), "mask": mask}, single=bits)
            spared = Spared.among(new.parts)
            assert torch.equal(new.w[~mask], w[~mask]) and torch.equal(spared.entries, new.w[mask])
            assert torch.equal(spared.entries, spared.entries.bfloat16().float()) and not bool(spared.rest(new.w)[mask].any())
            rows = [{float(v) for v in (row[kept] / row[kept].abs().max())} for row, kept in zip(new.w, mask, strict=True) if kept.any()]
            assert all(len(values) < 1 << bits for values in rows)
            near.append(float((new.w - w).norm()))
        assert near == sorted(near, reverse=True) and near[-1] < 0.1 * near[0]
        columns = Unit(get("unit/inputs"))(w.abs(), 0.3)
        off = []
        for bits in (4, 8):
            new = call(m, {**env(m, name), "mask": columns}, bits=bits)
            spared = Spared.among(new.parts)
            assert spared.columns.tolist() == columns[0].nonzero()[:, 0].tolist() and spared.codes.bits == bits
            assert torch.equal(spared.whole(spared.rest(w)), new.w) and torch.equal(new.w[~columns], w[~columns])
            off.append(float((new.w - w).norm()))
        assert 0 < off[1] < 0.2 * off[0]
        assert not Spared.among(call(m, {**env(m, name), "mask": torch.zeros_like(mask)}).parts)


def columns(new: Change) -> int:
    """The rank of its factors, of two products together."""
    products = Entrywise.among(new.parts)
    return Factors.among(new.parts).rank if products is None else products.rank


def law_edit_factors_have_the_share(m: Method) -> None:
    """As many parameters as the share allows and no rank more; or the rank that was asked for, between 1 and the shorter side."""
    if m.facts["factors"]:
        for name in THREE:
            out, inputs = SITES[name].shape
            for keep in (0.01, *SHARES, 1.0):
                rank, least = columns(pruned(m, name, plain(), keep)), 1 + (m.facts["factors"] == "entrywise")
                assert rank == max(least, rank_of((out, inputs), keep)) == max(least, int(keep * out * inputs / (out + inputs)))
                assert rank == least or rank * (out + inputs) <= keep * out * inputs < (rank + 1) * (out + inputs)
            for rank in (1, 3, min(out, inputs)):
                new = call(m, env(m, name), rank=rank)
                assert columns(new) == least * rank and rank ** least >= int(torch.linalg.matrix_rank(new.w))
            for rank in (-1, min(out, inputs) + 1):
                with pytest.raises(BadInput, match="a rank is 1 to"):
                    call(m, env(m, name), rank=rank)


def law_edit_factors_are_the_whole_at_full_rank(m: Method) -> None:
    if m.facts["factors"]:
        for name in THREE:
            close(call(m, env(m, name), rank=min(SITES[name].shape)).w, weight(name), 1e-4)


def law_edit_factors_beat_the_nearest(m: Method) -> None:
    """What they are told of the inputs saves the outputs a good part of what the nearest weight of that rank costs them."""
    if m.facts["factors"] and "gram" in m.needs:
        for name in THREE:
            for keep in SHARES:
                w, at = weight(name), env(m, name, keep=keep)
                assert error(w, call(m, at).w, at["gram"]) < 0.9 * error(w, get("edit/svd")(at).w, at["gram"]), (name, keep)


def law_edit_shares_what_its_parts_say(m: Method) -> None:
    """It is the other's weight with its own parts, to the last bit; the more of them the nearer to what it was, and at full rank that."""
    for name in THREE if m.facts["shares"] else ():
        at, off = env(m, name), []
        new = call(m, at)
        assert torch.equal(adapted(at["other"], new.parts), new.w)
        for rank in (1, 3, min(SITES[name].shape)) if "rank" in m.knobs else ():
            off.append(error(weight(name), call(m, at, rank=rank, scaled=False).w, at["gram"]))
        assert off == sorted(off, reverse=True) and (not off or off[-1] < 1e-3 * off[0])
        if "rank" in m.knobs:
            assert call(m, at, rank=0, scaled=False).w is not at["w"] and torch.equal(call(m, at, rank=0, scaled=False).w, at["other"])
            sizes = [float((w @ at["gram"] * w).sum()) for w in (call(m, at, rank=1).w, weight(name))]
            assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)


def law_edit_codes_lie_on_any_grid(m: Method) -> None:
    """What it leaves is on the grid it was given, of that type and group, whatever an earlier pass dropped."""
    if m.facts["codes"] is True:
        for name in THREE:
            for grid in grids(stats(name)):
                for mask in (torch.ones_like(weight(name), dtype=torch.bool), torch.rand(weight(name).shape, generator=generator(3)) > 0.3):
                    if bool(mask.all()) or grid.m.facts["zero"]:
                        new = pruned(m, name, plain(), 0.5, grid=grid, w=weight(name) * mask, mask=mask)
                        terms = Terms.among(new.parts)
                        along = weight(name).T if terms.transposed else weight(name)
                        assert (terms.codes.type, terms.codes.group) == (grid.m.facts["type"](grid.knobs), grid.group(along)), grid
                        assert torch.equal(terms.weight(), new.w) and not bool(new.w[~mask].any()), grid


def law_edit_rounding_is_no_worse_on_any_grid(m: Method) -> None:
    """Groups that a grid fits otherwise, each by itself, are rounded to what is stored of it."""
    if m.facts["codes"] is True and "gram" in m.needs:
        for name in THREE:
            w = weight(name).clone()
            w[:, :8] = (w[:, :8] * 10) ** 5
            for grid in grids(stats(name)):
                at = env(m, name, w=w, mask=torch.ones_like(w, dtype=torch.bool), grid=grid)
                assert error(w, call(m, at).w, at["gram"]) < 3 * error(w, get("edit/rtn")(at).w, at["gram"]), (name, grid)


def law_edit_rounding_beats_the_nearest(m: Method) -> None:
    """What it is told of the inputs saves the outputs a good part of what rounding every weight by itself costs them."""
    if m.facts["codes"] is True and "gram" in m.needs:
        for name in THREE:
            at = env(m, name, mask=torch.ones_like(weight(name), dtype=torch.bool), grid=OnGrid(get("grid/int"), stats(name), bits=3))
            least = error(weight(name), get("edit/rtn")(at).w, at["gram"])
            feedback = {"feedback": True} if "feedback" in m.knobs else {}
            assert error(weight(name), call(m, at, **feedback).w, at["gram"]) < 0.8 * least, name


def law_edit_books_are_of_the_bits(m: Method) -> None:
    """As many vectors as their indices have bits, more of them nearer; no more than there are in the weight; a second book on top."""
    for name in THREE if m.facts["books"] else ():
        at, w = env(m, name), weight(name)
        off = []
        for bits, residual in ((1, 0), (2, 0), (1, 1), (2, 1)):
            books = Books.among(call(m, at, bits=bits, residual=residual, vector=2).parts)
            assert [len(b) for _, b in books.pairs] == [1 << 2 * n for n in (bits, residual) if n]
            off.append(error(w, books.weight(), at["gram"]))
        assert off[3] < off[1] < off[0] > off[2] > off[3], name
        all_of_them = call(m, at, bits=8, vector=2)
        assert len(Books.among(all_of_them.parts).book) == 1 << (w.numel() // 2).bit_length() - 1
        odd = call(m, env(m, name, w=w[:-1]), vector=3)
        assert odd.w.shape == w[:-1].shape and error(w[:-1], odd.w, at["gram"]) < 0.7 * error(w[:-1], 0 * w[:-1], at["gram"])
        for wrong in ({"bits": 0}, {"bits": 9}, {"vector": 0}, {"residual": 9}, {"residual": -1}):
            with pytest.raises(BadInput, match="bits \\* vector"):
                call(m, at, **wrong)


def law_edit_books_beat_the_nearest(m: Method) -> None:
    """The sweep saves the outputs a good part of what the same books cost without it."""
    for name in THREE if m.facts["books"] else ():
        at, w = env(m, name), weight(name)
        alone = call(m, {**at, "gram": at["gram"].diagonal().diag()})
        assert error(w, call(m, at).w, at["gram"]) < 0.9 * error(w, alone.w, at["gram"]), name


def law_edit_touches_every_site(m: Method) -> None:
    """Drops something everywhere and leaves something everywhere; one that drops nothing changes every row."""
    for name in SITES:
        new = pruned(m, name, plain(), 0.5)
        if not m.facts["drops"]:
            assert m.facts["spares"] or m.facts["gates"] or bool((new.w != weight(name)).any(1).all()), name
            continue
        assert 0.25 < float((new.w == 0).float().mean()) < 0.75, name
        assert bool(((new.w != 0).sum(1) > 0).all()), name


def fisher_error(w: Tensor, new: Tensor, grads: Tensor) -> float:
    """Mean over sequences of (g . (w' - w))^2, the loss by the site's empirical Fisher matrix."""
    return float(torch.einsum("nij,ij->n", grads.double(), new.double() - w.double()).square().mean())


def law_edit_beats_magnitude(m: Method) -> None:
    """What it is told of the inputs, or of the gradients, saves it a good part of the error magnitude makes."""
    for need, measure in (("gram", error), ("grads", fisher_error)):
        coarse = isinstance(m.facts["codes"], str) or m.facts["books"]  # a grid of its own may be as coarse as a sign
        if m.joint and need in m.needs and not coarse and not m.facts["factors"]:
            for unit in (plain("row"), plain("site"), plain("nm")):
                for name in THREE:
                    for keep in SHARES if unit.free else (0.5,):
                        w, stat = weight(name), stats(name)[need]
                        simple = measure(w, w * unit(w.abs(), keep), stat)
                        assert measure(w, pruned(m, name, unit, keep).w, stat) < 0.8 * simple, (unit, name, keep)


def law_edit_survives_poor_statistics(m: Method) -> None:
    for name in THREE:
        new = pruned(m, name, plain(), 0.5, poor=True)
        assert bool(new.w.isfinite().all())
        assert float(new.w.abs().max()) < 100 * float(weight(name).abs().max())


def law_edit_computes_in_float32(m: Method) -> None:
    for name in THREE:
        w = weight(name).bfloat16()
        low, high = pruned(m, name, plain(), 0.3, w=w), pruned(m, name, plain(), 0.3, w=w.float())
        assert same([low.w, low.mask], [high.w.bfloat16(), high.mask])


def law_edit_rows(m: Method) -> None:
    """Another order of the outputs gives the same weights in that order."""
    for name in THREE:
        p = torch.randperm(SITES[name].shape[0], generator=generator(1))
        turned = pruned(m, name, plain(), 0.3, w=weight(name)[p], **permuted(name, p, "out"))
        close(turned.w, pruned(m, name, plain(), 0.3).w[p], 1e-4)


# --- repair at the level of the network -----------------------------------------------------------------------------
def law_net_lowers_what_the_held_out_samples_lose(m: Method) -> None:
    """Their next tokens and their last hidden states together."""
    net = edited()
    was = held_out(net, mended(net, lambda name, new: new))
    now = held_out(net, call(m, {"net": net}, epochs=20, lr=0.01))
    assert sum(now) < 0.9 * sum(was)


def law_net_is_never_worse(m: Method) -> None:
    """Training that runs away is left out: every change is as it was."""
    net = edited()
    assert same(call(m, {"net": net}, lr=1e6), mended(net, lambda name, new: new))


def law_net_keeps_what_it_says(m: Method) -> None:
    """Codes as they were, and parts that decode to the weight."""
    net = edited()
    before = mended(net, lambda name, new: new)
    for name, change in call(m, {"net": net}, epochs=20, lr=0.01).items():
        assert not torch.equal(change.w, before[name].w)
        if "codes" in m.facts["keeps"]:
            was, now = Codes.among(before[name].parts), Codes.among(change.parts)
            assert torch.equal(was.codes, now.codes) and same(was.grid, now.grid)
            assert torch.equal(Terms.among(change.parts).weight(), change.w)


def law_net_block_by_block_gives_the_same_bits(m: Method) -> None:
    """Where not all blocks are held at once, and where hidden states lie in files."""
    want = call(m, {"net": edited()}, epochs=5, lr=0.01)
    for spill in (None, 1):
        assert same(call(m, {"net": edited(0, spill)}, epochs=5, lr=0.01), want)


def law_net_goes_on_where_it_was_stopped(m: Method) -> None:
    state = Path(tempfile.mkdtemp()) / "state.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "EVERY", 7)  # other checks are another training
        patch.setattr(train, "MINUTE", 0.0)
        want = call(m, {"net": edited()}, epochs=20, accumulate=4, lr=0.01)
        for stop in (1, 9, 15):
            net = edited(state=state)
            net.tick = stopping(stop)
            with pytest.raises(KeyboardInterrupt):
                call(m, {"net": net}, epochs=20, accumulate=4, lr=0.01)
        assert train.State.read(state).step == 15
        assert same(call(m, {"net": edited(state=state)}, epochs=20, accumulate=4, lr=0.01), want)


def stopping(at: int) -> Callable[[str, int, int], None]:
    def tick(stage: str, done: int, of: int) -> None:
        if (stage, done) == ("train", at):
            raise KeyboardInterrupt

    return tick


# --- repair ---------------------------------------------------------------------------------------------------------
def best(w: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """The least calibration error a mask allows, row by row in float64."""
    out, g = torch.zeros_like(w, dtype=torch.float64), gram.double()
    for i, row in enumerate(mask):
        k = row.nonzero()[:, 0]
        if len(k):
            out[i, k] = torch.linalg.lstsq(g[k][:, k], (g @ w[i].double())[k, None], driver="gelsd").solution[:, 0]
    return out.to(w.dtype)


def law_repair_never_raises_the_error(m: Method) -> None:
    """From the masked weights, from worse ones, and from ones that cannot be improved."""
    for unit in units():
        for name in THREE:
            w, gram = weight(name), stats(name)["gram"]
            mask = unit(w.abs(), 0.5)
            for start in (w * mask, w * mask * 0.8, best(w, mask, gram)):
                out = call(m, env(m, name, new=Change(start, mask=mask)))
                assert lost(w, out, name) <= error(w, start, gram) * (1 + 1e-5) + 1e-9, (unit, name)


def law_repair_never_raises_the_error_in_half_precision(m: Method) -> None:
    for name in THREE:
        w, gram = weight(name).bfloat16(), stats(name)["gram"]
        mask = plain()(w.float().abs(), 0.5)
        out = call(m, env(m, name, w=w, new=Change(w * mask, mask=mask)))
        assert out.w.dtype == torch.bfloat16
        assert error(w, out.w, gram) <= error(w, w * mask, gram) * (1 + 1e-3)


def law_repair_mends(m: Method) -> None:
    """It takes away a good part of what can be mended at all; of what is codes, see below."""
    for unit in (plain("row"), plain("site")) if "codes" not in m.facts["keeps"] else ():
        for name in THREE:
            w, gram = weight(name), stats(name)["gram"]
            mask = unit(w.abs(), 0.5)
            before, least = error(w, w * mask, gram), error(w, best(w, mask, gram), gram)
            after = error(w, call(m, env(m, name, new=Change(w * mask, mask=mask))).w, gram)
            assert after - least < 0.8 * (before - least), (unit, name)


def law_repair_keeps_codes(m: Method) -> None:
    """Codes stay codes on a grid of the same kind, decode to the weight, and cost the outputs less than before."""
    for name in THREE if "codes" in m.facts["keeps"] else ():
        w, gram = weight(name), stats(name)["gram"]
        for mask in (torch.ones_like(w, dtype=torch.bool), *([plain()(w.abs(), 0.7)] if "mask" in m.facts["keeps"] else [])):
            for bits, asymmetric in ((3, False), (2, False), (3, True)):
                new = nearest(w * mask, bits, 8, asymmetric=asymmetric).change(None if bool(mask.all()) else mask)
                out = call(m, env(m, name, new=new))
                was, now = Codes.among(new.parts), Codes.among(out.parts)
                assert (now.type, now.group, now.grid.zeros is None) == (was.type, was.group, was.grid.zeros is None)
                assert torch.equal(Terms.among(out.parts).weight(), out.w) and not bool(out.w[~mask].any())
                assert lost(w, out, name) < error(w, new.w, gram)
                for row in range(len(w)):  # what a group gains alone may cost the row
                    assert error(w[[row]], out.w[[row]], gram) <= error(w[[row]], new.w[[row]], gram) * (1 + 1e-5)


def law_repair_damping_holds_on(m: Method) -> None:
    """Damping draws the kept weights towards the dense ones, or the values nearest to them, not towards zero."""
    if "damp" in m.knobs and "mask" in m.facts["keeps"]:
        for name in THREE:
            w, gram = weight(name), stats(name)["gram"]
            mask = plain()(w.abs(), 0.5)
            new, goal = Change(w * mask * 0.5, mask=mask), w * mask
            if "codes" in m.facts["keeps"]:
                grid = nearest(goal, 4).grid
                new, goal = (rounded(t, grid, w.shape[1]).change(mask) for t in (goal * 0.5, goal))
                goal = goal.w
            out = call(m, env(m, name, new=new), damp=1e5)
            nearer = [error(w[[i]], goal[[i]], gram) < error(w[[i]], new.w[[i]], gram) for i in range(len(w))]
            assert any(nearer)
            close(out.w[nearer], goal[nearer], 1e-3)


def law_repair_keeps_the_mask(m: Method) -> None:
    for unit in units():
        for dtype in (torch.float32, torch.bfloat16):
            for name in THREE:
                w = weight(name).to(dtype)
                mask = unit(w.float().abs(), 0.3)
                out = call(m, env(m, name, w=w, new=Change(w * mask, mask=mask)))
                assert out.w.dtype == dtype
                assert torch.equal(out.mask, mask)
                assert not bool(out.w[~mask].any())
                assert bool(out.w.isfinite().all())


def law_repair_leaves_the_whole_alone(m: Method) -> None:
    for name in THREE:
        w = weight(name)
        out = call(m, env(m, name, new=Change(w, mask=torch.ones_like(w, dtype=torch.bool))))
        torch.testing.assert_close(out.w, w, rtol=1e-4, atol=1e-5)


def law_repair_survives_poor_statistics(m: Method) -> None:
    for name in THREE:
        w, gram = weight(name), stats(name, True)["gram"]
        mask = plain()(w.abs(), 0.5)
        out = call(m, env(m, name, poor=True, new=Change(w * mask, mask=mask)))
        assert bool(out.w.isfinite().all())
        assert lost(w, out, name, True) <= error(w, w * mask, gram) * (1 + 1e-5)
        assert float(out.w.abs().max()) < 100 * float(w.abs().max())


def law_repair_computes_in_float32(m: Method) -> None:
    for name in THREE:
        w = weight(name).bfloat16()
        mask = plain()(w.float().abs(), 0.3)
        low = call(m, env(m, name, w=w, new=Change(w * mask, mask=mask)))
        high = call(m, env(m, name, w=w.float(), new=Change(w.float() * mask, mask=mask)))
        close(low.w, high.w, 2.0 ** -8)


def law_repair_rows(m: Method) -> None:
    for name in THREE:
        w = weight(name)
        p, mask = torch.randperm(len(w), generator=generator(1)), plain()(w.abs(), 0.3)
        turned = call(m, env(m, name, w=w[p], new=Change((w * mask)[p], mask=mask[p]), **permuted(name, p, "out")))
        straight = call(m, env(m, name, new=Change(w * mask, mask=mask)))
        close(turned.w, straight.w[p], 1e-4)
        if straight.bias is not None:
            close(turned.bias, straight.bias[p], 1e-4)


# --- format ---------------------------------------------------------------------------------------------------------
def held(m: Method, knobs: dict[str, Any], dtype: torch.dtype) -> Iterator[Change]:
    """Changes the format says it can hold: several patterns, full, empty and half-filled."""
    for name in THREE:
        w = weight(name).to(dtype)
        kind, mask = m.facts["holds"], w.float().abs() > 0.05
        if kind == "factors":
            for rank in (1, 2, 7):
                yield Factors(w[:, :rank], w[:rank]).change()
            yield Factors(w[:, :3] * mask[:, :3], (w * mask).T.contiguous().T[:3]).change()
            continue
        if kind == "entrywise":
            for rank in (1, 2, 7):
                for more in (0, 1):
                    yield Entrywise(Factors(w[:, :rank + more], w[:rank + more]), Factors(w[:, -rank:], w[-rank:])).change()
            continue
        if kind == "books":
            for vector, width, second in ((4, 8, 0), (3, 1, 3), (2, 9, 0), (5, 16, 10)):
                yield books(w, vector, width, second).change()
            continue
        if kind == "nm":
            lines = w.T if knobs["dim"] == "out" else w
            if lines.shape[1] % knobs["m"]:
                continue
            mask = torch.zeros(lines.shape, dtype=torch.bool)
            for i in range(len(lines)):
                for j in range(0, lines.shape[1], knobs["m"]):
                    for k in top(lines[i, j:j + knobs["m"]].abs().tolist(), knobs["n"]):
                        mask[i, j + k] = True
            mask = mask.T.contiguous() if knobs["dim"] == "out" else mask
        elif kind == "block":
            r, c = knobs["rows"] or knobs["b"], knobs["cols"] or knobs["b"]
            mask = mask[::r, ::c].repeat_interleave(r, 0).repeat_interleave(c, 1)
        empty = torch.zeros_like(mask)
        thin = w * mask
        thin[1] = 0
        yield from (Change(w * mask, mask=mask), Change(thin, mask=mask), Change(w * empty, mask=empty),
                    Change((w * mask).T.contiguous().T, mask=mask))
        if kind != "nm":
            yield Change(w, mask=torch.ones_like(mask))
        yield Change((w * mask).abs())


def books(w: Tensor, vector: int, width: int, second: int = 0) -> Books:
    """Books of so many bits that w could be of, their last vectors in use."""
    g = generator(width)

    def pair(width: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(0, 1 << width, (-(-len(w) // vector), w.shape[1]), generator=g)
        index[-1, -1] = (1 << width) - 1
        return index.to(typed(1 << width)), torch.randn(1 << width, vector, generator=g).half()

    return Books(*pair(width), w.abs().amax(1).half(), *(pair(second) if second else ()))


def coded(m: Method, knobs: dict[str, Any]) -> Iterator[Change]:
    """The same as codes of every type the format stores, symmetric and not."""
    if knobs.get("dim") == "out":
        return
    for new in held(m, knobs, torch.float32):
        cols = knobs["cols"] or knobs["b"] if m.facts["holds"] == "block" else 0
        groups = (cols if cols > 1 else 0,) if cols else (0, 8)
        for bits, asymmetric, group in ((8, False, groups[0]), (8, True, groups[-1]), (4, True, groups[-1]), (3, True, groups[0]),
                                        (3, False, groups[-1]), (2, False, groups[-1])):
            if f"i{bits}" in m.facts["codes"]:
                yield nearest(new.w, bits, group, asymmetric=asymmetric).change(new.mask)
        for type_, bits in TABLES.items():
            if type_ in m.facts["codes"] and new.mask is None:
                yield by_table(new.w, bits, groups[-1]).change()
        for group in (0, 20) if "t" in m.facts["codes"] else ():
            yield nearest(new.w, 2, group, ternary=True).change(new.mask)


def by_table(w: Tensor, bits: int, group: int = 0) -> Codes:
    """Codes of a table that is not even, in groups (0: rows)."""
    table = torch.linspace(-1, 1, 1 << bits).pow(3)
    return rounded(w, steps(w, table, group), min(group, w.shape[1]) or w.shape[1])


def awkward(dtype: torch.dtype) -> Iterator[Change]:
    """Changes a format may hold or refuse, but not lose."""
    g = generator(4)
    for shape in ((24, 20), (7, 9), (1, 3), (5, 8), (8, 5)):
        w = torch.randn(shape, generator=g).to(dtype)
        loose = torch.rand(shape, generator=g) > 0.6
        yield from (Change(w), Change(w * loose), Change(w * loose, mask=loose), Change(w, mask=loose))
        yield nearest(w, 4, 4).change()
        yield nearest(w * loose, 8).change(loose)
        yield nearest(w, 2, 4, ternary=True).change()
        yield Factors(w[:, :1], w[:1]).change()
        yield Entrywise(Factors(w[:, :1], w[:1]), Factors(w[:, -1:], w[-1:])).change()
        yield books(w, 3, 4).change()


def restores(m: Method, new: Change, packed: Packed) -> None:
    check(packed)
    back = m.inverse(packed)
    assert back.dtype == new.w.dtype
    assert back.is_contiguous()
    assert torch.equal(back, new.w)
    bits = torch.int32 if back.dtype == torch.float32 else torch.int16
    assert torch.equal(back.view(bits)[back != 0], new.w.contiguous().view(bits)[back != 0])


def law_format_exact(m: Method) -> None:
    for knobs in variants(m):
        for dtype in (torch.float32, torch.bfloat16):
            for new in held(m, knobs, dtype):
                restores(m, new, m.fn(new, **knobs))
        for new in coded(m, knobs):
            restores(m, new, m.fn(new, **knobs))


def law_format_bytes(m: Method) -> None:
    """Every buffer takes exactly what the formula says, and there is no other."""
    for knobs in variants(m):
        for new in [*held(m, knobs, torch.float32), *held(m, knobs, torch.bfloat16), *coded(m, knobs)]:
            kept = int((new.w != 0).sum() if new.mask is None else new.mask.sum())
            packed = m.fn(new, **knobs)
            if m.facts["holds"] in ("block", "mask", "factors", "entrywise"):  # a block is kept whole; others may fill up
                kept = m.facts["stored"](packed)
            its = {k: getattr(packed, k) for k in ("rows", "n", "m")} if m.facts["holds"] == "books" else knobs
            want = m.facts["bytes"](tuple(new.w.shape), packed.entries, kept, its)
            assert {k: b.nbytes for k, b in packed.buffers.items()} == want, knobs
            assert packed.nbytes == sum(want.values())
            if m.facts["holds"] == "nm" and knobs["m"] == 2:  # one bit says which of two
                assert want["bits"] == -(-new.w.shape[0] // 32) * 32 * new.w.shape[1] // 2 // 8


def law_format_knows_what_it_stores(m: Method) -> None:
    for knobs in variants(m):
        for new in held(m, knobs, torch.float32):
            kept = int((new.w != 0).sum() if new.mask is None else new.mask.sum())
            whole = {"any": new.w.numel(), "nm": new.w.numel() // knobs.get("m", 1) * knobs.get("n", 1)}
            packed = m.fn(new, **knobs)
            if (factors := Factors.among(new.parts)) is not None:
                assert m.facts["stored"](packed) == factors.left.numel() + factors.right.numel()
            elif (products := Entrywise.among(new.parts)) is not None:
                assert m.facts["stored"](packed) == sum(t.numel() for t in new.parts.values()) == products.rank * sum(new.w.shape)
            elif (vectors := Books.among(new.parts)) is not None:
                assert m.facts["stored"](packed) == new.w.numel()
                assert (packed.rows, packed.n) == (vectors.book.shape[1], len(vectors.book).bit_length() - 1)
            elif m.facts["holds"] in whole:
                assert m.facts["stored"](packed) == whole[m.facts["holds"]]
            elif "windows" in packed.buffers:  # one window holds all inputs: steps of two, as many as the fullest output of 16 fills
                longest = [int(rows.sum(1).max()) for rows in (new.w != 0 if new.mask is None else new.mask).split(16)]
                assert new.w.shape[1] <= 128 and m.facts["stored"](packed) == 32 * sum(-(-n // 2) for n in longest) >= kept
            elif m.facts["holds"] == "mask" or new.mask is not None:
                assert m.facts["stored"](packed) == kept


def law_format_exact_or_refused(m: Method) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for knobs in variants(m):
            for new in awkward(dtype):
                try:
                    packed = m.fn(new, **knobs)
                except BadInput as e:
                    assert "\n" not in str(e)
                    assert len(str(e)) > 20
                else:
                    restores(m, new, packed)


def law_format_refuses_another_pattern(m: Method) -> None:
    """n:m and block formats say no to a shape their pattern does not divide, n:m to a group that keeps too many."""
    for knobs in variants(m):
        if m.facts["holds"] in ("nm", "block"):
            with pytest.raises(BadInput, match="divide"):
                m.fn(Change(torch.zeros(7, 9)), **knobs)
        if m.facts["holds"] == "nm":
            with pytest.raises(BadInput, match="keeps"):
                m.fn(Change(torch.ones(8, 24)), **knobs)


def law_format_refuses_what_it_would_lose(m: Method) -> None:
    """Weights that are not finite, of a type no kernel has, that are no matrix, and codes where it stores none."""
    w = torch.zeros(24, 24)
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = w.clone()
        broken[3, 5] = value
        with pytest.raises(BadInput, match="finite"):
            call(m, {"new": Change(broken)})
    with pytest.raises(BadInput, match="float32 or bfloat16, not float16"):
        call(m, {"new": Change(w.half())})
    for shape in ((24,), (0, 24)):
        with pytest.raises(BadInput, match="out, in"):
            call(m, {"new": Change(torch.zeros(shape))})
    for kind in LEVELS.keys() - set(m.facts["codes"]):
        with pytest.raises(BadInput, match="codes"):
            table = torch.arange(float(LEVELS[kind])) if kind in TABLES else None
            call(m, {"new": Codes(torch.ones(24, 24, dtype=torch.uint8), Grid(torch.ones(24, 1), LEVELS[kind], None, table), 24).change()})


def law_format_stands_alone(m: Method) -> None:
    """Buffers can be written as they are: contiguous, and not the caller's memory seen from elsewhere."""
    for new in [next(held(m, small(m), torch.float32)), *coded(m, small(m))][:2]:
        ours = {t.untyped_storage().data_ptr() for t in tensors(new)}
        for b in call(m, {"new": new}).buffers.values():
            assert b.is_contiguous() and b.untyped_storage().data_ptr() not in ours


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Matrices this small are slower on two."""
    torch.set_num_threads(1)


# --- laws x methods -------------------------------------------------------------------------------------------------
LAWS = {n.removeprefix("law_"): f for n, f in globals().items() if n.startswith("law_")}


def laws_of(m: Method) -> dict[str, Callable[[Method], None]]:
    """The laws of every axis and those of its own, under the name an xfail uses."""
    out = {}
    for n, f in LAWS.items():
        axis = n.split("_")[0]
        mine = "net" if m.facts.get("level") == "net" else m.axis
        if axis == mine or axis not in (*AXES, "net"):
            out[n.removeprefix(f"{mine}_")] = f
    return out


def params() -> Iterator[Any]:
    for m in REG.values():
        for n, f in laws_of(m).items():
            marks = [pytest.mark.xfail(reason=m.xfail[n], strict=True)] if n in m.xfail else []
            yield pytest.param(m, f, id=f"{m.key}-{n}", marks=marks)


@pytest.mark.parametrize(("m", "law"), list(params()))
def test_law(m: Method, law: Callable[[Method], None]) -> None:
    law(m)


def test_summary_tells_what_is_above() -> None:
    """Scores on the very edges of bins: powers of two are the lower edges of theirs."""
    s = torch.tensor([0.0, 1.0, 1.0, 1.05, 2.0, 4.0])
    summary = Summary.of(SITES["2.attn.o"], s)
    assert (summary.count, summary.total, summary.mean) == (6, pytest.approx(9.05), pytest.approx(9.05 / 6))
    assert [summary.above(v) for v in (0.0, 0.9, 1.0, 1.5, 2.0, 3.9, 4.0)] == [5, 5, 3, 2, 1, 1, 0]
    bins = summary.hist.nonzero()[:, 0].tolist()
    assert summary.hist[bins].tolist() == [1, 2, 1, 1, 1]
    for value, b in zip((0.0, 1.0, 1.05, 2.0, 4.0), bins, strict=True):
        assert Summary.edge(b) <= value < Summary.edge(b + 1)
        assert Summary.edge(b + 1) <= max(value, 2.0 ** -70) * 2 ** (1 / 64)


@pytest.mark.parametrize("name", SITES)
def test_losses_of_ranks_are_those_of_the_best_factors(name: str) -> None:
    """By the weight that is left of every rank, and what its rows are off weighted by their gradients."""
    w, gram, grad_sq = weight(name).double(), stats(name)["gram"].double(), stats(name)["grad_sq"].double()
    lost = losses_of_ranks(weight(name), stats(name)["gram"], stats(name)["grad_sq"])
    assert len(lost) == min(w.shape) + 1
    for rank in range(1, len(lost)):
        off = get("edit/svdllm").fn(w, 1.0, stats(name)["gram"], rank=rank, damp=0.0).w - w
        rows = ((off @ gram) * off).sum(1) * grad_sq.sum(1) / gram.trace()
        assert lost[rank] == pytest.approx(float(rows.sum() / 2), rel=1e-4, abs=1e-9 * lost[0])


@pytest.mark.parametrize("key", REG)
def test_expected_failures_name_laws(key: str) -> None:
    assert set(REG[key].xfail) <= set(laws_of(REG[key]))


@pytest.mark.parametrize("n", [4, 32, 33, 257])
@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_select_is_a_stable_sort(n, levels):
    gen = torch.Generator().manual_seed(n + levels)
    s = (torch.rand(5, n, generator=gen) * levels).floor()
    s[0, ::2] = torch.inf
    for k in (0, 1, n // 3, n - 1, n):
        want = torch.zeros_like(s, dtype=torch.bool)
        for mine, kept in zip(s.tolist(), want, strict=True):
            kept[list(top(mine, k))] = True
        assert torch.equal(select.top(s, k), want), k
