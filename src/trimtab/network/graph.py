"""What is where in each family of networks: a table of declarations, and the few functions that read it.

The only module that knows layer types. A family says where its blocks are, which parameter serves which role, what
the stored names are called, where the residual stream passes between attention and MLP, and what the native decoder
must be told of it.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from trimtab.core.types import BadInput, Site

Roles = dict[str, str]  # role -> module (or parameter) of a block; roles that share one are stacked in it, in this order


@dataclass(frozen=True)
class Decoded:
    """How a family with RMS norms, rotary positions and gated MLPs differs from the others of that shape.

    The functions take a complete config.json; `window` a layer's number too.
    """

    defaults: Mapping[str, Any]                            # what config.json may leave out
    biases: Callable[[Mapping[str, Any]], str]             # letters of the roles that have one: q k v o, g(ate) u(p) d(own)
    window: Callable[[Mapping[str, Any], int], int | None]  # positions a query sees
    head_norms: bool = False                               # q and k are normed head by head


@dataclass(frozen=True)
class Family:
    """One architecture. Paths in `attn`, `mlp`, `norms` and `between` are relative to a block, the others to the base model."""

    name: str                                   # model_type in config.json
    attn: Roles
    mlp: dict[str, Roles]                       # "", "experts" (3-D, a slice an expert), "shared": those a block really has
    norms: tuple[str, ...]                      # modules of a block whose vectors run along the residual channels
    between: Callable[[Any], tuple[str, str]]   # of the config: ("in" | "out" | "parallel", module); see `Network.taps`
    blocks: str = "layers"
    front: tuple[str, ...] = ("embed_tokens",)  # what runs before the first block
    auto: str = "AutoModelForCausalLM"          # the class when config.json names none
    norm_offset: float = 0.0                    # a norm multiplies by its weight plus this
    transposed: bool = False                    # weights are stored [in, out]
    by_head: bool = False                       # q, k, v are stacked within each head
    routers: tuple[str, ...] = ()               # linear maps that choose experts: not sites
    renames: tuple[tuple[str, str], ...] = ()   # (name in the module, name in files): regular expressions, all or none
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # expert parameter -> its files, stacked in this order
    decoded: Decoded | None = None              # None: the native decoder does not run it
    sizes: Mapping[str, str] = field(default_factory=dict)  # where config.json says a size under a name of its own: see SIZES
    last: str = "norm"                          # the norm behind the blocks
    writes: Mapping[str, int] = field(default_factory=dict)  # where norms take a mean off: see `centred`
    free_heads: bool = True                     # config.json may say how wide a head is, so that there can be fewer of them


# What config.json calls how many there are: hidden neurons (of experts, of the shared one), heads, layers, channels.
SIZES = {"neurons": "intermediate_size", "experts": "moe_intermediate_size", "shared": "shared_expert_intermediate_size",
         "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "layers": "num_hidden_layers",
         "width": "hidden_size"}
QKVO = {r: f"self_attn.{r}_proj" for r in "qkvo"}
GATED = {r: f"mlp.{r}_proj" for r in ("gate", "up", "down")}
EXPERTS = {"gate": "mlp.experts.gate_up_proj", "up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}
SHARED = {r: f"mlp.shared_expert.{r}_proj" for r in ("gate", "up", "down")}
TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
QWEN_SPLIT = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
    "mlp.experts.down_proj": ("mlp.experts.{e}.down_proj.weight",),
}
MIXTRAL_SPLIT = {
    "mlp.experts.gate_up_proj": ("block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight"),
    "mlp.experts.down_proj": ("block_sparse_moe.experts.{e}.w2.weight",),
}


def _before(norm: str) -> Callable[[Any], tuple[str, str]]:
    """Pre-norm: the stream between the sublayers is what this norm reads."""
    return lambda config: ("in", norm)


def _llama_like(name: str, **other: Any) -> Family:
    common: dict[str, Any] = {"attn": QKVO, "mlp": {"": GATED}, "norms": TWO_NORMS, "between": _before(TWO_NORMS[1])}
    return Family(name, **common | other)


def _later_layers(config: Mapping[str, Any], i: int) -> int | None:
    """Qwen: a window where `use_sliding_window` is on, in the layers that are named or in the last ones."""
    kinds = config.get("layer_types")
    slides = kinds[i] == "sliding_attention" if kinds else i >= config["max_window_layers"]
    return config["sliding_window"] if config["use_sliding_window"] and slides else None


DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False}
QWEN = {**DEFAULTS, "num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False,
        "sliding_window": 4096, "max_window_layers": 28}
LLAMA_DECODED = Decoded(
    {**DEFAULTS, "max_position_embeddings": 2048, "mlp_bias": False}, window=lambda c, i: None,
    biases=lambda c: ("qkvo" if c["attention_bias"] else "") + ("gud" if c["mlp_bias"] else ""))
MISTRAL_DECODED = Decoded(
    {**DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    window=lambda c, i: c["sliding_window"], biases=lambda c: "")
QWEN2_DECODED = Decoded(QWEN, window=_later_layers, biases=lambda c: "qkv")
QWEN3_DECODED = Decoded({**QWEN, "head_dim": 128}, window=_later_layers, biases=lambda c: "qkvo" if c["attention_bias"] else "",
                        head_norms=True)

FAMILIES = {f.name: f for f in (
    _llama_like("llama", decoded=LLAMA_DECODED),
    _llama_like("mistral", decoded=MISTRAL_DECODED),
    _llama_like("qwen2", decoded=QWEN2_DECODED),
    _llama_like("qwen3", decoded=QWEN3_DECODED),
    *(_llama_like(n, norms=FOUR_NORMS, between=_before(FOUR_NORMS[2]), norm_offset=1.0) for n in ("gemma2", "gemma3_text")),
    _llama_like("phi3", attn={**dict.fromkeys("qkv", "self_attn.qkv_proj"), "o": "self_attn.o_proj"},
                mlp={"": {"gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj", "down": "mlp.down_proj"}}),
    _llama_like("mixtral", mlp={"experts": EXPERTS}, routers=("mlp.gate",), split=MIXTRAL_SPLIT,
                renames=((r"\.mlp\.", ".block_sparse_moe."),)),
    _llama_like("qwen2_moe", mlp={"": GATED, "experts": EXPERTS, "shared": SHARED}, split=QWEN_SPLIT,
                routers=("mlp.gate", "mlp.shared_expert_gate")),
    _llama_like("qwen3_moe", mlp={"": GATED, "experts": EXPERTS}, split=QWEN_SPLIT, routers=("mlp.gate",)),
    Family("opt", attn={**QKVO, "o": "self_attn.out_proj"}, mlp={"": {"up": "fc1", "down": "fc2"}},
           norms=("self_attn_layer_norm", "final_layer_norm"), blocks="decoder.layers", sizes={"neurons": "ffn_dim"}, free_heads=False,
           front=("decoder.embed_tokens", "decoder.embed_positions", "decoder.project_in"), last="decoder.final_layer_norm",
           writes={"decoder.embed_tokens.weight": 1, "decoder.embed_positions.weight": 1, "decoder.project_in.weight": 0},
           between=lambda c: ("in", "final_layer_norm") if c.do_layer_norm_before else ("out", "self_attn_layer_norm")),
    Family("gpt2", attn={**dict.fromkeys("qkv", "attn.c_attn"), "o": "attn.c_proj"},
           mlp={"": {"up": "mlp.c_fc", "down": "mlp.c_proj"}}, norms=("ln_1", "ln_2"), between=_before("ln_2"), blocks="h",
           front=("wte", "wpe"), transposed=True, free_heads=False, last="ln_f", writes={"wte.weight": 1, "wpe.weight": 1},
           sizes={"neurons": "n_inner", "layers": "n_layer", "heads": "n_head", "width": "n_embd"}),
    Family("gpt_neox", attn={**dict.fromkeys("qkv", "attention.query_key_value"), "o": "attention.dense"},
           mlp={"": {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}}, norms=TWO_NORMS, by_head=True, free_heads=False,
           between=lambda c: ("parallel", "attention") if c.use_parallel_residual else ("in", TWO_NORMS[1]),
           front=("embed_in",), renames=((r"^lm_head\.", "embed_out."),), last="final_layer_norm", writes={"embed_in.weight": 1}),
    Family("bert", attn={"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
                         "o": "attention.output.dense"},
           mlp={"": {"up": "intermediate.dense", "down": "output.dense"}},
           norms=("attention.output.LayerNorm", "output.LayerNorm"), blocks="encoder.layer", front=("embeddings",), free_heads=False,
           between=lambda c: ("out", "attention.output.LayerNorm"), auto="AutoModel",
           renames=((r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta"))),
    Family("vit", attn={r: f"attention.{r}_proj" for r in "qkvo"}, mlp={"": {"up": "mlp.fc1", "down": "mlp.fc2"}},
           norms=("layernorm_before", "layernorm_after"), between=_before("layernorm_after"), front=("embeddings",),
           auto="AutoModel", free_heads=False, last="layernorm",
           writes={"embeddings.patch_embeddings.projection.weight": 0, "embeddings.patch_embeddings.projection.bias": 0,
                   "embeddings.cls_token": 2, "embeddings.position_embeddings": 2, "embeddings.mask_token": 2},
           renames=((r"(^|\.)layers\.", r"\1encoder.layer."), (r"attention\.q_proj", "attention.attention.query"),
                    (r"attention\.k_proj", "attention.attention.key"), (r"attention\.v_proj", "attention.attention.value"),
                    (r"attention\.o_proj", "attention.output.dense"), (r"mlp\.fc1", "intermediate.dense"),
                    (r"mlp\.fc2", "output.dense"))),
)}


def family_of(config: dict[str, Any], where: Any = "config.json") -> Family:
    """The declaration for a config.json; BadInput lists what was found and what is supported."""
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise BadInput(f"{where}: architectures is {names!r}; it is a list of names")
    if not isinstance(found := config.get("model_type"), str) or found not in FAMILIES:
        raise BadInput(f"{where}: model_type {found!r} (architectures {config.get('architectures')}) is not supported; "
                       f"trimtab knows {', '.join(sorted(FAMILIES))}")
    return FAMILIES[found]


# ---- layers that differ -------------------------------------------------------------------------
PER_LAYER = "per_layer_config"  # of config.json: {layer: what of it is another there}, as transformers has it
# What is said of single layers and never of all. `parallel`: the MLP is given what attention is; `offline`: of norms, by name, what every
# token is multiplied by in place of its own size, and what is taken off it before.
OWN = ("skip", "parallel", "offline")
SKIPPED = {"attn": "attention", "mlp": "mlp"}  # sublayers, as a layer's `skip` names them


def per_layer(config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What a config.json says of single layers, by number; `skip` lists the sublayers that a layer lacks: see OWN."""
    given = config.get(PER_LAYER) or {}
    try:
        found = {int(i): dict(own) for i, own in given.items()}
        for own in found.values():
            numbers = [x for pair in own.get("offline", {}).values() for x in pair]
            if not set(own.get("skip", ())) <= set(SKIPPED.values()) or type(own.get("parallel", True)) is not bool \
                    or not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
                raise ValueError
    except (TypeError, ValueError, AttributeError):
        raise BadInput(f"config.json: {PER_LAYER} is no mapping of layers to what is another there; save the model again") from None
    return found


