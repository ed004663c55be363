from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput
from trimtab.methods import books
from trimtab.methods.gates import Core, Gate, number
from trimtab.methods.select import top

ITERS = 50  # of k-means
MANY = 1 << 16  # sentences that clusters are found among
OWN = "the sentence decides; of the weight it is the number of inputs alone"


def check(knobs: dict[str, float]) -> None:
    """BadInput for knobs by which no sentence decides."""
    for name in ("prompt", "clusters"):
        if knobs.get(name, 1) < 1:
            raise BadInput(f"{name}={knobs[name]} decides nothing; it is 1 or more")


@method("gate", by="sentence", roles=("down",), check=check, xfail={"uses_data": OWN})
def core(w: Tensor, keep: float, *, prompt: int = 64) -> Gate:
    """Compute the neurons that were among the largest for most of the first tokens of a sentence, for all that follow them.

    `w` [out, in]; `keep`: the share computed behind the first `prompt` tokens, which are computed whole.

    Formula: C(x) = the 0.4 of the neurons with h_i > 0 whose h_i is largest; neuron i is computed where it is among the round(keep in) that
        are in C(x_m) for most tokens m of the prompt
    Source: Wang et al. 2024 (CoreInfer), arXiv:2410.18311, definitions 1 and 2 and its stability-guided prediction
    Deviations: every block, where theirs leaves the first and the last few whole; each token counts the share of its own neurons above
        zero, as defined, where the authors' code takes as many for all
    """
    return Gate(core=Core(prompt, number(w.shape[1], keep)))


@method("gate", by="sentence", roles=("down",), check=check)
def core_similar(keep: float, firings: Tensor, *, prompt: int = 64, clusters: int = 4, seed: int = 0) -> Gate:
    """Compute the neurons that were among the largest in the calibration sentences that are like this one.

    `keep`: the share computed behind the first `prompt` tokens, which are computed whole and say which cluster of sentences is nearest;
    `firings` [sentences, neurons], how many of the tokens of calibration sentences have a neuron in their core.

    Formula: e(s) = 1 for the round(keep in) neurons that most tokens of s have in C(x), as in `core`, else 0; clusters of e over
        calibration sentences by k-means; neuron i is computed where it is among the round(keep in) that most tokens of the nearest cluster
        have in C(x)
    Source: Wang et al. 2024 (CoreInfer), arXiv:2410.18311, its similarity-guided prediction
    Deviations: sentences are likened in each block by its own neurons, where theirs are in one block for all; their signature is of the
        3000 most frequent ones; a number of clusters that is given; the calibration text, where theirs is of the task
    """
    count = number(firings.shape[1], keep)
    own = top(firings, count)
    at = own.float()
    generator = torch.Generator(at.device).manual_seed(seed)
    centres = books.means(at, torch.ones_like(at), min(clusters, len(at)), ITERS, generator, MANY).float()
    nearest = torch.cdist(at, centres).argmin(1)
    seen = torch.zeros_like(centres).index_add_(0, nearest, firings)
    return Gate(core=Core(prompt, count, centres, top(seen, count)))
