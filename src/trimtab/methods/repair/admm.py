from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.solvers import improved, kernel, lengths, splitting


@method("repair")
def admm(w: Tensor, new: Change, gram: Tensor, *, damp: float = 0.1, iters: int = 20, rho: float = 1.0) -> Change:
    """Least squares on the kept weights of all rows at once, by ADMM with one factorisation.

    `w` [out, in] is the dense weight, `gram` [in, in]; returns `new` with its mask and the mended w [out, in].

    Formula: n_j = ||X_j||; A = G / (n n^T) + damp * I; V_0 = W * n; Z = (V + U) * M; U += V - Z;
        V = (V_0 A + rho (Z - U)) (A + rho I)^-1; W' = (V + U) * M / n
    Source: Boža 2024, arXiv:2401.02938; steps and defaults as in the released code (lib/admm.py)
    Deviations: starts from the dense weights; a row it does not improve is left as it was
    """
    if new.mask is None:
        return new
    mask, n = new.mask, lengths(gram)
    x = splitting(w.float() * n, kernel(gram, n, damp, rho), lambda x, t: x * mask, iters)
    return improved(w, new, x / n, gram)
