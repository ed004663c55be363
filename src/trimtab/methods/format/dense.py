from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change


def restore(buffers: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    return buffers["weight"].reshape(shape)


@method("format", inverse=restore, holds="any", bytes=lambda shape, itemsize, *_: shape[0] * shape[1] * itemsize)
def dense(new: Change) -> dict[str, Tensor]:
    """Every entry, zeros included: `weight` [out, in].

    Formula: bytes = itemsize * out * in
    Source: common practice
    Deviations: none
    """
    return {"weight": new.w.contiguous()}
