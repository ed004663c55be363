from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.gates import HIDDEN, Gate, number, passing


@method("gate", of=HIDDEN)
def chess(keep: float, hidden_gate: Tensor, hidden_up: Tensor, *, exact: bool = False) -> Gate:
    """Compute the hidden neurons whose gate, times what it usually multiplies, is large: a threshold of its own for each.

    The gate itself is computed for all; of what it multiplies, and of what follows, the others are left out. `keep`: the share computed;
    `hidden_gate` [tokens, neurons], the gates of some calibration tokens, activated; `hidden_up` [neurons], the mean magnitude of what they
    multiply.

    Formula: neuron i is computed where |f(x W_gate)_i| E|u_i| > t, t the (1 - keep)-quantile over tokens and neurons
    Source: He et al. 2024 (CHESS), arXiv:2409.01366, section 3.1, and the second version of the authors' code
    Deviations: one quantile over the sample, where theirs is a mean of those of the documents
    """
    scale = hidden_up.float()
    return Gate(count=number(len(scale), keep), scale=scale, of=HIDDEN) if exact else Gate(
        passing(hidden_gate.abs() * scale, keep), scale=scale, of=HIDDEN)
