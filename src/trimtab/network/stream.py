"""A network block by block from its files: the real transformers model on the meta device, filled where it is needed."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.types import BadInput, Failed, Site
from trimtab.methods.rounding import ACT, Rounding, cost
from trimtab.methods.terms import Terms, of_site
from trimtab.network import graph
from trimtab.network.checkpoint import PARTS, Checkpoint, SafeFile, finite, not_finite

Sink = Callable[..., None]  # kind, key, *tensors


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
        self.kind = _kind(type(self.model).__name__, self.family)
        base = self.model.base_model
        listed = base.get_submodule(self.family.blocks)
        self._blocks: list[nn.Module] = list(listed)
        self.n_blocks = len(self._blocks)
        self.base = "" if base is self.model else self.model.base_model_prefix + "."
        self._stem = f"{self.base}{self.family.blocks}."
        self._front = tuple(f"{self.base}{p}." for p in self.family.front)
        self._validate()
        self._by_block = [graph.sites(self.family, self.config, b, i) for i, b in enumerate(self._blocks)]
        self.sites = [s for block in self._by_block for s in block]
        self._given: Tensor | None = None
        self._parts: SafeFile | None = None
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] | None = None
        self._mask: Tensor | None = None
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

    def bias_file(self, site: Site) -> str | None:
        """That of the bias of a site that has one."""
        return self.block_file(site.block, graph.bias_of(site) or "") if self.has_bias(site) else None

    def sites_of(self, i: int) -> list[Site]:
        return self._by_block[i]

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
    def tied_head(self) -> bool:
        """Whether the head's weight is the table of embeddings."""
        return self.kind == "lm" and bool(getattr(self.config.get_text_config(), "tie_word_embeddings", False))

    def as_packed(self, module: nn.Module, i: int) -> None:
        """Let the layers of block `i` that are packed in the files run as they are stored; their weights are gone then."""
        from trimtab.runtime.modules import PackedLinear

        stem = f"{self._stem}{i}."
        for name in self.checkpoint.packed:
            if name.startswith(stem):
                at = name.removeprefix(stem)
                owner, _, leaf = at.rpartition(".")
                bias = module.get_submodule(at)._parameters["bias"]
                setattr(module.get_submodule(owner), leaf, PackedLinear(self.checkpoint.linear(name), bias))

    def rounded_parts(self, i: int) -> dict[str, Tensor]:
        """The parts, by `<site>:<part>`, of those sites of block `i` whose inputs are rounded. BadInput where they are not what the
        weights are made of."""
        file = self.checkpoint.path / PARTS
        if self._parts is None and file.exists():
            self._parts = SafeFile(file)
        names = self._parts.names if self._parts is not None else []
        its = {s.name for s in self.sites_of(i) if f"{s.name}:{ACT[0]}" in names}
        found = {n: self._parts.read(n) for n in names if n.rpartition(":")[0] in its} if self._parts is not None else {}
        for s in self.sites_of(i):
            if s.name in its:
                terms = Terms.among(of_site(found, s.name))
                name, dtype = f"{self._stem}{i}.{s.param}", self.stored_dtype(s)
                stored = s.get(self._load(name, self._blocks[i].get_parameter(s.param), {}))
                if terms is None or not torch.equal(terms.weight().to(dtype), stored.to(dtype)):
                    raise BadInput(f"{s.name}: the weights of {self.checkpoint.path} are not those that {PARTS} was written for; "
                                   f"trim the model again, or remove {PARTS} to run the weights as they are")
        return found

    def as_rounded(self, module: nn.Module, i: int, parts: Mapping[str, Tensor]) -> None:
        """Let the sites of block `i` whose `parts`, by `<site>:<part>`, say so meet rounded inputs, as packed layers do."""
        layers: dict[str, list[Site]] = {}
        for s in self.sites_of(i):
            layers.setdefault(s.param, []).append(s)
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

    def _pieces_of(self, site: Site) -> list[graph.Piece]:
        return self._pieces[f"{self._stem}{site.block}.{site.param}"]

    def stored_dtype(self, site: Site) -> torch.dtype:
        """The dtype of the site's weight in the files."""
        mine = [p for p in self._pieces_of(site) if p.expert in (None, site.expert)]
        return self.checkpoint.tensors[mine[0].file].dtype

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
        module = copy.deepcopy(meta, {id(self.config): self.config})  # they ask one config which attention to use
        _fill_buffers(self.model, module)
        for name, p in meta.named_parameters():
            _assign(module, name, self._load(f"{self._stem}{i}.{name}", p, replaced or {}))
        return module.eval()

    def run(self, module: nn.Module, i: int, hidden: Tensor, context: Context) -> Tensor:
        """Hidden states behind block `i`."""
        args, kwargs = context.calls[i]
        self._mask = context.mask
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
                changed.add(self._set_bias(module, v, b / by))
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

    def weight_grad(self, module: nn.Module, site: Site) -> Tensor:
        """The gradient [out, in] of the site; zeros where none arrived."""
        grad = self.param(module, site).grad
        return torch.zeros(site.shape, dtype=self.dtype) if grad is None else site.get(grad)

    def bias(self, module: nn.Module, site: Site) -> Tensor | None:
        """The bias [out] that is added to the site's output, if there is one."""
        b = dict(module.named_parameters()).get(graph.bias_of(site) or "")
        rows = None if site.rows is None else slice(*site.rows) if len(site.rows) == 2 else torch.tensor(site.rows)
        return None if b is None else b.detach()[slice(None) if rows is None else rows].clone()

    def _set_bias(self, module: nn.Module, site: Site, b: Tensor) -> str:
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
        return self._set_bias(module, site, (b.float() + delta).to(self.checkpoint.tensors[file].dtype).to(b.dtype))

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
        "sublayer": key = "attn" or "mlp", the residual stream x, y [tokens, width] before and after; in a parallel block
        both start from the block's input, in a post-norm block the stream is taken behind the norm.
        """
        handles = []
        if "input" in want:
            first = {s.input: s for s in reversed(self.sites_of(i)) if s.expert is None}
            for key, s in first.items():
                handles.append(module.get_submodule(s.param.rpartition(".")[0]).register_forward_pre_hook(
                    lambda m, args, key=key: sink("input", key, self._tokens(args[0])), prepend=True))  # before it is rounded
            stacks = {s.role: s.param for s in self.sites_of(i) if s.expert is not None}
            if stacks:
                handles.append(module.get_submodule(stacks["up"].rpartition(".")[0]).register_forward_pre_hook(
                    lambda m, args, kwargs: self._expert_inputs(m, *args, *kwargs.values(), sink=sink), with_kwargs=True))
        if "sublayer" in want:
            handles += self._sublayer_taps(module, sink)
        try:
            yield
        finally:
            for h in handles:
                h.remove()

    def _tokens(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, x.shape[-1])
        return x if self._mask is None or len(self._mask) != len(x) else x[self._mask]

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

    def _sublayer_taps(self, module: nn.Module, sink: Sink) -> list[Any]:
        how, where = self.family.between(self.config)
        seen: dict[str, Tensor] = {}

        def begin(m: nn.Module, args: Any) -> None:
            seen["x"] = args[0]

        def middle(m: nn.Module, args: Any, out: Any = None) -> None:
            seen["mid"] = args[0] if how == "in" else out[0] if isinstance(out, tuple) else out

        def end(m: nn.Module, args: Any, out: Any) -> None:
            x, mid, y = seen.pop("x"), seen.pop("mid"), out[0] if isinstance(out, tuple) else out
            parallel = how == "parallel"  # there `mid` is attention's contribution alone
            x, attn = self._tokens(x), self._tokens(x + mid if parallel else mid)
            before, y = x if parallel else attn, self._tokens(y - mid if parallel else y)
            sink("sublayer", "attn", x, attn)
            sink("sublayer", "mlp", before, y)

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


def _skeleton(c: Checkpoint, family: graph.Family, dtype: torch.dtype, trust: bool) -> tuple[Any, Any]:
    """(config, model without a byte of weights); what is computed rather than stored (rotary tables) is real."""
    import transformers

    before = torch.get_default_dtype()
    try:
        config = transformers.AutoConfig.from_pretrained(c.path, trust_remote_code=trust)
        for name in ("use_cache", "output_router_logits", "output_hidden_states", "output_attentions"):
            if getattr(config, name, False):
                setattr(config, name, False)
        cls = _model_class(c.config, family)
        torch.set_default_dtype(dtype)
        with torch.device("meta"), torch.no_grad():
            model = cls.from_config(config, trust_remote_code=trust) if cls.__name__.startswith("Auto") else cls(config)
    except Exception as e:  # whatever transformers makes of it, the config is at fault
        why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise BadInput(f"{c.path / 'config.json'} does not describe a model transformers can build: {why}") from None
    finally:
        torch.set_default_dtype(before)
    _fill_buffers(model, model)
    return config, model.eval().requires_grad_(False)


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


def _changed(y: Tensor, x: Tensor, changes: list[tuple[Any, Callable[[Tensor], Tensor]]]) -> Tensor:
    """Outputs, some rows of them changed by what is a function of the inputs."""
    y = y.clone()
    for rows, change in changes:
        y[..., rows] += change(x).to(y.dtype)
    return y


def _assign(module: nn.Module, name: str, p: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = p
