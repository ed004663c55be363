from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.books import means, nearest
from trimtab.methods.solvers import damped


@method("edit", joint=("score", "repair"), fuses=True,
        xfail={"uses_knobs": "the few neurons of the law's sites find their clusters in one step"})
def fuse(w: Tensor, keep: float, feeders: dict[str, Tensor], act: Callable[[Tensor], Tensor], source: Tensor, fed: Tensor, *,
         iters: int = 30, refit: bool = False, damp: float = 0.01, seed: int = 0) -> Change:
    """Hidden neurons that are alike become one: an MLP as a bundle of sub-MLPs of one neuron each, clustered.

    `w` [out, neurons] of down, `feeders`: by role gate and up [neurons, width] and, as "up.bias", their biases [neurons]; returns w whose
    column stands at the first neuron of its cluster, zeros elsewhere, and what becomes of the feeders there. `refit`: down is solved for
    again by least squares on `source` [tokens, width], what the MLP is given, and `fed` [tokens, neurons], what down was, with a ridge of
    `damp` times the mean diagonal. BadInput for what has no feeders.

    Formula: z_i = [gate_i, up_i, b_i, down_i]; k-means into round(keep * neurons) clusters with centroids z_k and sizes n_k; neuron k is
        z_k with n_k down_k
    Source: MLP Fusion, arXiv:2307.08941, section 3; a gate is a further part of z_i
    Deviations: n_k is in down's column, the same function as the source's scale of its own, which trains otherwise; `refit` is of this
        program
    """
    if not feeders:
        raise BadInput("fuse makes hidden neurons one, and this site has none; use it with neuron")
    parts = {role: t.float().view(len(t), -1) for role, t in feeders.items()}
    z = torch.cat([*parts.values(), w.float().T], 1)
    count, n = round(keep * len(z)), len(z)
    if not 0 < count < n:
        return Change(w.clone() if count else torch.zeros_like(w), mask=torch.full_like(w, count > 0, dtype=torch.bool))
    one, gen = torch.ones_like(z), torch.Generator(device=z.device).manual_seed(seed)
    book = means(z, one, count, iters, gen, n).float()
    at = nearest(z, one, book)
    # Of what no neuron is nearest to, nothing is left: the neurons farthest from theirs stand for themselves.
    used, at = at.unique(return_inverse=True)
    centre = torch.zeros(len(used), z.shape[1], device=z.device).index_add_(0, at, z)
    size = torch.zeros(len(used), device=z.device).index_add_(0, at, torch.ones(n, device=z.device))
    centre /= size[:, None]
    first = torch.full((len(used),), n, device=z.device).scatter_reduce_(0, at, torch.arange(n, device=z.device), "amin")
    if spare := count - len(used):
        off = (z - centre[at]).square().sum(1)
        off[first] = -1
        for i in off.topk(spare).indices.tolist():
            k = int(at[i])
            centre[k] = (centre[k] * size[k] - z[i]) / (size[k] - 1)
            size[k] -= 1
            centre, size = torch.cat([centre, z[i:i + 1]]), torch.cat([size, size.new_ones(1)])
            first = torch.cat([first, first.new_tensor([i])])
            at[i] = len(first) - 1
    new = {role: t.clone() for role, t in feeders.items()}
    begin = 0
    for role, t in parts.items():
        new[role][first] = centre[:, begin:begin + t.shape[1]].view(-1, *feeders[role].shape[1:]).to(feeders[role].dtype)
        begin += t.shape[1]
    down = centre[:, begin:].T * size
    if refit:
        h = hidden({role: t[first] for role, t in new.items()}, act, source)
        gram = damped(h.T @ h / len(h), damp, dtype=torch.float64)
        down = torch.linalg.solve(gram, (h.T @ fed.float()).double() / len(h) @ w.float().T.double()).T.float()
    out, mask = torch.zeros_like(w), torch.zeros_like(w, dtype=torch.bool)
    out[:, first], mask[:, first] = down.to(w.dtype), True
    return Change(out, mask=mask, feeders=new)


def hidden(feeders: dict[str, Tensor], act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What an MLP of these makes of x [tokens, width]: [tokens, neurons]."""
    y = {role: torch.nn.functional.linear(x, feeders[role], feeders.get(f"{role}.bias")) for role in ("gate", "up") if role in feeders}
    return act(y["gate"]) * y["up"] if "gate" in y else act(y["up"])
