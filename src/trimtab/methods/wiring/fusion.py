"""MLPs that nothing stands between, made one."""
from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.registry import method

MLP = dict[str, Tensor]  # its maps by role, their biases as "<role>.bias", and its norm as "norm" and "norm.bias"


def measured(knobs: dict[str, float]) -> bool:
    """Whether it is asked how much one MLP depends on another."""
    return knobs["dependency"] > 0


@method("wiring", of="run", looks=measured)
def fusion(mlps: list[MLP], apart: Tensor, *, length: int = 0, dependency: float = 0.0) -> list[tuple[int, MLP]]:
    """Runs of MLPs without attention between them become one wide MLP each, which all of them read the same input in.

    Of a run of MLPs, in order, what it becomes: how many are made one, and that one. `apart` [n, n]: how far what MLP i adds moves where
    MLP j before it is left out, as a cosine distance.

    Formula: x + sum_i D_i act(U_i n_i(x)) in place of one after the other: rows of U_i and columns of D_i one behind the other; of n_i the
        weight goes into the columns of U_i and the bias to those of U_i, so that one plain norm serves; from the first on as many as
        `length` allows, none of which moves by more than `dependency`
    Source: FFN Fusion, arXiv:2503.18908 (Bercovich et al. 2025), the fused layer and the block-wise dependency
    Deviations: theirs is a search over a model that was cut by another program, and is followed by distillation; here runs begin at their
        first MLP, a limit on the dependency is a knob, and nothing is trained; that the last MLP of a run is better left alone there could
        not be confirmed
    """
    found: list[tuple[int, MLP]] = []
    begin = 0
    while begin < len(mlps):
        end = begin + 1
        while end < len(mlps) and (not length or end - begin < length) and (
                not dependency or bool((apart[end, begin:end] <= dependency).all())):
            end += 1
        found.append((end - begin, one(mlps[begin:end]) if end - begin > 1 else mlps[begin]))
        begin = end
    return found


def one(mlps: list[MLP]) -> MLP:
    """One MLP that is the sum of all of them."""
    first = mlps[0]
    new: MLP = {"norm": torch.ones_like(first["norm"])}
    if "norm.bias" in first:
        new["norm.bias"] = torch.zeros_like(first["norm.bias"])
    for role in ("gate", "up"):
        if role in first:
            new[role] = torch.cat([m[role] * m["norm"] for m in mlps])
            if f"{role}.bias" in first:
                new[f"{role}.bias"] = torch.cat([m[f"{role}.bias"] + (m[role] @ m["norm.bias"] if "norm.bias" in m else 0) for m in mlps])
    new["down"] = torch.cat([m["down"] for m in mlps], 1)
    if "down.bias" in first:
        new["down.bias"] = torch.stack([m["down.bias"] for m in mlps]).sum(0)
    return new
