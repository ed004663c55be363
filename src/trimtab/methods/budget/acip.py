from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change, Net, Ranking, Seen
from trimtab.methods.factors import Factors

BEGIN = 0.01   # of the median slope of a mask: the penalty of the first update
GROWTH = 1.1   # of the penalty, from one update to the next
STOP = 0.3     # of the parameters: where so many are left, the training ends


def parameters(kept: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Of factors that keep so many singular values of each site, one at least, or of the weight where that is less."""
    return sum(min(max(1, n) * sum(shapes[s]), shapes[s][0] * shapes[s][1]) for s, n in kept.items())


def learned(net: Net, *, lr: float, epochs: int, accumulate: int, seed: int) -> dict[str, Tensor]:
    """Scores of all singular values [rank], by site, whose changes have them all as factors: what stayed has its mask's value, what went
    minus the number of updates since."""
    shapes: dict[str, tuple[int, int]] = {}

    def start(new: Change, generator: torch.Generator) -> dict[str, Tensor]:
        return {"mask": torch.ones(min(new.w.shape), device=new.w.device)}

    def weight(new: Change, own: Mapping[str, Tensor]) -> Tensor:
        factors, mask = Factors.among(new.parts), own["mask"].relu()
        assert factors is not None
        binary = (mask > 0).float() + mask - mask.detach()  # a threshold that slopes pass
        return (factors.left * binary) @ factors.right

    def loss(seen: Seen) -> Tensor:
        return torch.nn.functional.cross_entropy(seen.logits.float(), seen.following)

    scores: dict[str, Tensor] = {}
    penalty = 0.0
    for own, grads in net.updates(start, weight, loss, lr=lr, epochs=epochs, accumulate=accumulate, seed=seed):
        shapes = shapes or {s.name: s.shape for s in net.trained}
        for name, its in own.items():
            before, here = scores.get(name, torch.ones_like(its["mask"])), its["mask"] > 0
            scores[name] = torch.where(here, its["mask"], before.clamp_max(0) - 1)
        if parameters({n: int((s > 0).sum()) for n, s in scores.items()}, shapes) <= STOP * sum(a * b for a, b in shapes.values()):
            break
        slopes = torch.cat([its["mask"].abs() for its in grads.values()])
        penalty = GROWTH * penalty or BEGIN * float(slopes.median())
        for name, its in grads.items():
            its["mask"].add_(penalty).mul_(own[name]["mask"] > 0)  # what is gone stays so
    return scores


@method("budget", learns=learned, xfail={"uses_knobs": "they are the training's, whose ranking it is given"})
def acip(ranking: dict[str, Ranking], target: float, *, lr: float = 0.05, epochs: int = 2, accumulate: int = 2, seed: int = 0,
         source: str = "") -> dict[str, float]:
    """A rank for every site from one ranking of all singular values, which one training finds: any size is the head of it.

    `ranking`: of every site the scores of its singular values. `source`: the directory that an earlier run wrote, whose ranking is taken;
    nothing is trained then. Shares average to `target`, or to less by no more than what one singular value takes; a site whose factors
    would take as many parameters is left whole. BadInput where a rank of 1 everywhere takes more.

    Formula: W = U M S V^T, M = diag(p > 0), slopes passed to p as they are; min L + lambda |p|_1 by Adam from p = 1 on, lambda 1.1 times as
        large after every update, p = 0 for good; a score is p where it is above 0, else minus the updates since it was; kept: the n highest
        scores of all sites, of equal ones the greater singular values, as many as take no more than the target
    Source: Genzel et al. 2025 (ACIP), arXiv:2502.01717, section 3, and the authors' code for what scores are and the threshold
    Deviations: the low-rank adapter that is trained beside the masks is left out: what is lost is the edit's to mend, such as svdllm's. Of
        each site the edit keeps as many as have such scores, the greatest by its own measure, where the paper keeps these themselves. How
        lambda begins and grows, where the training ends (30 % of the parameters) and the learning rate are ours; p begins at 1 everywhere
    """
    shapes = {n: r.site.shape for n, r in ranking.items()}
    total, kept = sum(a * b for a, b in shapes.values()), dict.fromkeys(shapes, 0)
    if (taken := parameters(kept, shapes)) > target * total:
        raise BadInput(f"acip: {target:g} of the parameters is less than factors of the least rank take, {taken / total:.3g}; keep more")
    for _, _, n in sorted(((-s, i, n) for n, r in ranking.items() for i, s in enumerate(r.scores))):
        now, more = (parameters({n: kept[n] + k}, shapes) for k in (0, 1))
        taken += more - now
        if taken > target * total:
            break
        kept[n] += 1
    return {n: min(1.0, max(1, k) * sum(shapes[n]) / (shapes[n][0] * shapes[n][1])) for n, k in kept.items()}
