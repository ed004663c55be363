"""How a weight lies in memory so that a kernel can stream it: panels of outputs, input after input.

A panel is 32 outputs (or a block's height) side by side. One instruction meets one input with many outputs, nothing has
to be summed across lanes, and one stream is read from begin to end. The last panel is filled up with zeros. bfloat16
weights of two neighbouring inputs lie side by side, so that one 32-bit lane holds both. Codes of 8, 4 and 2 bits lie in
32-bit words of one output, 4, 8 or 16 inputs each: byte b of the word holds inputs b, b + 4, b + 8 ..., lowest bits first,
so that a shift and a mask leave four inputs a byte each. Ternary codes lie five a byte, 20 inputs a word: the byte / 256 is a
fraction whose first five digits in base 3 are those of inputs b, b + 4 ..., so that the next four come out by tripling the
bytes. Codes of 3 bits lie as their lower two bits and their third, two words and one for 32 inputs. Codes of a table lie as whole
numbers of their width do. The layouts do not depend on the processor: what is written on one is mapped on another.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import LEVELS, TABLES, WIDTHS, Codes

PANEL = 32   # outputs of a panel
TRITS = 5    # ternary codes of a byte
BITS = {"i8": 8, "i4": 4, "i2": 2}  # of the types of codes that every format of codes stores
DENSE = {**WIDTHS, **TABLES}        # of those that dense stores, ternary ones aside
WORD = {**{name: 32 // bits for name, bits in DENSE.items() if bits != 3}, "t": 4 * TRITS}  # inputs a word of codes holds
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
VECTORS = "v"  # the type of indices into a codebook


@dataclass(frozen=True)
class Values:
    """What the entries of a layout are: `type` f32, bf16, or of codes (LEVELS); of codes also the inputs in a `group` that
    share a scale, the bytes of a `scale`, and whether there are zero points."""

    type: str
    group: int = 0
    scale: int = 0
    zeros: bool = False

    def bytes(self, inputs: int, outputs: int = PANEL) -> int:
        """Of so many inputs of outputs that lie side by side."""
        if self.type in LEVELS:
            return words_of(self.type, inputs) * 4 * outputs
        return (-(-inputs // 2) * 4 if self.type == "bf16" else inputs * 4) * outputs

    def side(self, count: int) -> dict[str, int]:
        """Bytes of the scales and zero points of so many groups."""
        if self.type not in LEVELS:
            return {}
        side = {"scales": count * self.scale} | ({"zeros": count} if self.zeros else {})
        return side | ({"table": 4 * LEVELS[self.type]} if self.type in TABLES else {})


@dataclass(frozen=True)
class Packed:
    """One linear map [out, in] as a kernel reads it.

    `format`: dense, bsr, bitmask, sell, nm, lowrank, entrywise, book, sum or based; `type` of the values: f32, bf16, of codes, or v, of
    indices;
    `rows`, `cols` of a block, of a book the outputs of a vector; `n`, `m` of n:m along `dim` (in, or out: the transpose is what is
    packed), of a book the bits of its indices; `group`: inputs that share a scale;
    `buffers`: values (float32, bfloat16, or uint8 for words of codes), bits (uint8), columns (int32 of blocks, uint8 of
    entries), pointers (int64), windows (int32), scales (float32 or float16), zeros (uint8), table (float32), book (float16), act_scale
    (float32 [1]), those it has. `act_bits`: what x is rounded to before it meets codes, by the token, or by `act_scale` where that is
    there; 0 leaves it to who runs it.
    A map that is made of others, applied in turn (lowrank), multiplied entry by entry (entrywise), added (sum) or with a change of inputs
    and outputs around it (based), has these as its `factors` and their buffers as its own, what they are before the name. Buffers whose
    names begin with gate_ say which inputs of a token are computed (gates.py).
    """

    format: str
    shape: tuple[int, int]
    type: str
    buffers: dict[str, Tensor] = field(repr=False)
    rows: int = PANEL
    cols: int = 1
    n: int = 1
    m: int = 1
    group: int = 0
    dim: str = "in"
    act_bits: int = 0
    factors: tuple[Packed, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.buffers.values())

    @property
    def label(self) -> str:
        """In a word: the format, and what its codes are; of a map made of others theirs."""
        if self.factors and self.format not in ("lowrank", "entrywise"):
            return " + ".join(f.label for f in self.factors)
        met = f" x a{self.act_bits}" if self.act_bits else ""
        return f"{self.format} {self.type}{met}" if self.type in LEVELS else self.format

    @property
    def entries(self) -> Values:
        if self.type not in LEVELS:
            return Values(self.type)
        return Values(self.type, self.group, self.buffers["scales"].dtype.itemsize, "zeros" in self.buffers)


# ---- what comes in ----------------------------------------------------------------------------
def matrix(new: Change) -> Tensor | Codes:
    """What is to be stored, codes where the change has them. BadInput for what no layout holds."""
    if (codes := Codes.among(new.parts)) is not None:
        return codes
    w = new.w
    if w.ndim != 2 or 0 in w.shape:
        raise BadInput(f"a packed weight is [out, in], not {list(w.shape)}")
    if w.dtype not in TYPES:
        raise BadInput(f"a packed weight is float32 or bfloat16, not {str(w.dtype).removeprefix('torch.')}; "
                       "float32 holds every float16 exactly, bfloat16 takes as many bytes")
    if not all(bool(torch.isfinite(x)) for x in w.detach().aminmax()):
        raise BadInput("a weight is NaN or inf; only finite weights can be packed")
    return w.detach()


def pattern(new: Change) -> Tensor:
    """The entries to store, bool [out, in]: the mask, or where there is none what is not zero.

    BadInput if an entry outside the mask is not zero: it would be lost.
    """
    if new.mask is None:
        return new.w != 0
    if bool((new.w.masked_fill(new.mask, 0) != 0).any()):
        raise BadInput("a weight outside its mask is not zero and would be lost; store it as dense")
    return new.mask


# ---- panels -----------------------------------------------------------------------------------
def interleaved(t: Tensor) -> Tensor:
    """[..., inputs, outputs] -> the same for float32, [..., inputs / 2, outputs, 2] for bfloat16."""
    if t.dtype != torch.bfloat16:
        return t.contiguous()
    t = torch.nn.functional.pad(t, (0, 0, 0, t.shape[-2] % 2))
    return t.unflatten(-2, (-1, 2)).transpose(-1, -2).contiguous()


def straight(t: Tensor, inputs: int) -> Tensor:
    """The inverse of `interleaved`: [..., inputs, outputs]."""
    return t if t.dtype != torch.bfloat16 else t.transpose(-1, -2).flatten(-3, -2)[..., :inputs, :]


def panels(w: Tensor) -> Tensor:
    """[out, in] -> [panels, in, PANEL], filled up with zeros."""
    w = torch.nn.functional.pad(w, (0, 0, 0, -w.shape[0] % PANEL))
    return w.unflatten(0, (-1, PANEL)).transpose(1, 2)


def unpanelled(t: Tensor, out: int) -> Tensor:
    """The inverse of `panels`: [out, in]."""
    return t.transpose(1, 2).flatten(0, 1)[:out].contiguous()


def words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., inputs, outputs] -> words, uint8 [..., inputs / (32 / bits), outputs, 4]."""
    fields = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[-2] % (4 * fields)))
    codes = codes.unflatten(-2, (-1, fields, 4))
    whole = codes[..., 0, :, :].clone()
    for f in range(1, fields):
        whole |= codes[..., f, :, :] << bits * f
    return whole.transpose(-1, -2).contiguous()


