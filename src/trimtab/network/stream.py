"""A network block by block from its files: the real transformers model on the meta device, filled where it is needed."""
from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.types import BadInput, Failed, Site
from trimtab.methods.gates import HIDDEN, INPUT, PREFIX, ROUTER, Gate
from trimtab.methods.rounding import ACT, Rounding, cost
from trimtab.methods.terms import Terms, of_site
from trimtab.network import graph
from trimtab.network.checkpoint import PARTS, Checkpoint, SafeFile, finite, not_finite

Sink = Callable[..., None]  # kind, key, *tensors
Reached = dict[str, list[int]]  # by site, of the inputs of all tokens those that were computed, and all


@dataclass
class Context:
    """What the model hands its blocks beside hidden states, and which tokens [batch * length] are no padding (None: all)."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    mask: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """A plain linear layer: its module's name, the stored name of its weight, and the sites that are rows of it (none: the head)."""

    name: str
    file: str
    sites: tuple[Site, ...] = ()

    @property
    def is_head(self) -> bool:
        return not self.sites


class _Reached(Exception):
    """The hidden states behind the last block's place: the front has done its work."""


class _Place(nn.Module):
    """Stands where block `i` was."""

    def __init__(self, i: int, block: nn.Module, visit: Callable[..., Tensor]):
        super().__init__()
        self.i, self.visit = i, visit
        if hasattr(block, "attention_type"):  # some releases ask the block which mask it wants
            self.attention_type = block.attention_type

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.visit(self.i, hidden, args, kwargs)


