"""What a network is made of, that can go as a whole: inputs of the sites that sublayers end in, with all that makes and reads them.

Every one of these units is a set of columns of such a site [out, in]; `heads` says how many query heads and key/value heads its inputs
are: (in, in) where they are hidden neurons.
"""
from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.select import top

PLANNED = {"uses_knobs": "the plan reads them, and asks for the number of units that it makes of them"}
ONE = {n: "there is one unit, and the plan has compared it with those of other sites" for n in ("uses_data", "prefers_the_larger")}


def columns(s: Tensor, keep: float, count: int, rows: int = 1) -> Tensor:
    """Mask [out, in] of the best of `count` equal runs of columns, round(keep * count) of them, as many of each of `rows` sets."""
    worth = s.float().sum(0).view(rows, count // rows, -1).sum(-1)
    kept = top(worth, round(keep * (count // rows)))
    return kept.view(-1, 1).expand(-1, s.shape[1] // count).reshape(1, -1).expand(s.shape).contiguous()


@method("unit", whole=True, ends=("down",), xfail=PLANNED)
def neuron(s: Tensor, keep: float, *, multiple: int = 32, feeders: bool = False) -> Tensor:
    """Hidden neurons of an MLP: a row of gate and up, a column of down.

    `multiple`: as many stay as are a multiple of it (of a sixteenth of all, where there are few). `feeders`: the scores of gate and up
    count as well as those of down.

    Formula: the round(keep * neurons) with the largest sum of S_ij over all that belongs to them
    Source: LLM-Pruner, arXiv:2305.11627, section 3.2, group importance by summation, as remembered
    Deviations: without `feeders` the scores of down's columns alone
    """
    return columns(s, keep, s.shape[1])


@method("unit", whole=True, ends=("o",), xfail=PLANNED)
def kvgroup(s: Tensor, keep: float, heads: Tensor, *, feeders: bool = False) -> Tensor:
    """A key/value head and all query heads that read it: rows of q, k and v, columns of o. A single head where each has its own.

    Formula: the round(keep * groups) with the largest sum of S_ij over all that belongs to them
    Source: LLM-Pruner, arXiv:2305.11627, section 3.2, as remembered
    Deviations: without `feeders` the scores of o's columns alone
    """
    return columns(s, keep, int(heads[1]))


@method("unit", whole=True, ends=("o",), xfail=PLANNED)
def head(s: Tensor, keep: float, heads: Tensor, *, feeders: bool = False) -> Tensor:
    """Query heads, as many of each group that shares its keys and values: rows of q, columns of o; whole groups where each has its own.

    Formula: of each group the round(keep * heads) with the largest sum of S_ij; of all, where a group is one head
    Source: Minitron, arXiv:2407.14679, section 2.2 (ranked inside a group)
    Deviations: without `feeders` the scores of o's columns alone
    """
    h, kv = map(int, heads)
    return columns(s, keep, h, 1 if h == kv else kv)


@method("unit", whole=True, ends=("o", "down"), xfail=PLANNED)
def inner(s: Tensor, keep: float, heads: Tensor, *, multiple: int = 32, feeders: bool = False) -> Tensor:
    """Key/value groups of an attention and hidden neurons of an MLP, the same share of both.

    Heads stay in a number that the family's config allows; what that is off the share, the neurons of the same block make up for.

    Formula: as `kvgroup` and `neuron` have it
    Source: TransAct, arXiv:2407.05690 (transitional activations); AMP, arXiv:2504.21174
    Deviations: the sources make up for nothing (TransAct), or for at most half a head's worth of neurons (AMP)
    """
    return columns(s, keep, int(heads[1]))


@method("unit", joint=("budget",), whole=True, ends=("q", "k", "v", "gate", "up"), takes="channel", xfail=PLANNED)
def channel(s: Tensor, keep: float, *, multiple: int = 32, scaled: bool = True) -> Tensor:
    """Channels of the residual stream, the same in every block: what writes them, what reads them, the norms, the embeddings, the head.

    `multiple`: as many stay as are a multiple of it. `scaled`: the weights of the norms take what their inputs lose of their size.

    Formula: the channels with the largest sum of S_ij over all sites that read them, a score of inputs once for each norm; a norm's weight
        times sqrt(mean_kept E[x_c^2] / mean_all E[x_c^2])
    Source: Minitron, arXiv:2407.14679, section 2.2 (embedding channels)
    Deviations: `scaled` is of this program: the source distils instead; the last norm's output does not count
    """
    return columns(s, keep, s.shape[1])


@method("unit", joint=("budget",), whole=True, ends=("o", "down"), takes="sublayer", xfail=ONE)
def sublayer(s: Tensor, keep: float) -> Tensor:
    """An attention or an MLP as a whole; the network's lowest go, jointly ranked.

    Formula: drop argmin_l sum_ij S_ij until the parameters left are at most the share
    Source: LLM-Drop, arXiv:2406.15786, section 3 (joint layer drop)
    Deviations: until a share of the parameters is reached, not a number of sublayers
    """
    return columns(s, keep, 1)


@method("unit", joint=("budget",), whole=True, ends=("o", "down"), takes="layer", xfail=ONE)
def layer(s: Tensor, keep: float) -> Tensor:
    """A block as a whole, attention and MLP; the network's lowest go.

    Formula: drop argmin_l sum_ij S_ij until the parameters left are at most the share
    Source: ShortGPT, arXiv:2403.03853; LLM-Drop, arXiv:2406.15786, section 3 (block drop)
    Deviations: until a share of the parameters is reached, not a number of blocks
    """
    return columns(s, keep, 1)
