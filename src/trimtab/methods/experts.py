"""Experts made of the hidden neurons of a dense MLP, and routers to them that are told from calibration tokens in closed form."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from trimtab.core.types import BadInput
from trimtab.methods.products import linear
from trimtab.methods.routers import Steady, held_out
from trimtab.methods.select import top
from trimtab.methods.solvers import damped, factor

SEEN = 1024     # tokens that neurons are clustered by
ROUNDS = 10     # of k-means
EIGHT, FEW = 8, 16  # neurons that a row of grouped products is a multiple of, which is at most one of so many parts of them
NEAR = 2.0**-6  # how far the logits of a token lie apart at most: the experts it meets then weigh alike, which of them it meets is exact


@dataclass(frozen=True)
class Experts:
    """What an MLP becomes: `neurons` int64 [experts, size], the hidden neurons of each; every token meets the `active` ones of the largest
    scores, which the `router` float32 [experts, width] makes of what the MLP is given, and the `shared` neurons int64 [n], if there are.

    What they add is summed; of `copies` of the whole MLP it is averaged. `down` [width, neurons]: what takes the place of the map behind;
    `own` [experts, width, size]: of each expert's own, where a neuron may be in several of them.
    """

    neurons: Tensor
    active: int
    router: Tensor
    shared: Tensor | None = None
    copies: bool = False
    down: Tensor | None = None
    own: Tensor | None = None

    @property
    def gains(self) -> tuple[float, float]:
        """What the maps behind are multiplied by, of the experts and of the shared one, where weights of the experts that a token meets
        add up to one and are alike, and the gate of the shared one is half open."""
        if self.copies:
            return (1.0, 1.0) if self.shared is None else (0.5, 1.0)
        return float(self.active), 2.0

    def chosen(self, x: Tensor) -> Tensor:
        """Which experts tokens x [tokens, width] meet, bool [tokens, experts]."""
        return top(linear(x.float(), self.router), self.active)

    def met(self, x: Tensor, neurons: int) -> Tensor:
        """Which of so many neurons tokens x [tokens, width] meet, bool [tokens, neurons]."""
        on, found = self.chosen(x), torch.zeros(len(x), neurons, dtype=torch.bool, device=x.device)
        for e, mine in enumerate(self.neurons):
            found[:, mine] |= on[:, e, None]
        if self.shared is not None:
            found[:, self.shared] = True
        return found

    def adds(self, x: Tensor, h: Tensor, down: Tensor) -> Tensor:
        """What an MLP adds that is given x [tokens, width], of its hidden values h [tokens, neurons], with `down` behind them."""
        down, h = (down if self.down is None else self.down).float(), h.float()
        if self.own is None:
            return linear(h * self.met(x, h.shape[1]), down)
        on = self.chosen(x)
        each = [on[:, e, None] * linear(h[:, mine].contiguous(), self.own[e]) for e, mine in enumerate(self.neurons)]
        return torch.stack(each).sum(0)


def split(neurons: int, parts: int) -> int:
    """How many hidden neurons each of so many equal parts has. BadInput where they cannot be equal."""
    if parts < 2:
        raise BadInput(f"parts={parts} makes no experts; it is 2 or more")
    if neurons % parts:
        fits = sorted((n for n in range(2, neurons // 2 + 1) if neurons % n == 0), key=lambda n: (abs(n - parts), n))[:3]
        raise BadInput(f"{neurons} hidden neurons cannot be split into {parts} equal parts; use parts={', '.join(map(str, sorted(fits)))}")
    return neurons // parts


def sized(neurons: int, parts: int, keep: float) -> int:
    """How many of so many hidden neurons each of overlapping experts has: a multiple of EIGHT where there are many. BadInput for none."""
    step = min(EIGHT, max(1, neurons // FEW))
    size = int(keep * neurons / step * (1 + 1e-9)) * step
    if parts < 2 or not size:
        raise BadInput(f"parts={parts} with a share of {keep:g} of {neurons} neurons makes no experts; parts is 2 or more, and a share "
                       f"{step} neurons or more")
    return size


def copied(parts: int, active: int) -> None:
    """BadInput where a token cannot meet so many of so many copies."""
    if parts < 2 or not 1 <= active <= parts:
        raise BadInput(f"a token cannot meet {active} of {parts} copies; parts is 2 or more, and active 1 to parts")


def choosable(parts: int, always: int, keep: float) -> int:
    """How many of the parts that are not met always a token meets, for at most the share `keep` of all. BadInput where that is none."""
    if not 0 <= always < parts:
        raise BadInput(f"always={always} of {parts} parts leaves none to choose from; it is 0 to {parts - 1}")
    count = int(keep * parts * (1 + 1e-9)) - always
    if count < 1:
        raise BadInput(f"a share of {keep:g} of {parts} parts, {always} of them always met, leaves none to choose; raise --keep"
                       + (", or lower always" if always else ", or use more parts"))
    return count


def worth(h: Tensor, down: Tensor) -> Tensor:
    """How much each hidden neuron adds for each token, of hidden values h [tokens, neurons] and the map behind [width, neurons]."""
    return h.abs() * down.norm(dim=0)


def coactive(h: Tensor, down: Tensor) -> Tensor:
    """Points [neurons, tokens] that lie near each other where neurons add much for the same tokens: their squared distance falls with the
    correlation of what they add."""
    each = worth(h[:: -(-len(h) // SEEN)], down)
    each = each - each.mean(0)
    return (each / each.norm(dim=0).clamp_min(1e-30)).T.contiguous()


def alike(gate: Tensor) -> Tensor:
    """Points [neurons, width] that lie near each other where the rows of the gate point the same way."""
    return torch.nn.functional.normalize(gate, dim=1)


def clusters(points: Tensor, n: int, seed: int) -> Tensor:
    """Balanced k-means of points [m, d]: int64 [n, m / n], the points of each cluster, in order."""
    size = len(points) // n
    first = torch.randperm(len(points), generator=torch.Generator(points.device).manual_seed(seed), device=points.device)
    which = torch.empty(len(points), dtype=torch.int64, device=points.device)
    which[first] = torch.arange(len(points), device=points.device) // size
    centres = points[first[:n]]
    for _ in range(ROUNDS):
        moved = balanced(torch.cdist(points, centres).square(), which)
        if torch.equal(moved, which):
            break
        which = moved
        centres = torch.stack([points[which == c].mean(0) for c in range(n)])
    return torch.stack([(which == c).nonzero().flatten() for c in range(n)])


def balanced(cost: Tensor, which: Tensor) -> Tensor:
    """For each of m points its cluster [m], as many in each as in `which`, so that no exchange of points between two clusters lowers the
    sum of their costs [m, n]."""
    which, cost = which.clone(), cost.double()
    least = 1e-9 * float(cost.abs().max().clamp_min(1e-30))
    changed = True
    while changed:
        changed = False
        for a, b in combinations(range(cost.shape[1]), 2):
            here, there = (which == a).nonzero().flatten(), (which == b).nonzero().flatten()
            off, on = ((cost[at, x] - cost[at, y]).sort(descending=True, stable=True) for at, x, y in ((here, a, b), (there, b, a)))
            some = min(len(here), len(there))
            count = int((off.values[:some] + on.values[:some] > least).sum())
            if count:
                which[here[off.indices[:count]]], which[there[on.indices[:count]]] = b, a
                changed = True
    return which


def routed(x: Tensor, h: Tensor, down: Tensor, neurons: Tensor, active: int, damp: float) -> Tensor:
    """A router, float32 [experts, width]: of what the MLP is given, x [tokens, width], to whether an expert is among the `active` ones that
    add most, of hidden values h [tokens, all neurons], as ridge regression tells it."""
    size = torch.stack([linear(h[:, mine].contiguous(), down[:, mine].contiguous()).norm(dim=1) for mine in neurons], 1)
    most = top(size, active).float() - active / len(neurons)
    gram = linear(x.T.contiguous(), x.T.contiguous())
    low = factor(partial(damped_more, gram, damp))
    router = torch.cholesky_solve((x.T @ most).double(), low).T.float()
    logits = linear(x, router)
    far = float((logits - logits.mean(1, keepdim=True)).abs().max())
    return router * (NEAR / far) if far > 0 else router


def mended(found: Experts, x: Tensor, h: Tensor, down: Tensor, damp: float) -> Experts:
    """With the map behind that is nearest, in what the MLP adds for the tokens x with their hidden values h, where each meets the neurons
    of its experts alone; a ridge holds it to what it was."""
    some = h * found.met(x, h.shape[1])
    gram = linear(some.T.contiguous(), some.T.contiguous())
    low = factor(partial(damped_more, gram, damp))
    missing = linear(h - some, down)
    return replace(found, down=down + torch.cholesky_solve((some.T @ missing).double(), low).T.float())


def damped_more(gram: Tensor, damp: float, extra: float) -> Tensor:
    return damped(gram, damp + extra)


def separate(found: Experts, x: Tensor, h: Tensor, down: Tensor, damp: float) -> Experts:
    """With maps behind of each expert's own, nearest in what the MLP adds for the tokens x, with their hidden values h, that meet it alone;
    a ridge holds them to what they were."""
    on, maps = found.chosen(x), []
    for e, mine in enumerate(found.neurons):
        its = h[on[:, e]]
        some, own = its[:, mine].contiguous(), down[:, mine]
        if len(some):
            gram = linear(some.T.contiguous(), some.T.contiguous())
            low = factor(partial(damped_more, gram, damp))
            missing = linear(its, down) - linear(some, own.contiguous())
            own = own + torch.cholesky_solve((some.T @ missing).double(), low).T.float()
        maps.append(own)
    return replace(found, own=torch.stack(maps))


# ---- one expert a token, learned --------------------------------------------------------------
BATCH = 256    # tokens of an update
SOFT = 0.4     # temperature of the choice of an expert, and of the choice of its neurons
EVEN = 0.1     # weight of how evenly tokens are spread over experts
DAMP = 0.01    # of the router that it starts at


def grouped(each: Tensor, n: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens in n groups, of what neurons add for each [tokens, neurons]: how much neurons are worth to each group [n, neurons], and the
    group of every token [tokens], so that as little as may be is left out where a group has its `size` best neurons."""
    power = each.square()
    first = torch.randperm(len(power), generator=torch.Generator(power.device).manual_seed(seed), device=power.device)[:n]
    score, which = power[first], torch.full((len(power),), -1, device=power.device)
    for _ in range(ROUNDS):
        moved = (power @ top(score, size).float().T).argmax(1)
        if torch.equal(moved, which):
            break
        which = moved
        score = torch.stack([power[which == g].mean(0) if bool((which == g).any()) else score[g] for g in range(n)])
    return score, which


