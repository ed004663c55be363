from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.codes import Grid, integers, nearest
from trimtab.methods.terms import Spared


@method("edit", drops=False, spares=True)
def spare(w: Tensor, mask: Tensor, *, bits: int = 8, single: int = 0) -> Change:
    """Keep the best out of the hands of later passes, which have what is left.

    `w` [out, in], `mask` bool [out, in]: the share that is spared. Where it is whole inputs these are kept in `bits` bits, a scale an
    output (parts columns [k] and their codes), and w [out, in] has them so. Single weights (parts entries [n] and entries_at [n, 2]) are
    kept as they are, or in `single` bits, a scale an output, and w [out, in] has them so.

    Formula: W = W_spared + W_rest; later passes are given W_rest, without the columns that were spared. Single weights in b bits:
        s round(w / s), s = max |w| / (2^(b - 1) - 1) over those of an output, rounded up to 9 - b binary digits: all are bfloat16
    Source: Dettmers et al. 2022 (LLM.int8), arXiv:2208.07339, equation 8 (inputs); Yu et al. 2024, arXiv:2411.07191 (single weights);
        Ghaffari et al. 2024 (AdpQ), arXiv:2405.13358 (single weights in bits, with a range of their own)
    Deviations: inputs in codes, where LLM.int8 has float16. Single weights share a scale by output, where AdpQ has groups, and are
        stored as the values of their codes, in bfloat16 with an index each: fewer bits take no fewer bytes
    """
    columns = mask.all(0)
    if bool(columns.any()) and bool((mask.any(0) == columns).all()):
        at = columns.nonzero()[:, 0].int()
        spared = Spared(columns=at, codes=nearest(w[:, columns].float(), bits))
        return Change(spared.whole(spared.rest(w.float())).to(w.dtype), spared.parts())
    if not bool(mask.any()):
        return Change(w)
    kept = on_grid(w.float() * mask, single) if single else w.float()
    spared = Spared(entries=kept[mask], at=mask.nonzero().int().contiguous())
    return Change(torch.where(mask, kept.to(w.dtype), w), spared.parts())


def on_grid(w: Tensor, bits: int) -> Tensor:
    """w [out, in] in so many bits, a scale a row that leaves every value a bfloat16."""
    share, power = torch.frexp(integers(w, bits).scales)
    digits = 1 << (9 - bits)
    grid = Grid(torch.ldexp((share * digits).ceil() / digits, power), 1 << bits)
    return grid.values(grid.codes(w[:, None]))[:, 0]
