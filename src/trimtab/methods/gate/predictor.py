from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.gates import ROUTER, Gate, number, passing
from trimtab.methods.routers import LEARNED, active, check, learned


@method("gate", of=ROUTER, roles=("down",), check=check, xfail={"more_is_more": LEARNED})
def predictor(keep: float, source: Tensor, fed: Tensor, *, exact: bool = False, rank: int = 64, epochs: int = 20, lr: float = 0.003,
              seed: int = 0) -> Gate:
    """Compute the hidden neurons that a small network of two maps says are active, from what the MLP is given.

    So all three maps of the MLP can be left out where it says no. `keep`: the share computed, of all tokens on average, or `exact`ly of
    every one; `source` [tokens, width], what the MLP is given, and `fed` [tokens, neurons], its hidden values, for some calibration tokens.

    Formula: neuron i is computed where (W2 W1 x)_i > t, t the (1 - keep)-quantile over tokens and neurons; W1 [rank, width] and W2
        minimise sum w_i BCE(sigmoid(W2 W1 x)_i, y_i), w = y (1 - q) + q, q = mean(y) + 0.005, y_i = 1 where |h_i| is among the share keep
        of the largest over tokens and neurons, and not zero
    Source: Liu et al. 2023 (Deja Vu), arXiv:2310.17157, section 4.1, and the authors' code
    Deviations: their neurons are active where ReLU is not zero; where more than the share are not zero, as with SiLU, here the larger ones
        are. Of the same block, where theirs looks one ahead; rank 64 for 1000, updates of 128 tokens at 0.003 for 1024 at 0.001, the epoch
        of least loss held out for that of best recall; a threshold for the share in place of 0.5
    """
    router = learned(source, active(fed, keep), rank, lr=lr, epochs=epochs, seed=seed)
    scores = router(source)
    if exact or round((1 - keep) * scores.numel()) == 0:
        return Gate(count=number(fed.shape[1], keep), of=ROUTER, router=router)
    return Gate(passing(scores, keep), of=ROUTER, router=router)
