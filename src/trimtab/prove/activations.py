"""Which hidden values of a network's MLPs matter: how many are zero or small, how many can be left out, what the tokens of a batch share.

Hidden values h [tokens, neurons] are what the last map of an MLP meets: the activated neurons, times what a gate multiplies.
"""
from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.data import Batch, group
from trimtab.core.line import Report, counter
from trimtab.core.memory import Store
from trimtab.core.types import BadInput, Failed, Site
from trimtab.methods.gates import EVERYTHING, Gate
from trimtab.network import graph
from trimtab.network.stream import Network, Reached
from trimtab.prove.quality import Stream, _cosine, _language

SMALL = 0.1     # of a layer's root mean square
STEPS = 65_535  # between the least and the greatest threshold that is tried
CAP = 0.99      # share of a layer's contributions below the greatest threshold
NEAR = 1e-4     # a CETT is hit
FINE = 1e-3     # the CETT that a tolerance allows is found
ROWS = 1024     # tokens worked on at a time
HELD = 1 << 30  # bytes of hidden values, or of hidden states, above which they go to files


# ---- the measures -----------------------------------------------------------------------------
def small(h: Tensor) -> float:
    """Share of h [tokens, neurons] that is small, zeros included.

    Formula: P(|h| < 0.1 rms(h)), rms over all tokens and neurons of the layer
    Source: textbook; the rule by which `inspect` calls a weight near zero
    Deviations: none
    """
    return float((h.abs() < SMALL * h.square().mean(dtype=torch.float64).sqrt()).double().mean())


def dead(h: Tensor, static: Tensor) -> dict[str, float]:
    """Shares of the neurons of a ReLU layer. h [tokens, neurons]; static, bool [neurons]: no input can make them other than zero.

    static; dynamic: zero for a token though they are not static, mean over tokens; never_active: so for every token of h.

    Formula: |S| / F; mean_t |{i not in S: h_ti = 0}| / F; |{i not in S: h_ti = 0 for all t}| / F
    Source: Liu et al. 2022 (AP), arXiv:2212.06145
    Deviations: the paper's abstract was read, which names the dynamic rate; the formula is as remembered and may differ from the paper's.
        never_active is ours, and smaller the more tokens are looked at
    """
    zero = (h == 0) & ~static
    return {"static": float(static.double().mean()), "dynamic": float(zero.double().mean()),
            "never_active": float(zero.all(0).double().mean())}


@dataclass
class Tail:
    """The weak neurons of one layer, by what each adds to the output: |h_i| times the norm of its column of the last map w [out, neurons].

    Formula: CETT(eps) = mean_t ||sum_{i in D} n_i|| / ||sum_i n_i||, n_i = h_i w_i, D = {i: ||n_i|| <= eps}
    Source: Luo et al. 2024 (Sparsing Law), arXiv:2411.02335, eq. 3; thresholds as in the authors' code: bisection over 65,536 values,
        evenly spaced from the least contribution to the 99 % quantile
    Deviations: a neuron at the threshold belongs to D, so that zeros do at any CETT; bisection ends within 0.0001 of the target;
        a bias of the last map is no neuron and counts in neither norm; a token whose output is zero counts as 0
    """

    norms: Tensor  # of the columns, float32 [neurons]
    low: float
    high: float
    whole: Tensor  # norms of the outputs [tokens]
    known: dict[int, float] = field(default_factory=dict)  # CETT by the step of the threshold

    @staticmethod
    def of(h: Tensor, w: Tensor) -> Tail:
        norms = w.float().norm(dim=0)
        sizes = (h.abs() * norms).flatten()
        high = float(sizes.kthvalue(max(1, math.ceil(CAP * len(sizes)))).values)
        return Tail(norms, float(sizes.min()), high, torch.cat([(x @ w.T).norm(dim=1) for x in h.split(ROWS)]))

    def eps(self, step: int) -> float:
        """The threshold of a step, -1 for the one before the first, which drops nothing."""
        return EVERYTHING if step < 0 else float(torch.tensor(self.low + (self.high - self.low) * step / STEPS, dtype=torch.float32))

    def cett(self, h: Tensor, w: Tensor, eps: float) -> float:
        left = torch.cat([(x.where(x.abs() * self.norms <= eps, 0.0) @ w.T).norm(dim=1) for x in h.split(ROWS)])
        return float(torch.where(self.whole > 0, left / self.whole, 0.0).mean(dtype=torch.float64))

    def gate(self, eps: float) -> Gate:
        return Gate(torch.tensor([eps], dtype=torch.float32), scale=self.norms)

    def threshold(self, h: Tensor, w: Tensor, target: float) -> float:
        """The greatest threshold whose CETT is not above `target`."""
        def at(step: int) -> float:
            if step not in self.known:
                self.known[step] = self.cett(h, w, self.eps(step))
            return self.known[step]

        if at(STEPS) <= target:
            return self.eps(STEPS)
        above = min(k for k, c in self.known.items() if c > target)
        below = max((k for k, c in self.known.items() if k < above and c <= target), default=-1)
        while above - below > 1 and (below < 0 or target - at(below) > NEAR):
            middle = (above + below) // 2
            if at(middle) <= target:
                below = middle
            else:
                above = middle
        return self.eps(below)


