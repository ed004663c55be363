from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.gates import Gate, number, passing


@method("gate")
def wina(w: Tensor, keep: float, sample: Tensor, *, exact: bool = True) -> Gate:
    """Compute the inputs whose magnitude times the norm of their column of the weight is large.

    `w` [out, in]; `keep`: the share computed, exactly of every token, or on average; `sample` [tokens, in], some calibration tokens.

    Formula: x_j is computed where |x_j| ||W_:j||_2 is among the round(keep in) largest of the token
    Source: Chen et al. 2025 (WINA), arXiv:2505.19427, equation 4
    Deviations: without their change of basis, which makes the columns of k and gate orthogonal, and with the norms for every site, where
        theirs are for those two alone
    """
    scale = w.float().norm(dim=0)
    return Gate(count=number(w.shape[1], keep), scale=scale) if exact else Gate(passing(sample.abs() * scale, keep), scale=scale)
