"""Dense MLPs become experts: an ordinary checkpoint of the family that has the same blocks with experts in them.

What becomes of an MLP is the method's to say, block by block, with the blocks before it as they became. No weight is left out of the files;
the weights that the family gives to experts, and the gate of a shared one, are made up for in the maps behind.
"""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.core.spec import Step
from trimtab.core.types import BadInput, Site
from trimtab.methods.experts import Experts, choosable, copied, sized, split
from trimtab.methods.wiring.experts import SPLITS
from trimtab.network import graph
from trimtab.network.checkpoint import SafeFile, write_safetensors
from trimtab.network.rewire import Source, Target, write
from trimtab.network.stream import Network, into

if TYPE_CHECKING:
    from trimtab.core.rewire import Given


PARTS = ("neurons", "router", "shared", "down", "own")  # tensors of `Experts`
ROW = 16  # bytes of a row that grouped products of torch are made for


def becomes(net: Network, step: Step) -> graph.Family:
    """The family that the network becomes. BadInput where it becomes none."""
    try:
        if net.kind != "lm":
            raise BadInput(f"{type(net.model).__name__} is no language model, and the families with experts are")
        return graph.sparse(net.family, net.config, bool(step.bound.get("always")))
    except BadInput as e:
        raise BadInput(f"{step.method.name}: {e}") from None


def check(net: Network, step: Step) -> None:
    becomes(net, step)
    if step.bound.get("split", SPLITS[0]) not in SPLITS:
        raise BadInput(f"{step.method.name}: split={step.bound['split']} is no way to split neurons; use {', '.join(SPLITS)}")


def groups(net: Network, step: Step) -> None:
    if graph.PER_LAYER in net.checkpoint.config:
        raise BadInput(f"{step.method.name}: the layers of {net.checkpoint.path} differ, and those of a {becomes(net, step).name} do not; "
                       "take a network whose layers are alike")
    fits(net, step, 1.0)


def fits(net: Network, step: Step, keep: float) -> None:
    """BadInput where its MLPs do not make such experts, for this share."""
    down, knobs = next(s for s in net.sites if s.role == "down"), step.bound
    try:
        if step.method.facts["overlap"]:
            size = sized(down.shape[1], knobs["parts"], keep)
        elif "active" in knobs:  # copies are as wide as the MLP
            size = down.shape[1]
            copied(knobs["parts"], knobs["active"])
        else:
            size = split(down.shape[1], knobs["parts"])
            choosable(knobs["parts"], knobs["always"], keep)
        if (row := size * net.stored_dtype(down).itemsize) % ROW:
            raise BadInput(f"experts of {size} neurons take {row} bytes a row, and transformers multiplies rows of whole {ROW} bytes; "
                           "use fewer parts" + (", or another share" if step.method.facts["overlap"] else ""))
    except BadInput as e:
        raise BadInput(f"{step.method.name}: {e}") from None


def written(net: Network, step: Step, given: Given, out: Path) -> dict[str, Any]:
    """Write the network with experts in place of every MLP. Returns how many there are, and how many of them a token meets."""
    kept, shapes = [given.scratch / f"experts{i}.safetensors" for i in range(net.n_blocks)], list[Experts]()

    def look(i: int, module: Any, stats: Any) -> None:
        maps = {s.role: s for s in net.sites_of(i) if s.group == "mlp"}
        env = {"mlp": {r: net.weight(module, s).float() for r, s in maps.items()}, "keep": given.keep}
        found: Experts = step.method({**env, **(stats.of(maps["down"]) if stats else {})}, **step.bound)
        shapes.append(found)
        if stats:  # which the blocks behind it see
            meet(net, module, maps["down"], found)
        parts = {n: t for n in PARTS if (t := getattr(found, n)) is not None}
        write_safetensors(kept[i], {n: (t.dtype, tuple(t.shape)) for n, t in parts.items()}, lambda n: parts[n].contiguous(), {})

    needs = set(step.method.needs)
    given.walk({s.name: needs for s in net.sites if s.role == "down" and needs}, look, "sequential" if needs else "dense")
    first, source = shapes[0], Source(net)
    (number, size), shared = first.neurons.shape, 0 if first.shared is None else len(first.shared)
    config = graph.sparse_config(becomes(net, step), net.config, net.checkpoint.config, number, size, first.active, shared)
    target = Target(config)

    def tensor(name: str) -> Tensor:
        if (at := target.placed(name)) is None:
            return source.around(name)
        i, inner = at
        parts = SafeFile(kept[i])
        if inner == f"{target.family.routers[0]}.weight":
            return parts.read("router")
        if inner in {f"{r}.weight" for r in target.family.routers[1:]}:
            return torch.zeros(target.shapes[name])
        if sites := [s for s in target.sites_of(i) if s.group == "mlp" and s.param == inner]:
            return assembled(net, source.block(i), i, target.shapes[name], sites, parts, first.gains)
        own = dict(source.block(i).named_parameters())
        return own[inner] if inner in own else torch.zeros(target.shapes[name])  # a bias that its family has

    write(net, config, tensor, out)
    for file in kept:
        file.unlink()
    return {"experts": {"family": target.family.name, "of": number, "met": first.active, "neurons": size, "shared": shared}}


def meet(net: Network, module: Any, down: Site, found: Experts) -> None:
    """Let the MLP of a block compute what its experts will."""
    layer, seen, before = module.get_submodule(down.param.rpartition(".")[0]), dict[str, Tensor](), net.weight(module, down)
    net.on_source(module, down.block, down, into(seen, "x"))

    def some(m: Any, args: Any, y: Tensor) -> Tensor:
        x, h = seen.pop("x"), args[0]
        return found.adds(x.reshape(-1, x.shape[-1]), h.reshape(-1, h.shape[-1]), before).view(y.shape).to(y.dtype)

    layer.register_forward_hook(some)
    for name in PARTS:  # who looks at the block sees that it is another one
        layer.register_buffer(f"experts_{name}", getattr(found, name), persistent=False)


def assembled(net: Network, module: Any, i: int, shape: tuple[int, ...], sites: list[Site], parts: SafeFile,
              gains: tuple[float, float]) -> Tensor:
    """A parameter of this shape that holds maps of experts, or one of the shared expert."""
    new, neurons = torch.zeros(shape), parts.read("neurons")
    maps = {s.role: s for s in net.sites_of(i) if s.group == "mlp"}
    dense = {r: net.weight(module, maps[r]).float() for r in {s.role for s in sites}}
    if "down" in dense and "down" in parts.names:
        dense["down"] = parts.read("down")
    for s in sites:
        mine, gain = (parts.read("shared"), gains[1]) if s.expert is None else (neurons[s.expert], gains[0])
        if s.role != "down":
            s.put(new, dense[s.role][mine])
        else:
            s.put(new, gain * (parts.read("own")[s.expert] if s.expert is not None and "own" in parts.names else dense["down"][:, mine]))
    return new
