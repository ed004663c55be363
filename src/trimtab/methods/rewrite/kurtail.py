from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.basis import Basis, mixing, split

UNIFORM = 1.8  # kurtosis of what lies evenly between two ends
ROWS = 512     # tokens, and outputs, that are looked at
STEP = 0.3     # how far the first step turns, in radians over all entries of a matrix


def few(t: Tensor) -> Tensor:
    """Some of the rows [n, in], evenly spread, each of length one."""
    t = t if len(t) <= ROWS else t[torch.linspace(0, len(t) - 1, ROWS, device=t.device).long()]
    return (t.float() / t.float().norm(dim=1, keepdim=True).clamp_min(1e-12)).detach()


def kurtosis(t: Tensor) -> Tensor:
    """Of every row [n, in]."""
    v = t - t.mean(1, keepdim=True)
    return v.pow(4).mean(1) / v.square().mean(1).square().clamp_min(1e-24)


@method("rewrite", basis=True)
def kurtail(w: Tensor, sample: Tensor, *, iters: int = 60, seed: int = 0, scale: float = 0.0) -> Basis:
    """Inputs in a learned orthogonal basis in which each token's lie as evenly between their ends as they can.

    `w` [out, in]: all sites that read the input; `sample` [tokens, in]; returns the basis of the inputs. `scale`: how much the same of
    the weights counts beside it, row by row, for a recipe that rounds no inputs.

    Formula: min over orthogonal R of mean_t |kurt(R x_t) - 1.8| + scale mean_i |kurt(R w_i) - 1.8|, kurt(v) = mean((v - m)^4) / var(v)^2
    Source: Akhondzadeh et al. 2025 (KurTail), arXiv:2503.01483, section 3: the kurtosis of a uniform distribution as the aim
    Deviations: R is the product of two small matrices at every input, learned there from 512 tokens, evenly spread, where the source
        learns one for the residual stream from the inputs of all attentions and MLPs; by steps of falling length on the logarithm of
        each, from a Hadamard matrix; the term of the weights is ours
    """
    a, b = split(w.shape[1])
    g = torch.Generator(w.device).manual_seed(seed)
    start = mixing(a, g), mixing(b, g)
    its = [(share, few(t)) for share, t in ((1.0, sample), (scale, w)) if share]
    with torch.enable_grad():
        turns = [torch.zeros(len(m), len(m), device=w.device, requires_grad=True) for m in start]

        def basis() -> Basis:
            return Basis(None, *(torch.linalg.matrix_exp(t - t.T) @ m for t, m in zip(turns, start, strict=True)))

        for k in range(iters):
            now = basis()
            loss = torch.stack([share * (kurtosis(now.of(t)) - UNIFORM).abs().mean() for share, t in its]).sum()
            slopes = torch.autograd.grad(loss, turns)
            with torch.no_grad():
                for t, slope in zip(turns, slopes, strict=True):
                    t -= STEP * (1 - k / iters) * slope / slope.norm().clamp_min(1e-12)
        found = basis()
    return Basis(None, *(t.detach().contiguous() for t in (found.left, found.right) if t is not None))
