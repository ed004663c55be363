"""What rewrites a network as a whole: an ordinary checkpoint of another config.json, whose tensors are made of those of the network."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.journal import write_json
from trimtab.core.types import Site
from trimtab.network import graph
from trimtab.network.checkpoint import copy_others, write_sharded
from trimtab.network.stream import Network, described, layer_config


class Source:
    """The tensors of a network by name, one block of it in memory at a time."""

    def __init__(self, net: Network):
        self.net = net
        self._held: tuple[int, nn.Module] | None = None

    def block(self, i: int) -> nn.Module:
        if self._held is None or self._held[0] != i:
            self._held = None
            self._held = i, self.net.block(i)
        return self._held[1]

    def around(self, name: str) -> Tensor:
        """A parameter outside the blocks, by its name in the model."""
        return self.net.checkpoint.read(self.net.file(name))


class Target:
    """The network that a config.json describes, without a byte of its weights: `shapes`, in order, by its parameters' names, a tied one
    under the first of them; `silent`, those of sublayers that it skips."""

    def __init__(self, config: Mapping[str, Any]):
        self.family = graph.family_of(dict(config))
        self.model = described(config, self.family)
        base = self.model.base_model
        self.stem = f"{'' if base is self.model else self.model.base_model_prefix + '.'}{self.family.blocks}."
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        self.shapes = {n: tuple(p.shape) for n, p in self.model.named_parameters() if n not in tied}
        self._blocks = list(base.get_submodule(self.family.blocks))
        own = graph.per_layer(config)
        self.configs = [layer_config(self.model.config, own.get(j, {})) for j in range(len(self._blocks))]
        self.silent = {n for n in self.shapes if (at := self.placed(n)) and any(
            at[1].startswith(f"{graph.root(roles)}.") for group, roles in (("attn", self.family.attn), *(
                ("mlp", r) for r in self.family.mlp.values())) if graph.SKIPPED[group] in own.get(at[0], {}).get("skip", ()))}

    def placed(self, name: str) -> tuple[int, str] | None:
        """The block that a parameter belongs to, and its name there; None where it stands outside of all."""
        if not name.startswith(self.stem):
            return None
        number, _, inner = name.removeprefix(self.stem).partition(".")
        return int(number), inner

    def sites_of(self, j: int) -> list[Site]:
        """The linear maps of block `j`, skipped ones too."""
        return graph.sites(self.family, self.configs[j], self._blocks[j], j)


def write(net: Network, config: Mapping[str, Any], tensor: Callable[[str], Tensor], out: Path) -> None:
    """Write directory `out`: a checkpoint of `config`, with the network's other files. `tensor` gives every parameter by its name in the
    model that `config` describes, those of one block after the other.

    A tensor is stored in the type that the network's files have for that name, or else in the one that most of their values have. A
    sublayer that is skipped stays in the files as zeros.
    """
    out.mkdir(parents=True, exist_ok=True)
    target, stored = Target(config), net.checkpoint.tensors
    held = Counter[torch.dtype]()
    for e in stored.values():
        held[e.dtype] += torch.Size(e.shape).numel()
    old = target.family is not net.family or old_names(net)
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    where: dict[str, tuple[str, graph.Piece]] = {}
    for name, shape in target.shapes.items():
        for piece in graph.files_of(target.family, name, shape, old):
            entries[piece.file] = (stored[piece.file].dtype if piece.file in stored else held.most_common(1)[0][0], piece.shape)
            where[piece.file] = (name, piece)
    last: dict[str, Tensor] = {}

    def of(file: str) -> Tensor:
        name, piece = where[file]
        dtype, shape = entries[file]
        if name in target.silent:
            return torch.zeros(shape, dtype=dtype)
        if name not in last:  # several files may be parts of one
            last.clear()
            last[name] = tensor(name).detach()
        new: Tensor = piece.of(last[name])
        return new.to(dtype).contiguous()

    write_sharded(out, entries, of, lambda _: {"format": "pt"})
    copy_others(net.checkpoint, out, without=("config.json",))
    write_json(out / "config.json", {k: v for k, v in config.items() if k != "quantization_config"})


def old_names(net: Network) -> bool:
    """Whether the network's files have the older ones of its family."""
    prefix = net.model.base_model_prefix + "."
    for name, p in net.model.named_parameters():
        pieces = graph.files_of(net.family, name, tuple(p.shape), True)
        if pieces[0].file != name and any(n in net.checkpoint.tensors for n in (
                pieces[0].file, pieces[0].file.removeprefix(prefix), prefix + pieces[0].file)):
            return True
    return False
