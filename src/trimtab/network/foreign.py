"""Linear layers as GPTQ, AWQ and compressed-tensors store them, decoded to our codes: nothing is rounded on the way.

Of a layer [out, in] with `groups` groups of inputs, words being int32 that hold their first code in the lowest bits:

- gptq (AutoGPTQ, GPTQModel): `qweight` words along the inputs [in * bits / 32, out], `qzeros` along the outputs [groups, out * bits /
  32], `scales` [groups, out], `g_idx` int32 [in], the group of each input. Zero points are stored less one, as they are in `gptq_v2`.
- awq (AutoAWQ's GEMM): `qweight` words along the outputs [in, out / 8], `qzeros` [groups, out / 8], `scales` [groups, out]; the eight
  codes of a word are those of outputs 0, 2, 4, 6, 1, 3, 5, 7.
- compressed-tensors: `weight_packed` words along the inputs [out, in * bits / 32], `weight_shape` [2], or `weight` int8 or float8
  [out, in]; `weight_scale` [out, groups], or one; `weight_zero_point` words along the outputs [out * bits / 32, groups], or int8 [out,
  groups].
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.types import BadInput
from trimtab.methods.codes import WIDTHS, Codes, Grid, e4m3

Read = Callable[[str], Tensor]
PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"), "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
                           "input_scale", "input_zero_point", "output_scale", "output_zero_point"),
}
READS = "trimtab reads gptq and gptq_v2, the gemm layout of awq, and pack-, int-, float- and naive-quantized compressed-tensors"
AWQ_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # of output j of eight in its word: the inverse of 0, 2, 4, 6, 1, 3, 5, 7
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Quantized:
    """A layer [out, in] that another program quantised: `stored`, the names of its tensors by their last part; codes of `bits`, 0 for
    float8, in groups of `group` inputs, or, where those lie in an order of their own, the group of each input [in]; `plain`, the
    type of the weight that is decoded."""

    method: str
    stored: dict[str, str]
    shape: tuple[int, int]
    bits: int
    group: int
    order: Tensor | None
    plain: torch.dtype
    offset: int = 0  # what is added to zero points of gptq; -1: found out from those of symmetric codes

    def decoded(self, read: Read) -> Codes | Tensor:
        """The codes, or where no grid of ours holds them the weight in float32."""
        codes, scales, zeros = UNPACK[self.method](self, {k: read(n) for k, n in self.stored.items()})
        levels = 1 << (self.bits or 8)
        table = e4m3() if not self.bits else None
        if zeros is not None and bool((zeros == levels // 2).all()):
            zeros = None
        if self.order is not None:
            whole = Grid(scales.float(), levels, zeros, table)
            steps = codes.float() - whole.zero().float()[:, self.order]
            return steps.mul_(scales.float()[:, self.order])
        scales = (scales if scales.dtype == torch.float16 else scales.float()).contiguous()
        return Codes(codes.contiguous(), Grid(scales, levels, None if zeros is None else zeros.contiguous(), table), self.group)


def quantized(config: Mapping[str, Any], entries: Mapping[str, Any], read: Read) -> dict[str, Quantized]:
    """The layers by name that a config.json's quantization_config speaks of, checked; `entries` have a dtype and a shape by stored
    name. BadInput for a method or layout that is not read here, and a layer that is incomplete or contradicts itself."""
    about = config["quantization_config"]
    method = str(about.get("quant_method"))
    try:
        why = _strange(method, about) if method in PARTS else method
    except (AttributeError, TypeError):
        raise BadInput("the quantization_config of its config.json is malformed; fetch it again") from None
    if why:
        raise BadInput(f"it was quantised with {why}; {READS}")
    held: dict[str, dict[str, str]] = {}
    for full in entries:
        name, _, part = full.rpartition(".")
        if part in PARTS[method]:
            held.setdefault(name, {})[part] = full
    plain = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), None)
    found = {}
    for name, stored in held.items():
        mine = {k: entries[n] for k, n in stored.items()}
        if method == "compressed-tensors" and "weight_packed" not in mine and (
                "weight" not in mine or mine["weight"].dtype not in (torch.int8, E4M3)):
            continue  # a plain weight, a norm, scales of keys and values
        try:
            found[name] = CHECK[method](about, mine, stored, read, plain if plain in FLOATS else torch.float16)
        except BadInput as e:
            raise BadInput(f"layer {name}: {e}; fetch it again") from None
    if not found:
        raise BadInput(f"its config.json speaks of {method}, and no layer is stored so; fetch it again")
    return found


def _strange(method: str, about: Mapping[str, Any]) -> str:
    """What it says of itself that is not read here."""
    if method == "gptq":
        layout = about.get("checkpoint_format") or about.get("format") or "gptq"
        return "" if layout in ("gptq", "gptq_v2") else f"gptq in the layout {layout}"
    if method == "awq":
        layout = str(about.get("version") or about.get("format") or "gemm").lower()
        return "" if layout == "gemm" and about.get("backend") != "llm-awq" else f"awq in the layout {about.get('backend') or layout}"
    sparse = (about.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense" or (about.get("transform_config") or {}).get("config_groups"):
        return f"compressed-tensors and {'transforms' if sparse == 'dense' else f'{sparse} sparsity'}"
    formats = {about.get("format"), *(g.get("format") for g in (about.get("config_groups") or {}).values() if isinstance(g, dict))}
    known = {None, "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"}
    return f"compressed-tensors as {', '.join(sorted(map(str, formats - known)))}" if formats - known else ""


# ---- checks -----------------------------------------------------------------------------------
def _expect(entries: Mapping[str, Any], part: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None) -> Any:
    """A tensor of the layer. BadInput where it is not there, or not of these types and this shape."""
    if part not in entries:
        raise BadInput(f"its tensor {part} is missing")
    e = entries[part]
    if e.dtype not in dtypes or 0 in e.shape or (len(e.shape) != 2 if shape is None else e.shape != shape):
        want = f"{dtypes[0]} {list(shape) if shape else 'of two dimensions'}".removeprefix("torch.")
        raise BadInput(f"its tensor {part} is {str(e.dtype).removeprefix('torch.')} {list(e.shape)}, and {want} is wanted")
    return e


def _order(stored: Mapping[str, str], part: str, read: Read, groups: int, group: int) -> Tensor | None:
    """The group of each input; None where the groups follow each other."""
    if part not in stored:
        return None
    order = read(stored[part]).long()
    if part == "weight_g_idx" and bool((order == -1).all()):  # says nothing
        return None
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise BadInput(f"its {part} names groups from {int(order.min())} to {int(order.max())}, and there are {groups}")
    return None if torch.equal(order, torch.arange(len(order)) // group) else order


def _gptq(about: Mapping[str, Any], entries: Mapping[str, Any], stored: dict[str, str], read: Read, plain: torch.dtype) -> Quantized:
    rows, out = _expect(entries, "qweight", (torch.int32,)).shape
    bits: Any = about.get("bits")
    if "g_idx" in entries:  # it knows better, where layers have other bits
        inputs = _expect(entries, "g_idx", (torch.int32, torch.int64), (math.prod(entries["g_idx"].shape),)).shape[0]
        bits = next((b for b in WIDTHS.values() if -(-inputs * b // 32) == rows), None)
    if bits not in WIDTHS.values():
        raise BadInput(f"its qweight {[rows, out]} holds no codes of 8, 4, 3 or 2 bits")
    if "g_idx" not in entries:
        inputs = rows * 32 // bits
    groups = _expect(entries, "scales", FLOATS).shape[0]
    _expect(entries, "scales", FLOATS, (groups, out))
    _expect(entries, "qzeros", (torch.int32,), (groups, -(-out * bits // 32)))
    said = about.get("group_size")
    group = min(said, inputs) if isinstance(said, int) and said > 0 and -(-inputs // said) == groups else inputs // groups
    if -(-inputs // max(group, 1)) != groups:
        raise BadInput(f"its scales have {groups} groups, which do not divide its {inputs} inputs")
    return Quantized("gptq", stored, (out, inputs), bits, group, _order(stored, "g_idx", read, groups, group), plain,
                     0 if "gptq_v2" in (about.get("checkpoint_format"), about.get("format")) else -1 if about.get("sym") else 1)


def _awq(about: Mapping[str, Any], entries: Mapping[str, Any], stored: dict[str, str], read: Read, plain: torch.dtype) -> Quantized:
    if about.get("bits", about.get("w_bit", 4)) != 4:
        raise BadInput(f"awq stores codes of 4 bits, and config.json says {about.get('bits', about.get('w_bit'))}")
    inputs, words = _expect(entries, "qweight", (torch.int32,)).shape
    groups = _expect(entries, "scales", FLOATS).shape[0]
    _expect(entries, "scales", FLOATS, (groups, words * 8))
    _expect(entries, "qzeros", (torch.int32,), (groups, words))
    if inputs % groups:
        raise BadInput(f"its scales have {groups} groups, which do not divide its {inputs} inputs")
    return Quantized("awq", stored, (words * 8, inputs), 4, inputs // groups, None, plain)


def _compressed(about: Mapping[str, Any], entries: Mapping[str, Any], stored: dict[str, str], read: Read, plain: torch.dtype) -> Quantized:
    packed = "weight_packed" in entries
    if packed:
        rows, words = _expect(entries, "weight_packed", (torch.int32,)).shape
        _expect(entries, "weight_shape", (torch.int64, torch.int32), (2,))
        out, inputs = map(int, read(stored["weight_shape"]).tolist())
        bits = next((b for b in WIDTHS.values() if inputs > 0 and -(-inputs * b // 32) == words), None)
        if bits is None or out != rows:
            raise BadInput(f"its weight_packed {[rows, words]} holds no codes of 8, 4, 3 or 2 bits of {[out, inputs]}")
    else:
        (out, inputs), bits = _expect(entries, "weight", (torch.int8, E4M3)).shape, 8
    given = tuple(entries["weight_scale"].shape) if "weight_scale" in entries else ()
    scale = _expect(entries, "weight_scale", FLOATS, given if given in ((), (1,), (1, 1), (out,)) else (out, *given[1:2]))
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    if inputs % groups:
        raise BadInput(f"its weight_scale has {groups} groups, which do not divide its {inputs} inputs")
    if "weight_zero_point" in entries and packed:
        _expect(entries, "weight_zero_point", (torch.int32,), (-(-out * bits // 32), groups))
    elif "weight_zero_point" in entries and entries["weight"].dtype == torch.int8:
        _expect(entries, "weight_zero_point", (torch.int8,), scale.shape)
    if "weight_g_idx" in entries:
        _expect(entries, "weight_g_idx", (torch.int32, torch.int64), (inputs,))
    bits = 0 if not packed and entries["weight"].dtype == E4M3 else bits
    order = _order(stored, "weight_g_idx", read, groups, inputs // groups)
    return Quantized("compressed-tensors", stored, (out, inputs), bits, inputs // groups, order, plain)


# ---- decoding: codes [out, in], scales and zero points [out, groups] --------------------------
Unpacked = tuple[Tensor, Tensor, Tensor | None]


def fields(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row of words int32 [rows, n], lowest bits first: uint8 [rows, count]."""
    flat = words.contiguous().flatten().view(torch.uint8).view(len(words), -1)
    if bits == 3:  # eight codes in three bytes
        three = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 3)).unflatten(1, (-1, 3)).int()
        flat, span = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16, 24
    else:
        span = 8
    each = (flat[..., None] >> torch.arange(0, span, bits, dtype=flat.dtype)) & (1 << bits) - 1
    return each.flatten(1)[:, :count].to(torch.uint8)


