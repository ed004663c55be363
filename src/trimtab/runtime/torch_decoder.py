"""Continuing token ids with a transformers model: for what the native decoder does not run."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.runtime.decoder import not_finite
from trimtab.runtime.modules import PackedLinear


@torch.no_grad()
def generate(model: Any, ids: Sequence[int], max_new_tokens: int, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
             seed: int = 0, stop: Sequence[int] = ()) -> Iterator[int]:
    """New ids one by one, one of `stop` last; as `Decoder.generate`, though other ids at a temperature."""
    gen = torch.Generator().manual_seed(seed)
    cache, step = None, torch.tensor([list(ids)])
    for _ in range(max_new_tokens):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1].float()
        if not torch.isfinite(logits.max()):
            raise not_finite(_tensors(model))
        if temperature > 0:
            token = int(torch.multinomial(shares(logits / temperature, top_k, top_p), 1, generator=gen))
        else:
            token = int(logits.argmax())
        yield token
        if token in stop:
            return
        step = torch.tensor([[token]])


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield from model.state_dict().items()
    for name, m in model.named_modules():
        if isinstance(m, PackedLinear):
            yield from ((f"{name}.{k}", t) for k, t in m.linear.packed.buffers.items())


def shares(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities [vocabulary] of the `top_k` highest (0: all), and of these of the highest that have `top_p` together."""
    p = torch.softmax(logits, -1)
    high, at = p.sort(descending=True)
    high = high[:top_k or None]
    before = high.cumsum(0) - high
    kept = at[:len(high)][before < top_p * high.sum()]
    return torch.zeros_like(p).index_copy_(0, kept, p[kept])