def rounds(lengths: list[int], generator: torch.Generator) -> list[Tensor]:
    """Numbers of all tokens of sequences that lie one behind the other: a list for each turn, of one token of each sequence that has one
    left, sequences and tokens in random order."""
    starts = [end - n for end, n in zip(accumulate(lengths), lengths, strict=True)]
    places = [begin + torch.randperm(n, generator=generator) for begin, n in zip(starts, lengths, strict=True)]
    out = []
    for turn in range(max(lengths)):
        mine = torch.stack([p[turn] for p in places if turn < len(p)])
        out.append(mine[torch.randperm(len(mine), generator=generator)])
    return out


def batches_of(sequences: int) -> list[int]:
    """1, 2, 4, ... up to the number of sequences, and at most 256."""
    return [2 ** k for k in range(9) if 2 ** k <= sequences]


def union(active: Tensor, turns: list[Tensor], batch: int) -> dict[str, float]:
    """Share of the neurons that no token of a batch needs. active, bool [tokens, neurons]; `turns`: see `rounds`.

    sparsity and std: over batches of tokens of different sequences, every token in one at most; independent: what neurons would share that
    are active as often, each by itself.

    Formula: 1 - |{n: exists b <= B with n active for token b}| / F; independent: mean_n (1 - p_n)^B, p_n the share of tokens that
        n is active for
    Source: Shrestha et al. 2025 (Polar Sparsity), arXiv:2505.14884, as its code counts
    Deviations: tokens of a batch come from different sequences, not from anywhere; the line of independence is ours
    """
    groups = torch.cat([t[:len(t) // batch * batch].view(-1, batch) for t in turns])
    found = torch.cat([1 - active[g].any(1).double().mean(1) for g in groups.split(max(1, ROWS // batch))])
    alone = (1 - active.double().mean(0)) ** batch
    return {"sparsity": float(found.mean()), "std": float(found.std(correction=0)), "independent": float(alone.mean())}


# ---- of a network -----------------------------------------------------------------------------
@dataclass
class Layer:
    """An MLP: the site it ends in, its hidden values as the network itself has them, and what is known of their tail."""

    down: Site
    tail: Tail
    found: dict[str, Any]

    @property
    def name(self) -> str:
        return self.down.name.removesuffix(".down")


@dataclass
class Tried:
    """The network with every layer gated for one CETT: how much worse it is (a share), its score, and of every layer the share that it
    leaves out and the threshold."""

    worse: float
    score: float
    sparsity: dict[str, float]
    eps: dict[str, float]

    @property
    def mean(self) -> float:
        return sum(self.sparsity.values()) / len(self.sparsity)


class Activations:
    """The hidden values of a network over some text, taken once, and the network run again with gates on them."""

    def __init__(self, net: Network, samples: list[Batch], scratch: Path) -> None:
        self.net, self.scratch = net, scratch
        self.batches = group(samples, 8)
        self.layers: dict[int, Layer] = {}  # by block
        self.hidden: dict[int, Store] = {}
        self.tried: dict[float, Tried] = {}
        self.relu = graph.stops_negatives(net.config)
        self.dense: Stream | None = None
        self.own = math.nan  # score of the network itself
        self.turns: list[Tensor] = []

    def close(self) -> None:
        for store in [*self.hidden.values(), *([self.dense.hidden] if self.dense else [])]:
            store.close()

    def _through(self, see: Callable[[int, Any, Tensor], None] | None, gates: Callable[[int, Any], dict[str, Tensor]],
                 reached: Reached | None, step: Callable[[], None]) -> Stream:
        """All batches through all blocks; `see` is given each block and the hidden values its MLP's last map meets."""
        stream = Stream(self.net, self.batches, HELD, self.scratch)
        downs = measured(self.net)
        for i in range(self.net.n_blocks):
            module, met = self.net.block(i), list[Tensor]()
            self.net.as_said(module, i, self.net.said(i))
            self.net.as_said(module, i, gates(i, module), reached)
            key = downs[i].input if i in downs else ""

            def sink(kind: str, k: str, x: Tensor, key: str = key, met: list[Tensor] = met) -> None:
                if k == key:
                    met.append(x)

            with self.net.taps(module, i, {"met"} if see and key else set(), sink):
                for b, context in enumerate(stream.contexts):
                    stream.hidden[b] = self.net.run(module, i, stream.hidden[b], context)
            if see and key:
                see(i, module, torch.cat(met).float())
            step()
        return stream

    def take(self, step: Callable[[], None]) -> None:
        """The network as it is."""
        def see(i: int, module: Any, h: Tensor) -> None:
            down = measured(self.net)[i]
            w = self.net.weight(module, down).float()
            found = {"layer": down.name.removesuffix(".down"), "block": i, "neurons": down.shape[1],
                     "zeros": float((h == 0).double().mean()), "small": small(h), "rms": float(h.square().mean(dtype=torch.float64).sqrt()),
                     "dead": dead(h, silent(self.net, module, down)) if self.relu else None, "union": None}
            self.layers[i] = Layer(down, Tail.of(h, w), found)
            self.hidden[i] = store = Store(Path(tempfile.mkdtemp(dir=self.scratch), "met") if h.nbytes * self.net.n_blocks > HELD else None)
            store.append(h)

        self.dense = self._through(see, lambda i, module: {}, None, step)
        self.turns = rounds(lengths_of(self.dense), torch.Generator().manual_seed(0))

    @property
    def tokens(self) -> int:
        return sum(map(len, self.turns))

    def score(self, stream: Stream) -> float:
        """Perplexity, or for what has none the mean cosine to the outputs of the network itself."""
        assert self.dense is not None
        found = _language([stream], None, lambda: None) if self.net.kind == "lm" else _cosine([self.dense, stream], lambda: None)
        self.net.release()
        return float(found["score"])

    def at(self, cett: float, step: Callable[[], None]) -> Tried:
        """With every layer gated for one CETT. Thresholds are those of the network itself, whatever the gates before a layer change."""
        if cett not in self.tried:
            eps: dict[str, float] = {}

            def gates(i: int, module: Any) -> dict[str, Tensor]:
                if i not in self.layers:
                    return {}
                layer = self.layers[i]
                eps[layer.name] = layer.tail.threshold(self.hidden[i][0], self.net.weight(module, layer.down).float(), cett)
                return parts_of(layer, eps[layer.name])

            reached: Reached = {}
            stream = self._through(None, gates, reached, step)
            score = self.score(stream)
            stream.hidden.close()
            shares = {layer.name: 1 - reached[layer.down.name][0] / reached[layer.down.name][1] for layer in self.layers.values()}
            self.tried[cett] = Tried(score / self.own - 1 if self.net.kind == "lm" else 1 - score, score, shares, eps)
        return self.tried[cett]

    def tolerated(self, p: float, step: Callable[[], None]) -> dict[str, Any]:
        """Which share of the hidden values can be left out, in all layers at once, before the network is `p` per cent worse.

        Formula: CETT-PPL-p%: mean over layers and tokens of |D| / F, at the greatest CETT, one for all layers, with
            perplexity <= (1 + p / 100) times that of the network itself
        Source: Luo et al. 2024 (Sparsing Law), arXiv:2411.02335, section 4.2 and appendix F
        Deviations: |D| is counted in the run whose perplexity was measured, behind the gates of earlier layers; a network that is no
            language model is p per cent worse where the mean cosine of its outputs to the ungated ones is 1 - p / 100
        """
        low, high = 0.0, 1.0
        while high - low > FINE:
            middle = (low + high) / 2
            if self.at(middle, step).worse <= p / 100:
                low = middle
            else:
                high = middle
        best = self.at(low, step)
        return {"p": p, "cett": low, "score": best.score, "worse": best.worse, "sparsity": best.mean, "whole_range": high == 1.0}

    def unions(self, cett: float | None, step: Callable[[], None]) -> None:
        """Of every layer, over batches; of what is not zero, or of what gates for a CETT let pass."""
        sizes = batches_of(max(map(len, self.turns)))

        def see(i: int, module: Any, h: Tensor) -> None:
            each = [union(h != 0, self.turns, b) for b in sizes]
            self.layers[i].found["union"] = {k: [u[k] for u in each] for k in ("sparsity", "std", "independent")}

        if cett is None:
            for i, store in self.hidden.items():
                see(i, None, store[0])
            return
        eps = self.tried[cett].eps

        def gates(i: int, module: Any) -> dict[str, Tensor]:
            return parts_of(self.layers[i], eps[self.layers[i].name]) if i in self.layers else {}

        self._through(see, gates, None, step).hidden.close()


def parts_of(layer: Layer, eps: float) -> dict[str, Tensor]:
    return {f"{layer.down.name}:{k}": t for k, t in layer.tail.gate(eps).parts().items()}


def measured(net: Network) -> dict[int, Site]:
    """The site that the MLP of a block ends in, by block; experts have none of their own."""
    return {s.block: s for s in net.sites if s.role == "down" and s.expert is None}


def lengths_of(stream: Stream) -> list[int]:
    """Tokens of every sequence, without padding."""
    out: list[int] = []
    for b, context in enumerate(stream.contexts):
        rows, length = stream.hidden[b].shape[:2]
        out += [length] * rows if context.mask is None else context.mask.view(rows, length).sum(1).tolist()
    return out


def silent(net: Network, module: Any, down: Site) -> Tensor:
    """Neurons of a ReLU layer that are zero for any input, bool [neurons]: nothing comes in, and no bias lifts them."""
    feeders = {s.role: s for s in net.sites_of(down.block) if s.consumer == down.name}

    def empty(site: Site) -> tuple[Tensor, Tensor]:
        b = net.bias(module, site)
        return (net.weight(module, site) == 0).all(1), torch.zeros(site.shape[0]) if b is None else b.float()

    rows, bias = empty(feeders.get("gate", feeders["up"]))
    out = rows & (bias <= 0)
    if "gate" in feeders:
        rows, bias = empty(feeders["up"])
        out |= rows & (bias == 0)
    return out


@torch.no_grad()
def activations(net: Network, samples: list[Batch], ppl: list[float], scratch: Path, tick: Report) -> dict[str, Any]:
    """All measures of a network over `samples`, with tolerances `ppl` in per cent. BadInput where no MLP can be measured.

    `layers`: of each MLP `zeros` and `small` (shares of its hidden values), `dead` (ReLU only), `union` (per batch size of `union.batch`),
    and by tolerance `sparsity` and `eps`. `tolerances`: of the whole network, see `Activations.tolerated`. `tried`: what was measured on
    the way there. `union`: means over the layers, and which `mask` it is of: zeros, or the first tolerance's.
    """
    left = [s.name for s in net.sites if s.role == "down" and s.expert is not None]
    if not measured(net):
        raise BadInput(f"{net.checkpoint.path} has MLPs of experts alone ({left[0]}, ...), whose hidden values are not measured; "
                       "leave --activations out" if left else f"{net.checkpoint.path} has no MLP to measure; leave --activations out")
    runs = 3 + len(ppl) * (1 + math.ceil(-math.log2(FINE)))  # the most that can be
    step = counter(runs * net.n_blocks, lambda d, n: tick("activations", d, n))
    of = Activations(net, samples, scratch)
    try:
        of.take(step)
        assert of.dense is not None
        of.own = of.score(of.dense)
        if not math.isfinite(of.own):
            raise Failed(f"the {'perplexity' if net.kind == 'lm' else 'output'} of {net.checkpoint.path} on this text is no finite number")
        found = [of.tolerated(p, step) for p in ppl]
        of.unions(None if of.relu else found[0]["cett"], step)
    finally:
        of.close()
    tick("activations", runs * net.n_blocks, runs * net.n_blocks)
    layers = []
    for layer in of.layers.values():
        per = {f"{t['p']:g}": of.tried[t["cett"]] for t in found}
        layers.append({**layer.found, "sparsity": {p: t.sparsity[layer.name] for p, t in per.items()},
                       "eps": {p: t.eps[layer.name] for p, t in per.items()}})
    sizes = batches_of(max(map(len, of.turns)))
    means = {k: [sum(x["union"][k][b] for x in layers) / len(layers) for b in range(len(sizes))] for k in ("sparsity", "independent")}
    metric = "perplexity" if net.kind == "lm" else "cosine"
    return {"tokens": of.tokens, "sequences": len(samples), "small_below": SMALL, "relu": of.relu, "metric": metric, "score": of.own,
            "layers": layers, "tolerances": found,
            "tried": [{"cett": c, "worse": t.worse, "sparsity": t.mean} for c, t in sorted(of.tried.items())],
            "union": {"mask": "zeros" if of.relu else f"{'PPL' if net.kind == 'lm' else 'cosine'}-{ppl[0]:g}%", "batch": sizes, **means},
            "left_out": f"{len(left)} experts are not measured: {left[0]} to {left[-1]}" if left else None}
