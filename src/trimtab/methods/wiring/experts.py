"""Dense MLPs as experts that a router chooses from."""
from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput
from trimtab.methods.experts import (
    Experts,
    alike,
    choosable,
    clusters,
    coactive,
    copied,
    learned,
    mended,
    of_parts,
    routed,
    separate,
    sized,
    worth,
)

SPLITS = ("coactive", "weights", "order", "random")


@method("wiring", of="mlp")
def experts(mlp: dict[str, Tensor], *, parts: int = 4, always: int = 0) -> Experts:
    """An MLP as experts that every token meets all of: the same outputs, in a form in which experts can be left out, or trained.

    `mlp`: its maps by role.

    Formula: D f(x) = sum_e D_e f_e(x), the hidden neurons in equal runs; the router is zero, so that each expert has the weight 1 / n, and
        D_e is multiplied by n
    Source: Union-of-Experts, arXiv:2503.02495, the equivalent decomposition of MLPs
    Deviations: the decomposition alone: attention is not split, and its routers, which need training, are not made
    """
    size, router = of_parts(mlp, parts, always)
    order = torch.arange(parts * size, device=router.device)
    return Experts(order[always * size:].view(-1, size), len(router), router, order[:always * size] if always else None)


@method("wiring", of="mlp")
def upcycle(mlp: dict[str, Tensor], *, parts: int = 4, active: int = 2, always: int = 0) -> Experts:
    """An MLP as copies of itself, of which a token meets some: the same outputs, as a start for training a larger network.

    `mlp`: its maps by role. With `always`, one more copy that every token meets, and that counts for half.

    Formula: C(x) = 1/k sum over any k of n copies C_e(x); the router is zero
    Source: path-level transformation, arXiv:1806.02639, replicate and add; of MLPs as experts, sparse upcycling, arXiv:2212.05055
    Deviations: no noise on the copies, so that the outputs are the same: whoever trains them draws the router anew
    """
    copied(parts, active)
    width, neurons = mlp["down"].shape
    every = torch.arange(neurons, device=mlp["down"].device)
    router = mlp["down"].new_zeros(parts, width, dtype=torch.float32)
    return Experts(every.expand(parts, -1), active, router, every if always else None, True)


@method("wiring", of="mlp")
def moefication(mlp: dict[str, Tensor], keep: float, source: Tensor, fed: Tensor, *, parts: int = 8, always: int = 0,
                split: str = "coactive", refit: bool = True, damp: float = 0.01, seed: int = 0) -> Experts:
    """Hidden neurons that are active together as one expert, and a router to the experts that add most for a token; nothing is trained.

    `mlp`: the maps by role; `keep`: the share of the parts that a token meets; `source` [tokens, width], what the MLP is given, and `fed`
    [tokens, neurons], its hidden values, for some calibration tokens. `always`: so many parts of the neurons that add most are met by all.

    Formula: neurons in equal clusters by balanced k-means, of |h_i| |D_i| over tokens, centred and scaled to length one, or of the rows of
        the gate; W minimises sum_t |W x_t - s_t|^2 + damp |W|^2, s_te = 1 where |D_e h_te| is among the k largest of t, less k / n, and a
        token meets the k largest of W x; then D minimises sum_t |D (m_t h_t) - D_0 h_t|^2 + damp |D - D_0|^2, m_t what t meets
    Source: Zhang et al. 2021 (MoEfication), arXiv:2110.01786, sections 3.2 and 3.3: splits by clusters of parameters and by co-activation,
        and a router that is told from activations
    Deviations: theirs splits the graph of co-activations, and trains a network of two layers as a router, for ReLU; here both are told in
        closed form, the router is linear, as the families with experts have it, and D is fitted to what it chooses, which theirs is not
    """
    size, router = of_parts(mlp, parts, always)
    if split not in SPLITS:
        raise BadInput(f"split={split} is no way to split neurons; use {', '.join(SPLITS)}")
    count, down = choosable(parts, always, keep), mlp["down"]
    first = worth(fed, down).square().mean(0).argsort(descending=True, stable=True)[:always * size].sort().values
    rest = torch.ones(parts * size, dtype=torch.bool, device=down.device)
    rest[first] = False
    at, others = rest.nonzero().flatten(), parts - always
    if split in ("order", "random"):
        drawn = torch.randperm(len(at), generator=torch.Generator(at.device).manual_seed(seed), device=at.device)
        mine = (drawn if split == "random" else torch.arange(len(at), device=at.device)).view(others, size)
    else:
        points = coactive(fed[:, at], down[:, at]) if split == "coactive" else alike(mlp.get("gate", mlp["up"])[at])
        mine = clusters(points, others, seed)
    found = Experts(at[mine], count, router, first if always else None)
    if count == others:  # every token meets all of it
        return found
    found = Experts(found.neurons, count, routed(source, fed, down, found.neurons, count, damp), found.shared)
    return mended(found, source, fed, down, damp) if refit else found


@method("wiring", of="mlp", overlap=True)
def tomoe(mlp: dict[str, Tensor], keep: float, source: Tensor, fed: Tensor, *, parts: int = 4, refit: bool = True,
          damp: float = 0.01, lr: float = 0.003, epochs: int = 3, seed: int = 0) -> Experts:
    """Experts that are subsets of the hidden neurons, of which a token meets one: neurons and router are learned together.

    `mlp`: the maps by role; `keep`: the share of the neurons that an expert has; `source` [tokens, width], what the MLP is given, and `fed`
    [tokens, neurons], its hidden values, for some calibration tokens. A neuron that several experts have is stored in each.

    Formula: minimise E_t sum_e p_te |D (m_e h_t) - D h_t|^2 / E|D h|^2 + balance over Z and W, p_t = softmax(W x_t / T), m_e the keep * n
        largest of Z_e, its slope that of sigmoid((Z_e - edge) / T), T = 0.4; then D_e minimises the same for the tokens that meet e
    Source: Gao et al. 2025 (ToMoE), arXiv:2501.15316: masks of neurons as experts and a router to one of them, learned together on a
        budget of active parameters, with all weights left as they are
    Deviations: block by block against the MLP's own output, where theirs distils the network's; logits of their own in place of a network
        that makes them; the budget is met by construction, not by a penalty; the mean over experts in place of a Gumbel sample, and none on
        masks; nothing asks that every neuron is somewhere; attention is left; starts at groups of tokens; `refit` is ours
    """
    down = mlp["down"]
    neurons = down.shape[1]
    size = sized(neurons, parts, keep)
    if size == neurons:
        every = torch.arange(neurons, device=down.device)
        return Experts(every.expand(parts, -1), 1, down.new_zeros(parts, len(down), dtype=torch.float32), None, True)
    found = learned(source, fed, down, parts, size, lr=lr, epochs=epochs, seed=seed)
    return separate(found, source, fed, down, damp) if refit else found
