"""The generated pages: what a row counts for, when a claim holds, and what `check` notices."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tools import generate

from trimtab import evidence
from trimtab.core.registry import AXES, load_all
from trimtab.core.spec import parse
from trimtab.core.types import Claim
from trimtab.report import speed_plots

REG = load_all()
VERSIONS = {k: m.version for k, m in REG.items()}
CLAIM = Claim("weight times input beats weight", "wanda", "magnitude", "50%", "7.26 against 17.29")


def row(recipe: str, value: float | None, seed: int = 0, **more: Any) -> dict[str, Any]:
    methods = {"score/wanda": VERSIONS["score/wanda"]} if recipe == "wanda" else {}
    return {"recipe": recipe, "model": "toy", "setting": "50%", "metric": "perplexity", "value": value, "seed": seed,
            "methods": methods, **more}


@pytest.mark.parametrize(("ours", "other", "metric", "want"), [
    ([3.0], [4.0], "perplexity", "direction holds on toy"),
    ([4.0], [3.0], "perplexity", "direction fails on toy"),
    ([3.0], [4.0], "cosine", "direction fails on toy"),
    ([4.0], [3.0], "cosine", "direction holds on toy"),
    ([3.0], [3.0], "perplexity", "partly on toy"),
    ([2.0, 4.0], [3.0, 5.0], "perplexity", "partly on toy"),       # apart by 1.0, spread 1.41
    ([2.9, 3.1], [3.9, 4.1], "perplexity", "direction holds on toy"),  # apart by 1.0, spread 0.14
    ([3.9, 4.1], [2.9, 3.1], "perplexity", "direction fails on toy"),
    ([3.0], [4.0], "seconds", "untested"),
    ([], [4.0], "perplexity", "untested"),
    ([3.0], [], "perplexity", "untested"),
])
def test_the_status_follows_from_the_rows(ours: list[float], other: list[float], metric: str, want: str) -> None:
    every = [row("wanda", v, i, metric=metric) for i, v in enumerate(ours)]
    every += [row("magnitude", v, i, metric=metric) for i, v in enumerate(other)]
    assert generate.judged(CLAIM, every, VERSIONS)[0] == want


def test_the_spread_is_pooled() -> None:
    every = [row("wanda", v, i) for i, v in enumerate((3.0, 3.0))]
    every += [row("magnitude", v, i) for i, v in enumerate((3.0, 5.0))]  # apart by 1.0; spreads 0 and 1.41, pooled 1.0
    assert generate.judged(CLAIM, every, VERSIONS)[0] == "partly on toy"
    status, figures = generate.judged(CLAIM, [{**r, "value": r["value"] - (r["recipe"] == "wanda")} for r in every], VERSIONS)
    assert status == "direction holds on toy"
    assert figures == "perplexity 2 ± 0 against 4 ± 1.4 (toy, seeds: 2)"


def test_a_row_of_another_version_is_stale() -> None:
    old = {"score/wanda": "0" * 12}
    every = [row("wanda", 3.0, methods=old), row("magnitude", 4.0)]
    assert generate.judged(CLAIM, every, VERSIONS)[0] == "stale on toy"
    assert generate.judged(CLAIM, [*every, row("wanda", 5.0, 1)], VERSIONS)[0] == "direction fails on toy"
    assert generate.judged(CLAIM, [row("wanda", 3.0, methods={"score/gone": "1"}), every[1]], VERSIONS)[0] == "stale on toy"


def test_a_row_whose_recipe_means_something_else_now_is_stale() -> None:
    as_it_is = evidence.pipeline("50%", "magnitude")
    assert generate.judged(CLAIM, [row("wanda", 3.0), row("magnitude", 4.0, pipeline=as_it_is)], VERSIONS)[0].startswith("direction")
    other = as_it_is.replace("site", "row")
    assert other != as_it_is
    assert generate.judged(CLAIM, [row("wanda", 3.0), row("magnitude", 4.0, pipeline=other)], VERSIONS)[0] == "stale on toy"


def test_a_broken_model_counts_as_infinitely_bad() -> None:
    every = [row("wanda", 3.0), row("magnitude", 4.0), row("magnitude", None, 1)]
    assert generate.judged(CLAIM, every, VERSIONS) == ("direction holds on toy", "perplexity 3 against inf ± 0 (toy, seeds: 1)")
    assert generate.judged(CLAIM, [row("wanda", None), row("magnitude", None)], VERSIONS)[0] == "partly on toy"


def test_models_and_settings_are_kept_apart() -> None:
    every = [row("wanda", 3.0), row("magnitude", 4.0), row("wanda", 9.0, model="big"), row("magnitude", 4.0, model="big"),
             row("wanda", 99.0, setting="70%"), row("magnitude", 1.0, model="third")]
    assert generate.judged(CLAIM, every, VERSIONS)[0] == "direction fails on big; direction holds on toy"


RECIPES = {"wanda": replace(parse("row | wanda | mask"), name="wanda", source="a paper", claims=(CLAIM,), note="a note",
                            row="row | wanda"),
           "plain": replace(parse("site | magnitude | mask"), name="plain", source="another paper")}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(generate, "rows", lambda: RECIPES)
    (tmp_path / "results").mkdir()
    lines = [row("wanda", 3.0), row("magnitude", 5.0), row("magnitude", 4.0)]
    (tmp_path / "results/a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "README.md").write_text("Words.\n<!-- begin:results model=toy -->\nold\n<!-- end:results -->\nMore.\n")
    return tmp_path


def write(root: Path) -> None:
    for path, text in generate.differing(root).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or "")


def test_a_row_measured_again_replaces_the_first(root: Path) -> None:
    assert [(r["recipe"], r["value"]) for r in generate.measured(root)] == [("wanda", 3.0), ("magnitude", 4.0)]


@pytest.mark.parametrize("line", ["{", '{"recipe": "wanda"}', "[1]"])
def test_a_broken_row_is_named(root: Path, line: str) -> None:
    (root / "results/a.jsonl").write_text(json.dumps(row("wanda", 1.0)) + "\n" + line + "\n")
    with pytest.raises(SystemExit, match=r"results/a\.jsonl:2"):
        generate.measured(root)


def test_writing_settles_and_a_change_is_noticed(root: Path) -> None:
    assert {p.name for p in generate.differing(root)} == {*(f"{a}.md" for a in AXES), "recipes.md", "claims.md", "README.md"}
    write(root)
    assert not generate.differing(root)
    (root / "docs/catalogue/score.md").write_text("typed\n")
    (root / "docs/catalogue/gone.md").write_text("left over\n")
    changed = generate.differing(root)
    assert {p.name for p in changed} == {"score.md", "gone.md"}
    assert changed[root / "docs/catalogue/gone.md"] is None


def test_every_method_is_on_its_page(root: Path) -> None:
    pages = generate.pages(root)
    for m in REG.values():
        page = pages[root / f"docs/catalogue/{m.axis}.md"]
        section = page.split(f"\n## {m.name}\n")[1].split("\n## ")[0].replace("\\|", "|")
        for text in (m.doc["what"], m.doc["Formula"], m.doc["Source"], m.doc["Deviations"], *map(str, m.xfail.values()),
                     *(f"`{k}={v}`" for k, v in m.knobs.items())):
            assert text in section, (m.key, text)


def test_recipes_claims_and_users_are_on_their_pages(root: Path) -> None:
    pages = generate.pages(root)
    recipes, claims = pages[root / "docs/catalogue/recipes.md"], pages[root / "docs/claims.md"]
    assert "| `wanda` | `row \\| wanda` | a paper | weight times input beats weight | a note |" in recipes
    assert "| `plain` | `unit/site \\| score/magnitude" in recipes
    assert "| 7.26 against 17.29 | perplexity 3 against 4 (toy, seeds: 1) | direction holds on toy |" in claims
    used = {name: pages[root / "docs/catalogue" / page].split(f"## {name}\n")[1].split("## ")[0]
            for page, name in (("score.md", "wanda"), ("unit.md", "site"), ("stat.md", "in_sq"), ("unit.md", "column"))}
    assert "| used by | `wanda` |" in used["wanda"]
    assert "| used by | `plain` |" in used["site"]
    assert "| used by | `wanda` |" in used["in_sq"]
    assert "used by" not in used["column"]


def test_a_marked_table_is_filled_and_narrowed(root: Path) -> None:
    text = generate.pages(root)[root / "README.md"]
    assert text.startswith("Words.\n<!-- begin:results model=toy -->\n| recipe |")
    assert text.endswith("<!-- end:results -->\nMore.\n")
    lines = [line for line in text.splitlines() if "toy" in line and line.startswith("|")]
    assert ["`wanda`" in lines[0], "`magnitude`" in lines[1]] == [True, True]  # the lower perplexity first
    assert not any("`dense`" in line for line in lines)  # these rows do not say what they began with
    rows = (root / "results").glob("*.jsonl")
    path = next(p for p in rows if "toy" in p.read_text())
    path.write_text(path.read_text() + json.dumps(row("random", 9.0, dense=2.5)) + "\n")
    assert "| `dense` | 50% | toy | perplexity | 2.5 | 1 |" in generate.pages(root)[root / "README.md"]
    (root / "README.md").write_text("<!-- begin:results model=other -->\n<!-- end:results -->\n")
    assert "toy" not in generate.pages(root)[root / "README.md"].replace("model=", "")


@pytest.mark.parametrize(("text", "why"), [
    ("<!-- begin:nothing -->\n<!-- end:nothing -->\n", "no table 'nothing'"),
    ("<!-- begin:results -->\n", "without its end"),
    ("<!-- end:results -->\n", "without its end"),
    ("<!-- begin:results colour=red -->\n<!-- end:results -->\n", "cannot be narrowed"),
])
def test_a_broken_marker_is_named(root: Path, text: str, why: str) -> None:
    (root / "README.md").write_text(text)
    with pytest.raises(SystemExit, match=rf"README.md: .*{why}"):
        generate.pages(root)


def layer(recipe: str, batch: int, ms: float, size: int, shape: str = "64x32", **more: Any) -> dict[str, Any]:
    return {"recipe": recipe, "model": f"one layer {shape}, cold", "shape": shape, "metric": "milliseconds",
            "setting": f"zeros-batch-{batch}", "value": ms, "seed": 0, "methods": {}, "bytes": size, "read_gb_s": 10.0, **more}


def test_plots_take_what_rows_say_and_else_what_their_names_do() -> None:
    old = [layer("trimtab sell bf16 20% kept", 16, 2.0, 4000, times_fastest_other=1.5), layer("torch bf16", 16, 2.0, 4096),
           layer("trimtab 2:4 int4 g128, x int8", 1, 1.0, 1000), layer("trimtab something else", 1, 1.0, 1000),
           layer("trimtab dense f32", 4, 1.0, 8192), layer("trimtab 4:8 bf16", 1, 1.0, 2500, x="bf16"),
           layer("trimtab ternary by row, x int8", 1, 1.0, 500), layer("trimtab low rank bf16 25% (two maps)", 1, 1.0, 500),
           layer("trimtab dense mlp bf16", 1, 1.0, 500), layer("trimtab dense bf16", 1, 1.0, 4096, shape="32x64")]
    found = speed_plots.layers(old, "64x32")
    assert [(f.family, f.type, f.x, f.kept, f.rows, f.flops, f.peak) for f in found] == [
        ("sell", "bf16", "bf16", 0.2, 16, pytest.approx(2 * 64 * 32 * 0.2 * 16), None), ("n:m", "i4", "i8", 0.5, 1, 2048, None),
        ("n:m", "bf16", "bf16", 0.5, 1, 2048, None), ("codes", "t", "i8", 1.0, 1, 4096, None)]
    new = layer("trimtab sell bf16 20% kept", 16, 1.0, 4000, times_fastest_other=3.0, x="bf16", flops=12345, peak_gflop_s=7.0)
    last = speed_plots.layers([*old, new], "64x32")[0]
    assert (last.x, last.flops, last.peak, last.seconds) == ("bf16", 12345, 7e9, 1e-3)


def test_plots_are_files_of_their_own() -> None:
    from xml.etree import ElementTree

    rows = [layer(f"trimtab bsr32 {t} {kept}% kept", batch, 0.1 * kept / batch, 100 * kept, times_fastest_other=50 / kept, x=t,
                  flops=kept * 999 * batch, peak_gflop_s=40.0) for t in ("f32", "bf16") for kept in (5, 50) for batch in (1, 16, 512)]
    found = speed_plots.layers(rows, "64x32")
    for draw in (speed_plots.roofline, speed_plots.speed_up):
        text = speed_plots.standalone(draw(found))
        tips = [t.text for t in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}title")]
        assert len([t for t in tips if t and "rows of x" in t]) == len(found) and "var(" not in text
        assert text == speed_plots.standalone(draw(found))
    assert "x float32: 40" in speed_plots.roofline(found) and "x 8 bits" in speed_plots.roofline(found)


def kernel(recipe: str, **more: Any) -> dict[str, Any]:
    return layer(recipe, 1, 2.0, 4096, quartiles=[1.5, 2.5], share_of_read_bandwidth=0.5, **more)


def test_shapes_are_told_apart_and_what_is_not_measured_is_said(root: Path) -> None:
    some = [kernel("trimtab dense bf16"), kernel("torch bf16", shape="32x64", began="1")]
    (root / "results/a.jsonl").write_text("\n".join(json.dumps({k: v for k, v in r.items() if k != "shape"}) for r in some) + "\n")
    marked = [f"<!-- begin:kernels shape={s} -->\n<!-- end:kernels -->\n" for s in ("64x32", "32x64", "8x8")]
    (root / "README.md").write_text("".join(marked))
    first, second, third = generate.pages(root)[root / "README.md"].split("<!-- end:kernels -->\n")[:3]
    assert "trimtab dense bf16" in first and "torch" not in first
    assert "torch bf16" in second and "trimtab" not in second
    assert third == "<!-- begin:kernels shape=8x8 -->\nNot measured yet.\n"


def test_a_cache_is_shown_by_its_quality_and_by_its_speed() -> None:
    shared = {"runner": "trimtab", "model": "m", "setting": "s", "seed": 0, "methods": {}, "recipe": "int4", "cache_bytes": 1_539_000}
    quality = {**shared, "metric": "ppl", "value": 9.9735, "kl": 0.00249}
    step = {**shared, "metric": "step_ms", "value": 0.5, "quartiles": [0.4, 0.6], "threads": 2}
    assert "| int4 | trimtab | 9.973 | 2.5e-03 | 1.54 MB |" in generate.cache_table([quality], {}, {})
    assert "| m | s | 2 | int4 | 0.50 (0.40 to 0.60) | 1.5 MB |" in generate.cache_table([step], {}, {})


@pytest.mark.parametrize("name", ["kernels", "layers", "decode", "first_token", "cache"])
def test_a_table_of_speed_without_rows_says_so(name: str) -> None:
    assert generate.TABLES[name]([], {}, {}) == "Not measured yet.\n"


def test_a_table_is_of_one_run() -> None:
    old, new = (kernel(n, began=began) for n, began in (("trimtab gone", "2026-01-01T00:00:00"), ("trimtab here", "2026-01-02T00:00:00")))
    before = kernel("trimtab older still")
    other = kernel("trimtab elsewhere", shape="32x64")
    assert generate.of_last_run([before, new, old, other]) == [new, other]


def test_goals_of_a_layer_are_said_with_their_bound_and_their_miss() -> None:
    goals = [{"than": "the read bandwidth", "target": 0.85, "wanted": 0.85, "got": 0.9, "bound": "target", "met": True},
             {"than": "torch", "target": 1.3, "wanted": 1.2, "got": 1.1, "bound": "bandwidth", "met": False},
             {"than": "deepsparse", "target": 1.0, "met": None}]
    row = kernel("trimtab int4", goals=goals, error=0.0071, times_fastest_other=1.1, fastest_other="torch")
    said = ("85% of the read bandwidth: met; 1.20 x torch (bandwidth, else 1.30), got 1.100: **missed**; 1.00 x deepsparse: not measured")
    assert said in generate.kernels_table([row], {}, {}) and "| 7.1e-03 |" in generate.kernels_table([row], {}, {})
    assert f"| 1 | trimtab int4 | 2.000 | 50% | 1.10 x torch | {said} |" in generate.layers_table([row, kernel("torch")], {}, {})
    old = kernel("trimtab int4", wanted=1.3, bound="target", met=False)
    assert "1.30 (target): **missed**" in generate.kernels_table([old], {}, {})


def run(model: str, decode: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Rows of a run: tokens a second of decoding and prefill, by recipe."""
    return [{"recipe": name, "model": model, "setting": metric, "metric": metric, "value": v, "quartiles": [v, v],
             "seed": 0, "methods": {}, "read_gb_s": 10.0} for name, values in decode.items()
            for metric, v in zip(("decode_tok_s", "prefill_tok_s"), values, strict=True)]


