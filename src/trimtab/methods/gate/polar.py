from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.gates import ROUTER, Gate
from trimtab.methods.routers import LEARNED, active, check, held_out, learned

STEPS = 256  # steps that are tried for a number of sequences


@method("gate", of=ROUTER, by="step", free=False, roles=("down",), check=check, xfail={"more_is_more": LEARNED})
def polar(keep: float, source: Tensor, fed: Tensor, *, batch: int = 8, recall: float = 0.99, rank: int = 64, epochs: int = 20,
          lr: float = 0.003, seed: int = 0) -> Gate:
    """Compute the hidden neurons that a step of several sequences needs together: one set for all of them, found by a router.

    As many as find the share `recall` of what is active in any of the sequences, for every number of these up to `batch`. So the share
    computed is not `keep`, which says what counts as active; `source` [tokens, width], what the MLP is given, and `fed` [tokens, neurons],
    its hidden values, for some calibration tokens.

    Formula: neuron i is computed where sum_b relu(W2 W1 x_b)_i is among the k_B largest; k_B the least k so that on average over steps
        |top k and U| / |U| >= recall, U = {i : y_i = 1 for one of the sequences}; W1 [rank, width], W2 and y as in `predictor`
    Source: Shrestha et al. 2025 (Polar Sparsity), arXiv:2505.14884, section 4.1, algorithm 2, and the authors' code
    Deviations: the router sees what the MLP is given, theirs what attention is, to run beside it; k is the least for numbers of sequences
        that are powers of two and for the largest, the next larger one's between, theirs grows by 100 and is rounded up to 128; tokens of a
        step are drawn from those held out; for networks without ReLU what is active is the larger share, theirs leaves these alone; rank 64
        for 1024, and updates as in `predictor`
    """
    neurons = fed.shape[1]
    labels = active(fed, keep)
    router = learned(source, labels, rank, lr=lr, epochs=epochs, seed=seed)
    counts = torch.full((batch,), neurons, dtype=torch.int32, device=fed.device)
    if keep < 1:
        scores, wanted = router(held_out(source)[1]).clamp_min(0), held_out(labels)[1]
        generator = torch.Generator(fed.device).manual_seed(seed)
        sizes = sorted({batch, *(2**e for e in range(batch.bit_length()))})
        for size, before in zip(sizes, [0, *sizes], strict=False):
            draws = torch.randint(len(scores), (size, STEPS), generator=generator, device=fed.device)
            worth, union = scores[draws[0]], wanted[draws[0]]
            for at in draws[1:]:
                worth += scores[at]
                union |= wanted[at]
            counts[before:size] = least(worth, union, recall)
    return Gate(counts=counts.cummax(0).values, of=ROUTER, router=router)


def least(scores: Tensor, union: Tensor, recall: float) -> int:
    """How many of the largest scores of a step, [steps, neurons], find the share `recall` of its `union`, on average."""
    some = union.any(1)
    if not bool(some.any()):
        return 1
    order = scores[some].sort(dim=1, descending=True, stable=True).indices
    found = union[some].gather(1, order).double().cumsum(1)
    return 1 + int(((found / found[:, -1:]).mean(0) >= recall - 1e-12).byte().argmax())
