"""What changes the shape of a network: a checkpoint with fewer neurons, heads, sublayers or layers, as ordinary files."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.journal import write_json
from trimtab.core.types import BadInput, Site
from trimtab.network import graph
from trimtab.network.checkpoint import copy_others, write_sharded
from trimtab.network.stream import Network, whole_blocks

BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists of config.json with an entry a layer
BY_NUMBER = ("mlp_only_layers",)                                 # lists of layers' numbers


@dataclass(frozen=True)
class Cut:
    """What stays of a network. `inputs`: of a site that ends a sublayer, by name, which of its inputs [in] do, bool: those of a
    sublayer's sites that make the others go with them; all, where it is not named. `layers`: which of the blocks stay, all where it is
    empty. `skips`: sublayers ("attn", "mlp") that a block loses, by its number. `channels`: of the residual stream those that stay,
    bool [width]; `scales`: what parameters are multiplied by, by their stored names."""

    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    skips: Mapping[int, frozenset[str]] = field(default_factory=dict)
    channels: Tensor | None = None
    scales: Mapping[str, float] = field(default_factory=dict)


class Cutter:
    """Block i of a network under a cut: which rows and columns of its parameters stay."""

    def __init__(self, net: Network, i: int, cut: Cut):
        self.sites = net.sites_of(i)
        self.rows: dict[str, Tensor] = {}  # bool, by site
        self.columns: dict[str, Tensor] = {}
        for end in (s for s in self.sites if s.name in cut.inputs):
            self.columns[end.name] = kept = cut.inputs[end.name]
            if end.role == "down":
                self.rows |= {s.name: kept for s in self.sites if s.consumer == end.name}
                continue
            h, kv, d = graph.heads(net.config_of(i))
            stay = kept.view(h, d)
            if bool((stay.any(1) != stay.all(1)).any()):
                raise ValueError(f"{end.name}: heads stay or go as a whole")
            groups = stay[:, 0].view(kv, h // kv).any(1).repeat_interleave(d)
            self.rows |= {s.name: kept if s.role == "q" else groups for s in self.sites if s.group == "attn" and s.role != "o"}
        self.norms: dict[str, Tensor] = {}
        if cut.channels is not None:
            for s in self.sites:
                (self.rows if s.role in ("o", "down") else self.columns)[s.name] = cut.channels
            self.norms = {f"{n}.{k}": cut.channels for n in net.family.norms for k in ("weight", "bias")}

    def _index(self, sites: list[Site], total: int) -> Tensor | None:
        """Rows that stay of a parameter that is these sites; None for all."""
        if not any(s.name in self.rows for s in sites):
            return None
        stay = torch.ones(total, dtype=torch.bool)
        for s in sites:
            if s.name in self.rows:
                at = s.row_index()
                stay[slice(None) if at is None else at] = self.rows[s.name]
        return stay.nonzero().flatten()

    def _of(self, name: str, shape: tuple[int, ...]) -> list[tuple[Tensor | None, Tensor | None]]:
        """Of parameter `name`, the indices of the first and of the second dimension that stay, one pair for each expert."""
        if name in self.norms:
            return [(self.norms[name].nonzero().flatten(), None)]
        if biased := [s for s in self.sites if graph.bias_of(s) == name]:
            return [(self._index(biased, shape[0]), None)]
        mine: dict[int | None, list[Site]] = {}
        for s in self.sites:
            if s.param == name:
                mine.setdefault(s.expert, []).append(s)
        found = []
        for sites in mine.values():
            rows = self._index(sites, shape[-1] if sites[0].transposed else shape[-2])
            stay = self.columns.get(sites[0].name)
            columns = None if stay is None else stay.nonzero().flatten()
            found.append((columns, rows) if sites[0].transposed else (rows, columns))
        return found or [(None, None)]

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What it is after the cut."""
        first, second = self._of(name, shape)[0]
        lead, own = (shape[:1], shape[1:]) if len(shape) == 3 else ((), shape)
        return lead + tuple(n if at is None else len(at) for n, at in zip(own, (first, second), strict=False))

    def of(self, name: str, p: Tensor) -> Tensor:
        """What stays of parameter `name`."""
        def one(w: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
            w = w if first is None else w[first]
            return w if second is None else w[:, second]

        each = self._of(name, tuple(p.shape))
        return torch.stack([one(w, *at) for w, at in zip(p, each, strict=True)]) if p.dim() == 3 and len(each) > 1 else one(p, *each[0])


# ---- config.json ------------------------------------------------------------------------------
def size_key(net: Network, what: str) -> str:
    """What the network's config.json calls this size. Mixtral calls the width of its experts what others call that of a plain MLP."""
    key = graph.size_key(net.family, what)
    return key if what not in ("experts", "shared") or hasattr(net.config, key) else graph.size_key(net.family, "neurons")


def neurons_of(net: Network, down: Site) -> str:
    """Which of `graph.SIZES` the inputs of a site that ends an MLP are."""
    stem = down.name.split(".")[2:-1]
    return {"": "neurons", "shared": "shared", "experts": "experts"}[stem[0] if stem else ""]


def sizes(net: Network, i: int, cut: Cut) -> dict[str, int]:
    """What config.json would say of block i after the cut, by its keys."""
    found: dict[str, int] = {}
    for s in net.sites_of(i):
        if s.role == "down":
            count = int(cut.inputs[s.name].sum()) if s.name in cut.inputs else s.shape[1]
            key = size_key(net, neurons_of(net, s))
            if found.setdefault(key, count) != count:
                raise BadInput(f"block {i}: its experts would differ in width ({found[key]} and {count} neurons), and they are stored as "
                               "one; give them one share")
        elif s.role == "o" and net.family.free_heads:
            h, kv, d = graph.heads(net.config_of(i))
            stay = cut.inputs.get(s.name, torch.ones(h * d, dtype=torch.bool)).view(kv, h // kv, d)[..., 0].sum(1)
            groups = stay[stay > 0]
            if len(groups) and not bool((groups == groups[0]).all()):
                raise BadInput(f"block {i}: its groups of heads would differ in size ({', '.join(map(str, groups.tolist()))}); "
                               "the same number of each has to stay")
            found |= {graph.size_key(net.family, "heads"): int(stay.sum()), graph.size_key(net.family, "kv_heads"): len(groups),
                      graph.size_key(net.family, "head_dim"): d}
    return found


def config_of(net: Network, cut: Cut) -> dict[str, Any]:
    """config.json after the cut: what all layers share is said once, what differs by layer (`per_layer_config`)."""
    config = dict(net.checkpoint.config)
    before = graph.per_layer(config)
    config.pop(graph.PER_LAYER, None)
    stay = cut.layers or tuple(range(net.n_blocks))
    each: list[dict[str, Any]] = []
    for i in stay:
        own = {**before.get(i, {}), **sizes(net, i, cut)}
        skip = {*own.pop("skip", ()), *(graph.SKIPPED[g] for g in cut.skips.get(i, ()))}
        each.append(own | ({"skip": sorted(skip)} if skip else {}))
    config |= of_layers(net, config, each, stay)
    if cut.channels is not None:
        config |= {graph.size_key(net.family, "head_dim"): graph.heads(net.config)[2], "hidden_size": int(cut.channels.sum())}
    return config


def of_layers(net: Network, config: Mapping[str, Any], each: list[dict[str, Any]], stay: tuple[int, ...]) -> dict[str, Any]:
    """What config.json says of layers that are `each` so, of the blocks `stay` of the network: once what all share, what differs by
    layer."""
    new: dict[str, Any] = {}
    for k in sorted({k for own in each for k in own if k not in graph.OWN}):
        common = Counter(own[k] for own in each if k in own).most_common(1)[0][0]
        if k in config or common != getattr(net.config, k, None):  # what a class says by itself need not be said
            new[k] = common
        for own in each:
            if own.get(k) == common:
                del own[k]
    if differing := {str(j): own for j, own in enumerate(each) if own}:
        new[graph.PER_LAYER] = differing
    if len(stay) < net.n_blocks:
        new |= _shorter(net, {**config, **new}, stay)
    return new


def _shorter(net: Network, config: Mapping[str, Any], stay: tuple[int, ...]) -> dict[str, Any]:
    """What of config.json counts or lists layers, for those that stay."""
    new: dict[str, Any] = {graph.size_key(net.family, "layers"): len(stay)}
    for key in BY_LAYER:
        listed = config.get(key) or getattr(net.config, key, None)  # some classes make the list themselves, of a pattern
        if isinstance(listed, list | tuple) and len(listed) == net.n_blocks:
            new[key] = [listed[i] for i in stay]
    for key in BY_NUMBER:
        if isinstance(listed := config.get(key), list):
            new[key] = [j for j, i in enumerate(stay) if i in listed]
    if isinstance(first := config.get("max_window_layers"), int):
        new["max_window_layers"] = sum(i < first for i in stay)
    if config.get("decoder_sparse_step", 1) != 1:
        raise BadInput(f"{net.checkpoint.path}: every {config['decoder_sparse_step']}th layer has experts, which no longer holds once a "
                       "layer is gone; keep all layers")
    return new


# ---- files ------------------------------------------------------------------------------------
def gone(net: Network, config: Mapping[str, Any], stay: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The stored tensors of sublayers that the network lacks already, by their names in the new files, of the sizes that `config` says of
    all layers."""
    lacking = [(j, i) for j, i in enumerate(stay) if graph.per_layer(net.checkpoint.config).get(i, {}).get("skip")]
    blocks = whole_blocks(net, config) if lacking else []
    found = {}
    for j, i in lacking:
        for name, p in blocks[j].named_parameters():
            for piece in net.pieces(i, name, tuple(p.shape)) if name not in net.shapes(i) else ():
                found[net.numbered(piece.file, j) or piece.file] = (net.checkpoint.tensors[piece.file].dtype, piece.shape)
    return found


def apply(net: Network, cut: Cut, out: Path, edited: Callable[[int], Mapping[str, Tensor]]) -> None:
    """Write directory `out`: the network's checkpoint after the cut. `edited`: tensors of a block, by stored name, that are no longer
    what the files hold, in their old shapes. One block is in memory at a time.

    A sublayer that is skipped stays in the files as zeros: whoever does not read `skip` computes the same.
    """
    out.mkdir(parents=True, exist_ok=True)
    source, stay = net.checkpoint, cut.layers or tuple(range(net.n_blocks))
    config = config_of(net, cut)
    config.pop("quantization_config", None)
    around = {} if cut.channels is None else net.around()
    entries = {n: (e.dtype, e.shape) for n, e in source.tensors.items() if not net.in_blocks(n)}
    where: dict[str, tuple[int, str, graph.Piece]] = {}  # of a tensor, the block it was in, its parameter, and which part of that it is
    for n, dim in around.items():
        dtype, shape = entries[n]
        assert cut.channels is not None
        entries[n] = dtype, (*shape[:dim], int(cut.channels.sum()), *shape[dim + 1:])
    for j, i in enumerate(stay):
        cutter = Cutter(net, i, cut)
        for name, shape in net.shapes(i).items():
            for piece in net.pieces(i, name, cutter.shape(name, shape)):
                file = net.numbered(piece.file, j) or piece.file
                entries[file] = (source.tensors[piece.file].dtype, piece.shape)
                where[file] = (i, name, piece)
    zeros = gone(net, config, stay)
    entries |= zeros
    held: dict[int, tuple[Cutter, dict[str, Tensor]]] = {}

    def tensor(file: str) -> Tensor:
        if file in zeros:
            return torch.zeros(entries[file][1], dtype=entries[file][0])
        if file not in where:
            whole = source.read(file)
            if cut.channels is not None and file in around:
                whole = whole.index_select(around[file], cut.channels.nonzero().flatten())
            return whole if file not in cut.scales else (whole.float() * cut.scales[file]).to(whole.dtype)
        i, name, piece = where[file]
        if i not in held:
            held.clear()
            held[i] = Cutter(net, i, cut), dict(net.block(i, edited(i)).named_parameters())
        cutter, params = held[i]
        own = net.pieces(i, name, tuple(params[name].shape))[0].file
        if any(s.group in cut.skips.get(i, ()) for s in cutter.sites if name in (s.param, graph.bias_of(s))):
            return torch.zeros(entries[file][1], dtype=entries[file][0])
        new: Tensor = piece.of(cutter.of(name, params[name].detach())) * cut.scales.get(own, 1.0)
        return new.to(entries[file][0]).contiguous()

    write_sharded(out, entries, tensor, lambda _: {"format": "pt"})
    copy_others(source, out, without=("config.json",))
    write_json(out / "config.json", config)