def unworded(stored: Tensor, bits: int, inputs: int) -> Tensor:
    """The inverse of `words`: uint8 [..., inputs, outputs]."""
    fields = [(stored.transpose(-1, -2) >> bits * f) & (1 << bits) - 1 for f in range(8 // bits)]
    return torch.stack(fields, -3).flatten(-4, -2)[..., :inputs, :]


def triples(codes: Tensor) -> Tensor:
    """uint8 [..., inputs, outputs], below 8 -> words, uint8 [..., inputs / 32 * 3, outputs, 4]: of every 32 inputs two words of their
    lower two bits, then one of their third."""
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[-2] % 32)).unflatten(-2, (-1, 32))
    return torch.cat([words(codes & 3, 2), words(codes >> 2, 1)], -3).flatten(-4, -3)


def untripled(stored: Tensor, inputs: int) -> Tensor:
    """The inverse of `triples`: uint8 [..., inputs, outputs]."""
    three = stored.unflatten(-3, (-1, 3))
    low, high = three[..., :2, :, :], three[..., 2:, :, :]
    return (unworded(low, 2, 32) | unworded(high, 1, 32) << 2).flatten(-3, -2)[..., :inputs, :]


def worded(type_: str, codes: Tensor) -> Tensor:
    """Codes of any type, uint8 [..., inputs, outputs] -> words, uint8 [..., words, outputs, 4]."""
    if type_ == "t":
        return ternary_words(codes)
    return triples(codes) if DENSE[type_] == 3 else words(codes, DENSE[type_])


