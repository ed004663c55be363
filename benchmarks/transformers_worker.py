"""transformers' side of decode.py: the model in bfloat16, or with torch.ao's dynamic int8 (weights of 8 bits, x rounded to 8).

    python benchmarks/transformers_worker.py bf16|int8 MODEL THREADS      a line "PROMPT NEW" in, a line of JSON out
"""
from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from trimtab.core.memory import rss


def eight_bits(model: Any) -> None:
    """Every linear map with codes, everything else in float32; one block after another, so that float32 weights are few at a time."""
    def converted(part: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao calls it deprecated, and has no other that is as fast here
            return torch.ao.quantization.quantize_dynamic(nn.Sequential(part.float()), {nn.Linear}, dtype=torch.qint8, inplace=True)[0]

    body = model.model
    for i, block in enumerate(body.layers):
        body.layers[i] = converted(block)
    model.lm_head = converted(model.lm_head)
    model.float()


def main(kind: str, path: str, threads: int) -> None:
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    cls = transformers.AutoModelForCausalLM
    before, began = rss(), time.perf_counter()
    model = cls.from_pretrained(Path(path), dtype=torch.bfloat16).eval()
    if kind == "int8":
        eight_bits(model)
    loaded = time.perf_counter() - began
    print("ready", flush=True)
    for line in sys.stdin:
        prompt, new = map(int, line.split())
        ids = torch.randint(10, 1000, (1, prompt), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            times, cache = [time.perf_counter()], None
            for _ in range(new + 1):
                out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
                times.append(time.perf_counter())
        print(json.dumps({"prefill_tok_s": prompt / (times[1] - times[0]), "decode_tok_s": new / (times[-1] - times[1]), "load_s": loaded,
                          "rss_over_import": rss() - before}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
