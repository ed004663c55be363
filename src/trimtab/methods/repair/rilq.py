from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change, Net, Seen
from trimtab.methods.factors import Factors, checked_rank
from trimtab.methods.terms import Terms


@method("repair", keeps=("codes", "factors"), leaves=("factors",), level="net")
def rilq(net: Net, *, rank: int = 16, lr: float = 1e-3, epochs: int = 4, accumulate: int = 8,
         seed: int = 0) -> Callable[[str, Change], Change]:
    """Products of small rank beside the codes of all sites, trained together for what the network says at its end.

    Returns what mends a site: f(name, change) -> the change with the parts left ([out, rank]) and right ([rank, in]), bfloat16, whose
    product is added to what the codes decode to; beside factors it has already they are `rank` more. What did best on samples held out is
    kept, and changes are left as they are where that is to do nothing. BadInput for a rank that is not between 1 and the shorter side.

    Formula: L = mse(h', h) / 2 + cross entropy of the next token / 2, h the hidden states behind the last norm of the dense network and h'
        of this one; W' = codes + left right, left = 0 and right normal of variance 1 / rank at first; Adam on left and right alone
    Source: Lee et al. 2025 (RILQ), arXiv:2412.01129, equations of the model loss and the ground truth loss
    Deviations: the product is added whole, where the source has a quarter of it at rank 64; samples come in another order every time;
        factors are judged and kept in bfloat16; defaults are for few samples and a small network, the source's are rank=64, lr=1e-4
    """

    def mended(new: Change, own: Mapping[str, Tensor]) -> Terms:
        terms, both = Terms.among(new.parts), Factors(own["left"], own["right"])
        assert terms is not None
        if (had := terms.factors) is not None:
            had = had.to(both.left.dtype)
            both = Factors(torch.cat([had.left, both.left], 1), torch.cat([had.right, both.right]))
        return replace(terms, factors=both)

    def start(new: Change, generator: torch.Generator) -> dict[str, Tensor]:
        terms = Terms.among(new.parts)
        assert terms is not None and terms.codes is not None
        out, inputs = reversed(terms.codes.codes.shape) if terms.transposed else terms.codes.codes.shape
        checked_rank((out, inputs), rank)
        right = torch.randn(rank, inputs, generator=generator, device=generator.device) / math.sqrt(rank)
        return {"left": torch.zeros(out, rank, device=new.w.device), "right": right.to(new.w.device)}

    def loss(seen: Seen) -> Tensor:
        near = (seen.hidden.float() - seen.dense.float()).square().mean()
        return (near + torch.nn.functional.cross_entropy(seen.logits.float(), seen.following)) / 2

    best = net.fit(start, lambda new, own: mended(new, own).weight(), loss, lr=lr, epochs=epochs, accumulate=accumulate, seed=seed,
                   dtype=torch.bfloat16)

    def mend(name: str, new: Change) -> Change:
        if name not in best:
            return new
        terms = mended(new, best[name])
        return Change(terms.weight().to(new.w.dtype), terms.parts())

    return mend
