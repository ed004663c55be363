"""Weights that a place of the network takes of another one, which keeps its own. Who takes whose is the plan's to say.

`other` [out, in] is what the site would be with the weights of the place that the plan names. What is saved is bytes where the result is
packed, and no arithmetic.
"""
from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.factors import Factors, checked_rank
from trimtab.methods.solvers import damped

PAIRS = {"uses_knobs": "the plan reads them, and pairs the places by them"}
OWN = "own_"  # before the parts that a place has beside what it shares: factors, and a factor of every output


@method("edit", joint=("unit", "budget"), drops=False, shares="layer", xfail=PAIRS)
def tie(other: Tensor, *, near: bool = True, tried: bool = True) -> Change:
    """The weights of another block, norms and biases its own.

    `near`: only blocks that follow each other share; else any two. `tried`: what a pair costs is what the outputs of a block are off on
    calibration text; else the distance of the weights. A score in front says which blocks go instead, and the pairs only whose they take.

    Formula: groups of blocks, each with the weights of one of its own; from single blocks on the two groups become one, and take those,
        that raise sum_j cost(j, root of j) least; cost = mean_c ||y'_c - y_c|| / mean_c ||y_c|| of a block's outputs over tokens, or the
        mean over its sites of ||W' - W||^2 / ||W||^2
    Source: ours; that blocks which follow each other may share: MobileLLM, arXiv:2402.14905
    Deviations: the source trains with them shared; norms and biases are a few numbers, and each block keeps its own
    """
    return Change(other)


@method("edit", joint=("unit", "budget"), drops=False, shares="layer",
        xfail={"uses_knobs": "the plan reads `near` and `tried`, and pairs the places by them",
               "beats_magnitude": "nearly all of it is another place's weight"})
def adapt(w: Tensor, other: Tensor, gram: Tensor, *, rank: int = 8, whiten: bool = True, scaled: bool = True, near: bool = False,
          tried: bool = False, damp: float = 0.01) -> Change:
    """The weights of another block with a product of small rank beside them, the nearest to what they are off, and outputs of their size.

    `w` [out, in], `gram` [in, in]. `rank` 0: nothing beside them. `whiten`: nearest in the outputs, not in the weights. `scaled`: every
    output is as large as it was. `near`: only of the blocks that stay next to it; else of any. `tried`: whose it takes is tried on
    calibration text; else it is the one whose weights, adapted, are nearest. The score in front says which blocks go.

    Formula: W_i - W_j = U S V^T; W' = diag(c) (W_j + U_r S_r V_r^T), c_o^2 = (w_o G w_o^T) / (w'_o G w'_o^T); whitened, with G + damp
        mean(diag G) I = C C^T, (W_i - W_j) C in place of the difference and C^-1 behind the product; j = argmin of the mean over sites of
        ||W' - W_i||_G^2 / ||W_i||_G^2
    Source: FlexiGPT, arXiv:2501.14713: block influence, the unpruned block of the smallest low-rank reconstruction error, adapters by SVD
    Deviations: by its abstract and a summary, the equations were not confirmed; the source trains a billion tokens afterwards; its output
        normalisation is trained, and here a factor for every output of every linear map, one shot; its distance is not whitened; factors
        are bfloat16
    """
    if rank:
        checked_rank(w.shape, rank)
    off = (w.float() - other.float()).double()
    base, own = other.float(), dict[str, Tensor]()
    if rank:
        root = torch.linalg.cholesky(damped(gram, max(damp, 1e-6))) if whiten else None
        u, s, vt = torch.linalg.svd(off if root is None else off @ root, full_matrices=False)
        size = s[:rank].sqrt()
        left, right = u[:, :rank] * size, size[:, None] * vt[:rank]
        right = right if root is None else torch.linalg.solve_triangular(root, right, upper=False, left=False)
        own = {f"{OWN}{k}": t.bfloat16().contiguous() for k, t in (("left", left), ("right", right))}
    if scaled:
        new = adapted(base, own).double()
        have, want = ((x @ gram.double() * x).sum(1) for x in (new, w.double()))
        own[f"{OWN}scale"] = torch.where((have > 0) & (want > 0), want / have, 1.0).sqrt().clamp(0.1, 10.0).float()
    return Change(adapted(base, own).to(w.dtype), own)


def adapted(base: Tensor, own: dict[str, Tensor]) -> Tensor:
    """The weight [out, in] float32 that shared weights become with what a place has beside them."""
    w = base.float()
    if f"{OWN}left" in own:
        w = w + Factors(own[f"{OWN}left"], own[f"{OWN}right"]).weight()
    return w * own[f"{OWN}scale"][:, None] if f"{OWN}scale" in own else w


@method("edit", joint=("unit", "budget"), drops=False, shares="head")
def direct(other: Tensor) -> Change:
    """Queries and keys of a head, or its values, as those of the head that they are most like, in an earlier block.

    Where heads share keys and values, a key's head with all its queries is one. What they are like is told of the weights alone.

    Formula: v = flatten([W_q; W_k]) of a head, or flatten(W_v); of every head of every earlier block the largest cosine with v; the heads
        with the largest of these take the weights of theirs, or of those that these take
    Source: DirectShare, arXiv:2402.11819, by its published program
    Deviations: values are matched by themselves, where the program gives a head the values and outputs of the one that its queries and keys
        are like; outputs stay, whose columns are no rows to be stored once
    """
    return Change(other)
