"""Passes that rewrite the network as a whole and leave an ordinary checkpoint.

A method sees one group of tensors at a time. What its groups are, what it is told of each and what becomes of the network's files is a
handler's to say: one for every kind of group, as a method's fact `of` names it.
"""
from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core import experts
from trimtab.core.calibrate import Walk
from trimtab.core.data import Batch
from trimtab.core.journal import write_json
from trimtab.core.measured import Measured
from trimtab.core.memory import Store
from trimtab.core.spec import Pass, Recipe, Step
from trimtab.core.types import BadInput, Site
from trimtab.network import graph, surgery
from trimtab.network.checkpoint import write_like
from trimtab.network.rewire import Source, Target, write
from trimtab.network.stream import Network, as_offline, as_parallel, silence

LEAST = 1e-3  # of the largest weight of a norm: what is smaller is not divided by


@dataclass(frozen=True)
class Given:
    """What a handler may look at: calibration samples, a folder for what it holds of them and above how many bytes it goes there, and
    `walk`(needs, look), which takes `look`(i, module, statistics) over all blocks. `tick`(done, of) says how far it is; `keep` is the
    share that is asked for."""

    samples: list[Batch]
    scratch: Path
    spill: int | None
    walk: Callable[..., None]
    tick: Callable[[int, int], None]
    keep: float = 1.0


@dataclass(frozen=True)
class Handler:
    """`check`(net, step): BadInput where the family has no such groups, or its knobs mean nothing; `groups`(net, step): BadInput where
    this network has none; `written`(net, step, given, out) writes the checkpoint and returns what was rewired; `fits`(net, step, keep):
    BadInput where that share cannot be, of what has one."""

    check: Callable[[Network, Step], None]
    groups: Callable[[Network, Step], Any]
    written: Callable[[Network, Step, Given, Path], dict[str, Any]]
    fits: Callable[[Network, Step, float], None] = lambda net, step, keep: None


def handler(p: Pass) -> tuple[Step, Handler]:
    assert p.wiring is not None
    return p.wiring, HANDLERS[p.wiring.method.facts["of"]]


def check(net: Network, p: Pass) -> None:
    """BadInput where the network is none that can be rewired so, whatever passes before this one leave of it."""
    step, mine = handler(p)
    if p.scope:
        raise BadInput(f"{step.method.name} rewires the network as a whole; leave the scope out")
    mine.check(net, step)


def check_groups(net: Network, p: Pass, keep: float) -> None:
    """BadInput where nothing of the network as it is now would be rewired, for this share."""
    step, mine = handler(p)
    mine.groups(net, step)
    if p.free:
        mine.fits(net, step, keep if p.keep is None else p.keep)


def written(net: Network, p: Pass, given: Given, out: Path) -> dict[str, Any]:
    """Write into `out` the checkpoint of the network rewired. Returns what was, for the plan."""
    step, mine = handler(p)
    return mine.written(net, step, given, out)


# ---- runs of MLPs -----------------------------------------------------------------------------
def check_run(net: Network, step: Step) -> None:
    name, how = step.method.name, net.family.between(net.config)[0]
    if how != "in" or len(net.family.norms) != 2:
        beside = "attention beside" if how == "parallel" else "a norm behind"
        raise BadInput(f"{name}: the MLPs of this {net.family.name} have {beside} them; it takes families with one norm, in front of MLPs")
    if not graph.can_skip(net.family, net.config):
        raise BadInput(f"{name}: a block of a {net.family.name} cannot do without its attention, and so no two MLPs stand side by side")
    for knob, right in (("length", "2"), ("dependency", "0.1")):
        if (value := step.bound[knob]) < 0 or (knob == "length" and value == 1):
            raise BadInput(f"{name}: {knob}={value} leaves nothing to fuse; use 0 for any, or a value such as {right}")


def ends_mlp(net: Network, i: int) -> Site | None:
    """The site that the one plain MLP of block `i` ends in; None where it has experts or no MLP."""
    downs = [s for s in net.sites_of(i) if s.role == "down"]
    return downs[0] if len(downs) == 1 and downs[0].expert is None else None


def runs(net: Network, step: Step) -> list[list[int]]:
    """Blocks whose MLPs nothing stands between. BadInput where there are none."""
    found: list[list[int]] = [[]]
    for i in range(net.n_blocks):
        if ends_mlp(net, i) is None or getattr(net.config_of(i), "offline", None):
            found.append([])
        elif found[-1] and not any(s.group == "attn" for s in net.sites_of(i)):
            found[-1].append(i)
        else:
            found.append([i])
    if not (found := [r for r in found if len(r) > 1]):
        raise BadInput(f"{step.method.name}: attention stands between all MLPs of {net.checkpoint.path}; take some of it away in front: "
                       f"attn: sublayer | influence ; {step.method.name}")
    return found


