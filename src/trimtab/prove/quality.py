"""Quality of a network against the one it came from, block by block, so that neither is ever in memory whole."""
from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.memory import Store
from trimtab.core.types import Progress
from trimtab.network.stream import Network, Reached

LOGITS = 32 << 20  # bytes of float32 logits a network may hold at a time


class Stream:
    """All batches of one network at the same depth."""

    def __init__(self, net: Network, batches: list[dict[str, Tensor]], limit: float, scratch: Path) -> None:
        self.net, self.batches = net, batches
        self.contexts: list[Any] = []
        self.hidden = Store()
        self.reached: Reached = {}
        rows = sum(len(next(iter(b.values()))) for b in batches)
        for batch in batches:
            h, context = net.embed(batch)
            if not self.contexts and rows * h[0].numel() * h.element_size() > limit:
                path = Path(tempfile.mkdtemp(dir=scratch), "hidden")
                self.hidden = Store(path)
                path.unlink()  # nameless from now on: it disappears with the process, however that ends
            self.hidden.append(h)
            self.contexts.append(context)
        net.release()

    def step(self, i: int) -> dict[str, tuple[int, int]]:
        """Run block i over every batch. Returns {site: (zeros, entries)} of that block's weights."""
        module = self.net.block(i)
        zeros = {}
        for site in self.net.sites_of(i):
            w = site.get(module.get_parameter(site.param))
            zeros[site.name] = (w.numel() - int(torch.count_nonzero(w)), w.numel())
        self.net.as_said(module, i, self.net.said(i), self.reached)
        self.net.as_packed(module, i, self.reached)
        for b, context in enumerate(self.contexts):
            self.hidden[b] = self.net.run(module, i, self.hidden[b], context)
        return zeros

    def logits(self, b: int, row: int, begin: int, end: int) -> Tensor:
        """Float32 logits [end - begin, vocabulary] of one sequence; a head works position by position."""
        batch = {k: v[row:row + 1] for k, v in self.batches[b].items()}
        h = self.hidden[b][row:row + 1, begin:end]
        return self.net.finish(h, self.contexts[b], batch)[0].float()

    def pooled(self, b: int, row: int) -> Tensor:
        """[1, width] in float64: one last hidden state averaged over its unmasked tokens, or logits as they are."""
        batch = {k: v[row:row + 1] for k, v in self.batches[b].items()}
        out = self.net.finish(self.hidden[b][row:row + 1], self.contexts[b], batch).double()
        if out.dim() == 2:
            return out
        mask = batch.get("attention_mask")
        if mask is None or mask.shape != out.shape[:2]:
            return out.mean(1)
        mask = mask.double()[..., None]
        return (out * mask).sum(1) / mask.sum(1)


