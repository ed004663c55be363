"""What a pass does to the sites of a block: rewrites, scores, edits, repairs."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.core import rotation, structure
from trimtab.core.calibrate import Collector
from trimtab.core.registry import get
from trimtab.core.spec import Pass, Step
from trimtab.core.types import Change, Failed, Site
from trimtab.methods.basis import Basis
from trimtab.methods.codes import Grid, length
from trimtab.methods.entrywise import FIRST, Entrywise
from trimtab.methods.format.panels import unpack_mask
from trimtab.methods.gates import Gate
from trimtab.methods.rounding import Rounding
from trimtab.methods.terms import NOTHING, Spared, Terms, of_site, put_together
from trimtab.network import graph
from trimtab.network.checkpoint import finite
from trimtab.network.stream import Network


@dataclass(frozen=True)
class Unit:
    """A unit with its knobs set, as joint edits receive it: call it with scores and a share."""

    step: Step
    heads: Tensor | None = None  # what the inputs of the site are: see methods/unit/structure.py

    @property
    def period(self) -> int | None:
        f = self.step.method.facts["period"]
        return f(self.step.bound) if f else None

    @property
    def free(self) -> bool:
        return bool(self.step.method.facts["free"])

    def __call__(self, s: Tensor, keep: float) -> Tensor:
        heads = torch.tensor([s.shape[1]] * 2) if self.heads is None else self.heads
        return self.step.method({"s": s, "keep": keep, "heads": heads}, **self.step.bound)


@dataclass(frozen=True)
class Gridded:
    """A grid with its knobs set, as edits receive it: call it with weights [out, in] to fit it to them."""

    step: Step
    stats: dict[str, Tensor]

    @property
    def whole(self) -> bool:
        """Whether it has to see all of a site at once."""
        of = self.step.method.facts["of"]
        return (of(self.step.bound) if callable(of) else of) == "site"

    @property
    def blind(self) -> bool:
        """Whether the weights are all it sees."""
        return not self.step.method.needs

    def group(self, w: Tensor) -> int:
        """Inputs of w [out, in] that share a scale."""
        return length(self.step.bound["group"], w.shape[1])

    def __call__(self, w: Tensor) -> Grid:
        return self.step.method({"w": w, **self.stats}, **self.step.bound)


@dataclass(frozen=True)
class Gated:
    """A gate with its knobs set, as the edit receives it: call it with the weight [out, in] and the share that is computed."""

    step: Step
    stats: dict[str, Tensor]

    def __call__(self, w: Tensor, keep: float) -> Gate:
        found: Gate = self.step.method({"w": w, "keep": keep, **self.stats}, **self.step.bound)
        return found


@dataclass(frozen=True)
class Shared:
    """What a site becomes with the weights of another place, `w` [out, in], and the parts that say which place that is."""

    w: Tensor
    parts: dict[str, Tensor]


def score_site(p: Pass, w: Tensor, stats: dict[str, Tensor]) -> Tensor:
    """Scores of one site [out, in], higher = keep. Joint edits without a score are judged by magnitude for budgets."""
    step = p.steps.get("score", Step("score/magnitude"))
    scores: Tensor = step.method({"w": w, **stats}, **step.bound)
    if scores.dim() == 1:  # of inputs, or of the whole site: in equal parts over their weights
        scores = (scores * (len(scores) / w.numel())).expand(w.shape)
    return scores + stats["worth"] / len(scores) if "worth" in stats else scores  # that of the feeders, by input


def rewrite_block(net: Network, module: Any, i: int, owner: dict[str, Pass],
                  stats: Callable[[Site], dict[str, Tensor]], settled: set[str]) -> tuple[dict[str, Refit], set[str]]:
    """Scale the inputs of the block's sites as their passes' rewrites ask, and move them: outputs unchanged.

    Sites that an earlier sweep `settled`, with parts that a scale would leave behind, are left alone. Returns what became of the input
    of every site that was not, and the names of other parameters that took the inverse.
    """
    found: dict[str, Refit] = {}
    changed: set[str] = set()
    for fold in graph.folds(net.family, net.config_of(i), net.sites_of(i)):
        passes = {str(owner[s.name]): owner[s.name] for s in fold.readers if s.name in owner}
        p = next(iter(passes.values()), None)
        if len(passes) != 1 or p is None or not p.folds or any(s.name not in owner for s in fold.readers):
            continue  # somebody reads the input who would not follow
        if settled & {s.name for s in (*fold.readers, *([fold.writer] if fold.writer else []))}:
            continue
        its, z = stats(fold.readers[0]), None
        if p.centres and net.moves(fold) and (z := p.centres(its["sample"])) is not None:
            z, others = net.move(module, fold, z)
            its, changed = moved(its, z), changed | others
        s, others = net.fold(module, fold, rewritten(net, module, p, fold.readers, its))
        found |= {r.name: Refit(s, z) for r in fold.readers}
        changed |= others
    return found, changed


def rewritten(net: Network, module: Any, p: Pass, readers: Iterable[Site], stats: dict[str, Tensor]) -> Any:
    """What the pass's rewrite says of an input, for all these sites that read it."""
    step = p.steps["rewrite"]
    env: dict[str, Any] = {**stats, "w": torch.cat([net.weight(module, s).float() for s in readers])}
    if "grid" in p.steps:
        env["grid"] = Gridded(p.steps["grid"], stats)
    if "input" in p.steps:
        env["rounded"] = lambda x: rounding_for(p, {"sample": x}).of(x)
    return step.method(env, **step.bound)


