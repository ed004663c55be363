"""Passes that make a smaller network of a larger one: to the sizes of a config.json, or to some that are spelled out.

What stays of every dimension is the unit's to say: hidden neurons of every MLP, heads of every attention, channels of the residual stream,
the same in every block, and blocks. `sized` makes sizes of a config.json, so that the recipe says by itself what comes of it; `written`
writes the network.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core import structure
from trimtab.core.spec import Pass, Recipe, Step
from trimtab.core.types import BadInput, Site
from trimtab.network import graph, surgery
from trimtab.network.checkpoint import read_json
from trimtab.network.stream import Network
from trimtab.network.surgery import Cut, apply

SIZES = ("layers", "width", "neurons", "experts", "shared", "heads", "kv_heads")  # knobs, and what `graph.SIZES` calls them
RIGHT = "name a config.json, or a directory that has one"
# What config.json says beside sizes that a smaller network need not share: how it was saved, how it is trained, what speaks of layers.
ASIDE = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "bos_token_id", "eos_token_id",
         "pad_token_id", "initializer_range", "attention_dropout", "pretraining_tp", "quantization_config", "max_window_layers",
         "output_router_logits", *surgery.BY_LAYER, *surgery.BY_NUMBER}


# ---- sizes ------------------------------------------------------------------------------------
def sizes_of(net: Network) -> dict[str, int]:
    """Those a network has of SIZES."""
    h, kv, _ = graph.heads(net.config)
    found = {"layers": net.n_blocks, "width": int(net.config.hidden_size), "heads": h, "kv_heads": kv}
    return found | {surgery.neurons_of(net, s): s.shape[1] for s in net.sites if s.role == "down"}


def sized(net: Network, recipe: Recipe) -> Recipe:
    """The recipe with sizes in place of every config.json that it names. BadInput where that describes no smaller network of the kind."""
    return replace(recipe, passes=tuple(
        replace(p, steps={**p.steps, "unit": spelled(net, p.steps["unit"])}) if p.takes == "network" else p for p in recipe.passes))


def spelled(net: Network, step: Step) -> Step:
    """A unit with sizes, those that are others than the network's, in place of its config.json."""
    name, file, have = step.method.name, step.bound["config"], sizes_of(net)
    given = {k: v for k, v in step.knobs if k in SIZES}
    if not file and not given:
        raise BadInput(f"{name}: say what is to come of it, a config.json or sizes: {name}(config=PATH), {name}(layers={have['layers']})")
    if not file:
        return step
    if given:
        raise BadInput(f"{name}: config and {next(iter(given))} both say how large it is to be; keep one of them")
    said = of_config(net, Path(file).expanduser(), have)
    theirs = {k: n for k, n in said.items() if n != have[k]}
    if not theirs:
        raise BadInput(f"{file} has the sizes of {net.checkpoint.path}, and nothing would become smaller; name another")
    if theirs.keys() & {"heads", "kv_heads"}:  # one alone would say what the other is
        theirs |= {k: said[k] for k in ("heads", "kv_heads")}
    return Step(step.key, tuple(sorted({**{k: v for k, v in step.knobs if k != "config"}, **theirs}.items())))


def of_config(net: Network, path: Path, have: Mapping[str, int]) -> dict[str, int]:
    """The sizes in a config.json, of those that the network has. BadInput where it describes another kind of network."""
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise BadInput(f"there is no {file}; {RIGHT}")
    said, source = read_json(file, RIGHT), net.checkpoint.path
    if said.get("model_type") != net.family.name:
        raise BadInput(f"{file}: model_type is {said.get('model_type')!r}, and {source} is a {net.family.name}; only a smaller "
                       f"{net.family.name} can be made of it")
    if graph.per_layer(said):
        raise BadInput(f"{file}: its layers differ ({graph.PER_LAYER}); name a config of one size for all")
    try:
        config = type(net.config).from_dict(said)
        of_head, of_own = graph.heads(config)[2], graph.heads(net.config)[2]
    except Exception as e:  # whatever its class raises
        raise BadInput(f"{file} describes no {net.family.name}: {reason(e)}") from None
    if of_head != of_own:
        raise BadInput(f"{file}: a head would be {of_head} wide, and is {of_own} in {source}; heads stay whole: set head_dim to {of_own}, "
                       "or another number of heads")
    sizes = {graph.size_key(net.family, k) for k in graph.SIZES}
    theirs, ours = config.to_dict(), net.config.to_dict()
    for k in sorted((theirs.keys() | ours.keys()) - sizes - ASIDE):
        if theirs.get(k) != ours.get(k):
            raise BadInput(f"{file}: {k} is {theirs.get(k)!r}, and {ours.get(k)!r} in {source}; all but sizes has to be the same")
    read = {k: getattr(config, surgery.size_key(net, k), None) for k in have} | {"kv_heads": graph.heads(config)[1]}
    found = {k: have[k] if n is None else int(n) for k, n in read.items()}
    if none := [k for k, n in found.items() if n < 1]:
        raise BadInput(f"{file}: {surgery.size_key(net, none[0])} is {found[none[0]]}; it is 1 to {have[none[0]]}")
    return found