def learned(x: Tensor, h: Tensor, down: Tensor, n: int, size: int, *, lr: float, epochs: int, seed: int) -> Experts:
    """Experts of `size` neurons, of which a token meets one, and their router, learned together from what it is given, x [tokens, width],
    and their hidden values h [tokens, neurons], to lower how far what is added is from what all neurons add.

    Of all epochs the one that does best on tokens held out.
    """
    score, which = grouped(worth(h, down), n, size, seed)
    (x, judged), (h, wanted) = held_out(x), held_out(h)
    want = torch.nn.functional.one_hot(which[:len(x)], n).float() - 1 / n
    low = factor(partial(damped_more, linear(x.T.contiguous(), x.T.contiguous()), DAMP))
    router = torch.cholesky_solve((x.T @ want).double(), low).T.float() * n
    logits = score.clamp_min(1e-30).log()
    logits = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True).clamp_min(1e-6)
    scale = float(linear(h, down).square().sum(1).mean().clamp_min(1e-30))
    generator = torch.Generator(x.device).manual_seed(seed)

    def short(h: Tensor, kept: Tensor) -> Tensor:
        """What is missing of what is added where these neurons alone are met, [tokens, width]."""
        return linear(h * (~kept), down)

    def loss() -> float:
        kept, at = top(logits, size), linear(judged, router).argmax(1)
        return sum(float(short(wanted[at == e], kept[e]).square().sum()) for e in range(n)) / len(judged)

    rates, best, least = [Steady(t, lr) for t in (logits, router)], (logits.clone(), router.clone()), loss()
    for _ in range(epochs):
        for some in torch.randperm(len(x), generator=generator, device=x.device).split(BATCH):
            mine, its, kept = x[some], h[some], top(logits, size)
            soft = torch.softmax(linear(mine, router) / SOFT, 1)
            edge = logits.sort(1, descending=True).values[:, size - 1:size + 1].mean(1, keepdim=True)
            open_ = torch.sigmoid((logits - edge) / SOFT)
            costs, slopes = [], []
            for e in range(n):
                missing = short(its, kept[e])
                costs.append(missing.square().sum(1) / scale)
                slopes.append(-2 / scale * (soft[:, e, None] * its * linear(missing, down.T)).mean(0))
            each = torch.stack(costs, 1) + EVEN * n * torch.bincount(soft.argmax(1), minlength=n) / len(some)
            slope = soft * (each - (soft * each).sum(1, keepdim=True)) / (SOFT * len(some))
            rates[0].step(torch.stack(slopes) * open_ * (1 - open_) / SOFT)
            rates[1].step(linear(slope.T.contiguous(), mine.T.contiguous()))
        if (now := loss()) < least:
            best, least = (logits.clone(), router.clone()), now
    kept = top(best[0], size)
    return Experts(torch.stack([k.nonzero().flatten() for k in kept]), 1, best[1])


def of_parts(mlp: Mapping[str, Tensor], parts: int, always: int) -> tuple[int, Tensor]:
    """The size of equal parts of an MLP's hidden neurons, and a router to those that are not met always to which all are alike."""
    down = mlp["down"]
    choosable(parts, always, 1.0)
    return split(down.shape[1], parts), down.new_zeros(parts - always, down.shape[0], dtype=torch.float32)