def rounding_for(p: Pass, stats: Mapping[str, Tensor]) -> Rounding:
    """How the pass rounds an input of which `stats` are known."""
    step = p.steps["input"]
    found: Rounding = step.method(dict(stats), **step.bound)
    return found


Bases = tuple[Basis | None, Basis | None]  # of a site's inputs and of its outputs
PLAIN: Bases = (None, None)


def bases_of(net: Network, module: Any, i: int, owner: dict[str, Pass], stats: Callable[[Site], dict[str, Tensor]],
             spared: Callable[[Site], Spared]) -> dict[str, Bases]:
    """The bases that the block's sites are edited in, where their passes' rewrites ask for them: one for all that read an input."""
    found: dict[str, Bases] = {}
    readers: dict[tuple[str, str], list[Site]] = {}
    for s in net.sites_of(i):
        if s.name in owner and owner[s.name].turns:
            alone = s.name if spared(s).columns is not None else ""  # who reads only a part of an input
            readers.setdefault((s.input + alone, str(owner[s.name])), []).append(s)
    for sites in readers.values():
        p, kept = owner[sites[0].name], spared(sites[0])
        step, its = p.steps["rewrite"], restricted(stats(sites[0]), kept.others(sites[0].shape[1]))
        w = torch.cat([spared(s).rest(net.weight(module, s).float()) for s in sites])
        inside = rotation.inside(net, module, sites[0], step, w.device) if p.shares else None
        inside = step.method({**its, "w": w}, **step.bound) if inside is None else inside
        for s in sites:
            if p.shares:
                outside = rotation.outside(net, s, step, w.device)
            else:
                of = step.method.facts["outside"]
                outside = of(s.shape[0], step.bound, w.device) if of and s.rows is None else None
            found[s.name] = (inside, outside)
    return found


@dataclass(frozen=True)
class Refit:
    """What became of an input x: (x - shift) / scale, each [in]."""

    scale: Tensor
    shift: Tensor | None

    def of(self, stats: dict[str, Tensor]) -> dict[str, Tensor]:
        """Statistics of what it became."""
        stats = stats if self.shift is None else moved(stats, self.shift)
        return {n: get(f"stat/{n}").facts["rescaled"](t, self.scale) for n, t in stats.items()}


def moved(stats: dict[str, Tensor], z: Tensor) -> dict[str, Tensor]:
    """Statistics of an input that `z` [in] was taken off."""
    return {n: get(f"stat/{n}").facts["moved"](t, z, stats["in_mean"]) for n, t in stats.items()}


