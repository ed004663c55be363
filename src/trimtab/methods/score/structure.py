"""Scores of what a network is made of: heads and neurons by what a site is given of them, sublayers by what they change.

They are told by input, [in], those of a head in equal parts over its inputs, or of all of a sublayer, [1].
"""
from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method


@method("score", of="input")
def amp(w: Tensor, heads: Tensor, in_abs: Tensor, sample: Tensor) -> Tensor:
    """What inputs become in the weights that read them, in the mean; for a neuron its own size.

    `w` [out, in] of a site that ends a sublayer, whose inputs are heads[0] query heads; `in_abs` [in]; `sample` [tokens, in].

    Formula: a head: E_t ||W_h x_th||_1; a neuron: E_t |x_tj|
    Source: Efficient LLMs with AMP, arXiv:2504.21174
    Deviations: means over all tokens at once, not of a mean per prompt; those of heads over a sample of the tokens
    """
    h, width = int(heads[0]), w.shape[1]
    if h == width:
        return in_abs.float()
    d = width // h
    worth = torch.stack([(sample[:, n * d:(n + 1) * d].float() @ w[:, n * d:(n + 1) * d].float().T).abs().sum(1).mean() for n in range(h)])
    return (worth / d).repeat_interleave(d)


@method("score", of="input")
def transact(heads: Tensor, in_sq: Tensor) -> Tensor:
    """How large what passes inside a sublayer is: of a neuron over all tokens, of a head its mean dimension and ten times its largest.

    Of a site that ends a sublayer, whose inputs are heads[0] query heads; `in_sq` [in].

    Formula: s_j = ||x_j||_2 over all tokens; a head of d: mean_j s_j + (10 / d) max_j s_j
    Source: TransAct, arXiv:2407.05690, by its published program
    Deviations: root mean square over tokens in place of the norm; one shot, without training between shots
    """
    h, width = int(heads[0]), len(in_sq)
    s = in_sq.float().sqrt()
    if h == width:
        return s
    d = width // h
    each = s.view(h, d)
    return ((each.mean(1) + 10 / d * each.amax(1)) / d).repeat_interleave(d)


@method("score", of="input")
def minitron(heads: Tensor, sentence_abs: Tensor) -> Tensor:
    """How large an input is in the mean of a sample, and that over all samples; of a head the norm over its dimensions.

    Of a site that ends a sublayer, whose inputs are heads[0] query heads; `sentence_abs` [in].

    Formula: a_j = (sum_samples (mean_tokens |x_j|)^2)^(1/2); a head: ||a_j||_2 over its dimensions
    Source: Minitron, arXiv:2407.14679, section 2.2; arXiv:2408.11796
    Deviations: none
    """
    h, width = int(heads[0]), len(sentence_abs)
    a = sentence_abs.float()
    if h == width:
        return a
    d = width // h
    return (a.view(h, d).norm(dim=1) / d).repeat_interleave(d)


@method("score", of="sublayer")
def influence(cosine: Tensor) -> Tensor:
    """How far a sublayer turns the residual stream.

    `cosine` [1], of the stream before and after it.

    Formula: 1 - E_t cos(x_t, x_t + f(x_t))
    Source: LLM-Drop, arXiv:2406.15786, section 3
    Deviations: none
    """
    return 1 - cosine.float()


@method("score", of="sublayer")
def block_influence(block_cosine: Tensor) -> Tensor:
    """How far a block turns the residual stream.

    `block_cosine` [1], of the stream before and after it.

    Formula: 1 - E_t cos(x_t, y_t), x and y the stream before and after the block
    Source: ShortGPT, arXiv:2403.03853 (block influence); LLM-Drop, arXiv:2406.15786, section 3 (block drop)
    Deviations: none
    """
    return 1 - block_cosine.float()


@method("score", of="sublayer")
def entropy(stream_std: Tensor) -> Tensor:
    """How much a sublayer changes the entropy of the features in the residual stream.

    `stream_std` [2, width]: standard deviation of every channel before and after it.

    Formula: |H(y) - H(x)|, H = mean_c log std_c: the entropy of independent Gaussian channels, but for what is the same of both
    Source: MLP Can Be A Good Transformer Learner, arXiv:2404.05657
    Deviations: the source drops attentions whose removal changes the entropy of a block's output least, by a greedy search, and trains
        while they fade; this looks at each by itself in the whole network, and its formula is from memory, not confirmed
    """
    x, y = stream_std.float().clamp_min(1e-12).log().mean(1)
    return (y - x).abs().reshape(1)


@method("score", of="sublayer")
def shallow(depth: Tensor) -> Tensor:
    """The nearer to the input, the more it is worth.

    `depth`: 0 for the first block, 1 for the last.

    Formula: 2 - depth
    Source: Attention Is All You Need But You Don't Need All Of It, arXiv:2407.15516 (deeper attention sublayers go first)
    Deviations: none known; the paper's abstract was read, and that it drops from the last layer on
    """
    return 2 - depth.float().reshape(1)


@method("score", of="input")
def activation(in_abs: Tensor) -> Tensor:
    """How large an input is in the mean, `in_abs` [in].

    Formula: E_t |x_tj|
    Source: weight subcloning, arXiv:2312.09299, by summaries of it: the mean magnitude over batch and tokens
    Deviations: of what linear layers meet, so channels of the residual stream count as norms leave them, each norm alike
    """
    return in_abs.float()
