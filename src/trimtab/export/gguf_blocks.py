"""Weights as the blocks of GGUF: 32 or 256 neighbours of a row with their scales in float16, as ggml lays them out."""
from __future__ import annotations

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from numpy.typing import NDArray
from torch import Tensor

from trimtab.core.types import BadInput
from trimtab.methods.codes import WIDTHS, Codes

Type = GGMLQuantizationType
Bytes = NDArray[np.uint8]
SMALL, LARGE = 32, 256  # inputs of a block, and of a block of Q6_K
HALF = 2.0**-11         # what rounding to float16 may cost, as a share
FLOATS = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}


def block(kind: Type) -> int:
    """Inputs that a block holds; 1 of a type that has none."""
    return int(GGML_QUANT_SIZES[kind][0])


def nbytes(kind: Type, shape: tuple[int, ...]) -> int:
    size, each = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // size * each


# ---- codes ------------------------------------------------------------------------------------
def fitting(codes: Codes) -> tuple[Type, ...]:
    """The types that hold these very codes, the smallest first; none where their grid is no grid of GGUF.

    Scales of whole rows are float32 and become float16, as may be done where that costs no more than the last bit.
    """
    inputs = codes.codes.shape[1]
    if codes.grid.table is not None or inputs % SMALL or (codes.group % SMALL and codes.group != inputs):
        return ()
    scales = codes.grid.scales.float()
    if not bool(((scales.half().float() - scales).abs() <= HALF * scales).all()):
        return ()
    few = codes.grid.levels <= 16
    if codes.grid.zeros is not None:  # steps of -15 to 15 fit 8 bits, too
        return (Type.Q4_1, Type.Q8_0) if few and codes.type in WIDTHS and bool(_minimum(codes).isfinite().all()) else ()
    wide = few and inputs % LARGE == 0 and (codes.group % LARGE == 0 or codes.group == inputs)
    return ((Type.Q4_0,) if few else ()) + ((Type.Q6_K,) if wide else ()) + (Type.Q8_0,)


def exact(codes: Codes, kind: Type) -> bool:
    """Whether blocks of `kind` stand for the very same values: nothing had to be rounded to float16."""
    scales = codes.grid.scales.float()
    same = torch.equal(scales.half().float(), scales)
    return same and (kind != Type.Q4_1 or torch.equal(_minimum(codes).float(), -scales * codes.grid.zero().float()))


def _minimum(codes: Codes) -> Tensor:
    """What the code 0 stands for, float16 [out, groups]."""
    return (-codes.grid.scales.float() * codes.grid.zero().float()).half()


def of_codes(codes: Codes, kind: Type) -> Bytes:
    """Codes [out, in] as blocks of a type that is `fitting`, uint8 [out, bytes of a row]."""
    size = block(kind)
    count = codes.codes.shape[1] // size

    def by_block(t: Tensor) -> NDArray[np.generic]:
        """[out, groups] -> [out, blocks, 1]"""
        each = torch.repeat_interleave(t, -(-codes.group // size), 1)[:, :count]
        return each.contiguous().numpy()[..., None]

    at = codes.codes.numpy().reshape(len(codes.codes), count, size)
    d = _bytes(by_block(codes.grid.scales.half()))
    if kind == Type.Q4_1:
        parts = [d, _bytes(by_block(_minimum(codes))), _nibbles(at)]
    else:
        steps = at.astype(np.int16) - by_block(codes.grid.zero())
        if kind == Type.Q4_0:
            parts = [d, _nibbles((steps + 8).astype(np.uint8))]
        elif kind == Type.Q6_K:
            parts = [*_six(steps), np.ones((*steps.shape[:2], 16), np.uint8), d]
        else:
            parts = [d, steps.astype(np.int8).view(np.uint8)]
    return np.concatenate(parts, -1).reshape(len(at), -1)


def _bytes(a: NDArray[np.generic]) -> Bytes:
    return np.ascontiguousarray(a).view(np.uint8)


def _nibbles(at: Bytes) -> Bytes:
    """32 numbers below 16 in 16 bytes: the first half in the low bits, the second in the high ones."""
    return at[..., :16] | at[..., 16:] << 4


def _six(steps: NDArray[np.int16]) -> list[Bytes]:
    """256 steps of -32 to 31: the low four bits of each, then the high two. Both halves of the block alike: the numbers l, l + 32,
    l + 64 and l + 96 share the bytes l and l + 32 of the low bits, and the byte l of the high ones."""
    q = (steps + 32).astype(np.uint8).reshape(*steps.shape[:-1], 2, 4, 32)
    low, high = q & 15, q >> 4
    ql = np.concatenate([low[..., 0, :] | low[..., 2, :] << 4, low[..., 1, :] | low[..., 3, :] << 4], -1)
    qh = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    return [ql.reshape(*steps.shape[:-1], 128), qh.reshape(*steps.shape[:-1], 64)]


# ---- rounding ---------------------------------------------------------------------------------
def as_type(w: Tensor, kind: Type, name: str) -> Bytes:
    """A tensor in `kind`, rounded where that needs it, uint8 [..., bytes of a row]. BadInput where it overflows float16."""
    if kind in FLOATS:
        t = w.to(FLOATS[kind])
        if kind == Type.F16 and not bool(torch.isfinite(t).all()):
            raise BadInput(f"tensor {name} overflows float16; use --type bf16")
        return t.contiguous().view(torch.uint8).numpy()
    rows = w.float().numpy()
    return np.concatenate([_rounded(r, kind) for r in np.array_split(rows, -(-rows.size // (1 << 24)))])


def _rounded(w: NDArray[np.float32], kind: Type) -> Bytes:
    return _to_q6_k(w) if kind == Type.Q6_K else quants.quantize(w, kind)


def _to_q6_k(w: NDArray[np.float32]) -> Bytes:
    """d * scale * step, 16 scales of 8 bits in a block of 256 and steps of 6 bits: the largest of 16 neighbours becomes the step -32,
    the largest scale -128."""
    each = w.reshape(len(w), -1, 16, 16)
    most = np.take_along_axis(each, np.abs(each).argmax(-1, keepdims=True), -1) / np.float32(-32)
    largest = np.take_along_axis(most, np.abs(most).argmax(2, keepdims=True), 2)
    d = (largest / np.float32(-128)).astype(np.float16)
    wide = d.astype(np.float32)
    scales = np.rint(np.divide(most, wide, out=np.zeros_like(most), where=wide != 0)).clip(-128, 127)
    step = wide * scales
    steps = np.rint(np.divide(each, step, out=np.zeros_like(each), where=step != 0)).clip(-32, 31).astype(np.int16)
    flat = steps.reshape(*steps.shape[:2], LARGE)
    parts = [*_six(flat), scales[..., 0].astype(np.int8).view(np.uint8), _bytes(d[:, :, 0])]
    return np.concatenate(parts, -1).reshape(len(w), -1)