def reason(e: Exception) -> str:
    """Its last line, which says what is wrong where the others say who found it."""
    return (str(e).strip() or type(e).__name__).splitlines()[-1].strip()


def wanted(net: Network, step: Step) -> dict[str, int]:
    """The sizes that the network is to have. BadInput where they are none that it can come to."""
    name, have = step.method.name, sizes_of(net)
    given = {k: v for k in SIZES if (v := step.bound[k])}
    for k, n in given.items():
        if k not in have:
            raise BadInput(f"{name}: {net.checkpoint.path} has no {k}; its sizes are {', '.join(have)}")
        if n < 0 or n > have[k]:
            raise BadInput(f"{name}: {k}={n}, and {net.checkpoint.path} has {have[k]}; a smaller network has 1 to {have[k]}")
    to = {**have, **given}
    each = have["heads"] // have["kv_heads"]
    if "heads" in given and "kv_heads" not in given and each == 1:
        to["kv_heads"] = to["heads"]
    elif "kv_heads" in given and "heads" not in given:
        to["heads"] = each * to["kv_heads"]
    if to["heads"] % to["kv_heads"] or to["heads"] // to["kv_heads"] > each:
        raise BadInput(f"{name}: {to['heads']} heads with {to['kv_heads']} of keys and values, and in {net.checkpoint.path} {each} share "
                       f"one; take 1 to {each} times as many heads as kv_heads")
    if to == have:
        raise BadInput(f"{name}: {net.checkpoint.path} has these sizes already; name smaller ones")
    return to


# ---- what stays -------------------------------------------------------------------------------
def check(net: Network, p: Pass, sites: list[Site]) -> None:
    """BadInput where the network cannot come to the sizes that the pass says."""
    step = p.steps["unit"]
    name, have, to = step.method.name, sizes_of(net), wanted(net, step)
    if len(sites) < len(net.sites):
        raise BadInput(f"{name} makes another network of the whole one; leave the scope out")
    if graph.PER_LAYER in net.checkpoint.config:
        raise BadInput(f"{name}: the layers of {net.checkpoint.path} differ; take a network whose layers are alike")
    if to["width"] < have["width"] and (graph.stream(net.family) is None or net.kind != "lm"):
        raise BadInput(f"{name}: more than norms and plain layers meets the residual stream of this {net.family.name}, or its heads are as "
                       f"wide as it is; it keeps its width of {have['width']}")
    if to["heads"] < have["heads"] and not net.family.free_heads:
        raise BadInput(f"{name}: the heads of a {net.family.name} are as wide as their number divides the model; it keeps its "
                       f"{have['heads']}")
    nothing = {s.name: torch.zeros(s.shape[1]) for s in net.sites}
    config = surgery.config_of(net, cut_of(net, p, to, nothing, torch.zeros(have["width"])))
    try:
        type(net.config).from_dict(config)
    except Exception as e:  # whatever its class raises
        raise BadInput(f"{name}: the config of a {net.family.name} refuses these sizes: {reason(e)}") from None


