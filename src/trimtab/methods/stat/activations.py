"""What activations say beyond the moments of a site's own input."""
from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.gates import firing
from trimtab.methods.stat.moments import TOKENS

ROUTED = 1024  # of a batch that a router learns from


@method("stat", of="mid", merge="sum", mean=True, done=torch.sqrt)
def act_norm(x: Tensor) -> Tensor:
    """Root mean square of each channel between the two halves of an MLP: [out] for gate and up, else [in].

    A site that feeds another one (gate and up feed down) is given the input of that other site, whose channels are its
    own outputs. Any other site is given its own input.

    Formula: sqrt(E[y_i^2])
    Source: DaSS, arXiv:2405.01943, section 3 as remembered
    Deviations: root mean square over tokens in place of the norm of their sum; the order is the same
    """
    return x.float().square().sum(0)


@method("stat", of="sublayer", merge="sum", mean=True)
def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Mean cosine between a token before and after a sublayer, [1]. Near 1 means the sublayer changes little.

    x, y [tokens, width]: the residual stream before and after. A token that is zero on either side counts as 0.

    Formula: E_t[<x_t, y_t> / (|x_t| |y_t|)]
    Source: LLM-Drop, arXiv:2406.15786, section 3 as remembered
    Deviations: the similarity itself, not the importance 1 - similarity
    """
    return torch.nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).sum().reshape(1)


@method("stat", of="block", merge="sum", mean=True)
def block_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Mean cosine between a token before and after a block, [1]. Near 1 means the block changes little.

    x, y [tokens, width]: the residual stream before and after. A token that is zero on either side counts as 0.

    Formula: E_t[<x_t, y_t> / (|x_t| |y_t|)]
    Source: ShortGPT, arXiv:2403.03853
    Deviations: the similarity itself, not the influence 1 - similarity
    """
    return torch.nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).sum().reshape(1)


@method("stat", of="sublayer", merge="sum", mean=True)
def stream_sq(x: Tensor, y: Tensor) -> Tensor:
    """Mean square of every channel of the residual stream before a sublayer and after it, [2, width].

    Formula: E_t[x_tc^2], E_t[y_tc^2]
    Source: textbook
    Deviations: none
    """
    return torch.stack([t.float().square().sum(0) for t in (x, y)])


def deviation(value: Tensor) -> Tensor:
    squares, means = value.unflatten(0, (2, 2))
    return (squares - means.square()).clamp_min(0).sqrt().float()


@method("stat", of="sublayer", merge="sum", mean=True, done=deviation)
def stream_std(x: Tensor, y: Tensor) -> Tensor:
    """Standard deviation over tokens of every channel of the residual stream before a sublayer and after it, [2, width].

    Formula: sqrt(E_t[x_tc^2] - E_t[x_tc]^2), and of y
    Source: textbook
    Deviations: none
    """
    return torch.stack([f(t.double()).sum(0) for f in (torch.square, torch.clone) for t in (x, y)])


@method("stat", of="sentence", merge="sum", done=torch.sqrt)
def sentence_abs(x: Tensor) -> Tensor:
    """How large each input is in the mean of a sequence, and that over all sequences, [in].

    x [tokens, in]: the input of one sequence.

    Formula: (sum_s (E_t |x_tj|)^2)^(1/2)
    Source: Minitron, arXiv:2407.14679, section 2.2
    Deviations: none
    """
    return x.float().abs().mean(0).square()


@method("stat", of="hidden", merge="cat")
def hidden_gate(x: Tensor, y: Tensor) -> Tensor:
    """The gates of an MLP, activated, for some of the tokens, [tokens, neurons]: at most 128 of a batch, evenly spread.

    x, y [tokens, neurons]: the gates, and what they multiply.

    Formula: f(x_t W_gate)
    Source: textbook
    Deviations: none
    """
    return x[:: -(-len(x) // TOKENS)].float().clone()


@method("stat", of="hidden", merge="sum", mean=True)
def hidden_up(x: Tensor, y: Tensor) -> Tensor:
    """Mean magnitude of what the gates of an MLP multiply, [neurons].

    x, y [tokens, neurons]: the gates, activated, and what they multiply.

    Formula: E_t[|u_ti|]
    Source: He et al. 2024 (CHESS), arXiv:2409.01366, section 3.1
    Deviations: none
    """
    return y.float().abs().sum(0)


@method("stat", of="fed", merge="cat")
def source(x: Tensor, y: Tensor) -> Tensor:
    """What a sublayer is given, for some of the tokens, [tokens, width]: at most 1024 of a batch, evenly spread.

    x [tokens, width], y [tokens, in]: what the sublayer is given, and what the site that ends it makes its output of.

    Formula: x_t
    Source: textbook
    Deviations: none
    """
    return x[:: -(-len(x) // ROUTED)].float().clone()


@method("stat", of="fed", merge="cat")
def fed(x: Tensor, y: Tensor) -> Tensor:
    """What the site that ends a sublayer is given, for the tokens of `source`, [tokens, in].

    x [tokens, width], y [tokens, in]: what the sublayer is given, and what the site that ends it makes its output of.

    Formula: h_t
    Source: textbook
    Deviations: none
    """
    return y[:: -(-len(y) // ROUTED)].float().clone()


@method("stat", of="sentence", merge="cat")
def firings(x: Tensor) -> Tensor:
    """How many tokens of each sequence have an input in their core, [sequences, in].

    x [tokens, in]: the input of one sequence. The core of a token is the 0.4 of its inputs above zero that are largest, rounded up.

    Formula: sum_t 1[x_ti is among the 0.4 of {x_tj > 0} that are largest]
    Source: Wang et al. 2024 (CoreInfer), arXiv:2410.18311, definitions 1 and 2
    Deviations: none
    """
    return firing(x)[None]
