"""A random Llama of about 1.1 billion parameters on disk, for measuring memory and wall time; weights mean nothing.

    python benchmarks/random_llama.py build/llama-1b
"""
from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from trimtab.builtin import model_path

LAYERS, WIDTH, MLP, HEADS, KV, VOCAB = 22, 2048, 5632, 32, 4, 32000


def build(out: Path) -> None:
    """One shard a layer, drawn and written layer by layer, so that building needs little memory."""
    out.mkdir(parents=True)
    head = WIDTH // HEADS
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=g) * 0.02).to(torch.bfloat16)

    index: dict[str, str] = {}
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (VOCAB, WIDTH)}]
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        shards.append({
            p + "self_attn.q_proj.weight": (WIDTH, WIDTH), p + "self_attn.k_proj.weight": (KV * head, WIDTH),
            p + "self_attn.v_proj.weight": (KV * head, WIDTH), p + "self_attn.o_proj.weight": (WIDTH, WIDTH),
            p + "mlp.gate_proj.weight": (MLP, WIDTH), p + "mlp.up_proj.weight": (MLP, WIDTH),
            p + "mlp.down_proj.weight": (WIDTH, MLP), p + "input_layernorm.weight": (WIDTH,),
            p + "post_attention_layernorm.weight": (WIDTH,)})
    shards.append({"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)})
    for n, shard in enumerate(shards, 1):
        name = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        save_file({k: draw(*s) if len(s) == 2 else torch.ones(s, dtype=torch.bfloat16) for k, s in shard.items()},
                  out / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}))
    config = json.loads((model_path() / "config.json").read_text())
    config |= {"hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
               "num_key_value_heads": KV, "head_dim": head, "vocab_size": VOCAB, "tie_word_embeddings": False,
               "max_position_embeddings": 2048, "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    for f in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / f, out / f)
    print(f"{size / 1e9:.2f} GB in {out}")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