def cut_of(net: Network, p: Pass, to: Mapping[str, int], worth: Mapping[str, Tensor], channels: Tensor) -> Cut:
    """What stays for these sizes. `worth` of the inputs of every site that ends a sublayer [in], `channels` of those of the stream."""
    step, have = p.steps["unit"], sizes_of(net)

    def best(s: Tensor, count: int) -> Tensor:
        """Bool [n]: which of n units stay."""
        kept: Tensor = step.method({"s": s[None], "keep": count / len(s)}, **step.bound)[0]
        return kept

    def heads(s: Tensor) -> Tensor:
        """Whole groups of heads, and as many of each group."""
        h, kv, d = graph.heads(net.config)
        each = s.view(kv, h // kv, d).sum(2)
        stay = best(each.sum(1), to["kv_heads"])[:, None] & torch.stack([best(g, to["heads"] // to["kv_heads"]) for g in each])
        return stay.flatten().repeat_interleave(d)

    layers = step.method.facts["blocks"](have["layers"], to["layers"])
    inputs = {s.name: best(worth[s.name], to[kind]) for s in net.sites
              if s.role == "down" and s.block in layers and to[kind := surgery.neurons_of(net, s)] < have[kind]}
    if to["heads"] < have["heads"]:
        inputs |= {s.name: heads(worth[s.name]) for s in net.sites if s.role == "o" and s.block in layers}
    stay = best(channels, to["width"]) if to["width"] < have["width"] else None
    factors = scales(net, to) if step.bound.get("scaled") else {}
    return Cut(inputs, layers if len(layers) < have["layers"] else (), channels=stay, scales=factors)


def scales(net: Network, to: Mapping[str, int]) -> dict[str, float]:
    """What keeps the outputs of linear layers as large as they were, by stored names: of those that read the stream the norms in front of
    them, so that it is for the head too, of those that end a sublayer the weights."""
    have, found = sizes_of(net), dict[str, float]()
    if to["width"] < have["width"]:
        stream = graph.stream(net.family)
        assert stream is not None
        norms = [net.block_file(i, f"{n}.weight") for i in range(net.n_blocks) for n in stream.norms.values()]
        found |= dict.fromkeys([*norms, net.file(f"{net.base}{stream.last}.weight")], math.sqrt(have["width"] / to["width"]))
    for s in net.sites:
        if s.role in ("o", "down"):
            kind = "heads" if s.role == "o" else surgery.neurons_of(net, s)
            found[net.block_file(s.block, s.param)] = math.sqrt(have[kind] / to[kind])
    return {n: v for n, v in found.items() if v != 1}


# ---- the smaller network ----------------------------------------------------------------------
def written(net: Network, p: Pass, walk: Callable[..., None], out: Path) -> dict[str, Any]:
    """Write into `out` the checkpoint with these sizes. `walk`(needs, look) takes `look`(i, module, statistics) over all blocks. Returns
    what went."""
    step, have, to = p.steps.get("score"), sizes_of(net), wanted(net, p.steps["unit"])
    worth = {s.name: torch.zeros(s.shape[1]) for s in net.sites if s.role in ("o", "down")}
    channels = torch.zeros(have["width"], dtype=torch.float64)

    def look(i: int, module: Any, stats: Any) -> None:
        assert step is not None
        seen: set[str] = set()
        for s in net.sites_of(i):
            known = {"w": net.weight(module, s).float(), "heads": torch.tensor(structure.heads_of(net, s))}
            scores = step.method({**known, **(stats.of(s) if stats else {})}, **step.bound)
            scores = scores if scores.dim() == 1 else scores.sum(0)
            if s.name in worth:
                worth[s.name] = scores
            elif not (step.method.facts["of"] == "input" and s.input in seen):  # once, whoever reads it
                seen.add(s.input)
                channels.add_(scores)

    if step is not None:
        walk({s.name: set(step.method.needs) for s in net.sites if step.method.needs}, look)
    cut = cut_of(net, p, to, worth, channels)
    apply(net, cut, out, lambda i: {})
    gone: dict[str, Any] = {}
    if cut.channels is not None:
        gone["channels"] = went("channel", cut.channels)
    for name, kept in cut.inputs.items():
        one = graph.heads(net.config)[2] if name.endswith(".o") else 1
        gone[name.rpartition(".")[0]] = went("head" if name.endswith(".o") else "neuron", kept[::one])
    layers = [i for i in range(net.n_blocks) if cut.layers and i not in cut.layers]
    return {k: v for k, v in {"units": gone, "layers": layers}.items() if v}


def went(kind: str, stay: Tensor) -> dict[str, Any]:
    return {"kind": kind, "of": len(stay), "went": (~stay).nonzero().flatten().tolist()}
