"""One table for the embeddings and the head."""
from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.solvers import damped


@method("wiring", of="table")
def table(embed: Tensor, head: Tensor, gram: Tensor, *, damp: float = 0.01) -> Tensor:
    """The table of embeddings serves as the head, too, behind a factor for every channel that the last norm takes in.

    `embed` and `head` [vocabulary, width]; `gram` [width, width] is the second moment of what the head is given. Returns the factors
    [width], with which the embeddings give the nearest to the head's logits, but for what is added to all of a token's.

    Formula: argmin_d E_h ||(O - E diag(d)) h||^2, E and O without their means over the vocabulary:
        ((E^T E) * G + damp mean(diag) I) d = diag(E^T O G), * entry by entry
    Source: weight tying, Press and Wolf, arXiv:1608.05859; the map between the tables is ours
    Deviations: the source trains with one table from the start; in a network that was trained with two they say different things, and what
        a factor of a channel mends of it is little: a start for training
    """
    e, o = (t.double() - t.double().mean(0) for t in (embed, head))
    g = gram.double()
    return torch.linalg.solve(damped((e.T @ e) * g, damp), ((e.T @ o) * g).sum(1)).float()