def unworded_of(type_: str, stored: Tensor, inputs: int) -> Tensor:
    """The inverse of `worded`: uint8 [..., inputs, outputs]."""
    if type_ == "t":
        return ternary_unworded(stored, inputs)
    return untripled(stored, inputs) if DENSE[type_] == 3 else unworded(stored, DENSE[type_], inputs)


def words_of(type_: str, inputs: int) -> int:
    """How many words hold the codes of so many inputs of an output."""
    return -(-inputs // 32) * 3 if DENSE.get(type_) == 3 else -(-inputs // WORD[type_])


def ternary_words(codes: Tensor) -> Tensor:
    """uint8 [..., inputs, outputs], below 3 -> words, uint8 [..., inputs / 20, outputs, 4].

    The least byte q with q / 256 >= v / 3^5, v the number that five codes are in base 3: less than 1 / 256 too much, and what is
    too much stays below the next digit as long as it is below 1 / 3^5.
    """
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[-2] % (4 * TRITS))).unflatten(-2, (-1, TRITS, 4)).int()
    whole = codes[..., 0, :, :].clone()
    for k in range(1, TRITS):
        whole.mul_(3).add_(codes[..., k, :, :])
    return whole.mul_(256).add_(3 ** TRITS - 1).floor_divide_(3 ** TRITS).to(torch.uint8).transpose(-1, -2).contiguous()


def ternary_unworded(stored: Tensor, inputs: int) -> Tensor:
    """The inverse of `ternary_words`: uint8 [..., inputs, outputs]."""
    left, digits = stored.transpose(-1, -2).to(torch.int16), []
    for _ in range(TRITS):
        left = (left & 255) * 3
        digits.append((left >> 8).to(torch.uint8))
    return torch.stack(digits, -3).flatten(-4, -2)[..., :inputs, :]


def sides(w: Codes) -> dict[str, Tensor]:
    """Scales and zero points by panels: [panels, groups, PANEL], and the table."""
    both = {"scales": panels(w.grid.scales).contiguous()}
    both |= {} if w.grid.zeros is None else {"zeros": panels(w.grid.zeros).contiguous()}
    return both | ({} if w.grid.table is None else {"table": w.grid.table.clone()})


def values_of(p: Packed, count: int, inputs: int) -> Tensor:
    """The values of so many panels or blocks in their shape, which the bytes do not tell: [count, inputs, rows], of bfloat16
    [count, inputs / 2, rows, 2], of codes [count, words, rows, 4]."""
    inputs, tail = {"f32": (inputs, ()), "bf16": (-(-inputs // 2), (2,))}.get(p.type) or (words_of(p.type, inputs), (4,))
    return p.buffers["values"].reshape(count, inputs, p.rows, *tail)


def sides_of(p: Packed, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Scales and zero points in this shape, float32."""
    scales = p.buffers["scales"].reshape(shape).float()
    middle = 0 if p.type in TABLES else LEVELS[p.type] // 2
    return scales, p.buffers["zeros"].reshape(shape).float() if "zeros" in p.buffers else torch.full_like(scales, middle)


def decoded(p: Packed, count: int, inputs: int, group: int) -> Tensor:
    """Codes as weights, as they are stored: `inputs` in groups of `group`, [count panels or blocks, inputs, rows] float32."""
    scales, zeros = sides_of(p, (count, -(-inputs // group), p.rows))
    stored = values_of(p, count, inputs)
    codes = unworded_of(p.type, stored, inputs)
    w = p.buffers["table"][codes.int()] if p.type in TABLES else codes.float()
    for g, part in enumerate(w.split(group, 1)):  # in place: a head is large
        part.sub_(zeros[:, g:g + 1]).mul_(scales[:, g:g + 1])
    return w


# ---- streams of bits --------------------------------------------------------------------------
def pack_bits(codes: Tensor, width: int = 1) -> Tensor:
    """Codes below 2^width one after the other, lowest bit first, eight bits a byte: uint8 [ceil(count * width / 8)].

    `width` is at most 8, so that bytes are all it takes: a large mask must not be blown up on the way.
    """
    codes = codes.flatten().to(torch.uint8)
    bits = (codes[:, None] >> torch.arange(width, device=codes.device, dtype=torch.uint8)) & 1
    bits = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 8)).reshape(-1, 8)
    return (bits << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """The first `count` codes of `pack_bits`, uint8 [count]."""
    bits = (packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    bits = bits.flatten()[: count * width].reshape(count, width)
    return (bits << torch.arange(width, device=packed.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask that was packed with one bit an entry, bool `shape`."""
    return unpack_bits(packed, 1, math.prod(shape)).bool().reshape(shape)
