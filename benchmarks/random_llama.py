"""A random Llama on disk, for measuring memory and time; weights mean nothing.

    python benchmarks/random_llama.py build/llama-1b [--size 1.1b|110m]
"""
from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from trimtab.builtin import model_path

VOCAB = 32000
# Layers, width, width of the mlp, heads, key/value heads.
SIZES = {"1.1b": (22, 2048, 5632, 32, 4), "110m": (12, 768, 2048, 12, 12)}


def build(out: Path, size: str = "1.1b") -> None:
    """One shard a layer, drawn and written layer by layer, so that building needs little memory."""
    layers, width, mlp, heads, kv = SIZES[size]
    out.mkdir(parents=True)
    head = width // heads
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=g) * 0.02).to(torch.bfloat16)

    index: dict[str, str] = {}
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (VOCAB, width)}]
    for i in range(layers):
        p = f"model.layers.{i}."
        shards.append({
            p + "self_attn.q_proj.weight": (width, width), p + "self_attn.k_proj.weight": (kv * head, width),
            p + "self_attn.v_proj.weight": (kv * head, width), p + "self_attn.o_proj.weight": (width, width),
            p + "mlp.gate_proj.weight": (mlp, width), p + "mlp.up_proj.weight": (mlp, width),
            p + "mlp.down_proj.weight": (width, mlp), p + "input_layernorm.weight": (width,),
            p + "post_attention_layernorm.weight": (width,)})
    shards.append({"model.norm.weight": (width,), "lm_head.weight": (VOCAB, width)})
    for n, shard in enumerate(shards, 1):
        name = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        save_file({k: draw(*s) if len(s) == 2 else torch.ones(s, dtype=torch.bfloat16) for k, s in shard.items()},
                  out / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
    total = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    config = json.loads((model_path() / "config.json").read_text())
    config |= {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
               "num_key_value_heads": kv, "head_dim": head, "vocab_size": VOCAB, "tie_word_embeddings": False,
               "max_position_embeddings": 2048, "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    for f in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / f, out / f)
    print(f"{total / 1e9:.2f} GB in {out}")


if __name__ == "__main__":
    ask = argparse.ArgumentParser()
    ask.add_argument("out", type=Path)
    ask.add_argument("--size", choices=SIZES, default="1.1b")
    a = ask.parse_args()
    build(a.out, a.size)