OURS = "trimtab"  # of config.json: what our runtime computes otherwise, and others leave as it is


def ours(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says to our runtime alone. `norms`: "rms", where the residual stream has no mean to take off."""
    found = config.get(OURS) or {}
    if not isinstance(found, Mapping) or found.get("norms", "rms") != "rms":
        raise BadInput(f"config.json: {OURS} says nothing that this trimtab knows; update trimtab, or remove it to run what others run")
    return dict(found)


def beyond(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says more than transformers reads."""
    return bool(per_layer(config) or ours(config))


def norms_in_front(family: Family, config: Any) -> dict[str, str]:
    """The norms of a block that make what its sublayers are given, by their group; none where norms lie behind them."""
    how, where = family.between(config)
    return {} if how == "out" else {"attn": family.norms[0], "mlp": where if how == "in" else family.norms[1]}


def eps_of(norm: nn.Module) -> float:
    """What a norm adds to a mean square."""
    return float(getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0)))


def takes_mean(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm


def size_key(family: Family, what: str) -> str:
    """What config.json calls this size: see SIZES."""
    return family.sizes.get(what, SIZES[what])


def between(family: Family, config: Any) -> tuple[str, str]:
    """The family's, of a layer's own config."""
    return ("parallel", root(family.attn)) if getattr(config, "parallel", False) else family.between(config)


def root(roles: Roles) -> str:
    """The module of a block that holds all of a sublayer, "" where it lies loose in the block."""
    stems = {path.partition(".")[0] for path in roles.values() if "." in path}
    return stems.pop() if len(stems) == 1 and all("." in path for path in roles.values()) else ""


def can_skip(family: Family, config: Any) -> bool:
    """Whether a layer without one of its sublayers is still a layer: what that would add is zero, and all of it is one module."""
    return family.between(config)[0] == "in" and bool(root(family.attn)) and all(root(r) for r in family.mlp.values()) \
        and not family.transposed


# ---- experts ----------------------------------------------------------------------------------
# Families of the same blocks but for experts in place of the MLP: (without an expert that every token meets, with one).
SPARSE = {"llama": ("mixtral", "qwen2_moe"), "mistral": ("mixtral", "qwen2_moe"), "qwen2": ("", "qwen2_moe"), "qwen3": ("qwen3_moe", "")}
ARCHITECTURES = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
# What a config says that both have, and that each may leave out where it is what its own class would say.
COMMON = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps",
          "max_position_embeddings", "initializer_range", "attention_dropout", "tie_word_embeddings", "bos_token_id", "eos_token_id",
          "pad_token_id")


