"""One GGUF file, which llama.cpp opens: the codes of a trim as they are, everything else in float16, bfloat16 or blocks."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFWriter, LlamaFileType
from torch import Tensor

import trimtab
from trimtab.core.types import BadInput
from trimtab.export.gguf_blocks import LARGE, SMALL, Bytes, Type, as_type, block, exact, fitting, nbytes, of_codes
from trimtab.export.gguf_tokens import add_vocabulary
from trimtab.export.source import Source
from trimtab.methods.codes import Codes
from trimtab.network import graph

FILE = "model.gguf"
TYPES = ("auto", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q6_k")
FAMILIES = {"llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2,
            "qwen3": gguf.MODEL_ARCH.QWEN3}
FILE_TYPES = {Type.F16: LlamaFileType.MOSTLY_F16, Type.BF16: LlamaFileType.MOSTLY_BF16, Type.Q8_0: LlamaFileType.MOSTLY_Q8_0,
              Type.Q4_0: LlamaFileType.MOSTLY_Q4_0, Type.Q4_1: LlamaFileType.MOSTLY_Q4_1, Type.Q6_K: LlamaFileType.MOSTLY_Q6_K}
BIASES = {"qwen3": "", "qwen2": "qkv"}  # roles whose bias the architecture has a place for; llama: every one


@dataclass(frozen=True)
class Entry:
    """A tensor of the file, and what makes its bytes."""

    name: str
    shape: tuple[int, ...]
    type: Type
    make: Callable[[], Bytes]


def write(model: Path, out: Path, *, type: str = "auto") -> dict[str, Any]:
    """Write `out`/model.gguf. Returns `types` (tensors of each), `sites_as_codes`, and warnings.

    `type`: auto leaves codes as they are and rounds nothing else below 16 bits; any other is what every matrix is stored in, as
    llama.cpp's own quantiser has it, and codes that it holds stay as they are. One tensor is in memory at a time.
    """
    source = Source(model)
    c, description = _check(source)
    d = description["layers"][0][0]["head_dim"]
    plan = Plan(source, type, d)
    layers = [_layer(plan, i, sublayers) for i, sublayers in enumerate(description["layers"])]
    plan.matrix("token_embd", description["embedding"])
    plan.vector("output_norm", description["norm"]["weight"])
    if not c["tie_word_embeddings"]:
        plan.matrix("output", f"{description['head']}.weight")
    plan.nothing_left(("lm_head.weight",) if c["tie_word_embeddings"] else ())
    size = source.checkpoint.tensors[source.find(description["embedding"]) or ""].shape[0]

    arch = FAMILIES[source.family.name]
    if any(x != layers[0] for x in layers):
        if arch != gguf.MODEL_ARCH.LLAMA:
            raise BadInput(f"the widths of {source.path} differ from layer to layer, which llama.cpp reads of no {source.family.name}")
        arch = gguf.MODEL_ARCH.DECI  # a llama whose widths are an array
    writer = GGUFWriter(None, gguf.MODEL_ARCH_NAMES[arch])
    context = _context(description)
    _describe(writer, source, description, layers, size, context)
    factors = _add_rope(writer, c, description["layers"][0][0]["rope"], plan.turned)
    warnings = add_vocabulary(writer, source.path, c, size) + plan.warnings()
    if context < description["context"]:
        warnings.append(f"llama.cpp has no sliding window for this family; the file says a context of {context}, the window, within which "
                        "it computes the same")
    if factors is not None:
        plan.entries.append(Entry("rope_freqs.weight", tuple(factors.shape), Type.F32, lambda: as_type(factors, Type.F32, "")))
    matrices = Counter(e.type for e in plan.entries if len(e.shape) == 2)
    writer.add_file_type(FILE_TYPES[matrices.most_common(1)[0][0]])
    if any(block(t) > 1 for t in matrices):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write(writer, out / FILE, plan.entries)
    types = Counter(e.type.name for e in plan.entries)
    return {"types": dict(sorted(types.items())), "sites_as_codes": plan.kept, "warnings": warnings}


def _check(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json with what it leaves out, and its description. BadInput for a model that has no place in the format."""
    family, names = source.family.name, source.config.get("architectures") or ["?"]
    if family not in FAMILIES or not names[0].endswith("ForCausalLM"):
        raise BadInput(f"{source.path} is a {names[0]}; trimtab writes GGUF of language models of {', '.join(FAMILIES)}")
    c, description = graph.completed(source.family, source.config), graph.describe(source.family, source.config)
    if (act := c["hidden_act"]) not in ("silu", "swish"):
        raise BadInput(f"llama.cpp runs {family} with silu, and this model has {act}; --to onnx can express it")
    assert source.family.decoded is not None
    if more := set(source.family.decoded.biases(c)) - set(BIASES.get(family, "qkvogud")):
        raise BadInput(f"llama.cpp has no place for the biases of {', '.join(sorted(more))} in a {family}; --to onnx can express them")
    return c, description


