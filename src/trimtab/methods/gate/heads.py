from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.gates import ROUTER, Gate, number
from trimtab.methods.routers import LEARNED, check, learned
from trimtab.methods.select import top


@method("gate", of=ROUTER, roles=("o",), check=check, xfail={"more_is_more": LEARNED})
def heads(keep: float, heads: Tensor, source: Tensor, fed: Tensor, *, rank: int = 0, epochs: int = 20, lr: float = 0.003,
          seed: int = 0) -> Gate:
    """Compute for every token the attention heads that a router says matter, from what attention is given.

    Heads that share their keys stand or fall together. Keys and values are those of all heads; what of the others is left out is to look
    at them, and the inputs of the output map. `keep`: the share of heads computed; `heads` int64 [2], their number, and that of keys;
    `source` [tokens, width], what attention is given, and `fed` [tokens, in], what its heads found, for some calibration tokens.

    Formula: heads of group g are computed where max over n in g of (W x + b)_n is among the round(keep groups) largest; W [heads, width]
        and b minimise sum w_n BCE(sigmoid(W x + b)_n, y_n), w = y (1 - q) + q, q = mean(y) + 0.005, y_n = 1 for the share keep of the heads
        of a token whose outputs have the largest norm
    Source: Shrestha et al. 2025 (Polar Sparsity), arXiv:2505.14884, section 4.2, and the authors' code
    Deviations: labels are the share that is computed, for 0.3; updates of 128 tokens at 0.003 for 512 at 0.0001, and the epoch of least
        loss held out for that of best recall; their first layer is left dense by the scope of the recipe
    """
    count, groups = heads.tolist()
    outputs = fed.unflatten(1, (count, -1))
    labels = top(outputs.norm(dim=2), number(count, keep))
    router = learned(source, labels, rank, lr=lr, epochs=epochs, seed=seed)
    return Gate(count=number(groups, keep), of=ROUTER, router=router, group=fed.shape[1] // groups, pool=count // groups)