def turned(stats: dict[str, Tensor], basis: Basis | None) -> dict[str, Tensor]:
    """Statistics of an input in another basis: those that can be told."""
    if basis is None or not stats:
        return stats
    facts = {n: get(f"stat/{n}").facts for n in stats}
    gram = basis.gram(stats["gram"]) if "gram" in stats else None
    known = {n: f(gram) for n in stats if gram is not None and (f := facts[n]["of_gram"])}
    return known | {n: f(t, basis) for n, t in stats.items() if (f := facts[n]["turned"])}


def restricted(stats: dict[str, Tensor], inputs: Tensor) -> dict[str, Tensor]:
    """Statistics of some of the inputs, bool [in]."""
    if bool(inputs.all()):
        return stats
    return {n: get(f"stat/{n}").facts["some"](t, inputs) for n, t in stats.items() if get(f"stat/{n}").facts["of"] == "input"}


def edit_block(net: Network, module: Any, i: int, owner: dict[str, Pass], shares: Mapping[str, float],
               stats: Collector | None, priors: Mapping[str, Tensor],
               others: Callable[[Site], Shared | None] = lambda s: None) -> tuple[Iterator[tuple[Site, Change]], set[str]]:
    """Edit the sites of a block by the passes that own them, in place, one after the other.

    `priors`: the parts that earlier passes left, by `<site>:<part>`; `others`: what a site takes of others'. Returns the changes, each made
    as it is asked for and with w in the type of the files, and the names of further parameters that a rewrite or a repair changed, all of
    them once every change is made.
    """
    def its(s: Site) -> dict[str, Tensor]:
        return stats.of(s) if stats else {}

    spared = {s.name: Spared.among(of_site(priors, s.name)) for s in net.sites_of(i)}
    settled = {n.rpartition(":")[0] for n in priors if n.endswith((":codes", ":left", f":{FIRST}", ":book", ":entries", ":columns"))}
    refit, changed = rewrite_block(net, module, i, owner, its, settled)
    bases = bases_of(net, module, i, owner, its, lambda s: spared[s.name])

    def changes() -> Iterator[tuple[Site, Change]]:
        for s in net.sites_of(i):
            if s.name not in owner:
                continue
            bits = priors.get(f"{s.name}:mask")
            prior = unpack_mask(bits, s.shape) if bits is not None else None
            known = refit[s.name].of(its(s)) if s.name in refit else its(s)
            if (p := owner[s.name]).gates:
                known = {**known, "heads": torch.tensor(graph.heads(net.config_of(i))[:2])}
            elif p.ends:
                known = {**known, **of_structure(net, module, p, s, its)}
            shared = others(s) if p.ties else None
            if shared is not None:
                known = {**known, "other": shared.w}
            change = edit_site(p, s, net.weight(module, s).float(), shares.get(s.name, math.nan), known, prior,
                               spared[s.name], bases.get(s.name, PLAIN))
            if shared is not None:
                change = replace(change, parts={**shared.parts, **change.parts})
            if p.takes and change.mask is not None and not change.mask.any() and (b := net.bias(module, s)) is not None:
                changed.add(net.add_to_bias(module, s, -b))  # nothing is left of what its sublayer adds
            change = replace(change, w=change.w.to(net.stored_dtype(s)))  # what the file holds is what later blocks see
            net.set_weight(module, s, change.w)
            for f in (f for f in structure.feeders(net, s) if f.role in change.feeders):
                net.set_weight(module, f, change.feeders[f.role])
                if (b := change.feeders.get(f"{f.role}.bias")) is not None:
                    changed.add(net.set_bias(module, f, b))
            if change.bias is not None:
                changed.add(net.add_to_bias(module, s, change.bias))
            yield s, change

    return changes(), changed


