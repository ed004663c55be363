"""How what meets codes is rounded: a number of bits, and a step for all tokens or one of each token's own."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.core.types import BadInput
from trimtab.methods.codes import LEVELS
from trimtab.methods.format.panels import Packed
from trimtab.methods.terms import Terms

ACT = ("act_bits", "act_scale")  # the parts of a change that say it
BITS = range(2, 9)
CLIPS = ("max", "mse", "percentile")
TRIED, LEAST = 100, 0.01  # shares of the largest magnitude that a range is tried with, and the smallest
SEEN = 1 << 18            # magnitudes that the error of a range is measured on


@dataclass(frozen=True)
class Rounding:
    """x to the nearest of 2^`bits` - 1 equal steps around zero. `scale` (float32 [1]) is the step, what lies beyond the last one is
    clipped to it; where there is none every token has the step that its largest magnitude is the last one of."""

    bits: int
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise BadInput(f"inputs are rounded to {BITS[0]} to {BITS[-1]} bits, not {self.bits}")
        if self.scale is not None and (self.scale.shape != (1,) or self.scale.dtype != torch.float32
                                       or not bool(torch.isfinite(self.scale).all() and (self.scale > 0).all())):
            raise BadInput("the step of rounded inputs is one float32 number, finite and above 0")

    @property
    def last(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def of(self, x: Tensor) -> Tensor:
        """x [..., in] as it is met, float32."""
        x = x.float()
        step = x.abs().amax(-1, keepdim=True) / self.last if self.scale is None else self.scale.to(x.device)
        return (x * torch.where(step > 0, 1 / step, 0.0)).round().clamp(-self.last, self.last) * step

    def same(self, other: Rounding) -> bool:
        """Whether it does what another one does."""
        return self.bits == other.bits and (self.scale is None) == (other.scale is None) and (
            self.scale is None or other.scale is None or bool((self.scale == other.scale).all()))

    def parts(self) -> dict[str, Tensor]:
        """As a change carries them."""
        own = {"act_bits": torch.tensor([self.bits], dtype=torch.int32, device=None if self.scale is None else self.scale.device)}
        return own if self.scale is None else {**own, "act_scale": self.scale}

    @staticmethod
    def among(parts: Mapping[str, Tensor]) -> Rounding | None:
        """What the parts of a change say of it; None where they say nothing."""
        return Rounding(int(parts["act_bits"]), parts.get("act_scale")) if "act_bits" in parts else None


def range_of(x: Tensor, bits: int, clip: str, share: float) -> float:
    """The magnitude that the steps for x reach to: its largest (max), the one with the least squared error of 100 between that and a
    hundredth of it (mse), or the one that a `share` of all is below (percentile).

    BadInput for another `clip`, or a share that is not above 0 and at most 1."""
    if clip not in CLIPS:
        raise BadInput(f"the range of inputs is chosen by {', '.join(CLIPS)}, not {clip}")
    if not 0 < share <= 1:
        raise BadInput(f"a percentile is a share above 0 and at most 1, such as 0.999, not {share:g}")
    sizes, last = x.float().abs().flatten(), Rounding(bits).last
    most = float(sizes.max())
    if clip == "max" or most == 0:
        return most
    if clip == "percentile":
        return float(sizes.kthvalue(max(1, round(share * len(sizes)))).values) or most
    some = sizes[:: -(-len(sizes) // SEEN)]
    found = (torch.inf, most)
    for i in range(TRIED):
        top = most * (1 - (1 - LEAST) * i / (TRIED - 1))
        off = float(((some * (last / top)).round().clamp_max(last) * (top / last) - some).square().sum())
        found = min(found, (off, top))
    return found[1]


def cost(terms: Terms, rounding: Rounding) -> Callable[[Tensor], Tensor]:
    """What rounding does to the outputs [..., out] of x [..., in], as a function of x: only codes meet it, in their own basis and without
    what was spared."""
    if terms.codes is None or terms.transposed:
        raise BadInput("inputs are rounded to meet codes in groups of inputs, and there are none here")
    w = terms.codes.weight()
    kept = None if terms.spared.columns is None else terms.spared.others(w.shape[1] + len(terms.spared.columns))

    def change(x: Tensor) -> Tensor:
        x = x.float() if kept is None else x.float()[..., kept]
        x = x if terms.inside is None else terms.inside.of(x)
        y = (rounding.of(x) - x) @ w.T
        return y if terms.outside is None else terms.outside.straight(y)

    return change


# ---- packed -----------------------------------------------------------------------------------
def met_rounded(p: Packed, rounding: Rounding | None) -> Packed:
    """The packed codes, with what they say of their inputs. BadInput where there are no codes to meet them."""
    if rounding is None:
        return p
    if p.type not in LEVELS or p.factors:
        raise BadInput("inputs are rounded where they meet codes, and there are none here; leave the rounding out")
    scale = {} if rounding.scale is None else {"act_scale": rounding.scale.clone()}  # sites that share it are stored each
    return replace(p, act_bits=rounding.bits, buffers={**p.buffers, **scale})


def weight_alone(p: Packed) -> Packed:
    """The packed weight, which says nothing of its inputs."""
    return replace(p, act_bits=0, buffers={k: t for k, t in p.buffers.items() if k != "act_scale"}) if p.act_bits else p


def rounding_of(p: Packed) -> Rounding | None:
    """How a packed weight says its inputs are rounded; None where it leaves that to who runs it."""
    return Rounding(p.act_bits, p.buffers.get("act_scale")) if p.act_bits else None


def rounding_bytes(p: Packed) -> dict[str, int]:
    """What its buffers take, by name. BadInput where they say what cannot be."""
    if type(p.act_bits) is not int or (p.act_bits and p.type not in LEVELS) or (not p.act_bits and "act_scale" in p.buffers):
        raise BadInput(f"{p.format} {p.type}: its inputs are rounded to {p.act_bits} bits, which is no number, or meets no codes")
    rounding = rounding_of(p)
    return {"act_scale": 4} if rounding is not None and rounding.scale is not None else {}
