from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.solvers import improved, refit


@method("repair")
def least_squares(w: Tensor, new: Change, gram: Tensor, *, damp: float = 1e-6) -> Change:
    """Refit every row exactly on the weights it kept.

    `w` [out, in] is the dense weight, `gram` [in, in]; returns `new` with its mask and the refitted w [out, in].

    Formula: w'_S = (H_SS)^-1 (H w)_S for the kept set S of a row, H = G + damp * mean(diag G) * I
    Source: textbook (normal equations of min ||X w' - X w||^2 with support S)
    Deviations: a row the damped solution does not improve is left as it was
    """
    if new.mask is None:
        return new
    return improved(w, new, refit(w, new.mask, gram, damp), gram)
