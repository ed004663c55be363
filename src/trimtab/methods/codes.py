"""Weights as small whole numbers: weight = scale * (code - zero), one scale for some inputs of an output."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.types import BadInput, Change

BITS = {"i8": 8, "i4": 4, "i2": 2}  # types whose codes are so many bits
LEVELS = {**{name: 1 << bits for name, bits in BITS.items()}, "t": 3}  # of all types of codes, t: ternary


@dataclass(frozen=True)
class Codes:
    """A weight [out, in].

    `codes` uint8 [out, in], each below `levels` (256, 16, 4, or 3: ternary); `scales` float32 or float16 [out, groups]; `zeros`
    uint8 [out, groups], or None for the middle code levels // 2 everywhere; ternary codes have None. Every `group` inputs
    share a scale, the last group may be shorter.
    """

    codes: Tensor
    scales: Tensor
    levels: int
    group: int
    zeros: Tensor | None = None

    def __post_init__(self) -> None:
        if self.levels not in LEVELS.values() or self.codes.dtype != torch.uint8 or self.codes.ndim != 2 or 0 in self.codes.shape:
            raise BadInput(f"codes are uint8 [out, in] of 256, 16, 4 or 3 levels, not {self.codes.dtype} {list(self.codes.shape)} "
                           f"of {self.levels}")
        out, inputs = self.codes.shape
        if not 1 <= self.group <= inputs:
            raise BadInput(f"a group of codes is 1 to {inputs} inputs here, not {self.group}")
        want = (out, -(-inputs // self.group))
        if int(self.codes.max()) >= self.levels:
            raise BadInput(f"codes of {self.levels} levels are below {self.levels}, not {int(self.codes.max())}")
        if self.scales.shape != want or self.scales.dtype not in (torch.float32, torch.float16):
            raise BadInput(f"scales are float32 or float16 {list(want)}, not {self.scales.dtype} {list(self.scales.shape)}")
        if self.zeros is not None and (self.zeros.shape != want or self.zeros.dtype != torch.uint8):
            raise BadInput(f"zero points are uint8 {list(want)}, not {self.zeros.dtype} {list(self.zeros.shape)}")
        if self.zeros is not None and self.type not in BITS:
            raise BadInput("ternary codes have no zero points: -1, 0 and 1 are all there are")

    @property
    def type(self) -> str:
        return next(name for name, levels in LEVELS.items() if levels == self.levels)

    @property
    def bits(self) -> int:
        """Of a code of a type in BITS."""
        return BITS[self.type]

    def zero(self) -> Tensor:
        """The zero points, uint8 [out, groups]."""
        return torch.full_like(self.scales, self.levels // 2, dtype=torch.uint8) if self.zeros is None else self.zeros

    def each(self, per_group: Tensor) -> Tensor:
        """[out, groups] -> [out, in]."""
        return per_group.repeat_interleave(self.group, 1)[:, : self.codes.shape[1]]

    def weight(self) -> Tensor:
        """What it stands for, float32 [out, in]."""
        return self.each(self.scales.float()) * (self.codes.float() - self.each(self.zero().float()))

    def parts(self) -> dict[str, Tensor]:
        """As a change carries them; `grid` int32: levels and group."""
        parts = {"codes": self.codes, "scales": self.scales,
                 "grid": torch.tensor([self.levels, self.group], dtype=torch.int32, device=self.codes.device)}
        return parts if self.zeros is None else {**parts, "zeros": self.zeros}

    def change(self, mask: Tensor | None = None) -> Change:
        """As an edit returns it: the parts, what they decode to, and the pattern `mask` it keeps."""
        return Change(self.weight(), self.parts(), mask)

    @staticmethod
    def of(new: Change) -> Codes | None:
        """The codes among the parts; None where there are none. BadInput where they contradict each other."""
        if "codes" not in new.parts:
            return None
        levels, group = new.parts["grid"].tolist()
        return Codes(new.parts["codes"], new.parts["scales"], levels, group, new.parts.get("zeros"))


def nearest(w: Tensor, bits: int, group: int = 0, *, asymmetric: bool = False, ternary: bool = False) -> Codes:
    """Every weight rounded to the nearest code of a grid over its group (0: the row). A weight of zero stays zero.

    Symmetric: scale = max |w| / (2^(bits - 1) - 1); asymmetric: from min(w, 0) to max(w, 0); ternary, whatever `bits`: -1, 0 and
    1 times the mean |w|. The scale of a row is float32, of a group float16, rounded before the weights are. BadInput for other
    bits than 8, 4 and 2, for a grid that is ternary and asymmetric, and where a weight is not finite.
    """
    if ternary and asymmetric:
        raise BadInput("a ternary grid is -1, 0 and 1: it cannot be asymmetric")
    if bits not in BITS.values() or group < 0:
        raise BadInput(f"codes have 8, 4 or 2 bits and groups of inputs (0: the row), not {bits} bits and groups of {group}")
    out, inputs = w.shape
    group = min(group, inputs) or inputs
    if not bool(torch.isfinite(w).all()):
        raise BadInput("a weight is not finite: there is no code for it")
    padded = torch.nn.functional.pad(w.float(), (0, -inputs % group)).view(out, -1, group)
    levels = 3 if ternary else 1 << bits
    if asymmetric:
        low, high = padded.amin(-1).clamp_max(0), padded.amax(-1).clamp_min(0)
        scales = (high - low) / (levels - 1)
    elif ternary:
        scales = padded.abs().sum(-1) / (inputs - group * torch.arange(padded.shape[1], device=w.device)).clamp_max(group)
    else:
        scales = padded.abs().amax(-1) / max(1, levels // 2 - 1)
    scales = scales if group == inputs else scales.clamp_max(65504).half()
    inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
    zeros = (-low * inverse).round().clamp(0, levels - 1) if asymmetric else torch.full_like(inverse, levels // 2)
    codes = (padded * inverse[..., None]).round().add_(zeros[..., None]).clamp_(0, levels - 1)
    return Codes(codes.to(torch.uint8).view(out, -1)[:, :inputs].contiguous(), scales, levels, group,
                 zeros.to(torch.uint8) if asymmetric else None)
