"""Write the pages that follow from the code and the measured rows, or check that they do.

    python tools/generate.py write     docs/catalogue/*.md, docs/claims.md, plots, tables between markers in hand-written pages
    python tools/generate.py check     exit 1 and name the pages that differ

Markers, in README.md and docs/**/*.md:  <!-- begin:results model=builtin:lm setting=50% -->  ...  <!-- end:results -->
The word is one of TABLES; `key=value` words narrow it to the rows with those values, several with commas between. Rows of single
layers have a shape besides, OUTxIN, and rows of a table of their own its name, as `table=gates`. A table of speed shows what the last run
measured, and says so where nothing was measured yet.
"""
from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trimtab.builtin import NAMES
from trimtab.core.registry import AXES, FACTS, KNOBS, Method, load_all
from trimtab.core.spec import Recipe, rows
from trimtab.evidence import BETTER, SETTINGS, Figure, is_stale, judged
from trimtab.report import cost_plots, speed_plots
from trimtab.runtime import names

ROOT = Path(__file__).resolve().parents[1]
SHAPE = "8192x2048"  # of the layers that the plots show
PLACES = {"all": "all", "*.down": "down"}  # of gates that are drawn together
GATES = [s for s in SETTINGS if s.startswith("gates-")]
SHAPES = [s for s in SETTINGS if s.startswith("shapes-")]
NOT_YET = "Not measured yet.\n"
KEYS = ("recipe", "model", "setting", "metric", "value", "seed", "methods")
QUESTION = {
    "stat": "What must we know about the data?", "wiring": "What becomes of the network as a whole?",
    "unit": "What stands or falls together, compared with whom?",
    "score": "How much does each unit matter? Higher means keep.", "budget": "How is the total split over the sites?",
    "rewrite": "Which exact change of basis makes the edit cheaper?", "grid": "Which values may a weight take?",
    "input": "How is rounded what codes meet?", "gate": "Which inputs of a token are computed?",
    "edit": "What happens to the weights?",
    "repair": "How is the error mended?", "format": "How is it stored?",
}
Row = dict[str, Any]


# --- measured rows ----------------------------------------------------------------------------------------------------
def measured(root: Path) -> list[Row]:
    """Rows of results/*.jsonl; of rows that agree in everything but the value the last one counts."""
    last: dict[tuple[Any, ...], Row] = {}
    for path in sorted((root / "results").glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                at = (*(row[k] for k in (*KEYS[:4], "seed")), row.get("one_at_a_time"), row.get("table"))
                last[at] = {k: row[k] for k in KEYS} | {"shape": shape_of(row)} | row
            except (ValueError, KeyError, TypeError) as e:
                raise SystemExit(f"{path.relative_to(root)}:{number}: want a row of {', '.join(KEYS)}: {e!r}") from None
    return list(last.values())


def shape_of(row: Row) -> str:
    """Of a row of a single layer, OUTxIN; else nothing."""
    found = re.match(r"one layer (\d+x\d+), cold$", str(row["model"]))
    return found[1] if found else ""


def of_last_run(every: list[Row]) -> list[Row]:
    """Of rows that say when their run began, those of the last one of each model and setting: runs are not compared."""
    last: dict[tuple[Any, ...], str] = {}
    for r in every:
        at = (r["model"], r["setting"], r.get("table"))
        last[at] = max(last.get(at, ""), r.get("began", ""))
    return [r for r in every if r.get("began", "") == last[r["model"], r["setting"], r.get("table")]]


# --- pages ------------------------------------------------------------------------------------------------------------
def table(head: list[str], body: Iterable[Iterable[Any]]) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, body)]) + "\n"


def code(text: str) -> str:
    return f"`{text}`"


def users(recipes: dict[str, Recipe]) -> dict[str, list[str]]:
    """Method key -> recipes that use it."""
    out: dict[str, list[str]] = {}
    for name, r in recipes.items():
        for key in r.methods:
            out.setdefault(key, []).append(name)
    return out


def knob(name: str, default: Any) -> str:
    return f"`{name}={default}` {KNOBS[name]}"


def declared(m: Method) -> str:
    """What it says of itself beyond the defaults of its axis; functions by their presence only."""
    facts = [k if callable(v) else f"{k}={v}" for k, v in m.facts.items() if v != FACTS[m.axis][k]]
    facts += [f"also decides the {a}" for a in m.joint]
    return ", ".join(facts)


