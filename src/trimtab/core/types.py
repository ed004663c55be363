"""The values that travel along the line. Plain data: no behaviour that decides anything."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class BadInput(Exception):
    """The user's input is wrong. The message is one line: what was wrong, and what would be right. Exit code 2."""


class Failed(Exception):
    """The run could not be finished, or the proof was not met. One line. Exit code 1."""


@dataclass(frozen=True)
class Change:
    """What an edit or a repair returns for one site.

    `w` [out, in] is what the parts decode to; `mask` (bool, True = kept) is the pattern it must respect;
    `parts` are the codes, scales, factors a format stores; `pre` are operations on the site's input, in order; `bias` [out] is to be
    added to the bias of the site. `feeders` is what becomes of the sites whose outputs are its inputs: weights by role, biases by
    "<role>.bias".
    """

    w: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    pre: tuple[Any, ...] = ()
    bias: Tensor | None = None
    feeders: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """One linear map `[out, in]`: a view of a parameter, in the canonical naming `<block>.<group>.<role>`.

    `param` is the parameter's name inside its block's module. The weight is
    `param[expert]` if `expert` is given, transposed if `transposed` (stored `[in, out]`), then `rows` of it.
    `input` names the activation that feeds it: sites with equal `input` in one block see the same tensor.
    `consumer` is the name of the site that reads this one's output as its own input channels (gate and up -> down).
    """

    name: str
    block: int
    group: str                           # "attn" or "mlp"
    role: str                            # q k v o gate up down
    param: str
    shape: tuple[int, int]
    input: str                           # "attn.in" "attn.mid" "mlp.in" "mlp.mid", with "experts.<e>." in front for experts
    expert: int | None = None
    transposed: bool = False
    rows: tuple[int, ...] | None = None  # (begin, end), or all the row numbers when they are interleaved
    consumer: str | None = None

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def row_index(self) -> slice | Tensor | None:
        """Its rows in the parameter; None for all of them."""
        if self.rows is None:
            return None
        return slice(*self.rows) if len(self.rows) == 2 else torch.tensor(self.rows)

    def get(self, param: Tensor) -> Tensor:
        """The site's weight as a new contiguous `[out, in]` tensor."""
        w = param.detach() if self.expert is None else param.detach()[self.expert]
        w = w.T if self.transposed else w
        rows = self.row_index()
        return (w if rows is None else w[rows]).clone(memory_format=torch.contiguous_format)

    def put(self, param: Tensor, w: Tensor) -> None:
        """Write `w` [out, in] back into the parameter, in place, in its stored layout and dtype."""
        if tuple(w.shape) != self.shape:
            raise ValueError(f"{self.name}: got {tuple(w.shape)}, the site is {self.shape}")
        with torch.no_grad():
            dst = param.detach() if self.expert is None else param.detach()[self.expert]
            dst = dst.T if self.transposed else dst
            rows = self.row_index()
            if rows is None:
                dst.copy_(w)
            else:
                dst[rows] = w.to(dst.dtype)


# Histogram of non-negative scores: 64 bins an octave from 2^-70 to 2^60, bin 0 for anything smaller (zero too).
OCTAVE, LOWEST, BINS = 64, -70, 130 * 64


@dataclass
class Summary:
    """What a budget may see of one site's scores: a histogram that can be merged, never the scores.

    `count` entries, their `total`, and `hist` [BINS] int64 over log2(score). `edge(b)` is the lower edge of bin b.
    """

    site: Site
    count: int
    total: float
    hist: Tensor

    @staticmethod
    def of(site: Site, s: Tensor) -> Summary:
        total, hist = 0.0, torch.zeros(BINS, dtype=torch.int64)
        for part in s.detach().flatten().split(1 << 20):  # a site's scores in double, several times over, would show
            x = part.double()
            at = ((torch.log2(x.clamp_min(2.0 ** (LOWEST - 1))) - LOWEST) * OCTAVE).floor().long() + 1
            hist += torch.bincount(at.clamp(0, BINS - 1), minlength=BINS)
            total += float(x.sum())
        return Summary(site, s.numel(), total, hist)

    @property
    def mean(self) -> float:
        return self.total / self.count

    @staticmethod
    def edge(b: int) -> float:
        return 0.0 if b <= 0 else 2.0 ** (LOWEST + (b - 1) / OCTAVE)

    def above(self, value: float) -> float:
        """How many entries are greater than `value` (to within one bin, 1.1 % of the value)."""
        if value <= 0:
            return float(self.count - int(self.hist[0]))
        b = math.floor((math.log2(value) - LOWEST) * OCTAVE) + 1
        return float(self.hist[max(b, 0) + 1:].sum())


@dataclass(frozen=True)
class Choices:
    """What a budget may see of the grids that one site may take: their `names`, and what each takes in `bytes` and loses (`losses`)."""

    site: Site
    names: tuple[str, ...]
    bytes: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Spectrum:
    """What a budget may see of the ranks that a site may have: `lost`, of every rank from 0 on, what the network's loss rises by behind the
    best factors of that rank."""

    site: Site
    lost: tuple[float, ...]


@dataclass(frozen=True)
class Ranking:
    """What a budget may see of a training that ranks the singular values of a site: their `scores`, the lowest go first."""

    site: Site
    scores: tuple[float, ...]


class Trial(Protocol):
    """A block as a budget sees it that tries shares on it: its `sites`, by name."""

    sites: Mapping[str, Site]

    def error(self, shares: Mapping[str, float]) -> float:
        """How far the block's outputs are from those of the block itself where these sites compute a share of their inputs, and all others
        everything: 0 where nothing is left out."""


@dataclass(frozen=True)
class Seen:
    """What one sequence came to, padding left out: `hidden` [tokens, width] behind the last norm, and `dense`, what it is in the dense
    network; of the tokens that another one follows, `logits` [followed, vocabulary] and `following` [followed], that token."""

    hidden: Tensor
    dense: Tensor
    logits: Tensor
    following: Tensor


Start = Callable[[Change, torch.Generator], dict[str, Tensor]]
Weight = Callable[[Change, Mapping[str, Tensor]], Tensor]
Loss = Callable[[Seen], Tensor]


class Net(Protocol):
    """A network as a repair sees it that trains at its level: sites that were edited, and calibration samples to train on."""

    trained: list[Site]

    def fit(self, start: Start, weight: Weight, loss: Loss, *, lr: float, epochs: int, accumulate: int, seed: int,
            dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
        """Train the float32 tensors that `start` makes of every site's change, to lower the mean `loss` of a sequence; `weight` is the
        site's weight [out, in] that comes of them. Returns what did best on samples held out, in `dtype`, by site and name; nothing
        where the sites as they are did best."""

    def updates(self, start: Start, weight: Weight, loss: Loss, *, lr: float, epochs: int, accumulate: int,
                seed: int) -> Iterator[tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]]:
        """The same training as who asks for it sees it: what is trained, and the slopes that it is changed by next, which may be changed
        in place first; at the end once more, with slopes of no use. Nothing is judged, nothing kept."""


@dataclass(frozen=True)
class Claim:
    """What a paper says of its recipe: `better` of the two recipes (by our names) on `metric`, their figures as `said`."""

    text: str
    better: str
    than: str
    setting: str = "50%"
    said: str = ""


Progress = Callable[[str, int, int], None]  # stage, done, of
Batches = Iterable[dict[str, Tensor]]
