"""What stays of a network that is made as large as another one of its kind, as a start for training that.

A unit is asked about one dimension at a time: hidden neurons, heads of a group, groups of heads, channels of the residual stream.
"""
from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.select import top

SIZED = {"uses_knobs": "they are the sizes of the network, which become shares of every dimension of it"}
ALL = ("q", "k", "v", "gate", "up", "o", "down")


def ends(n: int, k: int) -> tuple[int, ...]:
    """Of n blocks k: as many of the first as of the last, or one more."""
    return (*range(-(-k // 2)), *range(n - k // 2, n))


def first(n: int, k: int) -> tuple[int, ...]:
    """Of n blocks the first k."""
    return tuple(range(k))


@method("unit", joint=("budget",), whole=True, ends=ALL, takes="network", blocks=ends, xfail=SIZED)
def subclone(s: Tensor, keep: float, *, config: str = "", layers: int = 0, width: int = 0, neurons: int = 0, experts: int = 0,
             shared: int = 0, heads: int = 0, kv_heads: int = 0, scaled: bool = False) -> Tensor:
    """The larger network's most important parts, and its first and last blocks.

    Sizes that are 0 stay as they are. `scaled`: weights make up for the inputs that went, as the source has it.

    Formula: the keep * n units with the largest sum of S_ij, channels by one sum over all that read the stream; blocks out of the middle
        go; a weight whose n inputs become n' times sqrt(n / n'), in the norm where it reads the stream
    Source: weight subcloning, arXiv:2312.09299, by summaries of it: one order for all layers, blocks from the middle, weights scaled so
        that outputs keep their standard deviation
    Deviations: the factor is not confirmed: it is right for inputs that do not correlate and are of one size; a table of embeddings is not
        scaled, and that it serves as a head too is made up for by the last norm; heads stay whole and are ranked as neurons are, which
        the summaries do not tell. Off unless asked for: the built-in model began its training worse with it
    """
    return top(s.float().sum(0)[None], round(keep * s.shape[1])).expand(s.shape).contiguous()


@method("unit", joint=("score", "budget"), whole=True, ends=ALL, takes="network", blocks=first, xfail=SIZED)
def select(s: Tensor, keep: float, *, config: str = "", layers: int = 0, width: int = 0, neurons: int = 0, experts: int = 0,
           shared: int = 0, heads: int = 0, kv_heads: int = 0) -> Tensor:
    """Parts of the larger network at even steps, and its first blocks. Weights stay what they are.

    Sizes that are 0 stay as they are.

    Formula: of n units those at floor(i n / n') for i = 0 .. n' - 1, n' = keep * n; the first blocks
    Source: weight selection, arXiv:2311.18823, section 3, and its published program
    Deviations: where n' does not divide n, the program's round(linspace(0, n, n')) ends beyond the last unit; heads and groups of heads are
        chosen as a whole, where the program steps through the channels of all; the head is chosen like all else, and not drawn anew
    """
    n = s.shape[1]
    kept = round(keep * n)
    mask = torch.zeros(n, dtype=torch.bool, device=s.device)
    mask[torch.arange(kept, device=s.device) * n // max(1, kept)] = True
    return mask.expand(s.shape).contiguous()
