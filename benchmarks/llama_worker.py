"""llama.cpp's side of decode.py, run by an interpreter that has llama-cpp-python, gguf and numpy.

    PYTHON benchmarks/llama_worker.py make CONFIG.json OUT          random weights of that shape as bf16, q8_0 and q4_0
    PYTHON benchmarks/llama_worker.py serve MODEL.gguf THREADS      a line "PROMPT NEW" in, a line of JSON out
"""
from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def make(config: dict[str, Any], out: Path) -> None:
    import gguf

    rng = np.random.default_rng(0)
    width, mlp, heads, kv = (config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
    head = config["head_dim"]
    full = out.with_suffix(".f16.gguf")
    w = gguf.GGUFWriter(full, "llama")
    w.add_vocab_size(config["vocab_size"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(width)
    w.add_block_count(config["num_hidden_layers"])
    w.add_feed_forward_length(mlp)
    w.add_head_count(heads)
    w.add_head_count_kv(kv)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(head)
    w.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, cols: int) -> None:
        w.add_tensor(f"{name}.weight", (rng.standard_normal((rows, cols), dtype=np.float32) * 0.02).astype(np.float16))

    def ones(name: str) -> None:
        w.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))

    matrix("token_embd", config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        for name, rows, cols in (("attn_q", heads * head, width), ("attn_k", kv * head, width), ("attn_v", kv * head, width),
                                 ("attn_output", width, heads * head), ("ffn_gate", mlp, width), ("ffn_up", mlp, width),
                                 ("ffn_down", width, mlp)):
            matrix(f"blk.{i}.{name}", rows, cols)
        ones(f"blk.{i}.attn_norm")
        ones(f"blk.{i}.ffn_norm")
    ones("output_norm")
    matrix("output", config["vocab_size"], width)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    for name, kind in (("bf16", llama_cpp.LLAMA_FTYPE_MOSTLY_BF16), ("q8_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0),
                       ("q4_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0)):
        how = llama_cpp.llama_model_quantize_default_params()
        how.ftype, how.nthread = kind, 2
        llama_cpp.llama_model_quantize(str(full).encode(), str(out.with_suffix(f".{name}.gguf")).encode(), ctypes.byref(how))
    full.unlink()


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(path: Path, threads: int) -> None:
    before, began = rss(), time.perf_counter()
    model = llama_cpp.Llama(str(path), n_ctx=2048, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    loaded = time.perf_counter() - began
    print("ready", flush=True)
    for line in sys.stdin:
        prompt, new = map(int, line.split())
        ids = np.random.default_rng(0).integers(10, 1000, prompt).tolist()
        model.reset()
        start = time.perf_counter()
        model.eval(ids)
        first = time.perf_counter()
        for i in range(new):
            model.eval([10 + i])
        end = time.perf_counter()
        print(json.dumps({"prefill_tok_s": prompt / (first - start), "decode_tok_s": new / (end - first), "load_s": loaded,
                          "rss_over_import": rss() - before}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), Path(sys.argv[3]))
    else:
        serve(Path(sys.argv[2]), int(sys.argv[3]))
