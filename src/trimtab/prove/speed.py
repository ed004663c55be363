"""Tokens per second of two checkpoints in one process, taking turns, so that a busy machine slows both alike."""
from __future__ import annotations

import gc
import inspect
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from trimtab.core.memory import release, rss
from trimtab.core.types import BadInput, Progress
from trimtab.network import graph
from trimtab.network.stream import Network, load_module
from trimtab.prove.size import parameters
from trimtab.runtime.decoder import Decoder, NoKernel, check_cache, open_decoder, supported
from trimtab.runtime.modules import PackedLinear

KEYS = ("decode_tok_s", "prefill_tok_s", "first_token_s")
NAMES = {"f32": "float32", "bf16": "bfloat16", "i8": "int8"}
SLACK = 128 << 20  # activations, caches, the allocator
Run = Callable[[int], dict[str, float]]  # a timed pass that makes so many tokens, or goes so many times


@dataclass
class Candidate:
    """A checkpoint as one runner has it."""

    of: int                        # which checkpoint
    runner: str
    dtype: str                     # what x is multiplied in
    run: Run
    weight_bytes: int | None       # that a step of decoding reads
    warm: dict[str, float]         # a first run
    resident_bytes: int            # more than before it was loaded, behind that run
    rows: list[dict[str, float]] = field(default_factory=list)

    @staticmethod
    def load(of: int, runner: str, load: Callable[[], tuple[Run, int | None, str] | None], each: int) -> Candidate | None:
        release()
        before = rss()
        if (found := load()) is None:
            return None
        run, weights, dtype = found
        warm = run(each)
        release()
        return Candidate(of, runner, dtype, run, weights, warm, max(0, rss() - before))

    def figures(self) -> dict[str, Any]:
        return _figures(self.rows) | {"dtype": self.dtype, "weight_bytes": self.weight_bytes, "resident_bytes": self.resident_bytes}


def _free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return sys.maxsize


def _inputs(net: Network, prompt: int, batch: int) -> dict[str, Tensor]:
    """Random model inputs from a fixed seed."""
    gen = torch.Generator().manual_seed(0)
    if net.kind == "vision":
        size = net.config.image_size
        h, w = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.randn(batch, getattr(net.config, "num_channels", 3), h, w, generator=gen)}
    vocabulary = net.config.get_text_config().vocab_size
    return {"input_ids": torch.randint(0, vocabulary, (batch, prompt), generator=gen)}


def _load(net: Network, dtype: torch.dtype, trust: bool) -> torch.nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # heads a bare encoder has no use for are no news
    try:
        if net.checkpoint.quantized or graph.beyond(net.checkpoint.config):
            return load_module(net.checkpoint.path, dtype, trust)
        auto = AutoModelForCausalLM if net.kind == "lm" else AutoModel
        return auto.from_pretrained(net.checkpoint.path, dtype=dtype, trust_remote_code=trust).eval()
    finally:
        logging.set_verbosity(said)


def _weight_bytes(net: Network, model: torch.nn.Module) -> int | None:
    """What a step of decoding reads: of a table of embeddings only a row, where it is not the head too. None where a token chooses
    its experts, and where nothing is decoded."""
    if net.kind != "lm" or any(s.expert is not None for s in net.sites):
        return None
    table, head = (getattr(f(), "weight", None) for f in (model.get_input_embeddings, model.get_output_embeddings))
    packed = sum(m.linear.weight_bytes for m in model.modules() if isinstance(m, PackedLinear))
    return packed + sum(p.nbytes for p in model.parameters() if p is not table or p is head)


def _native(net: Network, how: torch.dtype) -> Decoder | None:
    """The checkpoint in our own decoder, where it runs it; None elsewhere."""
    if net.kind != "lm" or how not in (torch.float32, torch.bfloat16) or not supported(net.checkpoint):
        return None
    try:
        return open_decoder(net.checkpoint.path, None if net.checkpoint.packed else str(how).removeprefix("torch."))
    except NoKernel:
        return None


def _decode(decoder: Decoder, inputs: dict[str, Tensor], cache: str, new: int) -> dict[str, float]:
    """What `_generate` does, in our own decoder."""
    rows, prompt = inputs["input_ids"].shape
    start = perf_counter()
    ids = decoder.generate_batch(list(inputs["input_ids"]), new + 1, cache=cache)
    next(ids)
    first = perf_counter()
    for _ in ids:
        pass
    end = perf_counter()
    return {"decode_tok_s": new * rows / (end - first), "prefill_tok_s": prompt * rows / (first - start),
            "first_token_s": first - start}