def mlp_of(net: Network, source: Source, i: int) -> dict[str, Tensor]:
    """The maps of a block's MLP by role, their biases and its norm, in float32."""
    module = source.block(i)
    params = dict(module.named_parameters())
    found: dict[str, Tensor] = {}
    for s in (s for s in net.sites_of(i) if s.group == "mlp"):
        found[s.role] = net.weight(module, s).float()
        if (b := net.bias(module, s)) is not None:
            found[f"{s.role}.bias"] = b.float()
    norm = net.family.between(net.config)[1]
    return found | {"norm" + n: params[f"{norm}.{k}"].detach().float() for n, k in (("", "weight"), (".bias", "bias"))
                    if f"{norm}.{k}" in params}


class Apart(Walk):
    """The network block by block, and of a run of MLPs the same without one of them."""

    @torch.no_grad()
    def through(self, run: list[int], step: Callable[[], None]) -> Tensor:
        """Through the blocks of a run, with the hidden states in front of it. How far what MLP i adds moves where MLP j before it is left
        out [n, n], a cosine distance, the mean over tokens."""
        assert self.store is not None
        apart = torch.zeros(len(run), len(run), dtype=torch.float64)
        others: list[Store] = []
        for k, i in enumerate(run):
            module = self.net.block(i)
            bare = self.net.twin(module)
            silence(self.net.family, bare, {"mlp"}, i)
            without, tokens = self._new(self.store[0], len(run)), 0
            for b, x in enumerate(self.store):
                context = self.contexts[b]
                own, rest = self.net.run(module, i, x, context), self.net.run(bare, i, x, context)
                real = slice(None) if context.mask is None else context.mask
                tokens += len((own - rest).flatten(0, 1)[real])
                for j, other in enumerate(others):
                    y = self.net.run(module, i, other[b], context)
                    near = nn.functional.cosine_similarity((own - rest).double(), (y - other[b]).double(), dim=-1).flatten()
                    apart[k, j] += (1 - near[real]).sum()
                    other[b] = y
                without.append(rest)
                self.store[b] = own
                step()
            apart[k] /= max(1, tokens)
            others.append(without)
        for store in others:
            store.close()
        return apart.float()


def dependencies(net: Network, found: list[list[int]], given: Given) -> dict[int, Tensor]:
    """Of every run, by its first block, how much its MLPs depend on each other."""
    walk = Apart(net, given.samples, given.scratch, given.spill)
    done, total = 0, net.n_blocks * len(walk.batches)

    def step() -> None:
        nonlocal done
        done += 1
        given.tick(done, total)

    apart: dict[int, Tensor] = {}
    inside = {i for r in found for i in r}
    try:
        walk.embed()
        for i in range(found[-1][-1] + 1):
            if i not in inside:
                walk.forward(net.block(i), i, None, True, step)
            elif run := next((r for r in found if r[0] == i), None):
                apart[i] = walk.through(run, step)
    finally:
        walk.close()
    return apart


