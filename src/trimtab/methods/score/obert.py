from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput

ORDER = "blocks are of consecutive weights, so their order matters"
ROOM = 1 << 22  # entries of the float64 matrices inverted at a time


@method("score", xfail={"rows": ORDER, "inputs": ORDER})
def obert(w: Tensor, grads: Tensor, *, block: int = 50, damp: float = 1e-7) -> Tensor:
    """The loss of removing a weight, once the others of its block have made up for it.

    grads [n, out, in]. `damp` is added to the diagonal as it is, not as a share of its mean; too large a value turns the
    score into magnitude. BadInput if a block is singular or `block` is below 1.

    Formula: S_q = w_q^2 / (2 [F^-1]_qq); F = damp * I + (1/n) sum_i g_i g_i^T inside each block of consecutive weights
    Source: oBERT, arXiv:2203.07259, section 3 as remembered, in the form of the authors' code
    Deviations: each block is inverted at once in float64, where the authors update the inverse sample by sample; gradients
        are of sequences, not of batches; no recomputation between pruning steps
    """
    if block < 1:
        raise BadInput(f"obert(block={block}): a block has at least one weight, such as 50")
    g = grads.reshape(len(grads), -1)
    out = torch.empty(w.numel(), dtype=torch.float32, device=w.device)
    whole = w.numel() // block * block
    step = max(1, ROOM // (block * block)) * block
    spans = [(a, min(a + step, whole), block) for a in range(0, whole, step)]
    if whole < w.numel():
        spans.append((whole, w.numel(), w.numel() - whole))
    for a, b, size in spans:
        part = g[:, a:b].double().reshape(len(g), -1, size).transpose(0, 1)
        fisher = part.mT @ part / len(g)
        fisher.diagonal(dim1=-2, dim2=-1).add_(damp)
        lower, info = torch.linalg.cholesky_ex(fisher)
        if bool(info.any()):
            raise BadInput(f"obert(damp={damp:g}): the Fisher matrix of a block is singular; use a larger damp")
        inverse = torch.cholesky_inverse(lower).diagonal(dim1=-2, dim2=-1).flatten()
        out[a:b] = (w.reshape(-1)[a:b].double().square() / (2 * inverse)).float()
    return out.reshape(w.shape)
