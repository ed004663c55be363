"""Which inputs of a token are computed: a score of each, what it is held against, and for how many tokens that is decided together."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.core.types import BadInput
from trimtab.methods.format.panels import Packed
from trimtab.methods.select import top

# What is scored: the site's own input; the gate of an MLP, activated; what is given to the sublayer that the site ends, by a router.
INPUT, HIDDEN, ROUTER = SOURCES = ("input", "hidden", "router")
PREFIX = "gate_"
EVERYTHING = -1.0  # a threshold below every magnitude
CORE = (2, 5)  # of the inputs of a token that are above zero the share, the largest ones, rounded up, that is its core


@dataclass(frozen=True)
class Router:
    """Linear scores of what a sublayer is given: `second` [scores, width], or [scores, rank] behind `first` [rank, width], and `bias`
    [scores] where there is one. All float32."""

    second: Tensor
    first: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        inner = self.second if self.first is None else self.first
        if self.second.ndim != 2 or inner.ndim != 2 or (self.first is not None and len(self.first) != self.second.shape[1]) or (
                self.bias is not None and self.bias.shape != self.second.shape[:1]):
            raise BadInput("the maps of a router do not fit each other")
        maps = [t for t in (self.second, self.first, self.bias) if t is not None]
        if any(t.dtype != torch.float32 or not bool(torch.isfinite(t).all()) for t in maps):
            raise BadInput("the maps of a router are float32 and finite")

    def __call__(self, x: Tensor) -> Tensor:
        """Of x [..., width]: [..., scores]."""
        x, linear = x.detach().float(), torch.nn.functional.linear
        second, first, bias = (None if t is None else t.to(x.device) for t in (self.second, self.first, self.bias))
        if (width := (self.second if self.first is None else self.first).shape[1]) != x.shape[-1]:
            raise BadInput(f"a router of {width} inputs is given {x.shape[-1]}")
        assert second is not None
        return linear(x if first is None else linear(x, first), second, bias)


@dataclass(frozen=True)
class Core:
    """A sentence decides for itself: its first `prompt` tokens, of which all is computed, for those after them.

    The `count` inputs that are in the core of most of these tokens are the sentence's own core (ties by the lower index), and it is what
    is computed. With `centres` float32 [clusters, in], of such cores, the one of the nearest, `cores` bool [clusters, in], is in its place.
    """

    prompt: int
    count: int
    centres: Tensor | None = None
    cores: Tensor | None = None

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.count < 1:
            raise BadInput(f"a core is of 1 input or more, by 1 token or more; not {self.count} by {self.prompt}")
        if (self.centres is None) != (self.cores is None) or (self.cores is not None and self.centres is not None and (
                self.centres.ndim != 2 or self.cores.shape != self.centres.shape or self.centres.dtype != torch.float32)):
            raise BadInput("each cluster of a gate has a centre and a core")

    def mask(self, v: Tensor) -> Tensor:
        """Of v [..., tokens, in], sentences from their first tokens on: bool, of the same shape."""
        if self.centres is not None and self.centres.shape[1] != v.shape[-1]:
            raise BadInput(f"a gate of {self.centres.shape[1]} inputs is given {v.shape[-1]}")
        passed = torch.ones_like(v, dtype=torch.bool)
        if v.shape[-2] > self.prompt and self.count < v.shape[-1]:
            own = top(firing(v[..., :self.prompt, :]), self.count)
            if self.centres is not None and self.cores is not None:
                far = torch.cdist(own.float().reshape(-1, v.shape[-1]), self.centres.to(v.device))
                own = self.cores.to(v.device)[far.argmin(1)].view_as(own)
            passed[..., self.prompt:, :] = own[..., None, :]
        return passed


def firing(v: Tensor) -> Tensor:
    """How many tokens of v [..., tokens, in] have an input in their core, float32 [..., in]; of equal ones the lower index."""
    v = v.detach().float()
    order = v.where(v > 0, 0.0).sort(dim=-1, descending=True, stable=True).indices
    among = torch.arange(v.shape[-1], device=v.device) < -(-CORE[0] * (v > 0).sum(-1, keepdim=True) // CORE[1])
    return torch.zeros_like(v).scatter_(-1, order, among.float()).sum(-2)


@dataclass(frozen=True)
class Gate:
    """The inputs [in] of a token that a site computes, the others counting as zero, by one of four rules: those whose score is above
    `threshold` (float32 [1]); the `count` of the largest scores; as many as `counts` (int32 [largest]) says for so many sequences, those
    whose scores above zero have the largest sum over the sequences of a step, for all of these; or those of a `core`. Of equal ones the
    lower index.

    A score is |v| times `scale` (float32 [in], 1 where there is none), v being the input itself, or where `of` is hidden what the gate of
    the MLP gives for that neuron, activated; or it is what the `router` makes of v, where `of` is router. Each is of `group` inputs that
    stand or fall together, and the largest of `pool` scores where it has as many. What is not a number is computed.
    """

    threshold: Tensor | None = None
    count: int = 0
    scale: Tensor | None = None
    of: str = INPUT
    router: Router | None = None
    group: int = 1
    pool: int = 1
    counts: Tensor | None = None
    core: Core | None = None

    def __post_init__(self) -> None:
        if [self.threshold is not None, self.count != 0, self.counts is not None, self.core is not None].count(True) != 1:
            raise BadInput("a gate holds scores against a threshold, keeps so many of the largest, or those of a core: one of these")
        if self.threshold is not None and (self.threshold.shape != (1,) or self.threshold.dtype != torch.float32
                                           or bool(self.threshold.isnan().any())):
            raise BadInput("the threshold of a gate is one float32 number")
        if self.count < 0 or self.of not in SOURCES:
            raise BadInput(f"a gate keeps 1 input or more, by {' or '.join(SOURCES)}; not {self.count} by {self.of}")
        if self.counts is not None and (self.counts.ndim != 1 or self.counts.dtype != torch.int32 or not len(self.counts)
                                        or bool((self.counts < 1).any())):
            raise BadInput("the counts of a gate are int32, 1 or more, one for each number of sequences")
        if self.scale is not None and (self.scale.ndim != 1 or self.scale.dtype != torch.float32
                                       or not bool(torch.isfinite(self.scale).all() and (self.scale >= 0).all())):
            raise BadInput("the scales of a gate are float32, finite and not below 0, one an input")
        if (self.of == ROUTER) != (self.router is not None):
            raise BadInput("a gate scores by a router where it has one; trim the model again")
        if self.group < 1 or self.pool < 1 or (self.router is not None and len(self.router.second) % self.pool):
            raise BadInput(f"a gate of units of {self.group} inputs and {self.pool} scores each does not fit what it scores")

    @property
    def together(self) -> int:
        """How many sequences of a step it decides for together, at most; 0 where each token or sentence is alone."""
        return 0 if self.counts is None else len(self.counts)

    def score(self, v: Tensor) -> Tensor:
        """Of v [..., in], or what is given to the sublayer: one a unit, float32."""
        if self.router is not None:
            s = self.router(v)
        else:
            s = v.detach().float().abs()
            s = s if self.scale is None else s * self.scale.to(s.device)
        return s if self.pool == 1 else s.unflatten(-1, (-1, self.pool)).amax(-1)

    def mask(self, v: Tensor) -> Tensor:
        """The inputs that are computed, bool [..., in], of what is scored, v [..., in].

        Of a step together: v [sequences, ..., in]; by a core: v [..., tokens, in], from the first token of a sentence on.
        """
        if self.scale is not None and len(self.scale) != v.shape[-1]:
            raise BadInput(f"a gate of {len(self.scale)} inputs is given {v.shape[-1]}")
        if self.core is not None:
            return self.core.mask(v)
        s = self.score(v)
        if self.threshold is not None:
            passed = ~(s <= self.threshold.to(s.device))  # so that what is no number passes
        elif self.counts is None:
            passed = top(s.where(~s.isnan(), torch.inf), self.count)
        elif len(s) > self.together:
            raise BadInput(f"a gate that was made for steps of up to {self.together} sequences is given {len(s)}; run fewer together, or "
                           f"trim the model again with batch={len(s)}")
        else:
            s = s.clamp_min(0).sum(0)
            passed = top(s.where(~s.isnan(), torch.inf), int(self.counts[len(v) - 1])).expand(len(v), *s.shape)
        return passed if self.group == 1 else passed.repeat_interleave(self.group, -1)

    @property
    def alone(self) -> bool:
        """Whether it decides for every token alone and by what is there when the map runs, as packed maps do."""
        return self.router is None and self.core is None and self.counts is None and self.group == 1

    def same(self, other: Gate | None) -> bool:
        if other is None:
            return False
        mine, its = self.parts(), other.parts()
        return mine.keys() == its.keys() and all(torch.equal(t, its[k]) for k, t in mine.items())

    def parts(self) -> dict[str, Tensor]:
        """As a change carries them."""
        router, core = self.router, self.core
        tensors = {"threshold": self.threshold, "scale": self.scale, "counts": self.counts,
                   **({"first": router.first, "second": router.second, "bias": router.bias} if router else {}),
                   **({"centres": core.centres, "cores": None if core.cores is None else core.cores.byte()} if core else {})}
        at = next((t.device for t in tensors.values() if t is not None), None)

        def whole(n: int) -> Tensor:
            return torch.tensor([n], dtype=torch.int32, device=at)

        numbers = {"count": core.count if core else self.count, "prompt": core.prompt if core else 0,
                   **({"group": self.group, "pool": self.pool} if self.group > 1 or self.pool > 1 else {})}
        own = {"of": torch.tensor([SOURCES.index(self.of)], dtype=torch.uint8, device=at),
               **{k: t for k, t in tensors.items() if t is not None}, **{k: whole(n) for k, n in numbers.items() if n}}
        return {PREFIX + k: t for k, t in {**own, "parts": whole(len(own))}.items()}

    @staticmethod
    def among(parts: Mapping[str, Tensor]) -> Gate | None:
        """What the parts of a change say of it; None where they say nothing. BadInput where something is missing."""
        mine: dict[str, Any] = {k.removeprefix(PREFIX): t for k, t in parts.items() if k.startswith(PREFIX)}
        if not mine:
            return None
        of = mine.pop("of", None)
        if of is None or of.numel() != 1 or not 0 <= int(of) < len(SOURCES):
            raise BadInput("a gate does not say what it scores; trim the model again")
        if (said := mine.pop("parts", None)) is None or said.numel() != 1 or int(said) != len(mine) + 1:
            raise BadInput(f"a gate has {len(mine) + 1} of its {'' if said is None else f'{int(said[0])} '}parts; trim the model again")
        numbers = {k: int(mine.pop(k)) for k in ("count", "prompt", "group", "pool") if k in mine and mine[k].numel() == 1}
        router, core = None, None
        if "second" in mine:
            router = Router(mine["second"], mine.get("first"), mine.get("bias"))
        if "prompt" in numbers:
            core = Core(numbers["prompt"], numbers.pop("count", 0), mine.get("centres"), mine["cores"].bool() if "cores" in mine else None)
        return Gate(mine.get("threshold"), numbers.get("count", 0), mine.get("scale"), SOURCES[int(of)], router, numbers.get("group", 1),
                    numbers.get("pool", 1), mine.get("counts"), core)


def passing(scores: Tensor, keep: float) -> Tensor:
    """The threshold, float32 [1], that a share `keep` of the scores, of any shape, lies above; of equal ones all or none."""
    if keep >= 1:
        return scores.new_full((1,), EVERYTHING, dtype=torch.float32)
    flat = scores.float().flatten()
    dropped = min(len(flat), round((1 - keep) * len(flat)))
    return flat.kthvalue(dropped).values.reshape(1) if dropped else scores.new_full((1,), EVERYTHING, dtype=torch.float32)


def number(inputs: int, keep: float) -> int:
    """How many of so many inputs a share is, one at least."""
    return max(1, round(keep * inputs))


# ---- packed -----------------------------------------------------------------------------------
def met_gated(p: Packed, gate: Gate | None) -> Packed:
    """The packed weight, of whatever it is made, with the gate of its inputs."""
    return p if gate is None else replace(p, buffers={**p.buffers, **{k: t.clone() for k, t in gate.parts().items()}})


def ungated(p: Packed) -> Packed:
    """The packed weight, every input of which is computed."""
    return replace(p, buffers={k: t for k, t in p.buffers.items() if not k.startswith(PREFIX)})


def gate_of(p: Packed) -> Gate | None:
    """The gate of a packed weight. BadInput where what it says of it cannot be."""
    gate = Gate.among(p.buffers)
    if gate is None:
        return None
    if not (gate.alone or (gate.router is not None and gate.core is None and gate.counts is None)):
        raise BadInput(f"{p.format} {p.type}: its gate does not decide for every token alone")
    if gate.scale is not None and len(gate.scale) != p.shape[1]:
        raise BadInput(f"{p.format} {p.type}: its gate is of {len(gate.scale)} inputs, it has {p.shape[1]}")
    if (router := gate.router) is not None:
        if gate.scale is not None:
            raise BadInput(f"{p.format} {p.type}: its gate scores inputs by a router, which needs no scales of them; trim the model again")
        if gate.group * len(router.second) != gate.pool * p.shape[1]:
            raise BadInput(f"{p.format} {p.type}: the router of its gate makes {len(router.second)} scores, {gate.pool} for every "
                           f"{gate.group} of {p.shape[1]} inputs are wanted")
        if (given := (router.second if router.first is None else router.first).shape[1]) != p.shape[0]:  # as many features as it gives
            raise BadInput(f"{p.format} {p.type}: the router of its gate takes {given} features, its sublayer is given {p.shape[0]}")
    return gate
