"""Codes of 4 and 8 bits, whole numbers or float8, in the layout of compressed-tensors, which transformers and vLLM open.

A layer of `pack-quantized` is `weight_packed` int32 [out, in * bits / 32], the first code in the lowest bits, `weight_scale` [out,
groups], `weight_shape` int64 [2] and, of asymmetric codes, `weight_zero_point` int32 [out * bits / 32, groups], packed along the
outputs; one of `int-quantized` or `float-quantized` is `weight` int8 or float8 (e4m3) [out, in] and `weight_scale` [out, 1], and
`input_scale` [1] where inputs have one step. Codes and zero points count from 0 where they
are packed, and from -2^(bits - 1) where they are int8.

Scales are float32. Where all layers have one scheme and only weights are rounded, the quantization_config says `dequantize`:
transformers then decodes in the type of the scales, so that a model in bfloat16 has the weights of the plain directory to the bit.
Otherwise it rounds the scales to the model's type first, and cannot open packed zero points (5.23 with compressed-tensors 0.20); it
knows one scheme only where it decodes (the first).
"""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core import pack
from trimtab.core.journal import sync, write_json
from trimtab.core.line import file_digest
from trimtab.core.spec import Step
from trimtab.core.types import BadInput, Site
from trimtab.methods.codes import Codes, e4m3_step
from trimtab.methods.entrywise import FIRST
from trimtab.methods.rounding import ACT, Rounding
from trimtab.methods.terms import ALONE
from trimtab.network.checkpoint import NOT_JSON, PARTS, Checkpoint, SafeFile, copy_others, write_sharded
from trimtab.network.stream import Layer, Network

TYPES = ("auto", "w8a8", "fp8")
OWN = ("config.json", "trimtab.json", "README.md")  # what they say of the weights is no longer so
RIGHT = "rtn(bits=4,group=128), gptq or awq would do"
# The sites that servers run as one map, of which each has its own weight in some families.
TOGETHER = (("q", "k", "v"), ("gate", "up"))