@pytest.mark.parametrize(("ours", "size", "theirs", "want"), [
    (95.0, None, 100.0, "decode 1.00 x llama.cpp bf16, got 0.950: **missed**"),
    (100.0, None, 100.0, "decode 1.00 x llama.cpp bf16, got 1.000: met"),
    (86.0, 1e8, 200.0, "decode 0.42 x llama.cpp bf16 (85% of the read bandwidth, else 1.00), got 0.430: met"),
    (85.0, 1e8, 86.0, "decode 0.97 x llama.cpp bf16 (at the read bandwidth, else 1.00), got 0.988: met"),
    (80.0, 1e8, 86.0, "got 0.930: **missed**"),
])
def test_what_a_decoder_was_wanted_to_reach(ours: float, size: float | None, theirs: float, want: str) -> None:
    rows = run("llama-1b", {"trimtab dense bf16": (ours, 100.0), "llama.cpp bf16": (theirs, 90.0)})
    for r in rows:
        if size and "trimtab" in r["recipe"]:
            r["bytes_per_token"] = size
    text = generate.decode_table(rows, {}, {})
    assert want in text
    assert "prefill 1.00 x llama.cpp bf16, got 1.111: met (openvino genai bf16, transformers bf16 not measured)" in text


def test_goals_of_one_model_are_not_those_of_another() -> None:
    rows = {"trimtab int4 g128": (100.0, 1.0), "onnxruntime genai int4": (90.0, 1.0), "llama.cpp q4_0": (50.0, 1.0)}
    small, large = (generate.decode_table(run(m, rows), {}, {}) for m in ("llama-110m", "llama-1b"))
    assert "decode 1.20 x onnxruntime genai int4, got 1.111: **missed** (openvino genai int4 not measured)" in small
    assert "onnxruntime genai int4, got" not in large and "decode 1.30 x llama.cpp q4_0, got 2.000: met" in large
    assert "prefill 1.10 x (transformers int8, openvino genai int8 not measured)" in large


def test_the_table_beside_llmcompressor_says_what_was_missed() -> None:
    of = {"model": "llama-1b", "setting": "llmcompressor gptq w4a16, 16 x 256", "wanted": 0.5}
    rows = [row("gptq", 5e8, metric="peak_over_import", theirs=4e9, ratio=0.125, met=True) | of,
            row("gptq", 60.0, metric="whole_seconds", theirs=80.0, ratio=0.75, met=False) | of, row("wanda", 1.0)]
    memory, seconds = generate.llmcompressor_table(rows, {}, REG).splitlines()[2:]
    assert memory == "| gptq w4a16 | `gptq` | 16 x 256 | MB over a bare import | 500 | 4,000 | 0.125 | 0.500 x: met |"
    assert seconds == "| gptq w4a16 | `gptq` | 16 x 256 | seconds | 60.0 | 80.0 | 0.750 | 0.500 x: **missed** |"