# ---- tensors ----------------------------------------------------------------------------------
class Plan:
    """Which tensors the file has, and of which type each is. `kept`: sites whose codes are stored as they are."""

    def __init__(self, source: Source, asked: str, head_dim: int):
        self.source, self.head_dim = source, head_dim
        self.asked = None if asked == "auto" else Type[asked.upper()]
        self.turned = FAMILIES[source.family.name] == gguf.MODEL_ARCH.LLAMA
        self.entries: list[Entry] = []
        self.kept = 0
        self._used: set[str] = set()
        self._odd: Counter[tuple[Type, Type]] = Counter()
        self._lost: Counter[str] = Counter()
        self._rounded: Counter[Type] = Counter()
        self._factored = 0

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self.source.find(name)
        if stored is None:
            raise BadInput(f"tensor {name} is missing from {self.source.path}; its config.json asks for it")
        return self.source.checkpoint.tensors[stored].shape

    def _add(self, name: str, stored: str, kind: Type, make: Callable[[], Bytes]) -> None:
        self._used.add(self.source.find(stored) or stored)
        self.entries.append(Entry(name, self.shape(stored), kind, make))

    def vector(self, name: str, stored: str, order: Tensor | None = None) -> None:
        """A norm or a bias, in float32."""
        self.shape(stored)

        def make() -> Bytes:
            t = self.source.read(stored)
            return as_type(t if order is None else t[order], Type.F32, stored)

        self._add(name if name.endswith(".bias") else f"{name}.weight", stored, Type.F32, make)

    def matrix(self, name: str, stored: str, site: str = "", order: Tensor | None = None) -> None:
        """A weight [out, in], its rows in another `order`; of a `site`, or the table of embeddings or the head."""
        codes = self.source.codes(site) if site else None
        fits = fitting(codes) if codes is not None else ()
        if codes is not None and fits and (self.asked is None or self.asked in fits):
            kind = self.asked or fits[0]
            self.kept += 1
            self._rounded[kind] += not exact(codes, kind)
            self._add(f"{name}.weight", stored, kind, lambda: of_codes(_rows(self.source.codes(site), order), kind))
            return
        kind = self._type(stored, bool(site))
        if codes is not None:
            self._lost[f"{codes.type} in groups of {codes.group}{' with zero points' * (codes.grid.zeros is not None)}"] += 1
        self._factored += bool(site) and self.source.factors(site) is not None

        def make() -> Bytes:
            t = self.source.read(stored)
            return as_type(t if order is None else t[order], kind, stored)

        self._add(f"{name}.weight", stored, kind, make)

    def _type(self, stored: str, in_block: bool) -> Type:
        """The type of a matrix that is no codes, which may be a wider one than asked for where its rows are no whole blocks."""
        inputs = self.shape(stored)[1]
        dtype = self.source.checkpoint.tensors[self.source.find(stored) or stored].dtype
        kind = self.asked or (Type.BF16 if dtype == torch.bfloat16 else Type.F16)
        if kind in (Type.Q4_0, Type.Q4_1) and not in_block:  # as llama.cpp's quantiser has it: the head and the table lose more
            kind = Type.Q6_K
        was = kind
        if kind == Type.Q6_K and inputs % LARGE:
            kind = Type.Q8_0
        if block(kind) > 1 and inputs % SMALL:
            kind = Type.F16
        self._odd[was, kind] += was != kind
        return kind

    def nothing_left(self, unused: tuple[str, ...]) -> None:
        """BadInput where a stored tensor has no place in the file."""
        known = ("rotary_emb.inv_freq", *unused)
        left = [n for n in self.source.checkpoint.tensors if n not in self._used and not n.endswith(known)]
        if left:
            raise BadInput(f"tensor {left[0]} of {self.source.path} has no place in a GGUF file of a {self.source.family.name}")

    def warnings(self) -> list[str]:
        found = []
        for (was, now), n in self._odd.items():
            if n:
                found.append(f"{n} matrices whose rows are no multiple of {block(was)} are {now.name} in place of {was.name}, which is "
                             "what llama.cpp falls back to")
        for what, n in self._lost.items():
            said = f"rounded a second time, to {self.asked.name}" if self.asked else "stored as ordinary numbers, no smaller"
            found.append(f"{n} layers of codes ({what}) are no codes of {self.asked.name if self.asked else 'GGUF'} and are {said}")
        for kind, n in self._rounded.items():
            if n:
                what = "minima" if kind == Type.Q4_1 else "scales"
                found.append(f"{n} layers of codes have {what} that {kind.name} rounds to float16, by at most 0.05 %")
        if self._factored:
            found.append(f"{self._factored} layers of factors are stored as their product: GGUF has no place for factors")
        return found


