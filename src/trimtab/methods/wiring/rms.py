"""Norms that need not take a mean off."""
from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method


@method("wiring", of="stream")
def rms(writes: Tensor) -> Tensor:
    """Whatever adds to the residual stream adds nothing to its mean, so that layer norms are root mean square norms. Exact.

    Of weights or biases that write the stream, channels first, those without the mean over channels.

    Formula: W' = (I - 1 1^T / d) W, b' = (I - 1 1^T / d) b, for embeddings, positions and the last maps of attention and MLP; then
        LN(x) = RMSNorm(x) + b, since mean(x) = 0
    Source: Pre-RMSNorm transformers, arXiv:2305.14858 (Jiang et al. 2023), section 3
    Deviations: means are left as far as the type of the files rounds; Pre-CRMSNorm, which drops one channel besides, is not made; a head
        that shares the table of embeddings gets a table of its own
    """
    return writes - writes.mean(0)
