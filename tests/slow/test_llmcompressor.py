"""Ours beside llm-compressor: TRIMTAB_LLMCOMPRESSOR names an interpreter that has llmcompressor."""
from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import LM

PEER = os.environ.get("TRIMTAB_LLMCOMPRESSOR")
pytestmark = pytest.mark.skipif(not PEER, reason="TRIMTAB_LLMCOMPRESSOR names no interpreter with llmcompressor")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "llmcompressor.py"


def benchmark() -> Any:
    """The script as a module: `import llmcompressor` would be the package."""
    spec = importlib.util.spec_from_file_location("benchmark_llmcompressor", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Ours, theirs and dense, by scheme and metric."""
    bench, folder = benchmark(), tmp_path_factory.mktemp("llmcompressor")
    return {name: bench.compared(LM, name, Path(str(PEER)), folder, samples=32, seed=0, threads=2, rounds=1)[1] for name in bench.OURS}


@pytest.mark.parametrize("scheme", ["gptq w4a16", "awq w4a16", "gptq w8a8", "rtn w8a8"])
def test_perplexity_is_not_above_theirs(found, scheme):
    """By at most 0.5 %, in transformers, on the same samples and the same held-out tokens."""
    assert set(found[scheme]) == {"perplexity", *(["perplexity_int8_inputs"] if "w8a8" in scheme else [])}
    for metric, (ours, theirs, dense) in found[scheme].items():
        print(f"{scheme}, {metric}: {ours:.4f} ours, {theirs:.4f} theirs, {dense:.4f} dense")
        assert 11 < dense < theirs * 1.01 < 14
        assert ours <= 1.005 * theirs
