"""Measured rows: the same recipes under the same calibration set, several seeds, stored as they came out."""
from __future__ import annotations

import functools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core import line, spec
from trimtab.core.calibrate import StatCache
from trimtab.core.registry import load_all, near
from trimtab.core.types import BadInput, Claim
from trimtab.network import graph
from trimtab.network.stream import Network


@dataclass(frozen=True)
class Setting:
    """One table of the docs: a name, the share kept, the scope, and the recipes that stand in it."""

    keep: float | None
    scope: str | None
    recipes: tuple[str, ...]
    title: str


Row = dict[str, Any]
BETTER = {"perplexity": "lower", "cosine": "higher"}  # metrics that settle a claim
FINE = "int(asymmetric=true,clip=mse,group=64,"  # a fine grid, on which bases and roundings are compared
BASES = ("incoherent", "hadamard", "klt", "kurtail")
OUTLIERTUNE_PLAIN = ("*.q,*.k,*.v,*.gate,*.up: int(bits=8,group=0) | rtn | static(act_bits=6,clip=max) ; "
                     "*.o,*.down: int(bits=8,group=0) | rtn | token(act_bits=6)")
SETTINGS = {
    "50%": Setting(0.5, None, ("magnitude", "magnitude(unit=row)", "random", "wanda", "gblm", "taylor", "obs", "sparsegpt", "admm",
                               "obert", "chita", "nettrim", "row | wanda | mask | least_squares", "row | wanda | mask | admm"),
                   "half of all linear weights gone"),
    "2:4-mlp": Setting(None, "mlp", ("magnitude(unit=2:4)", "wanda(unit=2:4)", "dass(unit=2:4)", "sparsegpt(unit=2:4)",
                                     "admm(unit=2:4)"), "2:4 on the MLPs alone"),
    "70%": Setting(0.3, None, ("magnitude", "lamp", "magnitude(unit=model)", "wanda", "wanda_owl",
                               "wanda_redundancy", "wanda(unit=model)", "sparsegpt"), "70 % of all linear weights gone"),
    **{name: Setting(None, None, recipes, text) for name, text, recipes in (
        ("w8a8", "weights in 8 bits by row, inputs in 8 bits", (
            "int(bits=8,group=0) | rtn", "w8a8", "int(bits=8,group=0) | gptq | token", "llm_int8", "smoothquant",
            *(f"int(bits=8,group=0) | rtn | static(clip={c})" for c in ("max", "mse", "percentile")),
            "smoothquant | int(bits=8,group=0) | rtn | token", "smoothquant | int(bits=8,group=0) | rtn | static(clip=percentile)")),
        ("w4a8", "weights in 4 bits, inputs in 8 bits", (
            "gptq(bits=4)", "int(bits=4,group=128) | rtn | token", "int(bits=4,group=128) | gptq | token", "qqq",
            "int(bits=4,group=128) | gptq | static(clip=percentile)", "int(bits=4,group=0) | gptq | token", "qqq(group=0)",
            "hadamard | int(bits=4,group=128) | gptq | token", "kurtail | int(bits=4,group=128) | gptq | token")),
        ("w8a6", "weights in 8 bits by row, inputs in 6 bits", (
            "w8a8(act_bits=6)", "outliertune", "repquant", OUTLIERTUNE_PLAIN, "int(bits=8,group=0) | adaquant | static(act_bits=6)",
            "hadamard | int(bits=8,group=0) | rtn | token(act_bits=6)")),
        ("w4a4", "weights and inputs in 4 bits", tuple(
            f"{r}int(bits=4,group=128) | gptq | token(act_bits=4)" for r in ("", "hadamard | ", "kurtail | ", "smooth | ", "quarot | "))),
    )},
    **{f"rank-{gone}%": Setting(1 - gone / 100, None, (
        "svd", "svdllm", "svdllm_ranks", "utilised", "ranks | utilised", "cur", "cur(whiten=true)", "ranks | cur",
        "fedpara", "acip", "acip | svdllm"),
        f"{gone} % of the parameters gone by small ranks") for gone in (10, 20, 30)},
    "95%-blocks": Setting(0.05, None, ("blocks", "block(b=32) | wanda | mask | least_squares"),
                          "95 % of the 32x32 blocks gone, no training: a zero point"),
    **{f"{bits}-bits": Setting(None, None, tuple(f"{r}bits={bits}{end}" for r, end in (
        ("rtn(", ")"), ("rtn(asymmetric=true,", ")"), ("rtn(clip=mse,", ")"), ("rtn(grid=nf,", ")"), ("rtn(grid=kmeans,", ")"),
        *([("rtn(grid=fp,", ")")] if bits != 2 else []), ("gptq(", ")"), ("gptq(asymmetric=true,", ")"), ("gptq(act_order=true,", ")"),
        ("gptq(clip=mse,", ")"), ("gptq(grid=nf,", ")"), ("awq(", ")"), ("awq | int(asymmetric=true,", ") | gptq"),
        ("ldlq(", ")"), ("adaround(", ")"), ("adaquant(", ")"), ("lorc(", ")"), ("lorc(whiten=true,", ")"), ("adadim(", ")"),
        ("gain(", ")"), ("int(group=128,", ") | gptq | gain"),
        (FINE, ") | gptq"), (FINE, ") | gptq | greedy"), (FINE, ") | adaquant"),
        *((f"{r} | {FINE}", ") | gptq") for r in (*BASES, "quarot")),
        *([("super_weight(", ")")] if bits == 4 else []), *([("adpq(", f",single={bits})")] if bits > 2 else []),
        *([("vptq(", ")"), ("quip(", ")"), ("rilq(", ")")] if bits == 2 else []))),
        f"all linear weights in {bits} bits, a scale for 128 inputs (nf: 64)") for bits in (4, 3, 2)},
    "8-bits": Setting(None, None, ("rtn(bits=8)", "gptq(bits=8)", "awq(bits=8)", "lorc(bits=8)", "adadim(bits=8)", "fp8",
                                   *(f"{r} | int(bits=8,group=128) | gptq" for r in ("incoherent", "kurtail", "quarot"))),
                      "all linear weights in 8 bits, a scale for 128 inputs"),
    "mixed": Setting(None, None, (
        "knapsack", "measured(mean=3.25) | int(bits=2/3/4,group=64,clip=mse) | rtn",
        *(f"{budget}(mean=3.25) | int(bits=2/3/4,group=64,clip=mse) | gptq" for budget in ("knapsack", "measured")),
        "rtn(bits=3,clip=mse,group=64)", "gptq(bits=3,clip=mse,group=64)", "vptq(residual=1)", "ptq161", "onebit",
        "nm(n=2,m=4) | sparsegpt ; gptq(bits=4)", "row(keep=0.7) | wanda ; gptq(bits=4)"),
        "several bits, books and patterns: 3.25 bits of choice beside 3.25 for all, and what goes with what"),
    # `chess`, `polar` and the recipes of *.down alone gate fewer layers: they stand beside gate_magnitude on the same ones.
    **{f"gates-{dropped}%": Setting(1 - dropped / 100, None, (
        "gate_magnitude", "gate_magnitude(exact=true)", "wina", "wina(exact=false)", "teal", "teal | wina(exact=false)",
        "*.down,*.q,*.o: gate_magnitude", "chess", "*.down: gate_magnitude", "cats", "*.down: gated | chess", "lazy", "dejavu", "coreinfer",
        "*.o&!0.*: gate_magnitude", "*.o&!0.*: gated | heads", "polar", "gptq ; gate_magnitude", "gptq ; teal | gate_magnitude",
        "nm(n=2,m=4) | sparsegpt ; teal | gate_magnitude"),
        f"gates that leave out {dropped} % of the inputs of what they are on") for dropped in (25, 40, 50, 65, 80)},
    # What is behind a gate is not all of an MLP: `cats` leaves out of two maps of three.
    **{f"experts-{met}%": Setting(met / 100, None, (
        "moefication", "moefication(parts=16)", "moefication(split=weights)", "moefication(split=random)", "moefication(refit=false)",
        "moefication(split=random,refit=false)", "shared_experts", "tomoe",
        "tomoe(parts=8)", "mlp: neuron | wanda", "mlp: neuron | wanda | mask | least_squares",
        "cats", "dejavu"), f"{met} % of the MLPs met by a token, or left: experts beside gates and smaller MLPs") for met in (50, 75)},
    **{f"shapes-{gone}%": Setting(1 - gone / 100, None, (
        *(f"neuron{feeders} | {score}{end}" for score in ("magnitude", "wanda") for feeders in ("", "(feeders=true)")
          for end in ("", " | mask | least_squares")), "neuron | random", "neuron(order=dense) | taylor", "minitron",
        "neuron | transact | mask | least_squares", "neuron | wanda | global | mask | least_squares", "neuron | fuse",
        "neuron | fuse(refit=true)", "amp", "transact", "inner | amp | mask | least_squares", "inner | transact | mask | least_squares",
        "llm_drop", "sublayer | entropy", "shortgpt", "layer | shallow", "channel | minitron", "channel | wanda", "channel | magnitude",
        "slicegpt", "svd", "svdllm", "ranks | svdllm", "utilised", "cur", "fedpara", "acip | svdllm", "tie", "tie(near=false)",
        "tie(tried=false)", "block_influence | tie", "flexigpt", "flexigpt(scaled=false)", "flexigpt(tried=true)", "directshare"),
        f"{gone} % of the blocks' weights gone, with neurons, heads, layers, channels, in factors or shared") for gone in (10, 20, 30, 50)},
}