def sparse(family: Family, config: Any, shared: bool) -> Family:
    """The family that a dense one becomes with experts, `shared` where every token meets one of them. BadInput where there is none."""
    if family.name not in SPARSE:
        raise BadInput(f"no family has the blocks of a {family.name} with experts in them; there is one for {', '.join(sorted(SPARSE))}")
    name = SPARSE[family.name][shared]
    if not name:
        how = "none that every token meets: leave always out" if shared else \
            "one that every token meets: use always=1 or more, where a method has it"
        raise BadInput(f"a {family.name} with experts is a {SPARSE[family.name][not shared]}, which has {how}")
    h, _, d = heads(config)
    if biased := [k for k in ("attention_bias", "mlp_bias") if getattr(config, k, False) and (name, k) != ("qwen3_moe", "attention_bias")]:
        raise BadInput(f"config.json says {biased[0]}, and a {name}, which this {family.name} would become, has no such biases")
    slides = getattr(config, "sliding_window", None) if family.name == "mistral" else "sliding_attention" in (
        getattr(config, "layer_types", None) or ())
    if name != "mixtral" and slides:
        raise BadInput(f"this {family.name} slides a window, and not every program that runs a {name} does; "
                       + ("leave always out" if family.name == "mistral" else "take one with use_sliding_window off"))
    if name == "qwen2_moe" and h * d != config.hidden_size:
        raise BadInput(f"the heads of a {name} are as wide as their number divides the model, and {h} of {d} are {h * d} of "
                       f"{config.hidden_size} here" + ("; leave always out" if SPARSE[family.name][0] else ""))
    return FAMILIES[name]


