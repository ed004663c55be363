from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.basis import Basis, mixing, split

UNIFORM = 1.8  # kurtosis of what lies evenly between two ends
ROWS = 512     # outputs that are looked at
STEP = 0.3     # how far the first step turns, in radians over all entries of a matrix


@method("rewrite", basis=True)
def kurtail(w: Tensor, *, iters: int = 60, seed: int = 0) -> Basis:
    """Inputs in a learned orthogonal basis in which the weights lie as evenly between their ends as they can.

    `w` [out, in]: all sites that read the input; returns the basis of the inputs.

    Formula: min over orthogonal R of mean_i |kurt(W_i R^T) - 1.8|, kurt(v) = mean((v - m)^4) / var(v)^2
    Source: Akhondzadeh et al. 2025 (KurTail), arXiv:2503.01483, section 3: the kurtosis of a uniform distribution as the aim
    Deviations: of the weights of 512 outputs, evenly spread, which is what is rounded to few bits here, where the source takes the
        inputs of attention and MLP; R as the product of two small matrices at every input, where the source has one for the residual
        stream; by steps of falling length on the logarithm of each, from a Hadamard matrix
    """
    a, b = split(w.shape[1])
    g = torch.Generator(w.device).manual_seed(seed)
    start = mixing(a, g), mixing(b, g)
    some = w.float() if len(w) <= ROWS else w[torch.linspace(0, len(w) - 1, ROWS, device=w.device).long()].float()
    some = (some / some.std(1, keepdim=True).clamp_min(1e-12)).detach()
    with torch.enable_grad():
        turns = [torch.zeros(len(m), len(m), device=w.device, requires_grad=True) for m in start]

        def basis() -> Basis:
            return Basis(None, *(torch.linalg.matrix_exp(t - t.T) @ m for t, m in zip(turns, start, strict=True)))

        for k in range(iters):
            v = basis().weight(some)
            v = v - v.mean(1, keepdim=True)
            kurtosis = v.pow(4).mean(1) / v.square().mean(1).square().clamp_min(1e-12)
            slopes = torch.autograd.grad((kurtosis - UNIFORM).abs().mean(), turns)
            with torch.no_grad():
                for t, slope in zip(turns, slopes, strict=True):
                    t -= STEP * (1 - k / iters) * slope / slope.norm().clamp_min(1e-12)
        found = basis()
    return Basis(None, *(t.detach().contiguous() for t in (found.left, found.right) if t is not None))
