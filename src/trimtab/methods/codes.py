"""Weights as codes: weight = scale * (step of the code - zero), one scale for some inputs of an output."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from trimtab.core.types import BadInput, Change

WIDTHS = {"i8": 8, "i4": 4, "i3": 3, "i2": 2}  # types whose steps are their codes, of so many bits
TABLES = {f"l{bits}": bits for bits in (8, 4, 3, 2, 1)}  # types whose steps stand in a table
LEVELS = {**{name: 1 << bits for name, bits in {**WIDTHS, **TABLES}.items()}, "t": 3}  # of all types of codes, t: ternary


@dataclass(frozen=True)
class Grid:
    """The values that a group of weights may take: scale * (step - zero).

    The steps are the codes 0 to levels - 1 themselves, or those of `table` (float32 [levels], never falling). `scales` float32 or
    float16 [...], one a group; `zeros` uint8 [...], or None: the middle code levels // 2 of steps that are codes, 0 of a table.
    """

    scales: Tensor
    levels: int
    zeros: Tensor | None = None
    table: Tensor | None = None

    def __post_init__(self) -> None:
        if self.type not in LEVELS:
            raise BadInput(f"a grid has {_some(WIDTHS)} or 3 levels, or a table of {_some(TABLES)}, not {self.levels}")
        if self.scales.dtype not in (torch.float32, torch.float16):
            raise BadInput(f"scales are float32 or float16, not {self.scales.dtype}")
        if self.zeros is not None and (self.zeros.shape != self.scales.shape or self.zeros.dtype != torch.uint8):
            raise BadInput(f"zero points are uint8 {list(self.scales.shape)}, not {self.zeros.dtype} {list(self.zeros.shape)}")
        if self.zeros is not None and self.type not in WIDTHS:
            raise BadInput("only steps that are codes of whole bits have zero points, not a table, and not -1, 0 and 1")
        if self.table is not None and (self.table.dtype != torch.float32 or bool((self.table.diff() < 0).any())):
            raise BadInput(f"a table is float32 and never falls, not {self.table.dtype} {self.table.tolist()[:4]} ...")

    @cached_property
    def type(self) -> str:
        """As formats and kernels call it."""
        if self.table is not None:
            return f"l{(self.levels - 1).bit_length()}" if self.table.shape == (self.levels,) else "?"
        return "t" if self.levels == 3 else f"i{(self.levels - 1).bit_length()}" if self.levels in LEVELS.values() else "?"

    @property
    def has_zero(self) -> bool:
        """Whether a weight of zero is one of the values."""
        return self.table is None or bool((self.table == 0).any())

    def zero(self) -> Tensor:
        """The zero points of steps that are codes, uint8 [...]."""
        return torch.full_like(self.scales, self.levels // 2, dtype=torch.uint8) if self.zeros is None else self.zeros

    def codes(self, w: Tensor) -> Tensor:
        """The code whose value is nearest, uint8 [..., n], to weights [..., n], a group in the last dimension."""
        scales = self.scales.float()[..., None]
        steps = w.float() * torch.where(scales != 0, 1 / scales, 0.0)
        if self.table is None:
            return steps.round_().add_(self.zero()[..., None]).clamp_(0, self.levels - 1).to(torch.uint8)
        return torch.bucketize(steps.contiguous(), (self.table[1:] + self.table[:-1]) / 2).to(torch.uint8)

    def below(self, w: Tensor) -> Tensor:
        """The lower of the two codes, one apart, between whose values weights [..., n] lie, or that are next to them, uint8 [..., n]."""
        scales = self.scales.float()[..., None]
        steps = w.float() * torch.where(scales != 0, 1 / scales, 0.0)
        if self.table is None:
            return steps.floor_().add_(self.zero()[..., None]).clamp_(0, self.levels - 2).to(torch.uint8)
        return (torch.bucketize(steps.contiguous(), self.table, right=True) - 1).clamp_(0, self.levels - 2).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """What these codes stand for, float32 [..., n]."""
        steps = codes.float().sub_(self.zero().float()[..., None]) if self.table is None else self.table[codes.int()]
        return steps.mul_(self.scales.float()[..., None])

    def column(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """What tells of columns [out] of one group, one after the other, their codes and values, as `codes` and `values` do: all that is
        the grid's alone is computed once."""
        if self.table is not None:
            def looked_up(w: Tensor) -> tuple[Tensor, Tensor]:
                q = self.codes(w[:, None, None])
                return q[:, 0, 0], self.values(q)[:, 0, 0]

            return looked_up
        scales, zeros, top = self.scales.float()[:, 0], self.zero().float()[:, 0], self.levels - 1
        inverse = torch.where(scales != 0, 1 / scales, 0.0)

        def counted(w: Tensor) -> tuple[Tensor, Tensor]:
            q = (w * inverse).round_().add_(zeros).clamp_(0, top)
            return q.to(torch.uint8), q.sub_(zeros).mul_(scales)

        return counted

    def rows(self, at: slice) -> Grid:
        """The grid of some of the outputs, which the first dimension of the scales counts."""
        return replace(self, scales=self.scales[at], zeros=None if self.zeros is None else self.zeros[at])

    def group(self, at: int | slice) -> Grid:
        """The grid of some of the groups, which the last dimension of the scales counts."""
        return replace(self, scales=self.scales[..., at], zeros=None if self.zeros is None else self.zeros[..., at])