def _of_gptq(q: Quantized, t: dict[str, Tensor]) -> Unpacked:
    (out, inputs), levels = q.shape, 1 << q.bits
    stored = fields(t["qzeros"], q.bits, out)
    offset = q.offset if q.offset >= 0 else int(not bool((stored == levels // 2).all()))  # some say gptq and store gptq_v2
    return fields(t["qweight"].T, q.bits, inputs), t["scales"].T, (stored.int() + offset & levels - 1).to(torch.uint8).T


def _of_awq(q: Quantized, t: dict[str, Tensor]) -> Unpacked:
    def outputs(words: Tensor) -> Tensor:
        return fields(words, 4, q.shape[0]).unflatten(1, (-1, 8))[..., list(AWQ_PLACE)].flatten(1).T

    return outputs(t["qweight"]), t["scales"].T, outputs(t["qzeros"])


def _of_compressed(q: Quantized, t: dict[str, Tensor]) -> Unpacked:
    out, inputs = q.shape
    scales = t["weight_scale"].reshape(-1, inputs // q.group).expand(out, -1)
    zeros = t.get("weight_zero_point")
    if "weight_packed" in t:
        zeros = None if zeros is None else fields(zeros.T, q.bits, out).T
        return fields(t["weight_packed"], q.bits, inputs), scales, zeros
    raw = t["weight"].view(torch.uint8)
    if q.bits:
        return raw ^ 128, scales, None if zeros is None else (zeros.view(torch.uint8) ^ 128).reshape(-1, scales.shape[1]).expand(out, -1)
    size = raw & 127
    if bool((size == 127).any()):
        raise BadInput("a weight is NaN; only finite weights can be run")
    return torch.where(raw < 128, 128 + size, 127 - size), scales, None


CHECK = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}
UNPACK = {"gptq": _of_gptq, "awq": _of_awq, "compressed-tensors": _of_compressed}