def fused(net: Network, step: Step, given: Given, out: Path) -> dict[str, Any]:
    """Write the network with one MLP in place of several. Returns the blocks that became one."""
    found, source = runs(net, step), Source(net)
    apart = dependencies(net, found, given) if step.method.facts["looks"](step.bound) else {}

    def made(run: list[int], apart: Tensor) -> list[tuple[int, dict[str, Tensor]]]:
        mlps = [mlp_of(net, source, i) for i in run]
        done: list[tuple[int, dict[str, Tensor]]] = step.method({"mlps": mlps, "apart": apart}, **step.bound)
        return done

    groups: dict[int, list[int]] = {i: [i] for i in range(net.n_blocks)}  # blocks that become one, by the first of them
    for run in found:
        begin = 0
        for count, _ in made(run, apart.get(run[0], torch.zeros(len(run), len(run)))):
            groups[run[begin]] = run[begin:begin + count]
            for i in run[begin + 1:begin + count]:
                del groups[i]
            begin += count
    stay = tuple(groups)
    before, key = graph.per_layer(net.checkpoint.config), surgery.size_key(net, "neurons")
    each = [{**before.get(i, {}), **surgery.sizes(net, i, surgery.Cut())} for i in stay]
    for own, i in zip(each, stay, strict=True):
        if len(groups[i]) > 1:
            own[key] = sum(s.shape[1] for m in groups[i] if (s := ends_mlp(net, m)) is not None)
    config = {k: v for k, v in net.checkpoint.config.items() if k != graph.PER_LAYER}
    config |= surgery.of_layers(net, config, each, stay)
    target, wide = Target(config), dict[int, dict[str, Tensor]]()
    norm = net.family.between(net.config)[1]

    def tensor(name: str) -> Tensor:
        if (at := target.placed(name)) is None:
            return source.around(name)
        j, inner = at
        i = stay[j]
        sites = [s for s in target.sites_of(j) if s.group == "mlp" and inner in (s.param, graph.bias_of(s))]
        if len(groups[i]) == 1 or not (sites or inner.startswith(f"{norm}.")):
            return source.block(i).get_parameter(inner)
        if i not in wide:
            wide.clear()
            wide[i] = made(groups[i], torch.zeros(len(groups[i]), len(groups[i])))[0][1]
        if not sites:
            return wide[i][inner.replace(norm, "norm").removesuffix(".weight")]
        return assembled(target.shapes[name], sites, inner, wide[i])

    write(net, config, tensor, out)
    return {"fused": [its for its in groups.values() if len(its) > 1]}


def assembled(shape: tuple[int, ...], sites: list[Site], name: str, maps: dict[str, Tensor]) -> Tensor:
    """A parameter of this shape that holds sites, or their biases, from the maps by role."""
    new = torch.zeros(shape)
    for s in sites:
        if name == s.param:
            s.put(new, maps[s.role])
        else:
            at = s.row_index()
            new[slice(None) if at is None else at] = maps[f"{s.role}.bias"]
    return new


# ---- the basis of the residual stream ---------------------------------------------------------
def check_axes(net: Network, step: Step) -> None:
    if graph.stream(net.family) is None or net.kind != "lm":
        fits = ", ".join(f.name for f in graph.FAMILIES.values() if graph.stream(f) is not None)
        raise BadInput(f"{step.method.name}: more than root mean square norms and plain layers meets the residual stream of this "
                       f"{net.family.name}; it takes language models of {fits}")


def turned(net: Network, step: Step, given: Given, out: Path) -> dict[str, Any]:
    """Write the network with its residual stream in another basis. Returns whether its head has a table of its own now."""
    stream, source = graph.stream(net.family), Source(net)
    assert stream is not None
    width = int(net.config.hidden_size)
    moment = torch.zeros(width, width, dtype=torch.float64)
    readers = {(s.block, s.input): s.name for s in reversed(net.sites) if s.input in stream.norms}

    def weight(module: nn.Module, at: str) -> Tensor:
        return module.get_parameter(f"{stream.norms[at]}.weight").detach().double()

    def look(i: int, module: Any, stats: Any) -> None:
        for s in net.sites_of(i):
            if readers.get((i, s.input)) == s.name:
                g = weight(module, s.input)
                g = torch.where(g.abs() < LEAST * g.abs().max(), torch.inf, g)  # what a norm leaves nothing of tells nothing
                moment.add_(stats.of(s)["gram"].double() / g / g[:, None])

    given.walk({name: set(step.method.needs) for name in readers.values()}, look)
    q: Tensor = step.method({"gram": moment}, **step.bound).double()
    last, head = f"{net.base}{stream.last}.weight", net.head
    config = {**net.checkpoint.config, "tie_word_embeddings": False}
    target, norms = Target(config), {f"{n}.weight" for n in stream.norms.values()}

    def tensor(name: str) -> Tensor:
        if (at := target.placed(name)) is None:
            if name == last:
                return torch.ones(width)
            table = source.around(net.table if name == head and net.tied_head else name)
            return (table.double() * source.around(last).double() if name == head else table.double()) @ q if name in (head, net.table) \
                else table
        module, inner = source.block(at[0]), at[1]
        p = module.get_parameter(inner)
        if inner in norms:
            return torch.ones(width)
        for s in net.sites_of(at[0]):
            if s.role in ("o", "down") and inner in (s.param, graph.bias_of(s)):
                return q.T @ p.detach().double()
            if s.input in stream.norms and inner == s.param:
                return (p.detach().double() * weight(module, s.input)) @ q
        return p

    write(net, config, tensor, out)
    return {"turned": width, **({"untied": True} if net.tied_head else {})}