def _some(types: dict[str, int]) -> str:
    return ", ".join(str(1 << bits) for bits in types.values())


@dataclass(frozen=True)
class Codes:
    """A weight [out, in]: `codes` uint8 [out, in] on a `grid` with one scale [out, groups] for every `group` inputs of an output; the
    last group may be shorter."""

    codes: Tensor
    grid: Grid
    group: int

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.ndim != 2 or 0 in self.codes.shape:
            raise BadInput(f"codes are uint8 [out, in], not {self.codes.dtype} {list(self.codes.shape)}")
        out, inputs = self.codes.shape
        if not 1 <= self.group <= inputs:
            raise BadInput(f"a group of codes is 1 to {inputs} inputs here, not {self.group}")
        if int(self.codes.max()) >= self.grid.levels:
            raise BadInput(f"codes of {self.grid.levels} levels are below {self.grid.levels}, not {int(self.codes.max())}")
        if self.grid.scales.shape != (want := (out, -(-inputs // self.group))):
            raise BadInput(f"scales are {list(want)}, not {list(self.grid.scales.shape)}")

    @property
    def type(self) -> str:
        return self.grid.type

    @property
    def bits(self) -> int:
        """Of a code."""
        return (self.grid.levels - 1).bit_length()

    @property
    def nbytes(self) -> int:
        """Of the codes, as many bits each as they have, and of what the grid has."""
        grid = (self.grid.scales, self.grid.zeros, self.grid.table)
        return -(-self.codes.numel() * self.bits // 8) + sum(t.nbytes for t in grid if t is not None)

    def weight(self) -> Tensor:
        """What it stands for, float32 [out, in]."""
        out, inputs = self.codes.shape
        return self.grid.values(grouped(self.codes, self.group)).reshape(out, -1)[:, :inputs].contiguous()

    def parts(self) -> dict[str, Tensor]:
        """As a change carries them; `grid` int32: levels and group."""
        parts = {"codes": self.codes, "scales": self.grid.scales,
                 "grid": torch.tensor([self.grid.levels, self.group], dtype=torch.int32, device=self.codes.device)}
        return parts | {k: t for k, t in (("zeros", self.grid.zeros), ("table", self.grid.table)) if t is not None}

    def change(self, mask: Tensor | None = None) -> Change:
        """As an edit returns it: the parts, what they decode to, and the pattern `mask` it keeps."""
        return Change(self.weight(), self.parts(), mask)

    @staticmethod
    def among(parts: Mapping[str, Tensor]) -> Codes | None:
        """The codes among the parts of a change; None where there are none. BadInput where they contradict each other."""
        if "codes" not in parts:
            return None
        levels, group = parts["grid"].tolist()
        return Codes(parts["codes"], Grid(parts["scales"], levels, parts.get("zeros"), parts.get("table")), group)


def e4m3(device: torch.device | None = None) -> Tensor:
    """The numbers of float8 (e4m3) in order, [256] float32: below 128 the negative ones. At either end two codes are one number."""
    sizes = torch.arange(127, dtype=torch.uint8, device=device or "cpu").view(torch.float8_e4m3fn).float()
    sizes = torch.cat([sizes, sizes[-1:]])
    return torch.cat([-sizes.flip(0), sizes])


def e4m3_step(table: Tensor) -> float | None:
    """What the numbers of e4m3 are multiplied by in a table of codes, whatever its ends are; None where it has others."""
    if len(table) != 256:
        return None
    step = float(table[-2]) / 448
    return step if torch.equal(table[1:-1], e4m3(table.device)[1:-1] * step) else None


# ---- fitting ----------------------------------------------------------------------------------
def grouped(t: Tensor, group: int) -> Tensor:
    """[out, in] -> [out, groups, group], the last group filled up with zeros."""
    more = -t.shape[1] % group
    return (torch.nn.functional.pad(t, (0, more)) if more else t).reshape(len(t), -1, group)


def length(group: int, inputs: int) -> int:
    """Of the groups of so many inputs: 0 stands for the row, and so does more than it has. BadInput for a negative one."""
    if group < 0:
        raise BadInput(f"a group is so many inputs, 0 for the row, not {group}")
    return min(group, inputs) or inputs


def rounded(w: Tensor, grid: Grid, group: int) -> Codes:
    """Every weight [out, in] as the nearest code of its group's grid."""
    codes = grid.codes(grouped(w, group)).view(len(w), -1)[:, : w.shape[1]]
    return Codes(codes.contiguous(), grid, group)


def stored(scales: Tensor, group: int) -> Tensor:
    """Scales in the type they are stored in, before weights are rounded by them: float32 for rows (0), float16 for groups."""
    return scales.clamp_max(65504).half() if group else scales


def finite(w: Tensor) -> Tensor:
    """BadInput where a weight is not."""
    if not all(bool(torch.isfinite(x)) for x in w.aminmax()):  # NaN and inf show in the extremes
        raise BadInput("a weight is not finite: there is no code for it")
    return w


def integers(w: Tensor, bits: int, group: int = 0, asymmetric: bool = False, shrink: Tensor | float = 1.0) -> Grid:
    """Equal steps over every group (0: the row) of w [out, in]: symmetric, scale = max |w| / (2^(bits - 1) - 1); asymmetric, from
    min(w, 0) to max(w, 0). `shrink` [out, groups] makes ranges smaller. BadInput for other bits than 8, 4, 3 and 2."""
    if bits not in WIDTHS.values():
        raise BadInput(f"codes have {', '.join(map(str, WIDTHS.values()))} bits, not {bits}")
    each, levels = grouped(finite(w).float(), length(group, w.shape[1])), 1 << bits
    if not asymmetric:
        return Grid(stored(each.abs().amax(-1) * shrink / (levels // 2 - 1), group), levels)
    low, high = each.amin(-1).clamp_max(0) * shrink, each.amax(-1).clamp_min(0) * shrink
    scales = stored((high - low) / (levels - 1), group)
    wide = scales.float()
    zeros = (-low * torch.where(wide > 0, 1 / wide, 0.0)).round().clamp(0, levels - 1)
    return Grid(scales, levels, zeros.to(torch.uint8))


def mean_size(w: Tensor, group: int) -> Tensor:
    """Mean |w| of every group (0: the row) of w [out, in], [out, groups]."""
    n = length(group, w.shape[1])
    each = grouped(finite(w).float(), n)
    return each.abs().sum(-1) / (w.shape[1] - n * torch.arange(each.shape[1], device=w.device)).clamp_max(n)


def thirds(w: Tensor, group: int = 0) -> Grid:
    """-1, 0 and 1 times the mean |w| of every group (0: the row) of w [out, in]."""
    return Grid(stored(mean_size(w, group), group), 3)


def steps(w: Tensor, table: Tensor, group: int = 0, shrink: Tensor | float = 1.0) -> Grid:
    """The steps of `table`, whose largest magnitude meets the largest of every group (0: the row) of w [out, in]."""
    most = grouped(finite(w).float(), length(group, w.shape[1])).abs().amax(-1) * shrink
    return Grid(stored(most / table.abs().max(), group), len(table), table=table)


def nearest(w: Tensor, bits: int, group: int = 0, *, asymmetric: bool = False, ternary: bool = False) -> Codes:
    """w [out, in] on `integers`, or on `thirds`. A weight of zero stays zero."""
    grid = thirds(w, group) if ternary else integers(w, bits, group, asymmetric)
    return rounded(w, grid, length(group, w.shape[1]))


# ---- clipping ---------------------------------------------------------------------------------
CLIPS = ("max", "mse", "percentile", "entropy", "rms")
TRIED, LEAST = 40, 0.2  # shares of the range that are tried, and the smallest
BINS = 2048             # of the histogram whose entropy is compared
SPREAD = 2.4            # root mean squares that a range by `rms` reaches


def clipped(w: Tensor, group: int, clip: str, share: float, fit: Callable[[Tensor | float], Grid]) -> Grid:
    """What `fit` makes of the share of every group's range that `clip` chooses for w [out, in] in groups (0: the row).

    max: all of it; mse: the one of 40 between 1 and 0.2 with the least squared error; percentile: up to the magnitude that a
    `share` of the group is below; entropy: one share for the whole of w, the one whose histogram loses least to the reference by
    Kullback and Leibler; rms: up to 2.4 times the root mean square, where that is less than all. BadInput for another name, or a
    share that is not above 0 and at most 1.
    """
    if clip not in CLIPS:
        raise BadInput(f"a range is clipped by {', '.join(CLIPS)}, not {clip}")
    if not 0 < share <= 1:
        raise BadInput(f"a percentile is a share above 0 and at most 1, such as 0.999, not {share:g}")
    group = length(group, w.shape[1])
    each = grouped(finite(w).float(), group)
    real = grouped(torch.ones_like(w[:1], dtype=torch.float32), group)  # not what fills the last group up
    if clip == "mse":
        return fit(_least_error(each, real, fit))
    if clip == "percentile":
        most = each.abs().amax(-1)
        below = torch.stack([g[..., : int(n)].abs().quantile(share, -1) for g, n in zip(each.unbind(1), real.sum(-1)[0], strict=True)], 1)
        return fit(torch.where(most > 0, below / most, 1.0))
    if clip == "rms":
        most, reach = each.abs().amax(-1), SPREAD * (each.square().sum(-1) / real.sum(-1)).sqrt()
        return fit(torch.where(most > reach, reach / most, 1.0))
    return fit(_least_surprise(each, real, fit(1.0).levels) if clip == "entropy" else 1.0)


def _least_error(each: Tensor, real: Tensor, fit: Callable[[Tensor | float], Grid]) -> Tensor:
    """The share of each group's range that leaves the least squared error, [out, groups]."""
    shrink = torch.ones_like(each[..., 0])
    least = torch.full_like(shrink, torch.inf)
    for i in range(TRIED):
        share = 1 - (1 - LEAST) * i / (TRIED - 1)
        grid = fit(share)
        off = grid.values(grid.codes(each)).sub_(each).square_().mul_(real).sum(-1)
        better = off < least
        least, shrink = torch.where(better, off, least), shrink.masked_fill(better, share)
    return shrink


def _least_surprise(each: Tensor, real: Tensor, levels: int) -> float:
    """The share of the range for which the divergence of the clipped histogram from the one in `levels` / 2 steps is least."""
    most = each.abs().amax(-1, keepdim=True)
    sizes = (each.abs() / torch.where(most > 0, most, 1.0))[real.expand_as(each) > 0]
    hist = torch.bincount((sizes * BINS).long().clamp_max(BINS - 1), minlength=BINS).double()
    hist[0] = 0  # zeros are kept exactly, whatever the range
    half = max(2, levels // 2)
    found: tuple[float, float] = (torch.inf, 1.0)
    for end in range(max(half, int(LEAST * BINS)), BINS + 1, max(1, BINS // 256)):
        seen = hist[:end].clone()
        said = seen.clone()
        seen[-1] += hist[end:].sum()
        part = torch.arange(end, device=each.device) * half // end
        count = torch.zeros(half, dtype=torch.float64, device=each.device)
        mass, wide = count.index_add(0, part, said), count.index_add(0, part, (said > 0).double())
        guess = torch.where(said > 0, (mass / wide.clamp_min(1))[part], 0.0)
        if float(guess.sum()) == 0 or float(seen.sum()) == 0:
            continue
        p, q = seen / seen.sum(), guess / guess.sum()
        lost = float(torch.where(p > 0, p * (p / q.clamp_min(1e-12)).log(), 0.0).sum())
        found = min(found, (lost, end / BINS))
    return found[1]