def rows_of(model: Path, name: str, settings: dict[str, tuple[str, ...]], seeds: int, *, calib: tuple[str, ...] = (),
            text: tuple[str, ...] = (), first_seed: int = 0, done: frozenset[tuple[str, str, int]] = frozenset(),
            proof_tokens: int = 16384, progress: Any = None) -> Iterator[dict[str, Any]]:
    """One row a setting, recipe and seed that is not `done`; the statistics of one seed are shared."""
    from trimtab.demo import machine

    net = Network.open(model)
    lm, turns = net.kind == "lm", graph.stream(net.family)  # some recipes need a language model's loss, or a stream that turns
    for seed in range(first_seed, first_seed + seeds):
        cache = StatCache()
        for setting, recipes in settings.items():
            s = SETTINGS[setting]
            for text_of_recipe in recipes:
                recipe = limited(s, text_of_recipe)
                if any((not lm and (line.differentiates(p) or p.measures or p.learns or p.trainer)) or (not turns and p.shares)
                       for p in recipe.passes):
                    continue
                if (setting, text_of_recipe, seed) in done:
                    continue
                if progress is not None:
                    progress(f"{setting}, seed {seed}: {text_of_recipe}", 0, 0)
                with tempfile.TemporaryDirectory() as tmp:
                    r = line.trim(model, recipe, Path(tmp) / "out", line.Options(
                        seed=seed, calib=calib, text=text, proof_tokens=proof_tokens if lm else None, speed=False, fresh=False,
                        cache=cache), _quiet)
                gated = r.get("sparsity")
                met = r.get("met")
                gone = r["removed"]["blocks"] if "removed" in r else round(1 - r["factored_share"], 6) if "factored_share" in r else \
                    r["shared"]["gone"] if "shared" in r else None
                yield {
                    "model": name, "setting": setting, "recipe": text_of_recipe, "pipeline": recipe.text, "seed": seed,
                    "metric": r["metric"], "value": r["after"]["perplexity"] if r["metric"] == "perplexity" else r["score"],
                    "dense": r["before"]["perplexity"] if r["metric"] == "perplexity" else 1.0,
                    "recovery": r["recovery"], "kl": r.get("kl"), "top1_agreement": r.get("top1_agreement"),
                    **({"skipped": {k: round(v, 4) for k in ("target", "reached") if (v := gated[k]) is not None}} if gated else {}),
                    **({"removed": {"target": round(1 - (s.keep or 1), 4), "reached": gone}} if gone is not None else {}),
                    **({"met": met["blocks"]} if met else {}),
                    "edit_seconds": r["edit_seconds"], "plan_hash": r["plan_hash"], "methods": recipe.methods,
                    "machine": machine(), "date": time.strftime("%Y-%m-%d"),
                }