# ---- the residual stream ----------------------------------------------------------------------
def check_stream(net: Network, step: Step) -> None:
    name = step.method.name
    if not graph.centred(net.family, net.config, net.model.base_model):
        fits = ", ".join(f.name for f in graph.FAMILIES.values() if f.writes)
        raise BadInput(f"{name}: norms of this {net.family.name} take no mean off the residual stream, or lie behind a sublayer; it takes "
                       f"those with one in front of each, of {fits}")


def stream_of(net: Network, step: Step) -> None:
    """There is one in every network."""


def centred(net: Network, step: Step, given: Given, out: Path) -> dict[str, Any]:
    """Write the network with whatever adds to the residual stream changed. Returns what became of its norms, and whether its head has a
    table of its own now."""
    check_stream(net, step)
    around, source = graph.centred(net.family, net.config, net.model.base_model), Source(net)
    config = dict(net.checkpoint.config)
    config[graph.OURS] = {**graph.ours(config), "norms": "rms"}
    if untied := net.tied_head and net.table.removeprefix(net.base) in around:
        config["tie_word_embeddings"] = False  # the head reads a table that is not changed
    target = Target(config)

    def less(w: Tensor, dim: int = 0) -> Tensor:
        new: Tensor = step.method({"writes": w.float().movedim(dim, 0)}, **step.bound)
        return new.movedim(0, dim)

    def tensor(name: str) -> Tensor:
        if (at := target.placed(name)) is None:
            own, dim = source.around(name), around.get(name.removeprefix(net.base)) if name.startswith(net.base) else None
            return own if dim is None else less(own, dim)
        j, inner = at
        p = source.block(j).get_parameter(inner)
        for s in net.sites_of(j):
            if s.role in ("o", "down") and inner in (s.param, graph.bias_of(s)):
                return less(p, 1 if s.transposed and inner == s.param else 0)
        return p

    write(net, config, tensor, out)
    return {"norms": "rms", **({"untied": True} if untied else {})}


# ---- the head ---------------------------------------------------------------------------------
def untied(net: Network, step: Step) -> None:
    if net.tied_head:
        raise BadInput(f"{step.method.name}: the head of {net.checkpoint.path} is its table of embeddings as it is; leave it out")


def tabled(net: Network, step: Step, given: Given, out: Path) -> dict[str, Any]:
    """Write the network with its table of embeddings as its head. Returns that it is."""
    stream, source = graph.stream(net.family), Source(net)
    assert stream is not None
    last, head = f"{net.base}{stream.last}.weight", net.head
    scale = step.method({"embed": source.around(net.table), "head": source.around(head), "gram": met_by_head(net, given)}, **step.bound)

    def tensor(name: str) -> Tensor:
        if (at := target.placed(name)) is not None:
            return source.block(at[0]).get_parameter(at[1])
        return source.around(name).float() * scale if name == last else source.around(name)

    target = Target(config := {**net.checkpoint.config, "tie_word_embeddings": True})
    write(net, config, tensor, out)
    return {"tied": True}


@torch.no_grad()
def met_by_head(net: Network, given: Given) -> Tensor:
    """The second moment of what the head is given [width, width]."""
    walk, width = Walk(net, given.samples, given.scratch, given.spill), int(net.config.hidden_size)
    moment, done = torch.zeros(width, width, dtype=torch.float64), 0

    def step() -> None:
        nonlocal done
        done += 1
        given.tick(done, net.n_blocks * len(walk.batches))

    try:
        walk.embed()
        for i in range(net.n_blocks):
            walk.forward(net.block(i), i, None, True, step)
        assert walk.store is not None
        for b, x in enumerate(walk.store):
            mask, seen = walk.contexts[b].mask, net.ends(x, walk.contexts[b], walk.batches[b])[0].double().flatten(0, 1)
            seen = seen if mask is None else seen[mask]
            moment += seen.T @ seen
    finally:
        walk.close()
        net.release()
    return moment.float()


def check_later(net: Network, recipe: Recipe) -> None:
    """BadInput where a pass would leave what is added to a residual stream without a mean with one, which norms no longer take off."""
    free = bool(graph.ours(net.checkpoint.config).get("norms"))
    for p in recipe.passes:
        if p.wiring is not None and p.wiring.method.facts["of"] == "stream":
            if free:
                raise BadInput(f"{p.wiring.method.name}: the norms take no mean off as it is; leave it out")
            free = True
        if free and not (p.shapes or p.gates) and (bad := [s.name for s in net.sites if s.role in ("o", "down") and p.covers(s)]):
            raise BadInput(f"{bad[0]}: {p} would leave a mean in what it adds to the residual stream, whose norms take none off; scope it "
                           f"to {','.join(f'*.{r}' for r in dict.fromkeys(s.role for s in net.sites) if r not in ('o', 'down'))}")


