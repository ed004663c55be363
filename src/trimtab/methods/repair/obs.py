from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.solvers import Settle, improved, sweep


@method("repair")
def obs(w: Tensor, new: Change, gram: Tensor, *, damp: float = 0.01, block: int = 128) -> Change:
    """SparseGPT's update for a mask that is already chosen.

    `w` [out, in] is the dense weight, `gram` [in, in]; returns `new` with its mask and the mended w [out, in].

    Formula: H = G + damp * mean(diag G) * I; H^-1 = U^T U; from left to right, for each dropped w_ij with
        e = w_ij / U_jj, w_ik -= e * U_jk for k >= j
    Source: Frantar and Alistarh 2023, arXiv:2301.00774, section 3 and algorithm 1
    Deviations: starts from the dense weights; a row the sweep does not improve is left as it was
    """
    if new.mask is None:
        return new
    mask = new.mask

    def settle(begin: int, end: int) -> Settle:
        return lambda cur, scale, j: cur[j].masked_fill(~mask[:, begin + j], 0)

    swept = sweep(w, gram, settle, damp=damp, block=block)
    return improved(w, new, swept, gram)