def sparse_config(family: Family, config: Any, said: Mapping[str, Any], experts: int, size: int, active: int,
                  shared: int) -> dict[str, Any]:
    """The config.json of `family` for a dense network of `config`, as its files have `said` it: so many experts of `size` hidden neurons,
    of which a token meets `active`, and one of `shared` that all meet."""
    own = ("attention_bias", "mlp_bias", "pretraining_tp", "intermediate_size", "layer_types", "use_sliding_window", "sliding_window",
           "max_window_layers", "head_dim", "num_experts")
    new = {k: v for k, v in said.items() if k not in own} | {k: getattr(config, k) for k in COMMON if hasattr(config, k)}
    if "rope_parameters" not in new:
        new["rope_theta"] = config.rope_parameters["rope_theta"]
    new |= {"model_type": family.name, "architectures": [ARCHITECTURES[family.name]], "num_experts_per_tok": active,
            "output_router_logits": False}
    if family.name == "mixtral":
        return new | {"head_dim": heads(config)[2], "sliding_window": getattr(config, "sliding_window", None), "intermediate_size": size,
                      "num_local_experts": experts}
    new |= {"intermediate_size": config.intermediate_size, "moe_intermediate_size": size, "num_experts": experts, "norm_topk_prob": True,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False}
    if family.name == "qwen2_moe":
        return new | {"shared_expert_intermediate_size": shared}
    return new | {"head_dim": heads(config)[2], "attention_bias": config.attention_bias}


