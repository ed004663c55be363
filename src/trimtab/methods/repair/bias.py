from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change


@method("repair", keeps=("mask", "codes", "factors", "books"), leaves=("bias",))
def bias(w: Tensor, new: Change, in_mean: Tensor) -> Change:
    """Add to the bias of every output what the new weights take off its mean.

    `w` [out, in] is the dense weight, `in_mean` [in]; returns `new` with `bias` [out], to be added to that of the site. Sites without a
    bias are refused before anything is written.

    Formula: b' = b + (W - W') E[x]
    Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2, with E[x] from data as in its empirical variant
    Deviations: E[x] is that of the site's inputs behind the blocks trimmed so far, its own block not yet; what all these changed of it is
        not made up for here
    """
    return replace(new, bias=(w.float() - new.w.float()) @ in_mean)