class Network:
    """checkpoint, config, family, n_blocks, sites (all, in order), kind ("lm", "masked", "encoder", "vision"), n_params,
    digest (of config.json and the weight files)."""

    digest = ""  # known once the files were read through

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False):
        self.checkpoint, self.dtype, self._trust = checkpoint, dtype, trust_remote_code
        self.family = graph.family_of(checkpoint.config, checkpoint.path / "config.json")
        if checkpoint.quantized and self.family.transposed:
            raise BadInput(f"{checkpoint.path} is a quantised {self.family.name}, whose weights are stored transposed; trimtab reads its "
                           "plain weights alone")
        self.config, self.model = _skeleton(checkpoint, self.family, dtype, trust_remote_code)
        self._own = graph.per_layer(checkpoint.config)
        self.kind = _kind(type(self.model).__name__, self.family)
        base = self.model.base_model
        listed = base.get_submodule(self.family.blocks)
        self._blocks: list[nn.Module] = list(listed)
        self.n_blocks = len(self._blocks)
        self.base = "" if base is self.model else self.model.base_model_prefix + "."
        self._stem = f"{self.base}{self.family.blocks}."
        self._front = tuple(f"{self.base}{p}." for p in self.family.front)
        self._validate()
        self._configs = [layer_config(self.config, self._own.get(i, {})) for i in range(self.n_blocks)]
        self._by_block = [graph.sites(self.family, self._configs[i], b, i) for i, b in enumerate(self._blocks)]
        self.sites = [s for block in self._by_block for s in block]
        self._given: Tensor | None = None
        self._parts: SafeFile | None = None
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] | None = None
        self._mask: Tensor | None = None
        self._sequences = 1
        self._phase, self._held = "", dict[str, nn.Parameter]()
        for i, block in enumerate(self._blocks):
            listed[i] = _Place(i, block, self._visit)
        table = self.model.get_input_embeddings().weight if self.family.name != "vit" else None
        self._table = {n for n, p in self.model.named_parameters(remove_duplicate=False) if p is table}
        # A decoder that classifies looks in the ids for the last token that is no padding.
        self._ids_at_the_end = self.kind == "encoder" and type(self.model).__name__.endswith("ForSequenceClassification") \
            and self.family.name != "bert"

    @staticmethod
    def open(path: Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> Network:
        """Open a checkpoint directory to compute in `dtype`. BadInput when a tensor the config asks for is missing, has
        another shape or is not finite."""
        net = Network(Checkpoint.open(Path(path)), dtype, trust_remote_code)
        net.digest = net.checkpoint.check(net._used)
        return net

    def tokenizer(self) -> Any | None:
        """The directory's tokenizer, None when it has none."""
        names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
        if not any((self.checkpoint.path / n).exists() for n in names):
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.checkpoint.path, trust_remote_code=self._trust)

    # ---- names and shapes -----------------------------------------------------------------
    def _validate(self) -> None:
        """Find the file of every parameter, and compare shapes."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        self._pieces: dict[str, list[graph.Piece]] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            for n in (name, tied.get(name), *(t for t, s in tied.items() if s == name)):
                pieces = graph.param_to_files(self.family, n, tuple(p.shape), self.checkpoint.tensors,
                                              self.model.base_model_prefix) if n else []
                if pieces:
                    break
            else:
                raise BadInput(f"tensor {name} {list(p.shape)} is missing from {self.checkpoint.path}; its config.json "
                               f"({type(self.model).__name__}) asks for it")
            for piece in pieces:
                if (found := self.checkpoint.tensors[piece.file].shape) != piece.shape:
                    raise BadInput(f"tensor {piece.file} of {self.checkpoint.path} has shape {list(found)}, config.json "
                                   f"implies shape {list(piece.shape)}; correct the one that is wrong")
            self._pieces[name] = pieces
        self._used = list(dict.fromkeys(p.file for ps in self._pieces.values() for p in ps))
        self.n_params = sum(torch.Size(self.checkpoint.tensors[n].shape).numel() for n in self._used)

    def file(self, name: str) -> str:
        """The stored name of a parameter that is stored as one tensor."""
        return self._pieces[name][0].file

    def block_file(self, i: int, name: str) -> str:
        """That of a parameter of block `i`."""
        return self.file(f"{self._stem}{i}.{name}")

    def shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """Those of the parameters of block `i`, by their names in it."""
        return {n: tuple(p.shape) for n, p in self._blocks[i].named_parameters()}

    def pieces(self, i: int, name: str, shape: tuple[int, ...]) -> list[graph.Piece]:
        """The stored tensors of a parameter of block `i`, were it of this shape."""
        return graph.param_to_files(self.family, f"{self._stem}{i}.{name}", shape, self.checkpoint.tensors, self.model.base_model_prefix)

    def around(self) -> dict[str, int]:
        """The stored tensors outside the blocks that have the channels of the residual stream, and in which dimension: of a family whose
        stream is `graph.stream`."""
        stream = graph.stream(self.family)
        assert stream is not None
        found = {self.file(self.table): 1, self.file(f"{self.base}{stream.last}.weight"): 0}
        if self.kind == "lm":  # a tied one may be stored, too
            found[self.file(self.head)] = 1
        return found

    def unread(self, file: str) -> bool:
        """Whether a stored tensor is that of a sublayer which is skipped, or of nothing in its block."""
        return file not in self._used and self.in_blocks(file)

    def in_blocks(self, file: str) -> bool:
        """Whether a stored tensor belongs to a block, whether the model reads it or not."""
        return self.numbered(file, 0) is not None

    def numbered(self, file: str, j: int) -> str | None:
        """What a stored tensor of a block is called in block j; None for one of no block."""
        places = [self._stem, self._stem.removeprefix(self.base), f"{self.model.base_model_prefix}.{self._stem}"]
        for pattern, to in self.family.renames:
            places += [re.sub(pattern, to, p) for p in list(places)]
        found = (re.fullmatch(f"({re.escape(p)})" + r"\d+(\..*)", file) for p in places)
        return next((f"{m[1]}{j}{m[2]}" for m in found if m), None)

    def bias_file(self, site: Site) -> str | None:
        """That of the bias of a site that has one."""
        return self.block_file(site.block, graph.bias_of(site) or "") if self.has_bias(site) else None

    def sites_of(self, i: int) -> list[Site]:
        return self._by_block[i]

    def config_of(self, i: int) -> Any:
        """What is said of block `i`, which may have fewer heads or neurons than others."""
        return self._configs[i]

    def layers(self) -> list[Layer]:
        """Every plain linear layer that is made of sites and stored as one tensor, in order, and a language model's head."""
        found = []
        for i, block in enumerate(self._blocks):
            stacks: dict[str, list[Site]] = {}
            for s in self._by_block[i]:
                stacks.setdefault(s.param, []).append(s)
            for param, sites in stacks.items():
                pieces = self._pieces[f"{self._stem}{i}.{param}"]
                if len(pieces) == 1 and param.endswith(".weight") and type(block.get_submodule(param.removesuffix(".weight"))) is nn.Linear:
                    found.append(Layer(f"{self._stem}{i}.{param}".removesuffix(".weight"), pieces[0].file, tuple(sites)))
        head = self.model.get_output_embeddings() if self.kind == "lm" else None
        if type(head) is nn.Linear:
            name = next(n for n, m in self.model.named_modules() if m is head)
            found.append(Layer(name, self.file(self.table if self.tied_head else f"{name}.weight")))
        return found

    def linears(self) -> list[str]:
        """The names of all plain linear layers, in blocks and around them."""
        places = [(f"{self._stem}{i}.", b) for i, b in enumerate(self._blocks)]
        return [at + n for at, part in (*places, ("", self.model)) for n, m in part.named_modules() if type(m) is nn.Linear]

    @property
    def table(self) -> str:
        """The name of the table of embeddings, which a tied head shares."""
        table = self.model.get_input_embeddings()
        return f"{next(n for n, m in self.model.named_modules() if m is table)}.weight"

    @property
    def head(self) -> str:
        """The name of a language model's head's weight."""
        head = self.model.get_output_embeddings()
        return f"{next(n for n, m in self.model.named_modules() if m is head)}.weight"

    @property
    def head_size(self) -> int:
        """Weights of a language model's head, 0 where there is none."""
        head = self.model.get_output_embeddings() if self.kind == "lm" else None
        return 0 if head is None else int(head.weight.numel())

    @property
    def tied_head(self) -> bool:
        """Whether the head's weight is the table of embeddings."""
        return self.kind == "lm" and bool(getattr(self.config.get_text_config(), "tie_word_embeddings", False))

    def as_packed(self, module: nn.Module, i: int, reached: Reached | None = None, held: dict[str, Tensor] | None = None) -> None:
        """Let the layers of block `i` that are packed in the files run as they are stored; their weights are gone then.

        `reached` counts what gates let pass; `held` as `Checkpoint.linear` has it."""
        from trimtab.runtime.modules import PackedLinear

        stem = f"{self._stem}{i}."
        for name in self.checkpoint.packed:
            if name.startswith(stem):
                at = name.removeprefix(stem)
                owner, _, leaf = at.rpartition(".")
                bias = module.get_submodule(at)._parameters["bias"]
                setattr(module.get_submodule(owner), leaf, PackedLinear(self.checkpoint.linear(name, held), bias))
        for s in self.sites_of(i) if self.checkpoint.packed else ():
            layer = module.get_submodule(s.param.rpartition(".")[0])
            if not isinstance(layer, PackedLinear) or (gate := layer.linear.gate_of_rows(s.rows)) is None:
                continue
            if gate.of == HIDDEN:
                self.on_hidden(module, i, s, layer.scoring)
            elif gate.of == ROUTER:
                self.on_source(module, i, s, layer.scoring)
            if reached is not None:
                layer.register_forward_pre_hook(lambda m, args, s=s, gate=gate: self._count(
                    reached, s, gate.mask(args[0] if gate.of == INPUT else m.scored)))

    def _count(self, reached: Reached | None, site: Site, passed: Tensor) -> None:
        if reached is not None:
            counted, real = reached.setdefault(site.name, [0, 0]), self._tokens(passed)
            counted[0] += int(real.sum())
            counted[1] += real.numel()

    def said(self, i: int) -> dict[str, Tensor]:
        """The parts, by `<site>:<part>`, of those sites of block `i` whose inputs are rounded or gated. BadInput where they are not what
        the weights are made of."""
        file = self.checkpoint.path / PARTS
        if self._parts is None and file.exists():
            self._parts = SafeFile(file)
        names = self._parts.names if self._parts is not None else []
        its = {s.name for s in self.sites_of(i) if f"{s.name}:{ACT[0]}" in names or any(n.startswith(f"{s.name}:{PREFIX}") for n in names)}
        found = {n: self._parts.read(n) for n in names if n.rpartition(":")[0] in its} if self._parts is not None else {}
        for s in self.sites_of(i):
            if s.name in its:
                terms, gate = Terms.among(of_site(found, s.name)), gate_of(found, s)
                if terms is None and gate is not None:
                    continue
                dtype = self.stored_dtype(s)
                stored = s.get(self.stored_param(s, {}))
                if terms is None or not torch.equal(terms.weight().to(dtype), stored.to(dtype)):
                    raise BadInput(f"{s.name}: the weights of {self.checkpoint.path} are not those that {PARTS} was written for; "
                                   f"trim the model again, or remove {PARTS} to run the weights as they are")
        return found

    def as_said(self, module: nn.Module, i: int, parts: Mapping[str, Tensor], reached: Reached | None = None) -> None:
        """Let the sites of block `i` whose `parts`, by `<site>:<part>`, say so meet gated and rounded inputs, as packed layers do.

        `reached` counts what gates let pass."""
        layers: dict[str, list[Site]] = {}
        for s in self.sites_of(i):
            layers.setdefault(s.param, []).append(s)
        self._as_gated(module, i, layers, parts, reached)
        for param, sites in layers.items():
            each = [(s, r, t) for s in sites if (r := Rounding.among(mine := of_site(parts, s.name))) and (t := Terms.among(mine))]
            if not each:
                continue
            layer, (_, rounding, _) = module.get_submodule(param.rpartition(".")[0]), each[0]
            if len(each) == len(sites) and all(t.simple and r.same(rounding) for _, r, t in each):
                layer.register_forward_pre_hook(lambda m, args, r=rounding: (r.of(args[0]).to(args[0].dtype), *args[1:]))
            else:
                changes = [(slice(None) if s.rows is None else s.row_index(), cost(t, r)) for s, r, t in each]
                layer.register_forward_hook(lambda m, args, y, changes=changes: _changed(y, args[0], changes))
            for s, r, _ in each:
                for k, value in r.parts().items():
                    layer.register_buffer(f"{s.role}_{k}", value, persistent=False)  # who looks at the block sees that it is another one

    def twin(self, module: nn.Module) -> nn.Module:
        """The block with the very same weights, whose inputs may be gated and rounded beside it."""
        shared = {id(x): x for x in (self.config, *self._configs, *module.parameters(), *module.buffers())}
        return copy.deepcopy(module, shared)

    def _as_gated(self, module: nn.Module, i: int, layers: dict[str, list[Site]], parts: Mapping[str, Tensor],
                  reached: Reached | None) -> None:
        seen: dict[str, Tensor] = {}  # by the site whose gate it is, what that scores of this call
        for param, sites in layers.items():
            each = [(s, g) for s in sites if (g := gate_of(parts, s)) is not None]
            if not each:
                continue
            layer = module.get_submodule(param.rpartition(".")[0])
            for s, g in each:
                if g.of == HIDDEN:
                    self.on_hidden(module, i, s, into(seen, s.name))
                elif g.of == ROUTER:
                    self.on_source(module, i, s, into(seen, s.name))
                for k, value in g.parts().items():
                    layer.register_buffer(f"{s.role}_{k}", value, persistent=False)  # who looks at the block sees that it is another one

            def mask(s: Site, g: Gate, x: Tensor) -> Tensor:
                v = x if g.of == INPUT else seen[s.name]
                whole = v.reshape(self._sequences, -1, v.shape[-1])
                # A step is one place of all sequences, or of as many as the gate takes.
                passed = torch.cat([g.mask(some) for some in whole.split(g.together or len(whole))])
                if passed.shape[-1] != x.shape[-1]:
                    raise BadInput(f"{s.name}: its gate decides for {passed.shape[-1]} inputs, and it has {x.shape[-1]}; "
                                   "trim the model again")
                passed = passed.view_as(x)
                self._count(reached, s, passed)
                return passed

            def gated(m: nn.Module, args: Any, own: tuple[Site, Gate] = each[0]) -> Any:
                return args[0] * mask(*own, args[0]), *args[1:]

            def taken(s: Site, g: Gate, w: Tensor) -> Callable[[Tensor], Tensor]:
                return lambda x: nn.functional.linear(x * mask(s, g, x) - x, w)

            if len(sites) == 1:
                layer.register_forward_pre_hook(gated)
            else:  # stacked: of each what it does to its own outputs
                changes = [(slice(None) if s.rows is None else s.row_index(), taken(s, g, self.weight(module, s))) for s, g in each]
                layer.register_forward_hook(lambda m, args, y, changes=changes: _changed(y, args[0], changes))

    def on_hidden(self, module: nn.Module, i: int, down: Site, see: Callable[[Tensor, Tensor], None]) -> list[Any]:
        """Calls `see`(gate, up), both [..., neurons], the gate activated, whenever the MLP of block `i` that ends in `down` runs, before
        that does. Returns the hooks. BadInput where it has no gate."""
        feeders = {s.role: s for s in self.sites_of(i) if s.consumer == down.name}
        if down.role != "down" or "gate" not in feeders or down.expert is not None:
            raise BadInput(f"{down.name}: what its gate lets pass is what an MLP with a gate ends in; scope it to such sites: *.mlp.down")
        act, held = graph.activation(self.config), dict[str, Tensor]()

        def keep(m: nn.Module, args: Any, y: Tensor, mine: list[Site]) -> None:
            held.update({s.role: y if s.rows is None else y[..., s.row_index()] for s in mine})

        by_param: dict[str, list[Site]] = {}
        for s in feeders.values():
            by_param.setdefault(s.param, []).append(s)
        hooks = [module.get_submodule(param.rpartition(".")[0]).register_forward_hook(lambda m, args, y, mine=mine: keep(m, args, y, mine))
                 for param, mine in by_param.items()]
        layer = module.get_submodule(down.param.rpartition(".")[0])
        return [*hooks, layer.register_forward_pre_hook(lambda m, args: see(act(held["gate"]), held["up"]), prepend=True)]

    def on_source(self, module: nn.Module, i: int, site: Site, see: Callable[[Tensor], None]) -> list[Any]:
        """Calls `see` with what the sublayer is given that `site` of block `i` ends, before anything is made of it. Returns the hooks.
        BadInput where it ends none."""
        feeders = [s for s in self.sites_of(i) if s.consumer == site.name or (site.role == "o" and s.role == "q")]
        if not feeders or site.expert is not None:
            raise BadInput(f"{site.name}: its gate looks at what a sublayer is given, and it ends none; scope it to *.o or *.down")
        layer = module.get_submodule(feeders[0].param.rpartition(".")[0])
        return [layer.register_forward_pre_hook(lambda m, args: see(args[0]), prepend=True)]

    def _pieces_of(self, site: Site) -> list[graph.Piece]:
        return self._pieces[f"{self._stem}{site.block}.{site.param}"]

    def stored_dtype(self, site: Site) -> torch.dtype:
        """The dtype of the site's weight in the files."""
        mine = [p for p in self._pieces_of(site) if p.expert in (None, site.expert)]
        return self.checkpoint.tensors[mine[0].file].dtype

    def stored_param(self, site: Site, replaced: Mapping[str, Tensor]) -> nn.Parameter:
        """The parameter that holds the site, in the compute dtype, from the files or, by stored name, from `replaced`."""
        return self._load(f"{self._stem}{site.block}.{site.param}", self._blocks[site.block].get_parameter(site.param), replaced)

    def _load(self, name: str, like: Tensor, replaced: Mapping[str, Tensor]) -> nn.Parameter:
        """A parameter in the compute dtype, from its pieces."""
        out: Tensor | None = None
        for piece in self._pieces[name]:
            t = replaced.get(piece.file)
            t = self.checkpoint.read(piece.file) if t is None else t
            if t.dtype.is_floating_point and not finite(t):
                raise not_finite(piece.file, self.checkpoint.path)
            if piece.expert is None and piece.rows is None:
                out = t.to(self.dtype, copy=piece.file in replaced)
            else:
                out = torch.empty(like.shape, dtype=self.dtype) if out is None else out
                piece.of(out).copy_(t)
        assert out is not None
        return nn.Parameter(out, requires_grad=False)

    # ---- front and end --------------------------------------------------------------------
    def _enter(self, phase: str) -> None:
        """Hold the weights of one phase, and only those."""
        if self._phase == phase:
            return
        self.release()
        shared: dict[str, nn.Parameter] = {}
        for name, p in list(self.model.named_parameters(remove_duplicate=False)):
            front = name.startswith(self._front)
            # The end runs through the front as well, on zeros: all of it is small but the table of embeddings.
            if front if phase == "front" else not front or name not in self._table or self._ids_at_the_end:
                self._held[name] = p
                key = self._pieces[name][0].file
                if key not in shared:
                    shared[key] = self._load(name, p, {})
                _assign(self.model, name, shared[key])
        self._phase = phase

    def release(self) -> None:
        """Drop the weights of the front or the end."""
        for name, p in self._held.items():
            _assign(self.model, name, p)
        self._held, self._phase = {}, ""

    def _visit(self, i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self._calls is None:
            assert self._given is not None
            return self._given
        self._calls.append((args, kwargs))
        if i == self.n_blocks - 1:
            raise _Reached(hidden)
        return hidden

    def embed(self, batch: dict[str, Tensor]) -> tuple[Tensor, Context]:
        """The front of the model: (hidden [batch, length, width], context for `run`). Its weights stay until `release`."""
        self._enter("front")
        context = Context()
        self._calls = context.calls
        try:
            self.model(**{k: v for k, v in batch.items() if k != "labels"})
            raise Failed(f"{type(self.model).__name__} never reached its last block")
        except _Reached as e:
            hidden: Tensor = e.args[0]
        finally:
            self._calls = None
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == hidden.shape[:2] and not mask.all():
            context.mask = mask.bool().flatten()
        return hidden, context

    def finish(self, hidden: Tensor, context: Context, batch: dict[str, Tensor]) -> Tensor:
        """Everything behind the last block: logits if the model has a head, else the last hidden state.

        `hidden` may be a slice of the positions where the head works position by position. Gradients flow to it.
        Its weights stay until `release`.
        """
        self._enter("tail")
        if self.kind == "vision":
            inputs = {"pixel_values": batch["pixel_values"]}
        elif self._ids_at_the_end:
            inputs = {k: v for k, v in batch.items() if k != "labels"}
        else:
            width = self.model.get_input_embeddings().weight.shape[1]
            inputs = {"inputs_embeds": torch.zeros(*hidden.shape[:2], width, dtype=self.dtype)}
        self._given = hidden
        try:
            out = self.model(**inputs)
        finally:
            self._given = None
        for name in ("logits", "prediction_logits", "last_hidden_state"):
            if getattr(out, name, None) is not None:
                return getattr(out, name)
        raise Failed(f"{type(self.model).__name__} gives neither logits nor a hidden state")

    def ends(self, hidden: Tensor, context: Context, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What `finish` gives of a language model, and before it what its head sees: the hidden states behind the last norm."""
        seen: list[Tensor] = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        try:
            logits = self.finish(hidden, context, batch)
        finally:
            hook.remove()
        return seen[0], logits

    # ---- blocks ---------------------------------------------------------------------------
    def block(self, i: int, replaced: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Block `i` with its weights in the compute dtype, from the files or, by stored name, from `replaced`."""
        meta = self._blocks[i]
        module = copy.deepcopy(meta, {id(c): c for c in (self.config, self._configs[i])})  # they ask one config which attention to use
        _fill_buffers(self.model, module)
        for name, p in meta.named_parameters():
            _assign(module, name, self._load(f"{self._stem}{i}.{name}", p, replaced or {}))
        return module.eval()

    def whole(self) -> nn.Module:
        """The model with all its weights in memory, its packed layers as they are stored. The network is of no use afterwards."""
        from trimtab.runtime.modules import PackedLinear

        listed = self.model.base_model.get_submodule(self.family.blocks)
        held: dict[str, Tensor] = {}
        for i in range(self.n_blocks):
            listed[i] = self.block(i)
            self.as_packed(listed[i], i, held=held)
        shared: dict[str, nn.Parameter] = {}
        for name, p in list(self.model.named_parameters(remove_duplicate=False)):
            if name in self._pieces and not name.startswith(self._stem):
                key = self.file(name)
                if key not in shared:
                    shared[key] = self._load(name, p, {})
                _assign(self.model, name, shared[key])
        for name in self.checkpoint.packed:
            if not name.startswith(self._stem):
                owner, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(owner), leaf, PackedLinear(self.checkpoint.linear(name, held), None))
        self.config.use_cache = True
        return self.model.eval()  # type: ignore[no-any-return]

    def run(self, module: nn.Module, i: int, hidden: Tensor, context: Context) -> Tensor:
        """Hidden states behind block `i`."""
        args, kwargs = context.calls[i]
        self._mask, self._sequences = context.mask, len(hidden)
        out = module(hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def param(self, module: nn.Module, site: Site) -> nn.Parameter:
        """The parameter of a block that holds the site."""
        return module.get_parameter(site.param)

    def site_params(self, module: nn.Module, i: int) -> dict[str, nn.Parameter]:
        """Every parameter of block `i` that holds sites, once, by its name in the block."""
        return {s.param: self.param(module, s) for s in self.sites_of(i)}

    def weight(self, module: nn.Module, site: Site) -> Tensor:
        """[out, in], a copy."""
        return site.get(self.param(module, site))

    def set_weight(self, module: nn.Module, site: Site, w: Tensor) -> None:
        site.put(self.param(module, site), w)

    def fold(self, module: nn.Module, fold: graph.Fold, s: Tensor) -> tuple[Tensor, set[str]]:
        """Scale the inputs [in] of a fold's readers by `s` > 0, which what makes them is divided by: the block's outputs stay.

        Returns the scale in effect, which differs from `s` by the rounding of a norm to its type in the files, and shared rows by
        their mean; and the parameters of the block that changed and hold no site.
        """
        changed: set[str] = set()

        def divide(name: str, by: Tensor, offset: float = 0.0) -> Tensor:
            p = module.get_parameter(name)
            dtype = self.checkpoint.tensors[self.block_file(fold.readers[0].block, name)].dtype
            before = p.detach().float() + offset
            p.data.copy_((before / by - offset).to(dtype))
            changed.add(name)
            after = p.detach().float() + offset
            return torch.where((after != 0) & (before != 0), before / after, torch.ones_like(by))

        s = s.float()
        if fold.norm:
            norms = dict(module.get_submodule(fold.norm).named_parameters())
            s = divide(f"{fold.norm}.weight", s, self.family.norm_offset)
            if norms.get("bias") is not None:
                divide(f"{fold.norm}.bias", s)
        elif fold.writer is not None:
            v = fold.writer
            if fold.rows:
                rows = torch.tensor(fold.rows)
                count = torch.zeros(v.shape[0]).index_add_(0, rows, torch.ones(len(rows)))
                by = (torch.zeros(v.shape[0]).index_add_(0, rows, s.log()) / count).exp()
                s = by[rows]
            else:
                by = s
            self.set_weight(module, v, self.weight(module, v).float() / by[:, None])
            if (b := self.bias(module, v)) is not None:
                changed.add(self.set_bias(module, v, b / by))
        for r in fold.readers:
            self.set_weight(module, r, self.weight(module, r).float() * s)
        return s, changed

    def moves(self, fold: graph.Fold) -> bool:
        """Whether the fold's input can be moved: the norm that makes it has a bias, and so has every site that reads it."""
        params = dict(self._blocks[fold.readers[0].block].named_parameters())
        return f"{fold.norm}.bias" in params and all(self.has_bias(r) for r in fold.readers)

    def move(self, module: nn.Module, fold: graph.Fold, z: Tensor) -> tuple[Tensor, set[str]]:
        """Take `z` [in] off the input of a fold's readers, whose biases add what they made of it: their outputs stay.

        Returns the shift in effect, which differs from `z` by the rounding of the norm's bias to its type in the files, and the
        parameters of the block that changed, none of which holds a site.
        """
        name = f"{fold.norm}.bias"
        p, dtype = module.get_parameter(name), self.checkpoint.tensors[self.block_file(fold.readers[0].block, name)].dtype
        before = p.detach().float().clone()
        p.data.copy_((before - z).to(dtype))
        z = before - p.detach().float()
        return z, {name} | {self.add_to_bias(module, r, self.weight(module, r).float() @ z) for r in fold.readers}

    def has_gate(self, down: Site) -> bool:
        """Whether the site ends an MLP that has a gate."""
        return any(s.role == "gate" and s.consumer == down.name for s in self.sites_of(down.block))

    def weight_grad(self, module: nn.Module, site: Site) -> Tensor:
        """The gradient [out, in] of the site; zeros where none arrived."""
        grad = self.param(module, site).grad
        return torch.zeros(site.shape, dtype=self.dtype) if grad is None else site.get(grad)

    def bias(self, module: nn.Module, site: Site) -> Tensor | None:
        """The bias [out] that is added to the site's output, if there is one."""
        b = dict(module.named_parameters()).get(graph.bias_of(site) or "")
        rows = None if site.rows is None else slice(*site.rows) if len(site.rows) == 2 else torch.tensor(site.rows)
        return None if b is None else b.detach()[slice(None) if rows is None else rows].clone()

    def set_bias(self, module: nn.Module, site: Site, b: Tensor) -> str:
        """Give a site that has one this bias [out], and return its parameter's name in the block."""
        name, at = graph.bias_of(site) or "", site.row_index()
        module.get_parameter(name).data[slice(None) if at is None else at] = b
        return name

    def has_bias(self, site: Site) -> bool:
        return (graph.bias_of(site) or "") in dict(self._blocks[site.block].named_parameters())

    def add_to_bias(self, module: nn.Module, site: Site, delta: Tensor) -> str:
        """Add `delta` [out] to the bias of a site that has one, rounded to its type in the files; its parameter's name in the block."""
        b, file = self.bias(module, site), self.bias_file(site)
        assert b is not None and file is not None
        return self.set_bias(module, site, (b.float() + delta).to(self.checkpoint.tensors[file].dtype).to(b.dtype))

    def stored(self, module: nn.Module, i: int, others: Iterable[str] = ()) -> dict[str, Tensor]:
        """The tensors of block `i` that hold sites, and `others` of its parameters, under their names and in the layout and dtype of the
        files."""
        out = {}
        for name, p in {**self.site_params(module, i), **{n: module.get_parameter(n) for n in sorted(others)}}.items():
            for piece in self._pieces[f"{self._stem}{i}.{name}"]:
                dtype = self.checkpoint.tensors[piece.file].dtype
                out[piece.file] = piece.of(p.detach()).to(dtype, copy=True, memory_format=torch.contiguous_format)
        return out

    # ---- taps -----------------------------------------------------------------------------
    @contextmanager
    def taps(self, module: nn.Module, i: int, want: set[str], sink: Sink) -> Iterator[None]:
        """While open, running block `i` calls `sink(kind, key, *tensors)`, padding left out.

        "input": key = Site.input, x [tokens, in], once per distinct input and forward; an expert sees its own tokens only.
        "met": the same behind gates and rounding, where these come before the layer; without experts.
        "sentence": the same for one sequence after the other, experts left out.
        "fed": key = the input of the site that a sublayer ends in, what the sublayer is given [tokens, width], and that input [tokens, in].
        "hidden": key = the input of the site that an MLP with a gate ends in, its gate, activated, and what that multiplies, [tokens, in].
        "sublayer": key = "attn", "mlp" or "block", the residual stream x, y [tokens, width] before and after; in a parallel block
        both start from the block's input, in a post-norm block the stream is taken behind the norm.
        """
        handles = []
        first = {s.input: s for s in reversed(self.sites_of(i)) if s.expert is None}

        def see(m: nn.Module, args: Any, kind: str, key: str) -> None:
            sink(kind, key, self._tokens(args[0]))

        for kind in sorted(want & {"input", "met"}):
            for key, s in first.items():
                handles.append(module.get_submodule(s.param.rpartition(".")[0]).register_forward_pre_hook(
                    partial(see, kind=kind, key=key), prepend=kind == "input"))
        if "input" in want:
            stacks = {s.role: s.param for s in self.sites_of(i) if s.expert is not None}
            if stacks:
                handles.append(module.get_submodule(stacks["up"].rpartition(".")[0]).register_forward_pre_hook(
                    lambda m, args, kwargs: self._expert_inputs(m, *args, *kwargs.values(), sink=sink), with_kwargs=True))
        if "hidden" in want:
            for down in (s for s in self.sites_of(i) if s.role == "down" and s.expert is None and self.has_gate(s)):
                handles += self.on_hidden(module, i, down, self._tap(sink, "hidden", down.input))
        if "sentence" in want:
            for key, s in first.items():
                handles.append(module.get_submodule(s.param.rpartition(".")[0]).register_forward_pre_hook(
                    lambda m, args, key=key: self._each_sentence(args[0], sink, key), prepend=True))
        if "fed" in want:
            given: dict[str, Tensor] = {}
            for s in {s.input: s for s in reversed(self.sites_of(i)) if s.role in ("o", "down") and s.expert is None}.values():
                handles += self.on_source(module, i, s, into(given, s.input))
                handles.append(module.get_submodule(s.param.rpartition(".")[0]).register_forward_pre_hook(
                    lambda m, args, key=s.input: sink("fed", key, self._tokens(given.pop(key)), self._tokens(args[0])), prepend=True))
        if "sublayer" in want:
            handles += self._sublayer_taps(module, i, sink)
        try:
            yield
        finally:
            for h in handles:
                h.remove()

    def _tokens(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, x.shape[-1])
        return x if self._mask is None or len(self._mask) != len(x) else x[self._mask]

    def _tap(self, sink: Sink, kind: str, key: str) -> Callable[..., None]:
        """What passes on the tokens of all that it is given."""
        def see(*tensors: Tensor) -> None:
            sink(kind, key, *map(self._tokens, tensors))

        return see

    def _each_sentence(self, x: Tensor, sink: Sink, key: str) -> None:
        """Passes on [tokens, width] of every sequence, padding left out."""
        whole = x.reshape(self._sequences, -1, x.shape[-1])
        real = None if self._mask is None or self._mask.numel() != whole[..., 0].numel() else self._mask.view(whole.shape[:2])
        for k, one in enumerate(whole):
            sink("sentence", key, one if real is None else one[real[k]])

    @torch.no_grad()
    def _expert_inputs(self, m: Any, hidden: Tensor, chosen: Tensor, *_: Tensor, sink: Sink) -> None:
        """What each expert [tokens that chose it, in] sees, and its hidden neurons; an expert nobody chose is not mentioned."""
        for e in range(m.gate_up_proj.shape[0]):
            mine = (chosen == e).any(-1)
            mine = mine if self._mask is None else mine & self._mask
            if mine.any():
                x = hidden[mine]
                gate, up = nn.functional.linear(x, m.gate_up_proj[e]).chunk(2, -1)
                sink("input", f"experts.{e}.mlp.in", x)
                sink("input", f"experts.{e}.mlp.mid", m.act_fn(gate) * up)

    def _sublayer_taps(self, module: nn.Module, i: int, sink: Sink) -> list[Any]:
        how, where = graph.between(self.family, self.config_of(i))
        seen: dict[str, Tensor] = {}

        def begin(m: nn.Module, args: Any) -> None:
            seen["x"] = args[0]

        def middle(m: nn.Module, args: Any, out: Any = None) -> None:
            seen["mid"] = args[0] if how == "in" else out[0] if isinstance(out, tuple) else out

        def end(m: nn.Module, args: Any, out: Any) -> None:
            x, mid, y = seen.pop("x"), seen.pop("mid"), out[0] if isinstance(out, tuple) else out
            parallel = how == "parallel"  # there `mid` is attention's contribution alone
            x, attn = self._tokens(x), self._tokens(x + mid if parallel else mid)
            before, after = x if parallel else attn, self._tokens(y)
            sink("sublayer", "attn", x, attn)
            sink("sublayer", "mlp", before, after - self._tokens(mid) if parallel else after)
            sink("sublayer", "block", x, after)

        at = module.get_submodule(where)
        return [module.register_forward_pre_hook(begin), module.register_forward_hook(end),
                at.register_forward_pre_hook(middle) if how == "in" else at.register_forward_hook(middle)]


# ---- building the model -----------------------------------------------------------------------
def load_module(path: Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> nn.Module:
    """The whole model in memory, as transformers loads it."""
    from transformers.utils import logging

    c = Checkpoint.open(Path(path))
    cls = _model_class(c.config, graph.family_of(c.config, c.path / "config.json"))
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if graph.beyond(c.config):
            return Network(c, dtype, trust_remote_code).whole()
        if c.quantized:  # decoded here: transformers would ask for the program that made it
            config, _ = _skeleton(c, graph.family_of(c.config, c.path / "config.json"), dtype, trust_remote_code)
            del config.quantization_config
            state = {n: c.read(n) for n in c.tensors}
            return cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype, trust_remote_code=trust_remote_code).eval()
        return cls.from_pretrained(c.path, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    finally:
        if shown:
            logging.enable_progress_bar()


def _model_class(config: dict[str, Any], family: graph.Family) -> Any:
    import transformers

    names = config.get("architectures") or [None]
    return getattr(transformers, str(names[0]), None) or getattr(transformers, family.auto)


def _kind(name: str, family: graph.Family) -> str:
    if family.name == "vit":
        return "vision"
    return "lm" if name.endswith(("ForCausalLM", "LMHeadModel")) else "masked" if name.endswith("ForMaskedLM") else "encoder"


def whole_blocks(net: Network, config: Mapping[str, Any]) -> list[nn.Module]:
    """The blocks on the meta device that transformers builds for another config.json of the network, where no layer differs."""
    with torch.device("meta"):
        model = type(net.model)(_alike(config))
    return list(model.base_model.get_submodule(net.family.blocks))


def described(config: Mapping[str, Any], family: graph.Family) -> Any:
    """The model on the meta device that a config.json describes, with the sublayers that it skips, too."""
    cls = _model_class(dict(config), family)
    said, own = _alike(config), graph.per_layer(config)
    with torch.device("meta"):
        model = cls.from_config(said) if cls.__name__.startswith("Auto") else cls(said)
        _differ(model, family, said, {i: {k: v for k, v in its.items() if k != "skip"} for i, its in own.items()})
    return model


def _alike(config: Mapping[str, Any]) -> Any:
    """What transformers makes of a config.json, but for what it says of single layers."""
    import transformers

    kind = type(transformers.AutoConfig.for_model(config["model_type"]))
    return kind.from_dict({k: v for k, v in config.items() if k != graph.PER_LAYER})


def _differ(model: Any, family: graph.Family, config: Any, own: Mapping[int, Mapping[str, Any]]) -> None:
    """Put blocks of their own where more is said of single layers."""
    blocks = model.base_model.get_submodule(family.blocks)
    for i, its in own.items():
        blocks[i] = _differing(family, blocks[i], layer_config(config, its), i)


def _skeleton(c: Checkpoint, family: graph.Family, dtype: torch.dtype, trust: bool) -> tuple[Any, Any]:
    """(config, model without a byte of weights); what is computed rather than stored (rotary tables) is real."""
    import transformers

    before = torch.get_default_dtype()
    try:
        if graph.PER_LAYER in c.config:  # what differs by layer is built here: few classes of transformers read it
            config = _alike(c.config)
        else:
            config = transformers.AutoConfig.from_pretrained(c.path, trust_remote_code=trust)
        for name in ("use_cache", "output_router_logits", "output_hidden_states", "output_attentions"):
            if getattr(config, name, False):
                setattr(config, name, False)
        cls = _model_class(c.config, family)
        torch.set_default_dtype(dtype)
        with torch.device("meta"), torch.no_grad():
            model = cls.from_config(config, trust_remote_code=trust) if cls.__name__.startswith("Auto") else cls(config)
            _differ(model, family, config, graph.per_layer(c.config))
            if graph.ours(c.config).get("norms"):
                _as_rms(model, family)
    except Exception as e:  # whatever transformers makes of it, the config is at fault
        why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise BadInput(f"{c.path / 'config.json'} does not describe a model transformers can build: {why}") from None
    finally:
        torch.set_default_dtype(before)
    _fill_buffers(model, model)
    return config, model.eval().requires_grad_(False)


def layer_config(config: Any, own: Mapping[str, Any]) -> Any:
    """The config of a layer of which config.json says more; its `own` keys go before what is said of all."""
    if not own:
        return config
    new = copy.copy(config)
    for name, value in own.items():
        setattr(new, name, value)
    return new


class _Silent(nn.Module):
    """A sublayer that adds nothing."""

    def __init__(self, attention: int | None):
        super().__init__()
        self.attention = attention  # the number of its layer

    def forward(self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any) -> Any:
        nothing = torch.zeros_like(hidden_states)
        if self.attention is not None and past_key_values is not None:  # which is asked how many positions there were
            past_key_values.update(*[nothing[:, None, :, :1]] * 2, self.attention)
        return nothing if self.attention is None else (nothing, None)


def silence(family: graph.Family, block: nn.Module, skip: Iterable[str], i: int) -> None:
    """Take the sublayers that are skipped out of block i."""
    for group, roles in (("attn", family.attn), *(("mlp", r) for r in family.mlp.values())):
        if graph.SKIPPED[group] in skip:
            setattr(block, graph.root(roles), _Silent(i if group == "attn" else None))


def _differing(family: graph.Family, block: nn.Module, config: Any, i: int) -> nn.Module:
    """A block of the same class for another config, without the sublayers that are skipped there."""
    kind = type(block)
    made: nn.Module = kind(config, layer_idx=i) if "layer_idx" in inspect.signature(kind).parameters else kind(config)
    as_own(family, made, config, {k: getattr(config, k) for k in graph.OWN if hasattr(config, k)}, i)
    return made


def as_own(family: graph.Family, block: nn.Module, config: Any, own: Mapping[str, Any], i: int) -> None:
    """Let block i run as config.json says of it alone: see `graph.OWN`."""
    silence(family, block, own.get("skip", ()), i)
    for norm, (scale, mean) in own.get("offline", {}).items():
        as_offline(family, block, norm, scale, mean)
    if own.get("parallel"):
        as_parallel(family, block, config)


class _Offline(nn.Module):
    """A norm that multiplies every token by the same, whatever its own size is."""

    def __init__(self, norm: Any, scale: float, mean: float, offset: float):
        super().__init__()
        self.weight, self.bias, self.offset = norm.weight, getattr(norm, "bias", None), offset
        self.scale, self.mean = scale, mean
        # Who looks at the block sees that it is another one.
        self.register_buffer("constants", torch.tensor([scale, mean], device="cpu"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = (x - self.mean) * ((self.weight + self.offset) * self.scale)
        return y if self.bias is None else y + self.bias


def as_offline(family: graph.Family, block: nn.Module, norm: str, scale: float, mean: float) -> None:
    """Put constants in place of what a norm of a block finds of every token."""
    setattr(block, norm, _Offline(block.get_submodule(norm), scale, mean, family.norm_offset))


def as_parallel(family: graph.Family, block: nn.Module, config: Any) -> None:
    """Let the MLP of a block that norms what its sublayers are given see what its attention does."""
    seen: dict[str, Tensor] = {}

    def begin(m: nn.Module, args: Any, kwargs: Any) -> None:
        seen["x"] = args[0] if args else kwargs["hidden_states"]

    block.register_forward_pre_hook(begin, with_kwargs=True)
    block.get_submodule(family.between(config)[1]).register_forward_pre_hook(lambda m, args: (seen.pop("x").view(args[0].shape), *args[1:]))
    # Who looks at the block sees that it is another one.
    block.register_buffer("parallel", torch.ones(1, device="cpu"), persistent=False)


class _Rms(nn.LayerNorm):
    """A norm of what has no mean."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return y if self.bias is None else y + self.bias


def _as_rms(model: Any, family: graph.Family) -> None:
    """Let the norms that read the residual stream take no mean off."""
    base, blocks = model.base_model, model.base_model.get_submodule(family.blocks)
    for norm in [base.get_submodule(family.last), *(b.get_submodule(n) for b in blocks for n in family.norms)]:
        if isinstance(norm, _Offline):
            continue
        if not graph.takes_mean(norm):
            raise BadInput(f"its norms take no mean off, and {graph.OURS} says that they need not; remove that")
        norm.__class__ = _Rms


@torch.no_grad()
def _fill_buffers(model: Any, module: nn.Module) -> None:
    """Compute the buffers that are in no file, the way transformers does after loading."""
    for m in module.modules():
        mine = [n for n, b in m.named_buffers(recurse=False) if b.is_meta]
        if not mine:
            continue
        for n in mine:
            b = m.get_buffer(n)
            m._buffers[n] = torch.full(b.shape, torch.nan, dtype=b.dtype) if b.is_floating_point() else torch.zeros(
                b.shape, dtype=b.dtype)
        model._init_weights(m)
        if bad := [n for n in mine if m.get_buffer(n).is_floating_point() and m.get_buffer(n).isnan().any()]:
            raise Failed(f"buffers {bad} of {type(m).__name__} are stored nowhere and transformers does not compute them")


def into(held: dict[str, Tensor], key: str) -> Callable[..., None]:
    """What puts the first tensor it is given there."""
    def put(x: Tensor, *_: Tensor) -> None:
        held[key] = x

    return put


def gate_of(parts: Mapping[str, Tensor], site: Site) -> Gate | None:
    """What the parts, by `<site>:<part>`, say of the site's gate; BadInput that names the site where something of it is missing."""
    try:
        return Gate.among(of_site(parts, site.name))
    except BadInput as e:
        raise BadInput(f"{site.name}: {e}") from None


def _changed(y: Tensor, x: Tensor, changes: list[tuple[Any, Callable[[Tensor], Tensor]]]) -> Tensor:
    """Outputs, some rows of them changed by what is a function of the inputs."""
    y = y.clone()
    for rows, change in changes:
        y[..., rows] += change(x).to(y.dtype)
    return y


def _assign(module: nn.Module, name: str, p: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = p