def _rows(codes: Codes | None, order: Tensor | None) -> Codes:
    assert codes is not None
    if order is None:
        return codes
    zeros = codes.grid.zeros
    grid = replace(codes.grid, scales=codes.grid.scales[order], zeros=None if zeros is None else zeros[order])
    return replace(codes, codes=codes.codes[order], grid=grid)


def turned(rows: int, head_dim: int) -> Tensor:
    """The order of the rows of q and k where a rotation turns neighbours, [rows]: of each head the first of its first half, the first
    of its second half, the second of its first half, and so on."""
    return torch.arange(rows).view(-1, 2, head_dim // 2).transpose(1, 2).reshape(-1)


def _layer(plan: Plan, i: int, sublayers: list[dict[str, Any]]) -> dict[str, int]:
    """The tensors of a layer; returns its widths."""
    attention, mlp = sublayers
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    rows: dict[str, int] = {}
    for what, group, norm in ((attention, "attn", "attn_norm"), (mlp, "mlp", "ffn_norm")):
        plan.vector(f"blk.{i}.{norm}", what["norm"]["weight"])
        for role in (r for r in names if r in what):
            m = what[role]
            linear, bias = (m["linear"], m.get("bias")) if isinstance(m, Mapping) else (m, None)
            rows[role] = plan.shape(f"{linear}.weight")[0]
            order = turned(rows[role], plan.head_dim) if plan.turned and role in ("q", "k") else None
            plan.matrix(f"blk.{i}.{names[role]}", f"{linear}.weight", f"{i}.{group}.{role}", order)
            if bias:
                plan.vector(f"blk.{i}.{names[role]}.bias", bias, order)
    for role in ("q", "k"):
        if f"{role}_norm" in attention:
            plan.vector(f"blk.{i}.attn_{role}_norm", attention[f"{role}_norm"]["weight"])
    return {"heads": rows["q"] // plan.head_dim, "kv_heads": rows["k"] // plan.head_dim, "inner": rows["up"]}


# ---- what describes them ----------------------------------------------------------------------
def _describe(writer: GGUFWriter, source: Source, description: Mapping[str, Any], layers: list[dict[str, int]], size: int,
              context: int) -> None:
    uneven = any(x != layers[0] for x in layers)

    def each(key: str) -> Any:
        return [x[key] for x in layers] if uneven else layers[0][key]

    d = description["layers"][0][0]["head_dim"]
    made = f"trimtab {trimtab.__version__}" + (f": {said}" if (said := source.notes.get("pipeline")) else "")
    writer.add_type("model")
    writer.add_name(source.path.resolve().name)
    writer.add_description(made)
    writer.add_context_length(context)
    writer.add_embedding_length(description["hidden"])
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(each("inner"))
    writer.add_head_count(each("heads"))
    writer.add_head_count_kv(each("kv_heads"))
    writer.add_key_length(d)
    writer.add_value_length(d)
    writer.add_layer_norm_rms_eps(description["norm"]["eps"])
    writer.add_vocab_size(size)
    writer.add_rope_dimension_count(d)


def _add_rope(writer: GGUFWriter, c: Mapping[str, Any], rope: Mapping[str, Any], divided: bool) -> Tensor | None:
    """Rotary positions; returns what each frequency is divided by, [head_dim / 2] float32, where that says it (and the architecture
    lets them be `divided`). BadInput for what llama.cpp does not compute."""
    given = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    theta = float(given.get("rope_theta") or c.get("rope_theta") or 10000.0)
    kind = given.get("rope_type") or given.get("type") or "default"
    writer.add_rope_freq_base(theta)
    if kind == "default":
        return None
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(given["factor"]))
        return None
    if kind == "yarn" and not given.keys() & {"attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"}:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(given["factor"]))
        writer.add_rope_scaling_orig_ctx_len(given.get("original_max_position_embeddings") or c["max_position_embeddings"])
        return None
    if kind == "llama3" and divided:
        inverse = torch.tensor(rope["inverse_frequencies"], dtype=torch.float32)
        plain = 1.0 / theta ** (torch.arange(0, 2 * len(inverse), 2, dtype=torch.float32) / (2 * len(inverse)))
        return plain / inverse
    raise BadInput(f"llama.cpp has no rotary positions as this config.json asks for ({kind}: {', '.join(sorted(given))}); "
                   "--to onnx can express them")


def _context(description: Mapping[str, Any]) -> int:
    """Positions that the file promises: llama.cpp lets every one of these families see all before it, which is the same within a window."""
    return min([description["context"], *(w for sublayers in description["layers"] if (w := sublayers[0].get("window")))])


def _write(writer: GGUFWriter, path: Path, entries: list[Entry]) -> None:
    for e in entries:
        writer.add_tensor_info(e.name, e.shape, torch.empty(0).numpy().dtype, nbytes(e.type, e.shape), e.type)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for e in entries:
            writer.write_tensor_data(e.make())
    finally:
        writer.close()