def axis_page(axis: str, reg: dict[str, Method], used: dict[str, list[str]]) -> str:
    mine = [m for m in reg.values() if m.axis == axis]
    out = [f"# {axis}\n", f"{QUESTION[axis]} Generated from the code; the names are what a recipe takes.\n"]
    if not mine:
        out.append("No method yet.\n")
    for m in mine:
        lines = [
            ("formula", m.doc["Formula"]), ("reads", ", ".join(map(code, m.data))),
            ("knobs", "<br>".join(knob(*k) for k in m.knobs.items())), ("declares", declared(m)),
            ("source", m.doc["Source"]), ("deviations", m.doc["Deviations"]),
            ("expected failures", "; ".join(f"{law}: {why}" for law, why in m.xfail.items())),
            ("used by", ", ".join(map(code, used.get(m.key, [])))),
        ]
        out += [f"## {m.name}\n", f"{m.doc['what']}\n", table(["", ""], [(k, v) for k, v in lines if v])]
    return "\n".join(out)


def recipes_page(recipes: dict[str, Recipe]) -> str:
    body = [(code(n), code(r.row or r.text), r.source, "; ".join(c.text for c in r.claims), r.note)
            for n, r in sorted(recipes.items())]
    return "# recipes\n\nOne row a paper. Generated from the code.\n\n" + table(
        ["name", "pipeline", "source", "claims", "note"], body)


def claims_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    versions = {k: m.version for k, m in reg.items()}
    body = []
    for name, r in sorted(recipes.items()):
        for c in r.claims:
            status, figures = judged(c, every, versions)
            said = f"{c.text} ({c.better} better than {c.than}, {c.setting})"
            body.append((code(name), said, c.said, figures, status))
    return table(["recipe", "claim", "the paper", "here", "status"], body)