def _quiet(stage: str, done: int, of: int) -> None:
    pass


def verify(names: list[str], *, seeds: int, progress: Callable[[str, int, int], None], words: bool,
           out: Path | None = None, model: Path | None = None, model_name: str = "builtin:lm",
           calib: tuple[str, ...] = (), text: tuple[str, ...] = (), first_seed: int = 0,
           settings: Sequence[str] = ()) -> dict[str, Any]:
    """Measure the claims of the recipes named (or every recipe of every setting) and say of each claim whether its direction holds here.

    `settings`: those alone, all if none is named.

    Rows that `out` already has, of methods that have not changed since, are not measured again.
    """
    from trimtab.builtin import model_path

    recipes = spec.rows()
    if unknown := [n for n in names if n not in recipes]:
        raise BadInput(f"no recipe {unknown[0]!r}{near(unknown[0], list(recipes))}")
    claims: list[tuple[str, Claim]] = [(n, c) for n in names or recipes for c in recipes[n].claims]
    wanted: dict[str, tuple[str, ...]] = {}
    for _, c in claims:
        wanted[c.setting] = tuple(dict.fromkeys((*wanted.get(c.setting, ()), c.better, c.than)))
    if not names:
        wanted = {k: s.recipes for k, s in SETTINGS.items()}
    if unknown := [k for k in settings if k not in SETTINGS]:
        raise BadInput(f"no setting {unknown[0]!r}{near(unknown[0], list(SETTINGS))}")
    if settings:
        wanted = {k: v for k, v in wanted.items() if k in settings}
        claims = [(n, c) for n, c in claims if c.setting in settings]
    versions = {k: m.version for k, m in load_all().items()}
    measured = fresh_rows(out, model_name, versions) if out else []
    done = frozenset((r["setting"], r["recipe"], r["seed"]) for r in measured)
    if out and not out.parent.is_dir():
        raise BadInput(f"{out.parent} is no directory; create it, or choose another -o")
    sink = out.open("a", encoding="utf-8") if out else None
    for row in rows_of(model or model_path(), model_name, wanted, seeds, calib=calib, text=text, first_seed=first_seed,
                       done=done, progress=progress):
        measured.append(row)
        if sink:
            sink.write(json.dumps(row, sort_keys=True) + "\n")
            sink.flush()
    if sink:
        sink.close()
    verdicts = []
    for n, c in claims:
        status, figures = judged(c, measured, versions)
        verdicts.append({"recipe": n, "claim": c.text, "setting": c.setting, "said": c.said, "status": status, "here": figures})
    if words:
        for at in dict.fromkeys((r["setting"], r["recipe"]) for r in measured):
            print(f"{at[0]:<12}{at[1]:<46}{Figure.of(r for r in measured if (r['setting'], r['recipe']) == at)}")
        for v in verdicts:
            print(f"{v['recipe']}: {v['claim']}: {v['status']} ({v['here']})")
    return {"rows": measured, "claims": verdicts}


