"""A tiny random language model with the built-in tokenizer, and text to calibrate on; made once a session."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

LM = Path(__file__).parents[1] / "src" / "trimtab" / "builtin" / "lm"


@pytest.fixture(autouse=True)
def threads():
    """One, where several processes share the tests: more would wait for each other."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory) -> Path:
    """Llama-shaped, 3 blocks, width 32, bf16, vocabulary of the built-in tokenizer, in two shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0,
                         eos_token_id=0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="150KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LM / name, path / name)
    return path


@pytest.fixture(scope="session")
def calib(tmp_path_factory) -> str:
    """Enough text for a few windows of 64 tokens."""
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text("\n".join(f"def f{i}(a, b):\n    return a * {i} + b" for i in range(200)))
    return str(path)
