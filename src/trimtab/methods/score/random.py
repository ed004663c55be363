from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method

BLIND = "which weight is where makes no difference to chance"


@method("score", xfail={"rows": BLIND, "inputs": BLIND})
def random(w: Tensor, *, seed: int = 0) -> Tensor:
    """Keep whatever chance keeps: the floor every other score has to beat.

    Equal seeds give equal scores for the same weights. The shape and the first row of weights enter the seed, or gate
    and up, and every block, would all be given one pattern. A weight that is zero scores 0 and goes first.

    Formula: S_ij = u_ij if W_ij != 0 else 0, u_ij uniform in [0, 1)
    Source: common practice
    Deviations: none
    """
    bits = w[0].float().contiguous().view(torch.int32).long()
    site = int((bits * torch.arange(1, len(bits) + 1, device=w.device)).sum()) + w.shape[0]
    g = torch.Generator(device=w.device).manual_seed((site + seed * 1_000_003) % 2**63)
    return torch.rand(w.shape, generator=g, device=w.device) * (w != 0)