def fresh_rows(path: Path, model: str, versions: dict[str, str]) -> list[Row]:
    if not path.exists():
        return []
    rows = []
    for n, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError:
            raise BadInput(f"line {n} of {path} is not a JSON row; remove it") from None
    return [r for r in rows if r["model"] == model and not is_stale(r, versions)]


# ---- what rows say ----------------------------------------------------------------------------
def is_stale(row: Row, versions: dict[str, str]) -> bool:
    """Whether a method has changed since, or is gone, or the recipe's name now stands for something else."""
    if any(versions.get(key) != version for key, version in row["methods"].items()):
        return True
    return row["setting"] in SETTINGS and "pipeline" in row and row["pipeline"] != pipeline(row["setting"], row["recipe"])


@functools.cache
def pipeline(setting: str, text: str) -> str:
    return limited(SETTINGS[setting], text).text


def limited(s: Setting, text: str) -> spec.Recipe:
    recipe = spec.load(text)
    return recipe.limited(s.scope, s.keep if any(p.free for p in recipe.passes) else None)


@dataclass(frozen=True)
class Figure:
    """Mean over the seeds, and their standard deviation (0 for a single one). Infinite when one of them broke the model."""

    mean: float
    spread: float
    seeds: int

    @staticmethod
    def of(some: Iterable[Row]) -> Figure:
        values = [math.inf if r["value"] is None else float(r["value"]) for r in some]
        if not all(map(math.isfinite, values)):
            return Figure(math.inf, 0.0, len(values))
        return Figure(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))

    def __str__(self) -> str:
        more = f" ± {self.spread:.2g}" if self.seeds > 1 else ""
        return f"{self.mean:.4g}{more}"


def judged(claim: Claim, every: list[Row], versions: dict[str, str]) -> tuple[str, str]:
    """Status of a claim and our figures, model by model. Computed from rows, never typed."""
    status, figures = [], []
    here = [r for r in every if r["setting"] == claim.setting and r["metric"] in BETTER]
    for model, metric in sorted({(r["model"], r["metric"]) for r in here}):
        sides = [[r for r in here if (r["recipe"], r["model"], r["metric"]) == (name, model, metric)]
                 for name in (claim.better, claim.than)]
        if not all(sides):
            continue
        fresh = [[r for r in side if not is_stale(r, versions)] for side in sides]
        if not all(fresh):
            status.append(f"stale on {model}")
            continue
        ours, other = map(Figure.of, fresh)
        gain = ours.mean - other.mean if BETTER[metric] == "higher" else other.mean - ours.mean
        pooled = ((ours.spread ** 2 + other.spread ** 2) / 2) ** 0.5
        if not abs(gain) > pooled:  # nan too: both broken
            status.append(f"partly on {model}")
        else:
            status.append(f"direction {'holds' if gain > 0 else 'fails'} on {model}")
        figures.append(f"{metric} {ours} against {other} ({model}, seeds: {min(ours.seeds, other.seeds)})")
    return "; ".join(status) or "untested", "; ".join(figures)
