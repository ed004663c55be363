"""Tiny random models of every family, saved as Hugging Face directories."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEXT: dict[str, Any] = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
MHA = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
GEMMA = {**TEXT, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4,
         "layer_types": ["sliding_attention", "full_attention"]}
MOE = {**TEXT, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
# name -> (class, config class, options)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", {
        **TEXT, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama_base": ("LlamaModel", "LlamaConfig", TEXT),
    "llama_classifier": ("LlamaForSequenceClassification", "LlamaConfig", {**TEXT, "num_labels": 3}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**TEXT, "sliding_window": 4, "head_dim": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**TEXT, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT),
    "opt": ("OPTForCausalLM", "OPTConfig", {**MHA, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "opt_post": ("OPTForCausalLM", "OPTConfig", {**MHA, "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 80, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                                              "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**MHA, "use_parallel_residual": True}),
    "gpt_neox_serial": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**MHA, "use_parallel_residual": False}),
    "bert": ("BertModel", "BertConfig", MHA),
    "bert_masked": ("BertForMaskedLM", "BertConfig", MHA),
    "vit": ("ViTForImageClassification", "ViTConfig", {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
        "patch_size": 4, "num_labels": 5}),
    "vit_base": ("ViTModel", "ViTConfig", {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
        "patch_size": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {
        **MOE, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**MOE, "head_dim": 8}),
}


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """The model in float32; every vector (norms, biases) is moved off its starting value."""
    import transformers

    cls, config, options = MODELS[name]
    torch.manual_seed(seed)
    model = getattr(transformers, cls)(getattr(transformers, config)(**{**options, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=0.1)
    return model


def save(name: str, path: Path, *, dtype: torch.dtype = torch.float32, shard: str = "50GB", seed: int = 0,
         **changes: Any) -> Path:
    """Build and save; returns `path`."""
    build(name, seed, **changes).to(dtype).save_pretrained(path, max_shard_size=shard)
    return path


def inputs(name: str, rows: int = 3, length: int = 10, seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch the model takes; text has padding at the end of its last row."""
    gen = torch.Generator().manual_seed(seed)
    if name.startswith("vit"):
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=gen)}
    ids, mask = torch.randint(3, 80, (rows, length), generator=gen), torch.ones(rows, length, dtype=torch.long)
    ids[-1, -3:] = mask[-1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}