# ---- layers -----------------------------------------------------------------------------------
def damages(net: Network, given: Given, count: int,
            variants: Callable[[int, nn.Module], Mapping[Hashable, nn.Module]]) -> dict[Hashable, float]:
    """What it costs to have one of the `variants`(i, module) of block i in its place, by their names; `count` of them in all: how far the
    last hidden states are off."""
    walk = Measured(net, given.samples, given.scratch, given.spill, count)
    try:
        for i in range(net.n_blocks):
            module = net.block(i)
            walk.through(i, module, ((name, nullcontext(other)) for name, other in variants(i, module).items()))
            given.tick(i + 1, net.n_blocks)
        return walk.distances()
    finally:
        walk.close()


def check_layer(net: Network, step: Step) -> None:
    name, how = step.method.name, net.family.between(net.config)[0]
    if how != "in" or len(net.family.norms) != 2:
        why = "are parallel as it is" if how == "parallel" else "have a norm behind their attention"
        raise BadInput(f"{name}: the layers of this {net.family.name} {why}; it takes families with one norm, in front of each sublayer")
    chosen(step, torch.zeros(net.n_blocks))


def chosen(step: Step, damage: Tensor) -> Tensor:
    """Which of them are rewired, bool [n]. BadInput where none would be."""
    mine: Tensor = step.method({"damage": damage}, **step.bound)
    if not mine.any():
        raise BadInput(f"{step}: of {len(mine)} layers that is none; raise share")
    return mine


def layers_of(net: Network, step: Step) -> list[int]:
    """Layers with both sublayers, one after the other. BadInput where there are none."""
    found = [i for i in range(net.n_blocks) if {"attn", "mlp"} <= {s.group for s in net.sites_of(i)}
             and not getattr(net.config_of(i), "parallel", False)]
    if not found:
        raise BadInput(f"{step.method.name}: no layer of {net.checkpoint.path} runs an MLP behind attention; leave it out")
    chosen(step, torch.zeros(len(found)))
    return found


def side_by_side(net: Network, step: Step, given: Given, out: Path) -> dict[str, Any]:
    """Write the network with the same weights, some layers parallel. Returns which, and what each alone costs where that was measured."""
    found = layers_of(net, step)
    costs: dict[Hashable, float] = {}

    def variants(i: int, module: nn.Module) -> dict[Hashable, nn.Module]:
        if i not in found:
            return {}
        other = net.twin(module)
        as_parallel(net.family, other, net.config_of(i))
        return {i: other}

    if step.method.facts["looks"](step.bound):
        costs = damages(net, given, len(found), variants)
    mine = chosen(step, torch.tensor([costs.get(i, 0.0) for i in found]))
    which = [i for i, is_one in zip(found, mine.tolist(), strict=True) if is_one]
    with_own(net, {i: {"parallel": True} for i in which}, out)
    return {"parallel": which, **({"damage": {str(i): v for i, v in costs.items()}} if costs else {})}


def with_own(net: Network, own: Mapping[int, Mapping[str, Any]], out: Path) -> None:
    """Write the network with the same weights, more said of some layers."""
    config = {k: v for k, v in net.checkpoint.config.items() if k != "quantization_config"}
    before = graph.per_layer(config)
    config |= {k: type(v)() for its in own.values() for k, v in its.items()}  # transformers wants a value for the others
    config[graph.PER_LAYER] = {str(i): {**before.get(i, {}), **own.get(i, {})} for i in sorted({*before, *own})}
    write_like(net.checkpoint, out, lambda name: None)
    write_json(out / "config.json", config)


# ---- norms ------------------------------------------------------------------------------------
Place = tuple[int, str]  # a norm: its block, and its name there


def check_norm(net: Network, step: Step) -> None:
    if not graph.norms_in_front(net.family, net.config):
        raise BadInput(f"{step.method.name}: the norms of this {net.family.name} lie behind its sublayers, where no map alone reads them; "
                       "it takes families with norms in front")
    constants(step, torch.ones(2 * net.n_blocks, 1), torch.zeros(2 * net.n_blocks, 1), torch.zeros(2 * net.n_blocks))


