"""What activations say beyond the moments of a site's own input."""
from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method


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
