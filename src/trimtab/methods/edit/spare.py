from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.codes import nearest
from trimtab.methods.terms import Spared


@method("edit", drops=False, spares=True)
def spare(w: Tensor, mask: Tensor, *, bits: int = 8) -> Change:
    """Keep the best out of the hands of later passes, which have what is left.

    `w` [out, in], `mask` bool [out, in]: the share that is spared. Where it is whole inputs these are kept in `bits` bits, a scale an
    output (parts columns [k] and their codes), and w [out, in] has them so; single weights are kept as they are (parts entries [n]
    and entries_at [n, 2]).

    Formula: W = W_spared + W_rest; later passes are given W_rest, without the columns that were spared
    Source: Dettmers et al. 2022 (LLM.int8), arXiv:2208.07339, equation 8 (inputs); Yu et al. 2024, arXiv:2411.07191 (single weights)
    Deviations: inputs in codes, where LLM.int8 has float16
    """
    columns = mask.all(0)
    if bool(columns.any()) and bool((mask.any(0) == columns).all()):
        at = columns.nonzero()[:, 0].int()
        spared = Spared(columns=at, codes=nearest(w[:, columns].float(), bits))
    elif bool(mask.any()):
        spared = Spared(entries=w[mask].float(), at=mask.nonzero().int().contiguous())
    else:
        return Change(w)
    return Change(spared.whole(spared.rest(w.float())).to(w.dtype), spared.parts())