def norms_of(net: Network, step: Step) -> list[Place]:
    """Norms in front of a sublayer that go by each token's own size. BadInput where there are none."""
    found = [(i, name) for i in range(net.n_blocks) for group, name in graph.norms_in_front(net.family, net.config).items()
             if any(s.group == group for s in net.sites_of(i)) and name not in getattr(net.config_of(i), "offline", {})]
    if not found:
        raise BadInput(f"{step.method.name}: all norms of {net.checkpoint.path} have constants as it is; leave it out")
    constants(step, torch.ones(len(found), 1), torch.zeros(len(found), 1), torch.zeros(len(found)))
    return found


def constants(step: Step, sizes: Tensor, means: Tensor, damage: Tensor) -> tuple[Tensor, Tensor]:
    """Which norms are rewired [n], and by what constants [n, 2]. BadInput where none would be."""
    mine, values = step.method({"sizes": sizes, "means": means, "damage": damage}, **step.bound)
    if not mine.any():
        raise BadInput(f"{step}: of {len(mine)} norms that is none; raise share")
    return mine, values


def seen_by(net: Network, found: list[Place], given: Given) -> tuple[Tensor, Tensor]:
    """What each norm finds of every token [n, tokens]: its size, and the mean that is taken off first."""
    walk, seen = Walk(net, given.samples, given.scratch, given.spill), dict[Place, list[tuple[Tensor, Tensor]]]()

    mask: list[Tensor | None] = [None]  # of the batch that is run

    def look(m: nn.Module, args: Any, at: Place) -> None:
        x = args[0].double().flatten(0, -2)[slice(None) if mask[0] is None else mask[0]]
        mean = x.mean(1) if graph.takes_mean(m) else x.new_zeros(len(x))
        size = ((x - mean[:, None]).square().mean(1) + graph.eps_of(m)).sqrt()
        seen.setdefault(at, []).append((size.float(), mean.float()))

    try:
        walk.embed()
        for i in range(net.n_blocks):
            module = net.block(i)
            for at in (at for at in found if at[0] == i):
                module.get_submodule(at[1]).register_forward_pre_hook(partial(look, at=at))
            assert walk.store is not None
            with torch.no_grad():
                for b, x in enumerate(walk.store):
                    mask[0] = walk.contexts[b].mask
                    walk.store[b] = net.run(module, i, x, walk.contexts[b])
            given.tick(i + 1, 2 * net.n_blocks)
    finally:
        walk.close()
    sizes, means = (torch.stack([torch.cat([pair[k] for pair in seen[at]]) for at in found]) for k in (0, 1))
    return sizes, means


def by_constants(net: Network, step: Step, given: Given, out: Path) -> dict[str, Any]:
    """Write the network with the same weights, constants in place of what some norms find of every token. Returns which norms, and what
    each alone costs where that was measured."""
    found = norms_of(net, step)
    sizes, means = seen_by(net, found, given)
    _, values = constants(step, sizes, means, torch.zeros(len(found)))
    costs: dict[Hashable, float] = {}

    def variants(i: int, module: nn.Module) -> dict[Hashable, nn.Module]:
        others: dict[Hashable, nn.Module] = {}
        for at, (scale, mean) in zip(found, values.tolist(), strict=True):
            if at[0] == i:
                others[at] = net.twin(module)
                as_offline(net.family, others[at], at[1], scale, mean)
        return others

    if step.bound["by"] == "damage":
        costs = damages(net, given, len(found), variants)
    mine, _ = constants(step, sizes, means, torch.tensor([costs.get(at, 0.0) for at in found]))
    own: dict[int, dict[str, Any]] = {}
    which = []
    for (i, name), pair, is_one in zip(found, values.tolist(), mine.tolist(), strict=True):
        if is_one:
            which.append(f"{i}.{name}")
            own.setdefault(i, {"offline": dict(getattr(net.config_of(i), "offline", {}))})["offline"][name] = pair
    with_own(net, own, out)
    return {"offline": which, **({"damage": {f"{i}.{n}": costs[i, n] for i, n in found}} if costs else {})}


HANDLERS = {"run": Handler(check_run, runs, fused), "stream": Handler(check_stream, stream_of, centred),
            "axes": Handler(check_axes, lambda net, step: None, turned),
            "mlp": Handler(experts.check, experts.groups, experts.written, experts.fits),
            "table": Handler(check_axes, untied, tabled),
            "layer": Handler(check_layer, layers_of, side_by_side), "norm": Handler(check_norm, norms_of, by_constants)}
