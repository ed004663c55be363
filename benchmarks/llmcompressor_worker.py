"""llm-compressor's side of llmcompressor.py, run by an interpreter that has it: PYTHON llmcompressor_worker.py trim|score SPEC.json

trim: `model`, `recipe` (of RECIPES), `inputs` (a .safetensors file of input_ids), `batch`, `out`, `threads`. One JSON object: seconds of
    loading, of the `oneshot` call and of saving, the peak of resident memory above a bare `import torch`, versions.
score: `models`, `inputs`, `threads`. Perplexity of the inputs for each directory as transformers opens it with compressed-tensors, in
    float32; `weights`: with activations as they come, `all`: rounded where the directory says so.
"""
from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def status(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


BARE = status("VmRSS")


def recipe(name: str) -> list[Any]:
    """As in the examples of llm-compressor: https://github.com/vllm-project/llm-compressor/tree/main/examples"""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    some: dict[str, Any] = {"targets": ["Linear"], "ignore": ["lm_head"]}
    return {
        "gptq w4a16": lambda: [GPTQModifier(scheme="W4A16", **some)],
        "awq w4a16": lambda: [AWQModifier(duo_scaling="both"), QuantizationModifier(scheme="W4A16_ASYM", **some)],
        "gptq w8a8": lambda: [GPTQModifier(scheme="W8A8", **some)],
        "rtn w8a8": lambda: [QuantizationModifier(scheme="W8A8", **some)],
    }[name]()


def trim(spec: dict[str, Any]) -> dict[str, Any]:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = load_file(spec["inputs"])["input_ids"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    steps = recipe(spec["recipe"])
    if not torch.accelerator.is_available():  # 0.14: AWQ pins its cache for a GPU, whether there is one or not
        IntermediatesCache.pin_memory = lambda self, batch: None
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    loaded = time.perf_counter()
    oneshot(model=model, tokenizer=tokenizer, dataset=data, recipe=steps, num_calibration_samples=len(ids), max_seq_length=ids.shape[1],
            shuffle_calibration_samples=False, batch_size=spec["batch"])
    done = time.perf_counter()
    model.save_pretrained(spec["out"], save_compressed=True)
    tokenizer.save_pretrained(spec["out"])
    return {"load_seconds": loaded - began, "edit_seconds": done - loaded, "save_seconds": time.perf_counter() - done,
            "over_import": status("VmHWM") - BARE}


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    losses = [torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:]) for row in ids]
    return float(torch.stack(losses).mean().exp())


def score(spec: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    ids = load_file(spec["inputs"])["input_ids"]
    found = []
    for path in spec["models"]:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        whole = perplexity(model, ids)
        rounding = [m.quantization_scheme for m in model.modules()
                    if getattr(getattr(m, "quantization_scheme", None), "input_activations", None) is not None]
        for scheme in rounding:
            scheme.input_activations = None
        found.append({"all": whole, "weights": perplexity(model, ids) if rounding else whole})
    return {"perplexity": found}


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    torch.set_num_threads(asked["threads"])
    said = {"trim": trim, "score": score}[sys.argv[1]](asked)
    said["versions"] = {p: version(p) for p in ("llmcompressor", "compressed-tensors", "transformers", "torch")}
    print(json.dumps(said))
