"""Linear layers that run on packed weights inside an ordinary torch model."""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from trimtab.core.types import BadInput
from trimtab.methods.codes import LEVELS
from trimtab.methods.format.panels import VECTORS, Packed
from trimtab.runtime import layouts, native


class PackedLinear(nn.Module):
    """y = x W^T + bias with a packed weight; x [..., in] of any float type, y [..., out] of the same.

    Where the weight is codes or vectors of a codebook, x is rounded to eight bits by groups of inputs; `narrowest = ""` turns that off.
    """

    def __init__(self, packed: Packed, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.linear = native.Linear(packed)
        self.narrowest = "i8" if packed.type in {*LEVELS, VECTORS} else ""
        self.scored: Tensor | None = None
        self.register_buffer("bias", bias)

    def scoring(self, scored: Tensor, up: Tensor | None = None) -> None:
        """What the gate of its inputs scores in the next call: the gate of the MLP it ends, activated, or what its sublayer is given."""
        self.scored = scored

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x, narrowest=self.narrowest, scored=self.scored)
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        p = self.linear.packed
        return f"{self.in_features} -> {self.out_features}, {p.format} {p.type}, {p.nbytes:,} bytes"


def pack_linears(model: nn.Module, names: Iterable[str], dtype: torch.dtype,
                 layout: Callable[[Tensor], Packed] = layouts.smallest) -> int:
    """Replace these linear modules of `model`, in place, by packed ones with weights of `dtype`. Bytes of their weights.

    A weight that `dtype` cannot hold exactly is rounded to it. TypeError for a module that is not a plain linear layer;
    BadInput for a weight that is not finite.
    """
    total = 0
    for name in names:
        old = model.get_submodule(name)
        if type(old) is not nn.Linear:
            raise TypeError(f"{name} is {type(old).__name__}, not a linear layer")
        try:
            packed = layout(old.weight.detach().to(dtype))
        except BadInput as e:
            raise BadInput(f"{name}: {e}") from None
        total += packed.nbytes
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, PackedLinear(packed, None if old.bias is None else old.bias.detach().float()))
    return total