def _language(streams: list[Stream], text: int | None, tick: Any) -> dict[str, Any]:
    """Next-token figures. The last position of a sequence predicts nothing and is left out of all of them."""
    nll, kl, same, count = [0.0] * len(streams), 0.0, 0, 0
    rises: list[tuple[float, int]] = []  # of every sequence: by how much more it is lost in the second, and its tokens
    batches = streams[0].batches
    vocabulary = streams[0].logits(0, 0, 0, 1).shape[-1]
    step = max(1, LOGITS // (4 * vocabulary))
    for b, batch in enumerate(batches):
        ids = batch["input_ids"]
        counted = batch.get("attention_mask", torch.ones_like(ids)).bool()
        for row in range(ids.shape[0]):
            had, tokens = list(nll), count
            for begin in range(0, ids.shape[1] - 1, step):
                end = min(begin + step, ids.shape[1] - 1)
                use = counted[row, begin + 1:end + 1]
                target = ids[row, begin + 1:end + 1][use][:, None]
                logs = [torch.log_softmax(s.logits(b, row, begin, end)[use], -1) for s in streams]
                for k, log in enumerate(logs):
                    nll[k] -= float(log.gather(1, target).double().sum())
                if len(logs) == 2:
                    same += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
                    terms = torch.where(logs[0] == -math.inf, 0.0, logs[0].exp() * (logs[0] - logs[1]))
                    kl += float(terms.sum(-1, dtype=torch.float64).sum())
                count += len(target)
            rises.append(((nll[-1] - had[-1]) - (nll[0] - had[0]), count - tokens))
        tick()
    figures = []
    for total in nll:
        mean = total / max(count, 1)
        ppl = math.exp(mean) if mean < 700 else math.inf
        figures.append({"perplexity": ppl, "bits_per_byte": total / math.log(2) / text if text else None})
    pair = len(streams) == 2
    recovery = figures[0]["perplexity"] / figures[1]["perplexity"] if pair else None
    return {"metric": "perplexity", "score": figures[-1]["perplexity"], "before": figures[0],
            "after": figures[1] if pair else None, "tokens": count,
            "recovery": recovery, "recovery_error": recovery * error_of_mean(rises) if recovery and len(rises) > 1 else None,
            "kl": kl / max(count, 1) if pair else None, "top1_agreement": same / max(count, 1) if pair else None}


def error_of_mean(sums: Sequence[tuple[float, int]]) -> float:
    """The standard error of a mean over tokens, of which sequences of text are drawn together: of each its sum and its tokens.

    Formula: sqrt(S / (S - 1) sum_s (x_s - n_s m)^2) / N, with m = sum x / N
    Source: the ratio estimator of cluster sampling
    """
    n = max(1, sum(k for _, k in sums))
    mean = sum(x for x, _ in sums) / n
    return math.sqrt(len(sums) / max(1, len(sums) - 1) * sum((x - k * mean) ** 2 for x, k in sums)) / n


def _cosine(streams: list[Stream], tick: Any) -> dict[str, Any]:
    total, rows, same = 0.0, 0, 0
    classes = "labels" in streams[0].batches[0]
    for b, batch in enumerate(streams[0].batches):
        for row in range(len(next(iter(batch.values())))):
            x, y = streams[0].pooled(b, row), streams[-1].pooled(b, row)
            total += float(torch.nn.functional.cosine_similarity(x, y, dim=-1))
            same += int(x.argmax() == y.argmax())
            rows += 1
        tick()
    pair = len(streams) == 2
    none = {"perplexity": None, "bits_per_byte": None}
    return {"metric": "cosine", "score": total / rows, "before": none, "after": dict(none) if pair else None,
            "tokens": rows, "recovery": total / rows if pair else None, "recovery_error": None, "kl": None,
            "top1_agreement": same / rows if pair and classes else None}


@torch.no_grad()
def compare(before: Network, after: Network | None, batches: list[dict[str, Tensor]], bytes_of_text: int | None,
            scratch: Path, max_memory: int | None, progress: Progress | None = None) -> dict[str, Any]:
    """Run both networks over the same batches and say how far apart they are.

    `batches`: model inputs, `input_ids` [rows, tokens] (or `pixel_values`), all rows of one batch equally long.
    `bytes_of_text`: bytes the predicted tokens stand for; without it bits_per_byte is None.
    Hidden states beyond an eighth of `max_memory` (bytes) go to a file in `scratch`.
    Language models: perplexity = exp(mean nll) over all predicted tokens, KL(before || after) in nats per token,
    top-1 agreement, and `recovery_error`, the standard error of `recovery` over the sequences. Others: mean cosine of the pooled
    outputs. Figures may be NaN or inf: the caller judges.
    `block_error`[i] = |after - before| / |before| (Frobenius) of the stream behind block i, each network on its own
    stream; empty when the numbers of blocks or their widths differ. Of the last network given `zeros`, {site: share of its weights that
    are zero}, and `computed`, {site: share of its inputs that its gate let pass}, of those that have one.
    """
    nets = [before] if after is None else [before, after]
    limit = math.inf if max_memory is None else max_memory / 8 / len(nets)
    depth = max(n.n_blocks for n in nets)
    done, total = 0, depth + len(batches)

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("quality", done, total)

    with contextlib.ExitStack() as stack:
        streams: list[Stream] = []
        for net in nets:
            streams.append(Stream(net, batches, limit, scratch))
            stack.callback(streams[-1].hidden.close)
        zeros: dict[str, tuple[int, int]] = {}
        errors: list[float] = []
        paired = len(nets) == 2 and all(a == b for a, b in zip(*((n.n_blocks, streams[k].hidden[0].shape[-1]) for k, n in enumerate(nets)),
                                                               strict=True))
        for i in range(depth):
            for s in streams:
                if i < s.net.n_blocks:
                    found = s.step(i)
                    if s is streams[-1]:
                        zeros.update(found)
            if paired:
                gap = norm = 0.0
                for b in range(len(batches)):
                    x, y = streams[0].hidden[b].double(), streams[1].hidden[b].double()
                    gap, norm = gap + float((y - x).square().sum()), norm + float(x.square().sum())
                errors.append(math.sqrt(gap / norm) if norm else 0.0)
            tick()
        result = _language(streams, bytes_of_text, tick) if before.kind == "lm" else _cosine(streams, tick)
        for net in nets:
            net.release()
    entries = sum(n for _, n in zeros.values())
    return {**result, "block_error": errors, "zeros": {k: z / n for k, (z, n) in zeros.items()},
            "computed": {k: passed / n for k, (passed, n) in sorted(streams[-1].reached.items())},
            "zero_share": sum(z for z, _ in zeros.values()) / entries if entries else 0.0}
