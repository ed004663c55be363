from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.gates import HIDDEN, Gate, number, passing


@method("gate", of=HIDDEN)
def cats(keep: float, hidden_gate: Tensor, *, exact: bool = False) -> Gate:
    """Compute the hidden neurons whose gate is large: those above one threshold of the MLP, or the largest of each token.

    The gate itself is computed for all; of what it multiplies, and of what follows, the others are left out. `keep`: the share computed;
    `hidden_gate` [tokens, neurons], the gates of some calibration tokens, activated.

    Formula: neuron i is computed where |f(x W_gate)_i| > t, t the (1 - keep)-quantile over tokens and neurons
    Source: Lee et al. 2024 (CATS), arXiv:2404.08763, section 3.2
    Deviations: the quantile of a sample, where theirs is that of a histogram; a value equal to the threshold is left out
    """
    return Gate(count=number(hidden_gate.shape[1], keep), of=HIDDEN) if exact else Gate(passing(hidden_gate.abs(), keep), of=HIDDEN)
