from __future__ import annotations

from typing import Any

from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.basis import Basis, mixed


def shared(n: int, knobs: dict[str, Any], device: Any) -> Basis:
    return mixed(n, knobs["seed"], device)


@method("rewrite", basis=True, shared=shared)
def quarot(w: Tensor, *, seed: int = 0) -> Basis:
    """One randomly signed Hadamard basis for the residual stream, one for every head, and one for inputs that no neighbour can turn.

    `w` [out, in]: all sites that read the input; returns the basis of the inputs where they are no residual stream and no heads (those of
    the MLP's last map). Packed, neighbours take the others: table of embeddings, norms and biases; the head turns its inputs back.

    Formula: x' = H D x for the stream, W' = W diag(g) D H^T where it is read behind a norm of weight g, H D W where it is written;
        for every head of v, R v, and o with R^T; H D as `hadamard` has it
    Source: Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 3, stages 1a to 1c
    Deviations: queries and keys are not turned behind their positions; one randomly signed matrix for all heads; where n is no power of
        two as in `hadamard`; for networks of gated MLPs and RMS norms with one stream that nothing else reads
    """
    return mixed(w.shape[1], seed, w.device)