def of_structure(net: Network, module: Any, p: Pass, s: Site, its: Callable[[Site], dict[str, Tensor]]) -> dict[str, Any]:
    """What a pass that takes parts of the network away is told of a site that a sublayer ends in."""
    known: dict[str, Any] = {"heads": torch.tensor(structure.heads_of(net, s)), "depth": torch.tensor(s.block / max(1, net.n_blocks - 1))}
    if p.steps["edit"].method.facts["fuses"]:
        mine = structure.feeders(net, s)
        biases = {f"{f.role}.bias": b for f in mine if (b := net.bias(module, f)) is not None}
        known |= {"feeders": {f.role: net.weight(module, f) for f in mine} | biases, "act": graph.activation(net.config)}
    if p.steps["unit"].bound.get("feeders"):
        known["worth"] = structure.worth_of_feeders(
            net, s, lambda f: score_site(p, net.weight(module, f).float(), {**its(f), **known, "heads": torch.tensor([f.shape[1]] * 2)}))
    return known


def edit_site(p: Pass, site: Site, w: Tensor, share: float, stats: dict[str, Tensor], prior: Tensor | None,
              spared: Spared = NOTHING, bases: Bases = PLAIN) -> Change:
    """Edit and repair one weight `w` [out, in] float32, but for what was `spared`, in its `bases`. What an earlier pass dropped
    (`prior`) stays dropped."""
    rest, inside, outside = w, *bases
    if p.ties and "other" not in stats:  # it keeps its own
        return checked(p, site, w, prior, Change(w))
    if p.gates:  # what earlier passes left of the weight stays as it is
        return checked(p, site, w, prior, edited(p, w, share, stats, prior))
    if p.steps["edit"].method.facts["factors"] and share >= 1:  # as many parameters as the weight, and less than it
        return checked(p, site, w, prior, Change(w))
    if spared or bases != PLAIN:
        others = spared.others(w.shape[1])
        rest = spared.rest(w)
        rest = rest if inside is None else inside.weight(rest)
        rest = rest if outside is None else outside.of(rest.T).T.contiguous()
        stats, prior_there = turned(restricted(stats, others), inside), None if prior is None else prior[:, others]
    else:
        prior_there = prior
    change = put_together(edited(p, rest, share, stats, prior_there), spared, inside, outside)
    if "input" in p.steps:
        change = replace(change, parts={**change.parts, **rounding_for(p, stats).parts()})
    return checked(p, site, w, prior, change)


def edited(p: Pass, w: Tensor, share: float, stats: dict[str, Tensor], prior: Tensor | None) -> Change:
    """What the edit and the repairs of a pass make of w [out, in]."""
    step = p.steps["edit"]
    env: dict[str, Any] = {"w": w, "keep": share, **stats}
    if "unit" in p.steps:
        env["unit"] = Unit(p.steps["unit"], stats.get("heads"))
    if "grid" in p.steps:
        env["grid"] = Gridded(p.steps["grid"], stats)
    if "gate" in p.steps:
        env["gate"] = Gated(p.steps["gate"], stats)
    if "score" in p.steps and not p.ties:
        s = score_site(p, w, stats)
        env["mask"] = env["unit"](s if prior is None else s * prior, share)
        if prior is not None:
            env["mask"] &= prior
    else:
        env["mask"] = torch.ones_like(w, dtype=torch.bool) if prior is None else prior
    change: Change = step.method(env, **step.bound)
    for r in p.repairs:
        change = r.method({**env, "new": change}, **r.bound)
    return change


def checked(p: Pass, site: Site, w: Tensor, prior: Tensor | None, change: Change) -> Change:
    """The change, if it keeps what every change has to keep."""
    mask, edit = change.mask, p.steps["edit"].key
    if change.w.shape != w.shape or not finite(change.w):
        raise Failed(f"{site.name}: {edit} returned a weight of wrong shape or with NaN; please report this")
    if mask is not None and bool((change.w[~mask] != 0).any()):
        raise Failed(f"{site.name}: {edit} left weights outside its own mask; please report this")
    terms = Terms.among(change.parts) or Entrywise.among(change.parts)
    if terms is not None and not torch.equal(terms.weight(), change.w):
        raise Failed(f"{site.name}: {edit} returned parts that do not decode to its weight; please report this")
    if prior is not None and bool((change.w[~prior] != 0).any()):
        raise Failed(f"{site.name}: {edit} brought back weights an earlier pass dropped; please report this")
    return change