# ---- sites ------------------------------------------------------------------------------------
def heads(config: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads, width of a head."""
    h = config.num_attention_heads
    return h, getattr(config, "num_key_value_heads", None) or h, getattr(config, "head_dim", None) or config.hidden_size // h


def _slices(family: Family, roles: list[str], total: int, config: Any) -> dict[str, tuple[int, ...] | None]:
    """Rows of a stacked parameter that belong to each role."""
    if len(roles) == 1:
        return {roles[0]: None}
    h, kv, d = heads(config)
    if family.by_head and "q" in roles:
        return {r: tuple(n * 3 * d + j * d + k for n in range(h) for k in range(d)) for j, r in enumerate(roles)}
    sizes = [h * d, kv * d, kv * d] if roles == ["q", "k", "v"] else [total // len(roles)] * len(roles)
    ends = [sum(sizes[:j + 1]) for j in range(len(roles))]
    return {r: (end - size, end) for r, size, end in zip(roles, sizes, ends, strict=True)}


def sites(family: Family, config: Any, block: nn.Module, i: int) -> list[Site]:
    """The linear maps of block `i`, whose parameters (on any device, meta too) tell the shapes."""
    params = dict(block.named_parameters())
    found: list[Site] = []

    def add(group: str, stem: str, roles: Roles, feed: str, expert: int | None = None) -> None:
        for at in dict.fromkeys(roles.values()):
            mine = [r for r in roles if roles[r] == at]
            param = at if at in params else f"{at}.weight"
            if param not in params:
                return
            shape = tuple(params[param].shape[-2:])
            rows, width = shape[::-1] if family.transposed else shape
            for role, part in _slices(family, mine, rows, config).items():
                size = rows if part is None else part[1] - part[0] if len(part) == 2 else len(part)
                found.append(Site(
                    name=f"{stem}.{role}", block=i, group=group, role=role, param=param, shape=(size, width), expert=expert,
                    input=f"{feed}{group}.{'mid' if role in ('o', 'down') else 'in'}", transposed=family.transposed, rows=part,
                    consumer=f"{stem}.down" if role in ("gate", "up") else None))

    add("attn", f"{i}.attn", family.attn, "")
    for kind, roles in family.mlp.items():
        if kind == "experts":
            stack = params.get(roles["down"])
            for e in range(0 if stack is None else len(stack)):
                add("mlp", f"{i}.mlp.experts.{e}", roles, f"experts.{e}.", e)
        else:
            add("mlp", f"{i}.mlp.{kind}" if kind else f"{i}.mlp", roles, "")
    return found


def bias_of(site: Site) -> str | None:
    """Name of the bias that belongs to a site, if its module has one; it has the site's rows."""
    return site.param.removesuffix("weight") + "bias" if site.param.endswith(".weight") else None


# ---- stored names -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Piece:
    """A stored tensor that makes up a parameter: all of it, or `param[expert]`, or `rows` (begin, end) of that."""

    file: str
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def of(self, param: Any) -> Any:
        """The view of the parameter that is stored under this name."""
        view = param if self.expert is None else param[self.expert]
        return view if self.rows is None else view[slice(*self.rows)]


def param_to_files(family: Family, name: str, shape: tuple[int, ...], stored: Iterable[str], base: str) -> list[Piece]:
    """Which of the `stored` names hold parameter `name` of the model; empty when they do not.

    With or without the base model's prefix `base`, under the module's names or the family's older ones, experts stacked
    or one by one: whatever the checkpoint really holds.
    """
    stored = stored if isinstance(stored, Mapping | set | frozenset) else set(stored)

    def find(n: str) -> str | None:
        return next((c for c in (n, n.removeprefix(base + "."), f"{base}.{n}") if c in stored), None)

    old = name
    for pattern, to in family.renames:
        old = re.sub(pattern, to, old)
    for n in dict.fromkeys((name, old)):
        if file := find(n):
            return [Piece(file, shape)]
    for suffix, templates in family.split.items():
        if name.endswith("." + suffix):
            step = shape[1] // len(templates)
            cut = [None] if len(templates) == 1 else [(j * step, (j + 1) * step) for j in range(len(templates))]
            pieces = [(find(name.removesuffix(suffix) + t.format(e=e)), e, rows)
                      for e in range(shape[0]) for t, rows in zip(templates, cut, strict=True)]
            if all(file for file, _, _ in pieces):
                return [Piece(str(file), (step, shape[2]), e, rows) for file, e, rows in pieces]
    return []


def files_of(family: Family, name: str, shape: tuple[int, ...], old: bool) -> list[Piece]:
    """The stored tensors that parameter `name` of the model is written as; `old`: under the family's older names, experts one by one."""
    for suffix, templates in family.split.items() if old else ():
        if name.endswith("." + suffix):
            step = shape[1] // len(templates)
            return [Piece(name.removesuffix(suffix) + t.format(e=e), (step, shape[2]), e,
                          None if len(templates) == 1 else (j * step, (j + 1) * step))
                    for e in range(shape[0]) for j, t in enumerate(templates)]
    for pattern, to in family.renames if old else ():
        name = re.sub(pattern, to, name)
    return [Piece(name, shape)]


# ---- coupled dimensions -----------------------------------------------------------------------
@dataclass(frozen=True)
class Member:
    """Unit u of a group takes indices u * size to (u + 1) * size of a site's rows ("out", its bias too) or columns ("in"),
    or of a norm's vectors ("norm")."""

    name: str
    side: str
    size: int

    def at(self, unit: int) -> slice:
        return slice(unit * self.size, (unit + 1) * self.size)


@dataclass(frozen=True)
class Group:
    """Dimensions that stand or fall together: `count` units of one kind: neuron, head, kvgroup or residual."""

    kind: str
    name: str
    count: int
    members: tuple[Member, ...]


def coupled(family: Family, config: Any, block: list[Site]) -> list[Group]:
    """The groups of one block, given its sites. Residual channels go on through every block, the embeddings and the head."""
    groups = []
    for down in (s for s in block if s.role == "down"):
        feeders = tuple(Member(s.name, "out", 1) for s in block if s.consumer == down.name)
        groups.append(Group("neuron", down.name.removesuffix(".down"), down.shape[1], (*feeders, Member(down.name, "in", 1))))
    h, kv, d = heads(config)
    attn = {s.role: s.name for s in block if s.group == "attn"}
    if attn and h != kv:
        groups.append(Group("head", f"{block[0].block}.attn", h, (Member(attn["q"], "out", d), Member(attn["o"], "in", d))))
    if attn:
        groups.append(Group("kvgroup" if h != kv else "head", f"{block[0].block}.attn", kv, (
            Member(attn["q"], "out", h // kv * d), Member(attn["k"], "out", d), Member(attn["v"], "out", d),
            Member(attn["o"], "in", h // kv * d))))
    channels = tuple(Member(s.name, "out" if s.role in ("o", "down") else "in", 1) for s in block)
    groups.append(Group("residual", str(block[0].block), config.hidden_size,
                        channels + tuple(Member(n, "norm", 1) for n in family.norms)))
    return groups


# ---- activations ------------------------------------------------------------------------------
def _activation_name(config: Any) -> str:
    known = ("hidden_activation", "hidden_act", "activation_function")
    return next((str(getattr(config, k)) for k in known if getattr(config, k, None)), "")


def activation(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What stands between the two halves of an MLP, as transformers has it."""
    from transformers.activations import ACT2FN

    found: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[_activation_name(config)]
    return found


def stops_negatives(config: Any) -> bool:
    """Whether the activation makes exact zeros of what is below zero, as the ReLU family does."""
    return not bool(activation(config)(torch.tensor([-8.0, -1.0, -0.1])).any())


# ---- scales -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fold:
    """Where a scale of some sites' common input can go: it multiplies the columns of the `readers`, and divides what makes the input,
    a `norm` (module of the block) or the rows of the `writer`.

    Input c comes from row `rows[c]` of the writer, more than one from the same where heads share their values; empty: each from its own.
    """

    readers: tuple[Site, ...]
    norm: str = ""
    writer: Site | None = None
    rows: tuple[int, ...] = ()


def folds(family: Family, config: Any, block: list[Site]) -> list[Fold]:
    """Every place of a block where an input can be scaled and nothing else sees it."""
    found = []
    for group, norm in norms_in_front(family, config).items():
        key = f"{group}.in"
        readers = tuple(s for s in block if s.input == key)
        alone = key == "attn.in" or not (family.routers or any(s.input.endswith(key) and s.input != key for s in block))
        if readers and alone:
            found.append(Fold(readers, norm))
    h, kv, d = heads(config)
    v, o = (next((s for s in block if s.group == "attn" and s.role == r), None) for r in "vo")
    if v and o and v.shape[0] == kv * d and o.shape[1] == h * d:
        found.append(Fold((o,), writer=v, rows=tuple(n // (h // kv) * d + c for n in range(h) for c in range(d))))
    for down in (s for s in block if s.role == "down"):
        feeders = {s.role: s for s in block if s.consumer == down.name}
        act = _activation_name(config)
        if "gate" in feeders or act == "relu":  # a gate's other half, and relu, pass a positive factor on
            found.append(Fold((down,), writer=feeders["up"]))
    return found


# ---- rotations --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stream:
    """Who meets the residual stream of a network, where all of it may be turned: every reader behind a norm that commutes with a turn but
    for its weight. `norms`: that of a block by the input that it makes; `last`: the one behind the blocks."""

    norms: Mapping[str, str]
    last: str = "norm"


def stream(family: Family) -> Stream | None:
    """None for a family in which something else meets the stream: norms that take the mean off, or lie behind a sublayer, routers."""
    return Stream({"attn.in": family.norms[0], "mlp.in": family.norms[1]}, family.last) if family.decoded else None


def centred(family: Family, config: Any, base: nn.Module) -> dict[str, int]:
    """The parameters outside the blocks that write the residual stream, by name in the base model, and their dimension that has its
    channels: of a family in which nothing but norms that take its mean off reads it. Empty for all others."""
    params, modules = dict(base.named_parameters()), dict(base.named_modules())
    if family.between(config)[0] == "out" or type(modules.get(family.last)) is not nn.LayerNorm:
        return {}
    width = int(config.hidden_size)  # a table of other channels is not what writes it
    return {n: dim for n, dim in family.writes.items() if n in params and params[n].shape[dim] == width}


# ---- the native decoder -----------------------------------------------------------------------
DESCRIPTION = 1  # version of what `describe` returns
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu"}


def completed(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with what it leaves out; BadInput for a family the native decoder does not run."""
    if family.decoded is None:
        runs = ", ".join(sorted(f.name for f in FAMILIES.values() if f.decoded))
        raise BadInput(f"the native decoder runs {runs}, not {family.name}")
    return {**family.decoded.defaults, **config}


def describe(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the native decoder executes for a config.json of this family: plain data, every map and tensor by name.

    Linear maps are named by their module, tensors by their stored name. BadInput for a family or an option it does not run.
    """
    c = completed(family, config)
    try:
        return _description(family, c)
    except (AttributeError, KeyError, TypeError) as e:
        raise BadInput(f"config.json of a {family.name} lacks something or holds what is no number ({e}); save the model again") from None


def _description(family: Family, c: dict[str, Any]) -> dict[str, Any]:
    decoded = family.decoded
    assert decoded is not None
    if (act := c["hidden_act"]) not in ACTIVATIONS:
        raise BadInput(f"the native decoder has no activation {act!r}; it has {', '.join(sorted(ACTIVATIONS))}")
    biases, own = decoded.biases(c), per_layer(c)
    layers = []
    for i in range(c["num_hidden_layers"]):
        mine = {**c, **own.get(i, {})}
        if mine.get("parallel"):
            raise BadInput("the native decoder runs attention and MLP one after the other, and some layers here are parallel")
        if mine.get("offline"):
            raise BadInput("the native decoder norms every token by its own size, and some norms here have a constant in its place")
        h, kv, d = heads(SimpleNamespace(**mine))
        stem = f"model.{family.blocks}.{i}."

        def norm(name: str, stem: str = stem) -> dict[str, Any]:
            return {"op": "rms", "weight": f"{stem}{name}.weight", "eps": c["rms_norm_eps"]}

        def maps(roles: Roles, stem: str = stem) -> dict[str, Any]:
            return {r: {"linear": stem + path, "bias": f"{stem}{path}.bias"} if r[0] in biases else stem + path
                    for r, path in roles.items()}

        attention = {"op": "attention", "norm": norm(family.norms[0]), **maps(family.attn), "heads": h, "kv_heads": kv, "head_dim": d,
                     "rope": _rope(c, d)}
        if decoded.head_norms:
            attention |= {"q_norm": norm("self_attn.q_norm"), "k_norm": norm("self_attn.k_norm")}
        if window := decoded.window(c, i):
            attention["window"] = window
        mlp = {"op": "mlp", "norm": norm(family.norms[1]), **maps(family.mlp[""]), "activation": ACTIVATIONS[act]}
        skip = mine.get("skip", ())
        layers.append([*([] if SKIPPED["attn"] in skip else [attention]), *([] if SKIPPED["mlp"] in skip else [mlp])])
    return {"version": DESCRIPTION, "context": c["max_position_embeddings"], "hidden": c["hidden_size"], "vocabulary": c["vocab_size"],
            "embedding": f"model.{family.front[0]}.weight", "layers": layers,
            "norm": {"op": "rms", "weight": "model.norm.weight", "eps": c["rms_norm_eps"]}, "head": "lm_head"}


def _rope(c: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """Rotary frequencies, as transformers computes them when it builds the model."""
    given = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    given.setdefault("rope_theta", c.get("rope_theta") or 10000.0)
    kind = given.setdefault("rope_type", given.get("type", "default"))
    if kind == "default":
        inverse, scaling = 1.0 / given["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim), 1.0
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if kind not in (known := ("dynamic", "linear", "llama3", "yarn")):
            raise BadInput(f"the native decoder has no rotary positions of type {kind!r}; it has default, {', '.join(known)}")
        if kind in ("llama3", "yarn"):
            given.setdefault("original_max_position_embeddings", c.get("original_max_position_embeddings") or c["max_position_embeddings"])
        inverse, scaling = ROPE_INIT_FUNCTIONS[kind](SimpleNamespace(**{
            **c, "rope_parameters": given, "head_dim": dim, "standardize_rope_params": lambda: None}))
    return {"inverse_frequencies": inverse.tolist(), "scaling": float(scaling), "style": "half"}