def claims_page(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    return f"""# claims

What papers say of their recipes, and what was measured here. Generated from the recipes and `results/*.jsonl`.

A claim says that one recipe beats another. Its direction holds where the means over the seeds differ by more than the
pooled spread, it holds *partly* where they differ by less, and it is *stale* where a method has changed since the
measurement. Lower perplexity is better, higher cosine is better.

{claims_table(every, recipes, reg)}"""


def results_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    versions = {k: m.version for k, m in reg.items()}
    groups: dict[tuple[str, ...], list[Row]] = {}
    for r in every:
        groups.setdefault(tuple(r[k] for k in ("model", "metric", "setting", "recipe")), []).append(r)
    dense: dict[tuple[str, ...], dict[int, Row]] = {}  # what every recipe of a table began with: one row, of all seeds
    for r in every:
        if r.get("dense") is not None and not is_stale(r, versions):
            at = (r["model"], r["metric"], r["setting"], "dense")
            dense.setdefault(at, {})[r["seed"]] = {**r, "value": r["dense"], "methods": {}, "setting": "dense"}
    groups |= {at: list(seeds.values()) for at, seeds in dense.items()}
    body = []
    for at, some in groups.items():
        old = all(is_stale(r, versions) for r in some)
        figure = Figure.of(some if old else [r for r in some if not is_stale(r, versions)])
        sign = -1 if BETTER.get(at[1]) == "higher" else 1
        body.append((at[:3], sign * figure.mean, (code(at[3]), at[2], at[0], at[1], f"{figure}{' (stale)' * old}",
                                                  figure.seeds)))
    return table(["recipe", "setting", "model", "metric", "value", "seeds"], [b[2] for b in sorted(body)])


def kernels_page(root: Path) -> str:
    by: dict[tuple[str, ...], list[str]] = {}
    for name in map(names.parse, names.of_source(root / "src/trimtab/kernels")):
        by.setdefault((name.op, name.format, name.type, name.activation), []).append(name.isa)
    return """# kernels

Generated from the table in the source. A kernel's name is `<op>_<activation>_<format>-<type>_<isa>`, for example
`linear_f32_bsr32-bf16_avx512`; `trimtab catalogue FORMAT` says which of a format's kernels run on the processor at hand.
A format without a kernel saves bytes, not time.

""" + table(["op", "format", "weights", "activations", "instruction sets"],
            [(*map(code, at), ", ".join(map(code, isas))) for at, isas in by.items()])


def counts_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    axes = [(a, [m.name for m in reg.values() if m.axis == a]) for a in AXES]
    body = [(a, len(names), ", ".join(map(code, names))) for a, names in axes if names]
    body.append(("recipes", len(recipes), ", ".join(map(code, sorted(recipes)))))
    return table(["axis", "methods", "names"], body)


def verdict(goal: Row) -> str:
    """A goal of a row in words: what came out, of what, what was wanted and why no more."""
    if goal["met"] is None:
        return f"{goal['target']:.2f} x {goal['than']}: not measured"
    met = "met" if goal["met"] else "**missed**"
    if goal["than"] == "the read bandwidth":
        return f"{goal['wanted']:.0%} of the read bandwidth: {met}"
    why = "" if goal["bound"] == "target" else f" ({goal['bound']}, else {goal['target']:.2f})"
    return f"{goal['wanted']:.2f} x {goal['than']}{why}, got {goal['got']:.3f}: {met}"


def wanted_of(r: Row) -> str:
    if "wanted" in r:  # rows of one target each
        return f"{r['wanted']:.2f} ({r['bound']}): {'met' if r['met'] else '**missed**'}"
    return "; ".join(map(verdict, r.get("goals", [])))


def kernels_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """Rows of benchmarks/kernels.py: time, spread, bandwidth, peak and error of x where they were measured, and the fastest other
    runtime of the same run."""
    every = of_last_run(every)
    if not every:
        return NOT_YET
    peaks, errors = (any(k in r for r in every) for k in ("share_of_peak", "error"))
    body = []
    for r in every:
        low, high = r["quartiles"]
        times = f"{r['times_fastest_other']:.2f} x {r['fastest_other']}" if "fastest_other" in r else ""
        peak = [f"{r['share_of_peak']:.0%}" if "share_of_peak" in r else ""] if peaks else []
        error = [f"{r['error']:.1e}" if "error" in r else ""] if errors else []
        read = f"{r['share_of_read_bandwidth']:.0%}"
        body.append((r["recipe"], f"{r['value']:.3f}", f"{low:.3f} to {high:.3f}", read, *peak, *error, times, wanted_of(r)))
    head = ["layer", "ms", "quartiles", "of the read bandwidth", *(["of the peak"] if peaks else []), *(["error of x"] if errors else [])]
    return table([*head, "against the fastest other", "wanted"], body)


def layers_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """The same rows in short: ours alone, all numbers of rows of x."""
    body = []
    for r in of_last_run(every):
        if "times_fastest_other" in r:
            rows = re.search(r"-batch-(\d+)$", r["setting"])
            body.append((rows[1] if rows else "", r["recipe"], f"{r['value']:.3f}", f"{r['share_of_read_bandwidth']:.0%}",
                         f"{r['times_fastest_other']:.2f} x {r['fastest_other']}", wanted_of(r)))
    return table(["rows of x", "layer", "ms", "of the read bandwidth", "against the fastest other", "wanted"], body) if body else NOT_YET


# What our candidates of benchmarks/decode.py are wanted to reach: of which model (nothing: of every one), in what, which of ours, so
# many times the best of these.
DECODE_GOALS: tuple[tuple[str, str, str, float, tuple[str, ...]], ...] = (
    ("", "decode_tok_s", "dense bf16", 1.0, ("llama.cpp bf16",)),
    ("", "decode_tok_s", "int8", 1.15, ("llama.cpp q8_0", "onnxruntime genai int8")),
    ("", "decode_tok_s", "int4 g128", 1.3, ("llama.cpp q4_0",)),
    ("llama-110m", "decode_tok_s", "int4 g128", 1.2, ("openvino genai int4", "onnxruntime genai int4", "llama.cpp q4_0")),
    ("", "decode_tok_s", "2:4 int4 g128", 1.25, ("llama.cpp q4_0",)),
    ("llama-1b", "decode_tok_s", "int2 g64", 1.4, ("trimtab int4 g128",)),
    ("llama-1b", "decode_tok_s", "mlp blocks 20% kept, bf16", 2.0, ("trimtab dense bf16",)),
    ("llama-1b", "decode_tok_s", "mlp blocks 5% kept, bf16", 2.8, ("trimtab dense bf16",)),
    ("", "prefill_tok_s", "dense bf16", 1.0, ("openvino genai bf16", "transformers bf16", "llama.cpp bf16")),
    ("", "prefill_tok_s", "int8", 1.1, ("transformers int8", "openvino genai int8")),
    ("", "prefill_tok_s", "int4 g128", 1.1, ("transformers int8", "openvino genai int8")),
    ("llama-1b", "prefill_tok_s", "mlp blocks 20% kept, bf16", 1.6, ("trimtab dense bf16",)),
    ("llama-1b", "prefill_tok_s", "mlp blocks 5% kept, bf16", 1.9, ("trimtab dense bf16",)),
    *(("llama-1b", metric, f"{kind}, gates skip 65%", times, (peer,)) for metric, kind, times, peer in (
        ("decode_tok_s", "bf16", 2.0, "trimtab dense bf16"), ("decode_tok_s", "int4 g128", 1.7, "trimtab int4 g128"),
        ("decode_tok_s", "int4 g128", 1.7, "llama.cpp q4_0"), ("prefill_tok_s", "bf16", 1.0, "trimtab dense bf16"),
        ("prefill_tok_s", "int4 g128", 1.0, "trimtab int4 g128"))),
)
NEAR, LIMIT = 0.85, 0.97  # of the read bandwidth counts as reached; times a peer that reaches it counts as level with it


def decode_goals(ours: Row, rows: dict[tuple[str, str], Row]) -> list[str]:
    """What a row was wanted to reach, in words. `rows`: those of the run, by recipe and metric.

    Decoding is bound by reading: 85 % of the bandwidth is enough where that is less. A peer of the same bytes that is there itself
    is reached at 0.97 times.
    """
    said = []
    metric, what = ours["metric"], ours["metric"].removesuffix("_tok_s")
    enough = NEAR * ours["read_gb_s"] * 1e9 / ours["bytes_per_token"] if metric == "decode_tok_s" and "bytes_per_token" in ours else None
    for model, of, name, times, peers in DECODE_GOALS:
        if of != metric or f"trimtab {name}" != ours["recipe"] or model not in ("", ours["model"]):
            continue
        found = {p: rows[p, metric]["value"] for p in peers if (p, metric) in rows}
        missing = [p for p in peers if p not in found]
        without = f" ({', '.join(missing)} not measured)" if missing else ""
        if not found:
            said.append(f"{what} {times:.2f} x{without}")
            continue
        best = max(found, key=lambda p: found[p])
        factor = LIMIT if times == 1 and enough is not None and found[best] >= enough else times
        bounded = enough is not None and enough < factor * found[best]
        goal = enough if enough is not None and bounded else factor * found[best]
        met = "met" if ours["value"] >= goal else "**missed**"
        why = f" (85% of the read bandwidth, else {times:.2f})" if bounded else f" (at the read bandwidth, else {times:.2f})" \
            if factor != times else ""
        said.append(f"{what} {goal / found[best]:.2f} x {best}{why}, got {ours['value'] / found[best]:.3f}: {met}{without}")
    return said


def decode_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """Rows of benchmarks/decode.py: one line a candidate."""
    rows = {(r["recipe"], r["metric"]): r for r in of_last_run([r for r in every if r["metric"] in ("decode_tok_s", "prefill_tok_s")])}
    if not rows:
        return NOT_YET

    def figure(r: Row) -> str:
        return f"{r['value']:,.1f} ({r['quartiles'][0]:,.1f} to {r['quartiles'][1]:,.1f})"

    body = []
    for name in dict.fromkeys(recipe for recipe, _ in rows):
        decode, prefill = rows[name, "decode_tok_s"], rows[name, "prefill_tok_s"]
        held = decode.get("rss_over_import")
        share = decode["bytes_per_token"] * decode["value"] / decode["read_gb_s"] / 1e9 if "bytes_per_token" in decode else None
        body.append((name, figure(decode), "" if share is None else f"{share:.0%}", figure(prefill),
                     f"{held / 1e6:,.0f} MB" if held else "", "; ".join(decode_goals(decode, rows) + decode_goals(prefill, rows))))
    return table(["model", "decode, tokens/s", "of the read bandwidth", "prefill, tokens/s", "resident over a bare import", "wanted"], body)


def first_token_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """Rows of benchmarks/first_token.py."""
    units = {"open_s": ("opened", 1.0, "s"), "first_token_s": ("first token", 1.0, "s"),
             "over_import": ("memory over a bare import", 1e-6, "MB")}
    body = []
    for r in (r for r in every if r["metric"] in units):
        what, by, unit = units[r["metric"]]
        wanted = f"at most {r['wanted'] * by:,.0f} {unit}: {'met' if r['met'] else '**missed**'}" if "wanted" in r else ""
        low, high = (f"{x * by:,.2f}" for x in r["quartiles"])
        body.append((f"{r['model']} {r['recipe']}", what, f"{r['value'] * by:,.2f} {unit}", f"{low} to {high}", wanted))
    return NOT_YET if not body else table(["directory", "what", "median", "quartiles", "wanted"], body)


def profiles_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """Rows of benchmarks/perf_profile.py: what the samples were taken in, the last time each was profiled."""
    rows = {(r["model"], r["recipe"], r["setting"]): r for r in every if "parts" in r}
    body = []
    for r in rows.values():
        of = r["model"].removeprefix("one layer ").removesuffix(", cold")
        setting = re.sub(r"^.*-batch-(\d+)$", r"\1 rows of x", r["setting"])
        body.append((f"{of} {r['recipe'].removeprefix('trimtab ')}", "1 row of x" if setting == "1 rows of x" else setting,
                     ", ".join(f"{part} {share:.0%}" for part, share in sorted(r["parts"].items(), key=lambda x: -x[1]) if share >= 0.015)))
    return table(["what", "when", "share of the samples"], body) if body else NOT_YET


def cache_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """Rows of benchmarks/cache.py: quality, or with --speed a step's time."""
    quality, steps = ([r for r in every if r["metric"] == m and "cache_bytes" in r] for m in ("ppl", "step_ms"))
    if quality:
        return table(["keys and values", "runs in", "perplexity", "KL, nats a token", "held"],
                     [(r["recipe"], r["runner"], f"{r['value']:.3f}", f"{r['kl']:.1e}",
                       f"{r['cache_bytes'] / 1e6:.2f} MB" if r["cache_bytes"] else "") for r in quality])
    body = [(r["model"], r["setting"], r["threads"], r["recipe"], f"{r['value']:.2f} ({r['quartiles'][0]:.2f} to {r['quartiles'][1]:.2f})",
             f"{r['cache_bytes'] / 1e6:.1f} MB") for r in steps]
    return table(["network", "behind", "threads", "keys and values", "ms a step", "held"], body) if body else NOT_YET


def llmcompressor_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """Rows of benchmarks/llmcompressor.py: ours, theirs, and whether their ratio is what was wanted."""
    units = {"perplexity": ("perplexity, weights rounded", 1.0, ".3f"),
             "perplexity_int8_inputs": ("perplexity, inputs in int8 too", 1.0, ".3f"), "whole_seconds": ("seconds", 1.0, ",.1f"),
             "peak_over_import": ("MB over a bare import", 1e-6, ",.0f")}
    body = []
    for r in (r for r in every if "theirs" in r):
        what, by, form = units[r["metric"]]
        mine, its = (f"{r[k] * by:{form}}" for k in ("value", "theirs"))
        wanted = f"{r['wanted']:.3f} x: {'met' if r['met'] else '**missed**'}"
        scheme, _, data = r["setting"].removeprefix("llmcompressor ").partition(", ")
        body.append((scheme, code(r["recipe"]), data, what, mine, its, f"{r['ratio']:.3f}", wanted))
    return table(["scheme", "our recipe", "samples", "what", "ours", "llmcompressor", "ratio", "wanted at most"], body) if body else NOT_YET


def of_gates(every: list[Row], reg: dict[str, Method]) -> list[Row]:
    return fresh(every, GATES, reg)


def fresh(every: list[Row], settings: list[str], reg: dict[str, Method]) -> list[Row]:
    versions = {k: m.version for k, m in reg.items()}
    return [r for r in every if r["setting"] in settings and not is_stale(r, versions)]


def shapes_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """One line a recipe: perplexity by the share of the blocks' weights that was to go, what went in brackets; the best of each in bold."""
    some = fresh(every, SHAPES, reg)
    if not some:
        return NOT_YET
    dense = Figure.of({r["seed"]: {**r, "value": r["dense"]} for r in some}.values())
    best = {s: min((Figure.of([r for r in some if (r["recipe"], r["setting"]) == (name, s)]).mean, name)
                   for name in {r["recipe"] for r in some if r["setting"] == s})[1] for s in {r["setting"] for r in some}}
    body = []
    for name in SETTINGS[SHAPES[0]].recipes:
        cells = []
        for setting in SHAPES:
            own = [r for r in some if (r["recipe"], r["setting"]) == (name, setting)]
            figure = f"**{Figure.of(own)}**" if best.get(setting) == name else str(Figure.of(own)) if own else ""
            cells.append(f"{figure} ({sum(r['removed']['reached'] for r in own) / len(own):.0%})" if own else "")
        if any(cells):
            body.append((code(name), *cells))
    head = ["recipe", *(f"{s.removeprefix('shapes-')} gone" for s in SHAPES)]
    return table(head, [(f"dense: {dense}", *[""] * (len(head) - 1)), *body])


# What is taken, by what a pipeline names; of those that name none of it, weights are kept as products of a small rank.
KINDS = {"unit/neuron": "neurons", "unit/inner": "heads and neurons", "unit/kvgroup": "heads", "unit/head": "heads",
         "unit/channel": "channels", "unit/sublayer": "depth", "unit/layer": "depth", "edit/tie": "sharing", "edit/adapt": "sharing",
         "edit/direct": "sharing"}


def kind_of(r: Row) -> str:
    """What is taken away in a row of smaller shapes."""
    return next((kind for key, kind in KINDS.items() if re.search(rf"\b{key}\b", r["pipeline"])), "small ranks")


def shape_winners(some: list[Row]) -> dict[tuple[str, str], tuple[float, str]]:
    """By kind and setting, of rows that took as much as was asked, what lost the least: its perplexity and its recipe."""
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for r in some:
        asked = float(r["setting"].removeprefix("shapes-").rstrip("%")) / 100
        if r["value"] is not None and r["removed"]["reached"] >= 0.95 * asked:
            mean = Figure.of([o for o in some if (o["recipe"], o["setting"]) == (r["recipe"], r["setting"])]).mean
            at = kind_of(r), r["setting"]
            best[at] = min(best.get(at, (math.inf, "")), (mean, r["recipe"]))
    return best


def shape_winners_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """Of each share that was to go the recipe of every kind that lost the least, of those that took that much; the best in bold."""
    best = shape_winners(fresh(every, SHAPES, reg))
    if not best:
        return NOT_YET
    kinds = [*dict.fromkeys(KINDS.values()), "small ranks"]
    body = []
    for kind in (k for k in kinds if any((k, s) in best for s in SHAPES)):
        cells = []
        for setting in SHAPES:
            mean, name = best.get((kind, setting), (math.inf, ""))
            first = min(found for (_, s), found in best.items() if s == setting) if name else None
            cells.append("" if not name else f"**{mean:.4g}** {code(name)}" if first == (mean, name) else f"{mean:.4g} {code(name)}")
        body.append((kind, *cells))
    return table(["kind", *(f"{s.removeprefix('shapes-')} gone" for s in SHAPES)], body)


def shape_speed_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """What smaller shapes buy: pairs of the whole model and what is left of it."""
    where = {"torch": "transformers", "trimtab": "our decoder"}
    body = []
    for r in every:
        way, _, runner = r["setting"].rpartition(", ")
        what = r["metric"].removesuffix("_tok_s")
        low, high = r["quartiles"]
        body.append((r["model"], f"{way}: {r['removed']['blocks']:.0%}", where[runner], what, f"{r['before']:,.0f}", f"{r['after']:,.0f}",
                     f"{r['value']:.2f} ({low:.2f} to {high:.2f})", f"{r['removed']['became_time'][what]:.0%}",
                     f"{r['wanted']:.2f} x: {'met' if r['met'] else '**missed**'}"))
    return table(["model", "gone of the blocks", "in", "what", "tokens/s", "then", "times as fast", "became time", "wanted"],
                 body) if body else NOT_YET


def retrieval_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """Rows of benchmarks/retrieval.py: the mean over the seeds, and where 95 % of the differences of one seed lie."""
    versions = {k: m.version for k, m in reg.items()}
    groups: dict[str, list[Row]] = {}
    for r in (r for r in every if not is_stale(r, versions)):
        groups.setdefault(r["recipe"], []).append(r)
    body = [(-Figure.of(some).mean, (code(name), f"{some[0]['left']:.1%}", str(Figure.of(some)),
                                     f"{some[0]['difference'][0]:+.3f} to {some[0]['difference'][1]:+.3f}", len(some)))
            for name, some in groups.items()]
    if not body:
        return NOT_YET
    dense = next(iter(groups.values()))[0]
    return table(["recipe", "of the blocks left", dense["metric"], "against dense, 95 %", "seeds"],
                 [("dense", "100.0%", f"{dense['dense']:.4g}", "", ""), *(b for _, b in sorted(body))])


def search_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """Rows of benchmarks/search.py: at every speed and every loss asked, what the search found and what others did, the best first. Of
    several runs the last; the file has them all."""
    if not every:
        return NOT_YET
    every = [r for r in every if r.get("began") == every[-1].get("began")]
    settings = sorted({r["setting"] for r in every}, key=lambda s: (s.endswith("loss"), float(re.split("[x%]", s)[0])))
    body = []
    for setting in settings:
        mine = [r for r in every if r["setting"] == setting]
        mine.sort(key=(lambda r: -r["speed"]) if setting.endswith("loss") else (lambda r: r["value"]))
        for k, r in enumerate(mine):
            low, high = r["quartiles"]
            who = f"**{r['recipe']}**" if r["recipe"] == "search" else r["recipe"]
            body.append(("at most " * setting.endswith("loss") + setting if not k else "", who, f"{r['value']:.5g}",
                         lost(r), than(r), f"{r['speed']:.2f} x ({low:.2f} to {high:.2f})", f"{r['told']:.2f} x",
                         f"{r['bytes'] / 1e6:.2f} MB"))
    return table(["asked", "by", "perplexity", "loss", "than the search", "speed", "told", "bytes"], body)


def lost(r: Row) -> str:
    """What more the perplexity is than the dense model's, with its standard error where the row says it."""
    times = r["value"] / r["dense"]  # of which the recovery is the inverse
    return f"{times - 1:+.2%} ± {times**2 * r['error']:.2%}" if "error" in r else f"{times - 1:+.1%}"


def than(r: Row) -> str:
    """What more it loses than the model that the search found for the same, of the same sequences, in thousandths of a nat."""
    return "{:+.2f} ± {:.2f}".format(*(1e3 * x for x in r["ahead"])) if r.get("ahead") else ""


def search_time_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """Rows of benchmarks/search_time.py, of each model the last."""
    every = list({(r["model"], r["setting"]): r for r in every}.values())
    return NOT_YET if not every else table(
        ["model", "what", "median error", "worst", "pairs that are apart keep their order", "threads", "wanted"],
        [(r["model"], r["setting"], f"{r['value']:.1%}", f"{r['worst']:.1%}", f"{r['kept']:.1%} of {r['pairs']}", r["threads"],
          f"under 7%: {'met' if r['value'] < 0.07 else '**missed**'}") for r in every])


def search_workers_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """Rows of benchmarks/search_workers.py."""
    return NOT_YET if not every else table(
        ["model", "what", "one, trials a minute", "two", "two against one", "wanted"],
        [(r["model"], r["setting"], *(" ".join(f"{x:.0f}" for x in r["trials_per_minute"][n]) for n in ("1", "2")), f"{r['value']:.2f} x",
          f"1.7 x: {'met' if r['value'] >= 1.7 else '**missed**'}") for r in every])


def shape_drawings(model: str, every: list[Row], reg: dict[str, Method]) -> dict[str, str]:
    """What smaller shapes cost a model, by what goes; and the best of every kind beside weights alone and chance."""
    some = fresh([r for r in every if r["model"] == model], SHAPES, reg)
    by: dict[str, list[Row]] = {}
    for r in some:
        by.setdefault(kind_of(r).replace(" ", "-"), []).append(r)
    first = {name for _, name in shape_winners(some).values()} | {"neuron | magnitude", "neuron | random"}
    by |= {"best": [r for r in some if r["recipe"] in first]} if some else {}
    return {kind: cost_plots.cost(cost_plots.points(its, "removed"), f"{model}: perplexity against weights removed, {kind}", "removed", 0.6)
            for kind, its in by.items()}


def gates_table(every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """One line a recipe: perplexity by what its gates were to skip, what they did in brackets, and the share that costs 1 %."""
    some = of_gates(every, reg)
    if not some:
        return NOT_YET
    dense = Figure.of({r["seed"]: {**r, "value": r["dense"]} for r in some}.values())
    shares, body = cost_plots.points(some), []
    for name in SETTINGS[GATES[0]].recipes:
        cells = []
        for setting in GATES:
            own = [r for r in some if (r["recipe"], r["setting"]) == (name, setting)]
            reached = [r["skipped"]["reached"] for r in own if r.get("skipped")]
            cells.append(f"{Figure.of(own)} ({sum(reached) / len(reached):.0%})" if reached else "")
        if any(cells):
            body.append((code(name), *cells, cost_plots.share_at(shares[name], 0.01) if name in shares else ""))
    head = ["recipe", *(s.removeprefix("gates-") for s in GATES), "at 1 % more"]
    return table(head, [(f"dense: {dense}", *[""] * (len(head) - 1)), *body])


def gate_drawings(model: str, every: list[Row], reg: dict[str, Method]) -> dict[str, str]:
    """What gates cost a model, by where they are: on all layers, or on the inputs of down alone."""
    places: dict[str, list[Row]] = {}
    for r in of_gates([r for r in every if r["model"] == model], reg):
        gated = [p for p in r["pipeline"].split(" ; ") if p.endswith("edit/gated")]
        where = {p.split(": ")[0] if ": " in p else "all" for p in gated}  # a pass without a scope has them on every layer
        for place in where & PLACES.keys() if len(where) == 1 else ():
            places.setdefault(PLACES[place], []).append(r)
    return {name: cost_plots.cost(cost_plots.points(some), f"{model}: perplexity against what gates skip") for name, some in places.items()}


TABLES: dict[str, Callable[[list[Row], dict[str, Recipe], dict[str, Method]], str]] = {
    "results": results_table, "claims": claims_table, "methods": counts_table,
    "kernels": kernels_table, "layers": layers_table, "decode": decode_table, "first_token": first_token_table,
    "profiles": profiles_table, "cache": cache_table, "llmcompressor": llmcompressor_table, "gates": gates_table,
    "shapes": shapes_table, "shape_winners": shape_winners_table, "shape_speed": shape_speed_table, "retrieval": retrieval_table,
    "search": search_table, "search_time": search_time_table, "search_workers": search_workers_table,
}


def filled(text: str, where: str, every: list[Row], recipes: dict[str, Recipe], reg: dict[str, Method]) -> str:
    """A hand-written page with its marked tables rendered anew."""

    def render(m: re.Match[str]) -> str:
        if m[1] not in TABLES:
            raise SystemExit(f"{where}: no table {m[1]!r}; there are {', '.join(TABLES)}")
        want = dict(w.split("=", 1) for w in m[2].split())
        if odd := set(want) - {*KEYS, "shape", "one_at_a_time", "table"}:
            raise SystemExit(f"{where}: {m[1]} cannot be narrowed by {sorted(odd)}")
        some = [r for r in every if r.get("table") == want.get("table") and all(str(r.get(k)) in v.split(",") for k, v in want.items())]
        return f"<!-- begin:{m[1]}{m[2]} -->\n{TABLES[m[1]](some, recipes, reg)}<!-- end:{m[1]} -->"

    text, done = re.subn(r"<!-- begin:(\w+)((?: \w+=\S+)*) -->\n.*?<!-- end:\1 -->", render, text, flags=re.S)
    if done != len(re.findall(r"<!-- begin:", text)) or done != len(re.findall(r"<!-- end:", text)):
        raise SystemExit(f"{where}: a begin marker without its end, or the other way round")
    return text


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Every generated page with its content, and every hand-written page with its tables rendered."""
    reg, recipes, every = load_all(), rows(), measured(root)
    used = users(recipes)
    out = {root / "docs/catalogue" / f"{axis}.md": axis_page(axis, reg, used) for axis in AXES}
    out[root / "docs/catalogue/recipes.md"] = recipes_page(recipes)
    if (root / "src/trimtab/kernels").exists():
        out[root / "docs/catalogue/kernels.md"] = kernels_page(root)
    out[root / "docs/claims.md"] = claims_page(every, recipes, reg)
    if found := speed_plots.layers(of_last_run(every), SHAPE):
        out[root / "docs/roofline.svg"] = speed_plots.standalone(speed_plots.roofline(found))
        out[root / "docs/speed-up.svg"] = speed_plots.standalone(speed_plots.speed_up(found))
    for model in NAMES:
        for where, drawing in gate_drawings(model, every, reg).items():
            out[root / f"docs/gates-{where}-{model.removeprefix('builtin:')}.svg"] = speed_plots.standalone(drawing)
        for kind, drawing in shape_drawings(model, every, reg).items():
            out[root / f"docs/shapes-{kind}-{model.removeprefix('builtin:')}.svg"] = speed_plots.standalone(drawing)
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        if path not in out and path.parent != root / "docs/catalogue":
            out[path] = filled(path.read_text(encoding="utf-8"), str(path.relative_to(root)), every, recipes, reg)
    return out


def differing(root: Path = ROOT) -> dict[Path, str | None]:
    """Pages whose file is not what it should be; None for a page of the catalogue that should not be there."""
    want = pages(root)
    out: dict[Path, str | None] = {p: t for p, t in want.items()
                                   if not p.exists() or p.read_text(encoding="utf-8") != t}
    return out | {p: None for p in (root / "docs/catalogue").glob("*.md") if p not in want}


def main(argv: list[str]) -> int:
    if argv not in (["write"], ["check"]):
        print(__doc__, file=sys.stderr)
        return 2
    wrong = differing()
    for path, text in sorted(wrong.items()):
        print(f"{path.relative_to(ROOT)}: {'written' if argv == ['write'] else 'stale'}")
        if argv == ["write"] and text is None:
            path.unlink()
        elif argv == ["write"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text or "", encoding="utf-8")
    if argv == ["check"] and wrong:
        print("run: python tools/generate.py write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
