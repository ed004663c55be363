"""Measure the built-in models: bits per byte against xz -9 on the same text, how often a continuation parses, what their MLPs leave
at zero and could leave out, the curves.

    python tools/measure_builtin.py          appends to results/builtin.jsonl and draws docs/builtin*-curve.svg
"""
from __future__ import annotations

import ast
import json
import lzma
import tempfile
import time
from pathlib import Path

import torch

import trimtab as tt
from train_builtin import CURVES, LONG, bits_per_byte
from trimtab.builtin import NAMES, corpus, model_path
from trimtab.core import data
from trimtab.demo import machine
from trimtab.network.stream import Network
from trimtab.prove.activations import activations

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, NEW, MOST_DROPPED = 50, 128, 3
SEQUENCES, LOSSES = 64, [1.0, 5.0]


def headers() -> list[tuple[str, str]]:
    """(the 60 lines of its module before it, header): one-line headers of top-level functions, evenly spread."""
    found = []
    for _, text in corpus.modules("validation"):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        lines = text.splitlines()
        found += [("\n".join(lines[max(0, n.lineno - 61):n.lineno - 1]), lines[n.lineno - 1]) for n in tree.body
                  if isinstance(n, ast.FunctionDef) and lines[n.lineno - 1].rstrip().endswith(":")]
    at = torch.linspace(0, len(found) - 1, PROMPTS).long().tolist()
    return [found[i] for i in at]


def parses(header: str, text: str) -> bool:
    """Header and body parse. The body ends at the first line that is not indented; of one that is cut off by the
    length limit, up to three last lines may be an unfinished statement."""
    body: list[str] = []
    lines = text.split("\n")
    finished = False
    for line in lines[:-1]:
        if line.strip() and not line[0].isspace():
            finished = True
            break
        body.append(line)
    for drop in range(1 if finished else MOST_DROPPED + 1):
        kept = body[:len(body) - drop]
        if not any(x.strip() for x in kept):
            return False
        try:
            ast.parse("\n".join([header, *kept]) + "\n")
            return True
        except (SyntaxError, ValueError):
            continue
    return False


def curve_svg(rows: list[dict]) -> str:
    """Training loss in bits per token over tokens, and the peeked bits per byte, as a small picture."""
    w, h, left, bottom = 640, 260, 46, 34
    tokens = [r["tokens"] for r in rows]
    top = 4.0

    def x(t: float) -> float:
        return left + (w - left - 12) * t / max(tokens)

    def y(v: float) -> float:
        return 10 + (h - bottom - 10) * (1 - min(v, top) / top)

    loss = " ".join(f"{x(r['tokens']):.1f},{y(r['loss']):.1f}" for r in rows)
    peek = " ".join(f"{x(r['tokens']):.1f},{y(r['peek_bits_per_byte']):.1f}" for r in rows if "peek_bits_per_byte" in r)
    grid = "".join(f'<line x1="{left}" x2="{w - 12}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#ccc" stroke-width=".7"/>'
                   f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v}</text>' for v in (0, 1, 2, 3, 4))
    ticks = "".join(f'<text x="{x(m * 1e6):.1f}" y="{h - 14}" text-anchor="middle">{m}</text>'
                    for m in range(0, int(max(tokens) / 1e6) + 1, 2))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" font-family="sans-serif" font-size="12" fill="#555">'
            f'<rect width="{w}" height="{h}" fill="#fff"/>{grid}{ticks}'
            f'<text x="{w / 2}" y="{h - 1}" text-anchor="middle">million tokens</text>'
            f'<polyline points="{loss}" fill="none" stroke="#0072b2" stroke-width="1.6"/>'
            f'<polyline points="{peek}" fill="none" stroke="#d55e00" stroke-width="1.6"/>'
            f'<text x="{w - 20}" y="24" text-anchor="end" fill="#0072b2">training loss, nats per token</text>'
            f'<text x="{w - 20}" y="40" text-anchor="end" fill="#d55e00">bits per byte, small validation modules</text></svg>\n')


Figure = tuple[str, str, str, float]  # of what, under which setting, metric, value


def hidden(name: str) -> list[Figure]:
    """What share of the hidden values of MLPs is zero, and may be left out by size at no more than these per cent of perplexity."""
    net = Network.open(model_path(name))
    with tempfile.TemporaryDirectory() as scratch:
        found = activations(net, data.prepare(net, (), "validation", SEQUENCES, 256, 0), LOSSES, Path(scratch), lambda *_: None)
    where = f"hidden values of MLPs, {SEQUENCES} x 256 validation tokens"
    zeros = sum(layer["zeros"] for layer in found["layers"]) / len(found["layers"])
    return [(name, where, "share of zeros", zeros),
            *((name, f"{where}, {t['p']:g}% more perplexity", "share left out", t["sparsity"]) for t in found["tolerances"])]


def of_model(name: str) -> list[Figure]:
    handle = tt.load(name)
    texts = corpus.text("validation")
    size = sum(f.stat().st_size for f in model_path(name).glob("*.safetensors"))
    figures = [
        (name, f"{len(texts)} validation modules, {len(''.join(texts).encode())} bytes, window {LONG}, stride 512", "bits_per_byte",
         bits_per_byte(handle.module, handle.tokenizer.backend_tokenizer, texts)),
        (name, "safetensors on disk", "megabytes", size / 1e6),
    ]
    alone = inside = 0
    for before, header in headers():
        alone += parses(header, "".join(handle.generate(header, max_new_tokens=NEW)))
        inside += parses(header, "".join(handle.generate(f"{before}\n{header}", max_new_tokens=NEW)))
    what = f"of {PROMPTS} function headers of validation modules, greedy, {NEW} tokens"
    figures.append((name, f"{what}, header alone", "share that parses", alone / PROMPTS))
    figures.append((name, f"{what}, behind the 60 lines before it", "share that parses", inside / PROMPTS))
    return figures + hidden(name)


def main() -> None:
    raw = "".join(corpus.text("validation")).encode()
    figures = [("xz -9", f"the same {len(raw)} bytes in one piece", "bits_per_byte", 8 * len(lzma.compress(raw, preset=9)) / len(raw))]
    for name in NAMES:
        figures += of_model(name)
    rows = [{"recipe": r, "model": "the_built-in_model", "setting": s, "metric": m, "value": round(v, 4), "seed": 0, "methods": {},
             "machine": machine(), "date": time.strftime("%Y-%m-%d")} for r, s, m, v in figures]
    with (ROOT / "results" / "builtin.jsonl").open("a", encoding="utf-8") as f:
        for row in rows:
            print(f"{row['recipe']:<18}{row['metric']:<20}{row['value']:<10}{row['setting']}")
            f.write(json.dumps(row, sort_keys=True) + "\n")
    for path in CURVES.values():
        curve = [json.loads(line) for line in path.read_text().splitlines()]
        path.with_suffix(".svg").write_text(curve_svg(curve), encoding="utf-8")


if __name__ == "__main__":
    main()