def _generate(model: torch.nn.Module, inputs: dict[str, Tensor], new: int) -> dict[str, float]:
    """Greedy generation with a cache: a plain loop over the model's own forward."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    rows, prompt = inputs["input_ids"].shape
    start = perf_counter()
    out = model(**inputs, use_cache=True, **last)
    ids = out.logits[:, -1:].argmax(-1)
    first = perf_counter()
    for _ in range(new):
        out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True, **last)
        ids = out.logits[:, -1:].argmax(-1)
    end = perf_counter()
    return {"decode_tok_s": new * rows / (end - first), "prefill_tok_s": prompt * rows / (first - start),
            "first_token_s": first - start}


def _forward(model: torch.nn.Module, inputs: dict[str, Tensor], times: int) -> dict[str, float]:
    """The mean of several passes: one of a small encoder is over before the clock has settled."""
    start = perf_counter()
    for _ in range(times):
        out = model(**inputs)
    took = (perf_counter() - start) / times
    return {"prefill_tok_s": out.last_hidden_state.shape[:2].numel() / took, "first_token_s": took}


def _clock(f: Callable[[], Any]) -> float:
    start = perf_counter()
    f()
    return perf_counter() - start


def _turn(r: int, n: int) -> list[int]:
    """Who runs when in round r: the two swap places every round, so that going first favours neither."""
    return list(range(n))[::-1 if r % 2 else 1]


def _estimators(nets: list[Network], prompt: int, batch: int, repeats: int) -> list[list[dict[str, float]]]:
    """Per network and repeat: one block from the middle times the number of blocks, plus the head.

    Attention over a cache is not counted: a step of decoding is a pass over one token.
    """
    lengths = (prompt, 1) if nets[0].kind == "lm" else (prompt,)
    starts = []
    for net in nets:
        starts.append([net.embed(_inputs(net, n, batch)) for n in lengths])
        net.release()
    tokens = starts[0][0][0].shape[:2].numel()
    blocks = [net.block(net.n_blocks // 2) for net in nets]
    for net, block in zip(nets, blocks, strict=True):
        net.as_packed(block, net.n_blocks // 2)
    passes: list[list[list[float]]] = [[] for _ in nets]
    for r in range(repeats + 1):
        for k in _turn(r, len(nets)):
            net = nets[k]
            took = [_clock(lambda h=h, c=c, k=k, net=net: net.run(blocks[k], net.n_blocks // 2, h, c))
                    for h, c in starts[k]]
            if r:  # the first round warms the caches
                passes[k].append(took)
    blocks.clear()
    heads: list[list[float]] = [[] for _ in nets]
    for r in range(repeats + 1):
        for k in _turn(r, len(nets)):
            net, (h, c) = nets[k], starts[k][-1]
            took = _clock(lambda h=h, c=c, net=net: net.finish(h, c, _inputs(net, lengths[-1], batch)))
            if r:
                heads[k].append(took)
    out: list[list[dict[str, float]]] = []
    for k, net in enumerate(nets):
        rows = []
        for took, head in zip(passes[k], heads[k], strict=True):
            first = net.n_blocks * took[0] + head
            row = {"prefill_tok_s": tokens / first, "first_token_s": first}
            if nets[0].kind == "lm":
                row["decode_tok_s"] = batch / (net.n_blocks * took[1] + head)
            rows.append(row)
        out.append(rows)
        net.release()
    return out


def _figures(rows: list[dict[str, float]]) -> dict[str, Any]:
    known = {key: [r[key] for r in rows] for key in KEYS if key in rows[0]}
    return {**{key: statistics.median(known[key]) if key in known else None for key in KEYS},
            "spread": {key: [min(v), max(v)] for key, v in known.items()},
            "quartiles": {key: statistics.quantiles(v, n=4)[::2] if len(v) > 1 else v * 2 for key, v in known.items()}}


@torch.no_grad()
def measure(before: Path | Network, after: Path | Network | None, *, prompt: int = 64, new: int = 64, batch: int = 1,
            threads: int | None = None, repeats: int = 5, max_memory: int | None = None, seconds: float | None = None,
            dtype: torch.dtype = torch.float32, trust_remote_code: bool = False, progress: Progress | None = None,
            ours: bool = False, cache: str = "") -> dict[str, Any]:
    """Time both checkpoints in turns A B, B A, A B; medians over `repeats`.

    With transformers, packed layers on our kernels; where a checkpoint is packed, or `ours` asks for it, and our decoder runs its
    family, all of them in our decoder too, so that what is not packed has its chance there. Of a checkpoint the faster runner counts.
    With a `cache` (f32, bf16, int8 or int4: what keys and values are kept as) in our decoder alone; BadInput where it cannot run.

    Returns `before` and `after` (None if there is none), each with decode_tok_s (None for networks that do not
    generate), prefill_tok_s, first_token_s, `spread` {key: [min, max]}, `quartiles` {key: [first, third]}, `dtype` that x is multiplied in
    (int8: where the weights are codes), `weight_bytes` that
    a step of decoding reads, `resident_bytes` that it added to the process, `runner` and `runners` (the same of each), and
    `ratio` {key: {median, min, max, quartiles}} of after to before, taken pair by pair. In `dtype`, or the stored dtype if that does
    not fit; when the two do not fit
    in `max_memory` bytes together, `"speed"` is "estimated" from one real block and the head. `seconds` bounds the
    time roughly, by generating fewer tokens.
    """
    if threads:
        torch.set_num_threads(threads)
    nets = [x if isinstance(x, Network) else Network.open(x, dtype=dtype, trust_remote_code=trust_remote_code)
            for x in (before, after) if x is not None]
    kept = check_cache(cache)
    for net in nets:
        if cache and (net.kind != "lm" or not supported(net.checkpoint)):
            raise BadInput(f"cache {cache} is of the native decoder, which does not run {net.checkpoint.path}; leave it out")
    kind, config = nets[0].kind, nets[0].config.get_text_config()
    places = getattr(config, "max_position_embeddings", None)
    if places and prompt + (new if kind == "lm" else 0) > places:
        prompt = min(prompt, places if kind != "lm" else max(1, places // 2))
        new = min(new, max(1, places - prompt))
    room = (_free() + rss() if max_memory is None else max_memory) - SLACK
    files = [sum(n.checkpoint.weight_bytes for n in nets), max(n.checkpoint.weight_bytes for n in nets)]
    ours = (ours or bool(cache) or any(n.checkpoint.packed for n in nets)) and nets[0].kind == "lm"
    entries = sum(parameters(n.checkpoint) for n in nets) * (2 if ours else 1)  # once more in the decoder
    # While a model loads its file is mapped, and mapped pages count.
    if rss() + dtype.itemsize * entries + files[1] < room:
        how: torch.dtype | None = dtype
    elif rss() + sum(files) < room and nets[0].config.dtype is not None:
        how = nets[0].config.dtype
    else:
        how = None
    if how is None and cache:
        raise BadInput(f"with cache {cache} the models are timed whole, and they do not fit into memory")
    if how is None:
        rows = _estimators(nets, prompt, batch, repeats)
        none = {"dtype": str(nets[0].dtype).removeprefix("torch."), "weight_bytes": None, "resident_bytes": None, "runners": {}}
        figures = [_figures(r) | none | {"runner": "trimtab" if n.checkpoint.packed else "torch"} for r, n in zip(rows, nets, strict=True)]
        held = rss()
    else:
        inputs = _inputs(nets[0], prompt, batch)
        inputs = {k: v.to(how) if v.is_floating_point() else v for k, v in inputs.items()}
        candidates: list[Candidate] = []
        few = min(new, 8) if kind == "lm" else 2

        def in_torch(net: Network) -> tuple[Run, int | None, str]:
            model = _load(net, how, trust_remote_code)
            run = partial(_generate if kind == "lm" else _forward, model, inputs)
            return run, _weight_bytes(net, model), str(how).removeprefix("torch.")

        def in_ours(net: Network) -> tuple[Run, int, str] | None:
            decoder = _native(net, how)
            return decoder and (partial(_decode, decoder, inputs, kept), decoder.weight_bytes, NAMES[decoder.narrowest])

        for k, net in enumerate(nets):
            for runner, load in (("torch", in_torch), ("trimtab", in_ours))[bool(cache):1 + ours]:
                if (c := Candidate.load(k, runner, partial(load, net), few)) is not None:
                    candidates.append(c)
        if seconds is not None and kind == "lm":
            left = seconds / repeats - sum(c.warm["first_token_s"] for c in candidates)
            new = max(few, min(new, int(left / sum(batch / c.warm["decode_tok_s"] for c in candidates))))
        each = new if kind == "lm" else min(new, 16)
        for r in range(repeats):
            for i in _turn(r, len(candidates)):
                candidates[i].rows.append(candidates[i].run(each))
            if progress is not None:
                progress("speed", r + 1, repeats)
        held = rss()
        rows, figures = [], []
        for k in range(len(nets)):
            mine = [c for c in candidates if c.of == k]
            if not mine:
                raise BadInput(f"cache {cache} is of the native decoder, which does not run {nets[k].checkpoint.path}; leave it out")
            best = max(mine, key=lambda c: c.figures()[KEYS[0] if kind == "lm" else KEYS[1]])
            rows.append(best.rows)
            figures.append(best.figures() | {"runner": best.runner, "runners": {c.runner: c.figures() for c in mine}})
        del candidates, mine, best, c
        gc.collect()
    ratio: dict[str, dict[str, Any]] = {}
    if after is not None:
        for key in KEYS[:2]:
            if key in rows[0][0]:
                pairs = [b[key] / a[key] for a, b in zip(*rows, strict=True)]
                quartiles = statistics.quantiles(pairs, n=4)[::2] if len(pairs) > 1 else pairs * 2
                ratio[key] = {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs), "quartiles": quartiles}
    counted = [f["runner"] for f in figures]
    last = {key: figures[-1][key] for key in KEYS}  # what `bench --json` shows of the model itself
    return {**last, "speed": "estimated" if how is None else "measured", "before": figures[0],
            "after": figures[1] if after is not None else None, "ratio": ratio, "repeats": repeats,
            "prompt": prompt, "new": new if kind == "lm" else None, "batch": batch,
            "threads": torch.get_num_threads(), "dtype": str(how or nets[0].dtype).removeprefix("torch."),
            "runner": counted[-1] if len(set(counted)) == 1 else f"{counted[-1]} against {counted[0]}", "rss_bytes": held,
            "cache": cache}
