"""A basis of the residual stream in which its last channels hardly matter."""
from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method


@method("wiring", of="axes")
def principal(gram: Tensor) -> Tensor:
    """The residual stream in its principal directions, the largest first. Exact, and in front of `channel` what goes is the least of it.

    `gram` [width, width]: the second moment of what norms make of the stream, without their weights, summed over all of them. Returns the
    basis, its directions in columns [width, width].

    Formula: sum_l E[x^T x] = Q diag(v) Q^T, v falling; embeddings E Q, readers W diag(g) Q behind a norm of weight g, which becomes 1,
        writers Q^T W
    Source: SliceGPT, arXiv:2401.15024 (Ashkboos et al. 2024), section 3, as remembered
    Deviations: one basis for all blocks, where the source has one of each with a map between them in the residual branch; a head that
        shares the table of embeddings gets a table of its own
    """
    return torch.linalg.eigh(gram.double()).eigenvectors.flip(1)
