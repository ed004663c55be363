from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.gates import Gate, number, passing


@method("gate")
def gate_magnitude(keep: float, sample: Tensor, *, exact: bool = False) -> Gate:
    """Compute the inputs of large magnitude: those above one threshold of the site, found by calibration, or the largest of each token.

    `keep`: the share computed, of all tokens on average, or `exact`ly of every one; `sample` [tokens, in], some calibration tokens.

    Formula: x_j is computed where |x_j| > t, t the (1 - keep)-quantile of |x| over tokens and inputs
    Source: Liu et al. 2024 (TEAL), arXiv:2408.14690, section 4.1
    Deviations: the quantile of the magnitudes themselves, where theirs is that of a histogram of signed values taken as symmetric; every
        token of a sequence, where theirs leaves the first half of a prompt as it is
    """
    return Gate(count=number(sample.shape[1], keep)) if exact else Gate(passing(sample.abs(), keep))
