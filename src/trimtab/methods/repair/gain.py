from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.solvers import lower
from trimtab.methods.terms import Terms


@method("repair", keeps=("mask", "codes"))
def gain(w: Tensor, new: Change, gram: Tensor) -> Change:
    """A factor for every output, the one with which it loses least; scales of codes take it in, and take no more room.

    `w` [out, in] is the dense weight, `gram` [in, in]; returns `new` with rows that were multiplied: of codes their scales, the codes as
    they were. The mask stays. Codes with factors beside them, or in groups of outputs, are left as they are.

    Formula: w'_i <- c w'_i, c = (w_i G w'_i^T) / (w'_i G w'_i^T), which makes (c w'_i - w_i) G (c w'_i - w_i)^T least
    Source: ours, by the normal equation; in the place of the re-tuned batch norms of Hubara et al. 2020, arXiv:2006.10518, section 3.4
    Deviations: their batch norms take a mean and a deviation for every channel; the mean is the repair `bias`, and the factor is the one of
        least squares on the site's own outputs
    """
    terms = Terms.among(new.parts)
    if terms is not None and (terms.codes is None or len(terms.main) > 1 or terms.transposed):
        return new
    moved = new.w.double() @ gram.double()
    power = (moved * new.w.double()).sum(1)
    factor = torch.where(power > 0, (moved * w.double()).sum(1) / power, 1.0).float()[:, None]
    if terms is None or terms.codes is None:
        scaled = (new.w.float() * factor).to(new.w.dtype)
        return replace(new, w=torch.where(lower(w, scaled, new.w, gram)[:, None] & (factor > 0), scaled, new.w))
    had = terms.codes.grid.scales
    scales = (had.float() * factor).to(had.dtype)
    wins = lower(w, with_scales(terms, scales).weight(), new.w, gram)[:, None] & (factor > 0)
    mended = with_scales(terms, torch.where(wins, scales, had))
    return replace(new, w=mended.weight().to(new.w.dtype), parts=mended.parts())


def with_scales(terms: Terms, scales: Tensor) -> Terms:
    assert terms.codes is not None
    return replace(terms, codes=replace(terms.codes, grid=replace(terms.codes.grid, scales=scales)))
