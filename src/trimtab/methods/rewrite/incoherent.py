from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.basis import Basis, orthogonal, split


def random(n: int, seed: int, device: Any, scale: Tensor | None = None) -> Basis:
    """A random orthogonal basis of n, as a product of two whose sizes are as near to each other as can be."""
    g = torch.Generator(device).manual_seed(seed)
    a, b = split(n)
    return Basis(scale, orthogonal(a, g), orthogonal(b, g))


def outside(n: int, knobs: dict[str, Any], device: Any) -> Basis:
    return random(n, knobs["seed"] + 1, device)


@method("rewrite", basis=True, outside=outside)
def incoherent(w: Tensor, gram: Tensor, *, seed: int = 0) -> Basis:
    """Inputs and outputs in random bases, in which no weight and no input stands out.

    `w` [out, in]: all sites that read the input, `gram` [in, in]; returns the basis of the inputs; that of a site's outputs depends on
    their number alone.

    Formula: W' = U (W S) V^T, x' = V S^-1 x; U, V random orthogonal, each the product of two; S = (diag G / diag W^T W)^(1/4)
    Source: Chee et al. 2023 (QuIP), arXiv:2307.13304, section 4.1 and algorithm 2; rescaling as in the authors' code
    Deviations: no random permutation besides; S is one for all sites that read the input;
        sites that are rows of a larger weight keep the basis of their outputs
    """
    weights, inputs = w.float().square().sum(0), gram.diagonal().float()
    s = (inputs.clamp_min(1e-8 * inputs.mean()) / weights.clamp_min(1e-8 * weights.mean().clamp_min(1e-30))).pow(-0.25)
    return random(w.shape[1], seed, w.device, s)
