"""The k best of each row, as units and edits need them: exactly k, whatever ties there are."""
from __future__ import annotations

import torch
from torch import Tensor

SHORT = 32  # up to here sorting a row is cheaper than selecting in it


def top(s: Tensor, k: int) -> Tensor:
    """Mask of the k best of each row of s [..., n]; ties go to the lower index."""
    n = s.shape[-1]
    if not 0 < k < n:
        return torch.full_like(s, k > 0, dtype=torch.bool)
    if n <= SHORT or s.is_meta:
        order = torch.argsort(s, dim=-1, descending=True, stable=True)
        return torch.zeros_like(s, dtype=torch.bool).scatter_(-1, order[..., :k], True)
    worst = s.kthvalue(n - k + 1, dim=-1, keepdim=True).values
    kept, tied = s > worst, s == worst
    room = k - kept.sum(-1, keepdim=True)
    return kept.logical_or_(tied.logical_and_(tied.cumsum(-1, dtype=torch.int32) <= room))
