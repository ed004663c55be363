"""Run by an interpreter that has llama_cpp: what llama.cpp computes for token ids, and how it cuts text.

Reads {"model": path, "windows": [[id, ...], ...], "texts": [...], "logits": bool} as JSON on stdin and prints, as JSON, `loss` (mean
-ln p of the next id), `ids` of each text, and `logits` of the first window if asked.
"""
import json
import sys

import numpy as np
from llama_cpp import Llama

asked = json.load(sys.stdin)
length = max(map(len, asked["windows"]), default=8)
model = Llama(asked["model"], n_ctx=length, n_batch=length, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
loss, first = [], None
for window in asked["windows"]:
    model.reset()
    model.eval(window)
    scores = np.array(model.scores[:len(window)], dtype=np.float64)
    first = scores if first is None else first
    shifted = scores - scores.max(-1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    loss += [-logp[i, window[i + 1]] for i in range(len(window) - 1)]
ids = [model.tokenize(t.encode(), add_bos=True, special=False) for t in asked["texts"]]
print(json.dumps({"loss": float(np.mean(loss)) if loss else None, "ids": ids,
                  "logits": first.tolist() if asked.get("logits") and first is not None else None}))