@dataclass(frozen=True)
class Scheme:
    """How weights were rounded: `group` inputs share a scale, 0: the row; activations in as many bits, 16: not at all, by the token or by
    one `static` scale."""

    bits: int
    symmetric: bool
    group: int
    activations: int
    static: bool = False
    floating: bool = False

    @property
    def format(self) -> str:
        return "float-quantized" if self.floating else "int-quantized" if self.activations == 8 else "pack-quantized"

    def data(self, targets: list[str]) -> dict[str, Any]:
        """As a group of the quantization_config."""
        common = {"type": "float" if self.floating else "int", "dynamic": False}
        grouped = {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel", "group_size": None}
        met = {**common, "num_bits": 8, "symmetric": True, "strategy": "tensor" if self.static else "token", "group_size": None,
               "dynamic": not self.static}
        return {"targets": targets, "format": self.format, "output_activations": None,
                "weights": {**common, "num_bits": self.bits, "symmetric": self.symmetric, **grouped},
                "input_activations": met if self.activations == 8 else None}

    def __str__(self) -> str:
        kind = "of e4m3 " if self.floating else "" if self.symmetric else "asymmetric "
        return f"{self.bits} bits {kind}in {f'groups of {self.group}' if self.group else 'rows'}"


def write(model: Path, out: Path, *, type: str = "auto") -> dict[str, Any]:
    """Fill the directory `out` with a compressed-tensors checkpoint of `model`, which trimtab trimmed without --pack.

    `type`: auto, activations are rounded where the recipe says so (token or static, 8 bits); w8a8 or fp8, they are, to int8 or float8
    token by token as the model runs; all for symmetric codes of 8 bits by rows, whole numbers or for fp8 those of float8. Returns what
    was written: format, schemes by name, quantized and ignored (counts of layers), bytes. BadInput where the directory is no such one,
    its weights are no longer those of its parts, or a site has what the format does not hold.
    """
    c = Checkpoint.open(Path(model))
    parts = parts_of(c)
    net = Network(c)
    codes = reader(net, parts)
    layers = {x.name: x for x in quantized(net, parts)}
    sides = {name: _sides(x, codes(x)) for name, x in layers.items()}
    roundings = {name: met(x, parts) or (Rounding(8) if type != "auto" else None) for name, x in layers.items()}
    proper = {group for group, inputs, *_ in sides.values() if group < inputs}
    schemes: dict[str, Scheme] = {}
    for name, (group, inputs, bits, symmetric, floating) in sides.items():
        site, r = layers[name].sites[0].name, roundings[name]
        activations, static = 16 if r is None else r.bits, r is not None and r.scale is not None
        scheme = Scheme(bits, symmetric, group if group < inputs or group in proper else 0, activations, static, floating)
        if inputs % group:
            raise BadInput(f"{site}: groups of {group} do not divide its {inputs} inputs, as compressed-tensors wants it; use a group that "
                           "does, or group=0, the row")
        if activations not in (8, 16):
            raise BadInput(f"{site}: its inputs are rounded to {activations} bits, and those of compressed-tensors here have 8; token or "
                           "static would do")
        if floating and (scheme.group or met(layers[name], parts) is not None):
            whole = "" if scheme.group else ", and inputs rounded to whole numbers"
            raise BadInput(f"{site}: it has {scheme}{whole}, and float8 layers have rows and, with --type fp8, inputs in float8; "
                           "fp(bits=8,exponent=4,group=0) | rtn would do")
        if activations == 8 and (bits, symmetric, scheme.group, floating) != (8, True, 0, type == "fp8"):
            raise BadInput(f"{site}: activations of 8 bits go with symmetric weights of 8 bits by rows, of float8 with --type fp8, and it "
                           f"has {scheme}; {'fp(bits=8,exponent=4,group=0) | rtn' if type == 'fp8' else 'rtn(bits=8,group=0)'} would do")
        schemes[name] = scheme
    alike(net, layers, schemes)
    if len(set(schemes.values())) > 1 and (odd := next((name for name, x in schemes.items() if not x.symmetric), None)):
        raise BadInput(f"{layers[odd].sites[0].name}: it has {schemes[odd]}, others have other schemes, and transformers opens zero points "
                       "only where all layers have one; quantise all alike, or without asymmetric=true")

    made = lru_cache(maxsize=1)(lambda name: tensors(codes(layers[name]), schemes[name], roundings[name]))
    whose = {f"{_stem(x)}.{k}": (name, k) for name, x in layers.items() for k in made(name)}
    gone = {x.file for x in layers.values()}
    entries = {n: (e.dtype, e.shape) for n, e in c.tensors.items() if n not in gone}
    entries |= {full: (t.dtype, tuple(t.shape)) for full, (name, k) in whose.items() for t in (made(name)[k],)}

    def tensor(full: str) -> Tensor:
        if full not in whose:
            return c.read(full)
        name, k = whose[full]
        return made(name)[k]

    out.mkdir(parents=True, exist_ok=True)
    files = write_sharded(out, entries, tensor, lambda _: {"format": "pt"})
    copy_others(c, out, without=OWN)
    about = config(net, layers, schemes, gone)
    write_json(out / "config.json", {**c.config, "quantization_config": about})
    sync(out)
    return {"format": about["format"], "schemes": {str(s): sum(x == s for x in schemes.values()) for s in set(schemes.values())},
            "quantized": len(layers), "ignored": len(about["ignore"]), "bytes": sum(f.stat().st_size for f in files)}


# ---- what is there ----------------------------------------------------------------------------
def parts_of(c: Checkpoint) -> SafeFile:
    """The parts beside the weights. BadInput where there are none, or the weights are not the ones they belong to."""
    if c.packed:
        raise BadInput(f"{c.path} is packed for our runtime; trim the model it was made from without --pack, and export that")
    if not (c.path / PARTS).exists():
        raise BadInput(f"{c.path} has no {PARTS}; give a directory that trimtab trim wrote without --pack")
    parts = SafeFile(c.path / PARTS)
    try:
        sums = json.loads(parts.metadata["trimtab"])["weights"]
        changed = [f.name for f in c.files if sums.get(f.name) != file_digest(f)]
    except (*NOT_JSON, KeyError, TypeError, AttributeError):
        raise BadInput(f"{parts.path} does not say which weights it belongs to; trim the model again") from None
    if changed:
        raise BadInput(f"{c.path / changed[0]} is not what {PARTS} belongs to (its hash differs); trim the model again")
    return parts


def quantized(net: Network, parts: SafeFile) -> list[Layer]:
    """The layers that are codes. BadInput for parts that are none, or lie in no plain linear layer."""
    layers = [x for x in net.layers() if not x.is_head]
    plain = {s.name for x in layers for s in x.sites}
    for s in net.sites:
        if more := next((k for k in (*ALONE, FIRST) if f"{s.name}:{k}" in parts.names), None):
            spared = dict.fromkeys(("entries", "columns"), "weights that were spared")
            known = {"left": "factors", FIRST: "products of factors", "book": "vectors of a codebook", **spared}
            what = known.get(more, "a basis of its own")
            raise BadInput(f"{s.name}: it has {what}, which compressed-tensors does not hold; {RIGHT}")
        if s.expert is not None:
            raise BadInput(f"{s.name}: it is an expert, and transformers opens those with compressed-tensors only as codes, which are not "
                           "written; give a model without experts")
        if f"{s.name}:codes" in parts.names and s.name not in plain:
            raise BadInput(f"{s.name}: its weight is stored transposed, and compressed-tensors holds plain linear layers; give a model of "
                           "another family")
    found = []
    for layer in layers:
        have = [f"{s.name}:codes" in parts.names for s in layer.sites]
        if any(have) and not all(have):
            raise BadInput(f"{layer.sites[have.index(False)].name}: it is part of {layer.file}, whose other rows are codes, and has none; "
                           "quantise them alike")
        if any(have):
            found.append(layer)
    if not found:
        raise BadInput(f"{net.checkpoint.path} has no codes, and compressed-tensors holds nothing else; {RIGHT}")
    return found


def reader(net: Network, parts: SafeFile) -> Callable[[Layer], Codes]:
    """A function that reads the codes of a layer. BadInput for those the format has no place for."""
    def read(layer: Layer) -> Codes:
        its = {f"{s.name}:{k}": parts.read(f"{s.name}:{k}") for s in layer.sites for k in ("codes", "scales", "grid", "zeros", "table")
               if f"{s.name}:{k}" in parts.names}
        rows = net.checkpoint.tensors[layer.file].shape[0]
        for s in layer.sites:
            check(s, its)
        codes = Codes.among(pack.whole(layer, torch.empty(rows, 0), its, torch.float32, pack.Format(Step("format/dense"))).parts)
        if codes is None:
            raise BadInput(f"{layer.sites[0].name}: it shares {layer.file} with rows on another grid, and compressed-tensors has one a "
                           "layer; quantise them alike")
        return codes

    return read


def met(layer: Layer, parts: SafeFile) -> Rounding | None:
    """How the inputs of a layer are rounded, as all its sites have it. BadInput where they differ."""
    each = [Rounding.among({k: parts.read(f"{s.name}:{k}") for k in ACT if f"{s.name}:{k}" in parts.names}) for s in layer.sites]
    first = each[0]
    if any((r is None) != (first is None) or (r is not None and first is not None and not r.same(first)) for r in each):
        raise BadInput(f"{layer.sites[0].name}: it shares {layer.file} with rows whose inputs are rounded otherwise; round them alike")
    return first


def check(site: Site, parts: Mapping[str, Tensor]) -> None:
    levels = int(parts[f"{site.name}:grid"][0])
    if (table := parts.get(f"{site.name}:table")) is not None:
        if e4m3_step(table) is None:
            raise BadInput(f"{site.name}: its codes are steps of a table of {levels}, and those of compressed-tensors here are whole "
                           f"numbers, or those of e4m3, fp(bits=8,exponent=4); {RIGHT}")
        return
    if levels not in (16, 256):
        what = "ternary" if levels == 3 else f"of {(levels - 1).bit_length()} bits"
        raise BadInput(f"{site.name}: its codes are {what}, and those of compressed-tensors that servers run have 4 or 8 bits; {RIGHT}")


def _sides(layer: Layer, codes: Codes) -> tuple[int, int, int, bool, bool]:
    return codes.group, codes.codes.shape[1], codes.bits, codes.grid.zeros is None, codes.grid.table is not None


def alike(net: Network, layers: Mapping[str, Layer], schemes: Mapping[str, Scheme]) -> None:
    """BadInput unless q, k and v have one scheme, and gate and up."""
    of = {s.name: schemes[name] for name, x in layers.items() for s in x.sites}
    for roles in TOGETHER:
        feeds: dict[tuple[int, str], list[Site]] = {}
        for s in net.sites:
            if s.role in roles:
                feeds.setdefault((s.block, s.input), []).append(s)
        for first, *others in feeds.values():
            for s in others:
                if of.get(s.name) != of.get(first.name):
                    has = [of.get(x.name) or "no codes" for x in (s, first)]
                    raise BadInput(f"{s.name}: it has {has[0]} and {first.name} has {has[1]}; servers run {', '.join(roles)} as one map: "
                                   "quantise them alike")


# ---- what is written --------------------------------------------------------------------------
def words(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n] below 2^bits, 4 or 8 bits, as int32 [rows, ceil(n * bits / 32)], the first in the lowest bits."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (32 // bits)))
    whole = codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
    return whole.flatten().view(torch.int32).view(len(codes), -1)


def tensors(codes: Codes, scheme: Scheme, rounding: Rounding | None) -> dict[str, Tensor]:
    """A layer's tensors by the last part of their names."""
    scales = codes.grid.scales.float()
    if codes.grid.table is not None:
        size = torch.where(codes.codes > 127, codes.codes - 128, 127 - codes.codes).clamp_max(126)  # 127 is its NaN
        bits = size | torch.where(codes.codes > 127, 0, 128).to(torch.uint8)
        return {"weight": bits.view(torch.float8_e4m3fn), "weight_scale": scales * (e4m3_step(codes.grid.table) or 1.0)}
    if scheme.format == "int-quantized":
        own = {"weight": (codes.codes ^ 128).view(torch.int8), "weight_scale": scales}  # the byte of code - 128
        return own if rounding is None or rounding.scale is None else {**own, "input_scale": rounding.scale}
    made = {"weight_packed": words(codes.codes, scheme.bits), "weight_scale": scales, "weight_shape": torch.tensor(codes.codes.shape)}
    if codes.grid.zeros is not None:
        made["weight_zero_point"] = words(codes.grid.zeros.T, scheme.bits).T.contiguous()
    return made


def _stem(layer: Layer) -> str:
    return layer.file.removesuffix(".weight")


def config(net: Network, layers: Mapping[str, Layer], schemes: Mapping[str, Scheme], gone: set[str]) -> dict[str, Any]:
    """The quantization_config. Layers are named as the model calls them, and as the files do where that differs."""
    stored = {n.removesuffix(".weight") for n, e in net.checkpoint.tensors.items()
              if n.endswith(".weight") and len(e.shape) == 2 and n not in gone}
    ignore = sorted((stored | set(net.linears())) - layers.keys())
    groups = {}
    distinct = list(dict.fromkeys(schemes.values()))
    for k, scheme in enumerate(distinct):
        mine = [x for name, x in layers.items() if schemes[name] == scheme]
        targets = ["Linear"] if len(distinct) == 1 else list(dict.fromkeys(n for x in mine for n in (x.name, _stem(x))))
        groups[f"group_{k}"] = scheme.data(targets)
    return {"quant_method": "compressed-tensors", "quantization_status": "compressed", "format": distinct[0].format,
            "config_groups": groups, "ignore": ignore, "kv_cache_scheme": None, "global_compression_ratio": None,
            "dequantize": len(distinct) == 1 and distinct[0].activations == 16}
