"""Measured rows: the same recipes under the same calibration set, several seeds, stored as they came out."""
from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core import line, spec
from trimtab.core.calibrate import StatCache
from trimtab.core.types import BadInput, Claim


@dataclass(frozen=True)
class Setting:
    """One table of the docs: a name, the share kept, the scope, and the recipes that stand in it."""

    keep: float | None
    scope: str | None
    recipes: tuple[str, ...]
    title: str


SETTINGS = {
    "50%": Setting(0.5, None, ("magnitude", "magnitude(unit=site)", "random", "wanda", "gblm", "taylor", "obs", "sparsegpt", "admm",
                               "obert", "chita", "nettrim", "row | wanda | mask | least_squares", "row | wanda | mask | admm"),
                   "half of all linear weights gone"),
    "2:4-mlp": Setting(None, "mlp", ("magnitude(unit=2:4)", "wanda(unit=2:4)", "dass(unit=2:4)", "sparsegpt(unit=2:4)",
                                     "admm(unit=2:4)"), "2:4 on the MLPs alone"),
    "70%": Setting(0.3, None, ("magnitude(unit=site)", "lamp", "magnitude(unit=model)", "wanda", "wanda_owl",
                               "wanda_redundancy", "wanda(unit=model)", "sparsegpt"), "70 % of all linear weights gone"),
    "95%-blocks": Setting(0.05, None, ("blocks", "block(b=32) | wanda | mask | least_squares"),
                          "95 % of the 32x32 blocks gone, no training: a zero point"),
}


def rows_of(model: Path, name: str, settings: dict[str, tuple[str, ...]], seeds: int, *, calib: tuple[str, ...] = (),
            text: tuple[str, ...] = (), proof_tokens: int = 32768, progress: Any = None) -> Iterator[dict[str, Any]]:
    """One row a setting, recipe and seed; the statistics of one seed are shared."""
    from trimtab.demo import machine

    for seed in range(seeds):
        cache = StatCache()
        for setting, recipes in settings.items():
            s = SETTINGS[setting]
            for text_of_recipe in recipes:
                recipe = spec.load(text_of_recipe)
                recipe = recipe.limited(s.scope, s.keep if any(p.free for p in recipe.passes) else None)
                if progress is not None:
                    progress(f"{setting}, seed {seed}: {text_of_recipe}", 0, 0)
                with tempfile.TemporaryDirectory() as tmp:
                    r = line.trim(model, recipe, Path(tmp) / "out", line.Options(
                        seed=seed, calib=calib, text=text, proof_tokens=proof_tokens, speed=False, cache=cache), _quiet)
                yield {
                    "model": name, "setting": setting, "recipe": text_of_recipe, "pipeline": recipe.text, "seed": seed,
                    "metric": r["metric"], "value": r["after"]["perplexity"] if r["metric"] == "perplexity" else r["score"],
                    "dense": r["before"]["perplexity"] if r["metric"] == "perplexity" else 1.0,
                    "recovery": r["recovery"], "kl": r.get("kl"), "top1_agreement": r.get("top1_agreement"),
                    "edit_seconds": r["edit_seconds"], "plan_hash": r["plan_hash"], "methods": recipe.methods,
                    "machine": machine(), "date": time.strftime("%Y-%m-%d"),
                }


def _quiet(stage: str, done: int, of: int) -> None:
    pass


def verify(names: list[str], *, seeds: int, progress: Callable[[str, int, int], None], words: bool,
           out: Path | None = None, model: Path | None = None, model_name: str = "builtin:lm",
           calib: tuple[str, ...] = (), text: tuple[str, ...] = ()) -> dict[str, Any]:
    """Measure the recipes named (or every setting) and say of each claim whether its direction holds here."""
    from trimtab.builtin import model_path

    recipes = spec.rows()
    if unknown := [n for n in names if n not in recipes]:
        from trimtab.core.registry import near

        raise BadInput(f"no recipe {unknown[0]!r}{near(unknown[0], list(recipes))}")
    claims: list[tuple[str, Claim]] = [(n, c) for n in names or recipes for c in recipes[n].claims]
    wanted: dict[str, tuple[str, ...]] = {}
    for _, c in claims:
        wanted[c.setting] = tuple(dict.fromkeys((*wanted.get(c.setting, ()), c.better, c.than)))
    if not names:
        wanted = {k: s.recipes for k, s in SETTINGS.items()}
    measured = []
    sink = out.open("a", encoding="utf-8") if out else None
    for row in rows_of(model or model_path(), model_name, wanted, seeds, calib=calib, text=text, progress=progress):
        measured.append(row)
        if sink:
            sink.write(json.dumps(row, sort_keys=True) + "\n")
            sink.flush()
    if sink:
        sink.close()
    verdicts = [{"recipe": n, "claim": c.text, "setting": c.setting, "said": c.said,
                 "better": summary(measured, c.better, c.setting), "than": summary(measured, c.than, c.setting),
                 "status": status(measured, c)} for n, c in claims]
    if words:
        for row in sorted({(r["setting"], r["recipe"]) for r in measured}):
            print(f"{row[0]:<12}{row[1]:<44}{summary(measured, row[1], row[0])}")
        for v in verdicts:
            print(f"{v['recipe']}: {v['claim']}: {v['status']} ({v['better']} against {v['than']})")
    return {"rows": measured, "claims": verdicts}


def values(rows: list[dict[str, Any]], recipe: str, setting: str) -> list[float]:
    return [r["value"] for r in rows if r["recipe"] == recipe and r["setting"] == setting]


def summary(rows: list[dict[str, Any]], recipe: str, setting: str) -> str:
    """Mean and half the range over seeds."""
    v = values(rows, recipe, setting)
    return f"{statistics.fmean(v):.4g} ± {(max(v) - min(v)) / 2:.2g}" if v else "not measured"


def status(rows: list[dict[str, Any]], claim: Claim, model: str | None = None) -> str:
    """Computed from the rows: holds or fails when the means differ by more than the spread of both, else partly."""
    mine = [r for r in rows if r["setting"] == claim.setting and (model is None or r["model"] == model)]
    a, b = values(mine, claim.better, claim.setting), values(mine, claim.than, claim.setting)
    if not a or not b:
        return "untested"
    where = next(r["model"] for r in mine)
    gain = statistics.fmean(b) - statistics.fmean(a)
    if next(r["metric"] for r in mine) != "perplexity":
        gain = -gain
    spread = (max(a) - min(a) + max(b) - min(b)) / 2
    if abs(gain) <= spread:
        return f"partly on {where} (within the spread of seeds)"
    return f"direction {'holds' if gain > 0 else 'fails'} on {where}"
