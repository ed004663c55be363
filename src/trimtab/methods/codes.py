"""Weights as small whole numbers: weight = scale * (code - zero), one scale for some inputs of an output."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.types import BadInput, Change

BITS = {"i8": 8, "i4": 4, "i2": 2}


@dataclass(frozen=True)
class Codes:
    """A weight [out, in].

    `codes` uint8 [out, in], each below 2^bits; `scales` float32 or float16 [out, groups]; `zeros` uint8 [out, groups], or
    None for the middle code 2^(bits - 1) everywhere. Every `group` inputs share a scale, the last group may be shorter.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group: int
    zeros: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS.values() or self.codes.dtype != torch.uint8 or self.codes.ndim != 2 or 0 in self.codes.shape:
            raise BadInput(f"codes are uint8 [out, in] of 8, 4 or 2 bits, not {self.codes.dtype} {list(self.codes.shape)} of {self.bits}")
        out, inputs = self.codes.shape
        if not 1 <= self.group <= inputs:
            raise BadInput(f"a group of codes is 1 to {inputs} inputs here, not {self.group}")
        want = (out, -(-inputs // self.group))
        if int(self.codes.max()) >> self.bits:
            raise BadInput(f"codes of {self.bits} bits are below {1 << self.bits}, not {int(self.codes.max())}")
        if self.scales.shape != want or self.scales.dtype not in (torch.float32, torch.float16):
            raise BadInput(f"scales are float32 or float16 {list(want)}, not {self.scales.dtype} {list(self.scales.shape)}")
        if self.zeros is not None and (self.zeros.shape != want or self.zeros.dtype != torch.uint8):
            raise BadInput(f"zero points are uint8 {list(want)}, not {self.zeros.dtype} {list(self.zeros.shape)}")

    @property
    def type(self) -> str:
        return next(name for name, bits in BITS.items() if bits == self.bits)

    def zero(self) -> Tensor:
        """The zero points, uint8 [out, groups]."""
        middle = 1 << self.bits - 1
        return torch.full_like(self.scales, middle, dtype=torch.uint8) if self.zeros is None else self.zeros

    def each(self, per_group: Tensor) -> Tensor:
        """[out, groups] -> [out, in]."""
        return per_group.repeat_interleave(self.group, 1)[:, : self.codes.shape[1]]

    def weight(self) -> Tensor:
        """What it stands for, float32 [out, in]."""
        return self.each(self.scales.float()) * (self.codes.float() - self.each(self.zero().float()))

    def parts(self) -> dict[str, Tensor]:
        """As a change carries them; `grid` int32: bits and group."""
        parts = {"codes": self.codes, "scales": self.scales,
                 "grid": torch.tensor([self.bits, self.group], dtype=torch.int32, device=self.codes.device)}
        return parts if self.zeros is None else {**parts, "zeros": self.zeros}

    def change(self, mask: Tensor | None = None) -> Change:
        """As an edit returns it: the parts, what they decode to, and the pattern `mask` it keeps."""
        return Change(self.weight(), self.parts(), mask)

    @staticmethod
    def of(new: Change) -> Codes | None:
        """The codes among the parts; None where there are none. BadInput where they contradict each other."""
        if "codes" not in new.parts:
            return None
        bits, group = new.parts["grid"].tolist()
        return Codes(new.parts["codes"], new.parts["scales"], bits, group, new.parts.get("zeros"))


def nearest(w: Tensor, bits: int, group: int = 0, *, asymmetric: bool = False) -> Codes:
    """Every weight rounded to the nearest code of a grid over its group (0: the row). A weight of zero stays zero.

    Symmetric: scale = max |w| / (2^(bits - 1) - 1); asymmetric: from min(w, 0) to max(w, 0). The scale of a row is
    float32, of a group float16, rounded before the weights are. BadInput for other bits than 8, 4 and 2, and where a weight is not finite.
    """
    if bits not in BITS.values() or group < 0:
        raise BadInput(f"codes have 8, 4 or 2 bits and groups of inputs (0: the row), not {bits} bits and groups of {group}")
    out, inputs = w.shape
    group = min(group, inputs) or inputs
    if not bool(torch.isfinite(w).all()):
        raise BadInput("a weight is not finite: there is no code for it")
    padded = torch.nn.functional.pad(w.float(), (0, -inputs % group)).view(out, -1, group)
    top = (1 << bits) - 1
    if asymmetric:
        low, high = padded.amin(-1).clamp_max(0), padded.amax(-1).clamp_min(0)
        scales = (high - low) / top
    else:
        scales = padded.abs().amax(-1) / max(1, (1 << bits - 1) - 1)
    scales = scales if group == inputs else scales.clamp_max(65504).half()
    inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
    zeros = (-low * inverse).round().clamp(0, top) if asymmetric else torch.full_like(inverse, 1 << bits - 1)
    codes = (padded * inverse[..., None]).round().add_(zeros[..., None]).clamp_(0, top)
    return Codes(codes.to(torch.uint8).view(out, -1)[:, :inputs].contiguous(), scales, bits, group,
                 zeros.to(torch.uint8) if asymmetric else None)
