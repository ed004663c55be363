"""The library's face: the command line, as functions."""
from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core import data, line, spec
from trimtab.core.types import BadInput
from trimtab.network.stream import Network


def resolve(model: str | Path) -> Path:
    from trimtab.cli import find_model

    return find_model(str(model))


def silent(stage: str, done: int, of: int) -> None:
    """A progress function that says nothing."""


class Handle:
    """A loaded model: `.module` (transformers), `.tokenizer`, `.generate`."""

    def __init__(self, path: Path, dtype: str = "float32", trust_remote_code: bool = False):
        from transformers import AutoTokenizer

        from trimtab.network.stream import load_module

        self.path = path
        self.module: Any = load_module(path, getattr(torch, dtype), trust_remote_code)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path) if (path / "tokenizer_config.json").exists() else None
        notes = path / "trimtab.json"
        if notes.exists() and json.loads(notes.read_text(encoding="utf-8")).get("proof") in ("failed", "pending"):
            warnings.warn(f"{path} did not pass its proof; see its README.md", stacklevel=3)

    @torch.no_grad()
    def generate(self, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0,
                 return_ids: bool = False) -> Iterator[Any]:
        """New pieces of text one by one, or new ids including the stop token. Greedy at temperature 0."""
        if not type(self.module).__name__.endswith(("ForCausalLM", "LMHeadModel")):
            raise BadInput(f"{self.path} is a {type(self.module).__name__}, which does not continue text; give a language model")
        if self.tokenizer is None:
            raise BadInput(f"{self.path} has no tokenizer, so it cannot continue text")
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        if not ids.numel():
            raise BadInput("the prompt is empty; give some text to continue")
        gen = torch.Generator().manual_seed(seed)
        stop = self.module.generation_config.eos_token_id if hasattr(self.module, "generation_config") else None
        stops = set(stop if isinstance(stop, list) else [stop]) | {self.tokenizer.eos_token_id}
        limit = getattr(self.module.config, "max_position_embeddings", None)
        cache, step, new, shown = None, ids, [], ""
        for _ in range(max_new_tokens if limit is None else min(max_new_tokens, limit - ids.shape[1])):
            out = self.module(input_ids=step, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[0, -1].float()
            if temperature > 0:
                token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=gen))
            else:
                token = int(logits.argmax())
            new.append(token)
            step = torch.tensor([[token]])
            if return_ids:
                yield token
                if token in stops:
                    return
                continue
            if token in stops:
                return
            text = self.tokenizer.decode(new)
            if not text.endswith("\ufffd"):  # half a character waits for its other half
                yield text[len(shown):]
                shown = text


def load(model: str | Path, dtype: str = "float32", trust_remote_code: bool = False) -> Handle:
    """Open a directory, `builtin:lm` or a hub id for use."""
    return Handle(resolve(model), dtype, trust_remote_code)


def trim(model: str | Path, recipe: str, out: str | Path, *, keep: float | None = None, scope: str | None = None,
         progress: line.Report = silent, **options: Any) -> dict[str, Any]:
    """Trim `model` by `recipe` into `out`, prove it, and return what `trimtab trim --json` prints.

    Options are those of `trimtab.core.line.Options`: samples, seq_len, seed, calib, text, max_memory (bytes), ...
    """
    opts = replace(line.Options(), **options, **({} if keep is None else {"keep": keep}))
    return line.trim(resolve(model), spec.load(recipe).limited(scope, keep), Path(out), opts, progress)


def calibrate(model: str | Path, stats: set[str], *, samples: int = 128, seq_len: int = 256, seed: int = 0,
              calib: tuple[str, ...] = ()) -> dict[str, dict[str, Tensor]]:
    """Statistics of every site of the dense model: {site: {statistic: tensor}}."""
    import tempfile

    net = Network.open(resolve(model))
    batches = data.prepare(net, calib, "calibration", samples, seq_len, seed)
    found: dict[str, dict[str, Tensor]] = {}

    def look(i: int, module: Any, collect: Any) -> None:
        found.update({s.name: collect.of(s) for s in net.sites_of(i)})

    with tempfile.TemporaryDirectory() as scratch:
        walk = line.walker(net, batches, Path(scratch), None, None)
        walk({s.name: set(stats) for s in net.sites}, look, "dense", lambda d, n: None, 0)
    return found


def prove(before: str | Path, after: str | Path, *, text: tuple[str, ...] = (), tokens: int = 8192, seq_len: int = 256,
          speed: bool = True) -> dict[str, Any]:
    """Compare two models in a fresh process: quality on held-out text, bytes, speed."""
    from trimtab.evaluate import compare

    return compare(resolve(after), resolve(before), text, tokens, seq_len, speed=speed)
