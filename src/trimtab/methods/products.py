"""Products of large float32 matrices."""
from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

SMALL = 1 << 22  # multiplications below which it does not matter who does them


@cache
def _onednn() -> bool:
    """Whether torch has oneDNN's linear map for plain matrices here: an operator that torch.compile uses, and no one promised."""
    try:
        x, w = torch.arange(12.0).view(3, 4), torch.arange(20.0).view(5, 4)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""), x @ w.T)
    except (AttributeError, RuntimeError, TypeError):
        return False


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x [m, k] times w [n, k] transposed, [m, n]; no gradients.

    By oneDNN where it can: torch itself multiplies float32 matrices with MKL, which was the slower one on the AMD processor that was
    measured (torch f32 and torch oneDNN among the dense maps of results/kernels.jsonl).
    """
    dense = w.is_contiguous() or w.T.is_contiguous()  # oneDNN has but a slow way for what lies otherwise
    if x.dtype == w.dtype == torch.float32 and x.is_cpu and dense and len(x) * w.numel() >= SMALL and _onednn():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        return found
    return x @ w.T
