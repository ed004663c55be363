"""The report, the tables and the card: every recipe and figure is there, nothing is loaded, everything is escaped."""
from __future__ import annotations

import html
import io
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from rich.console import Console

from trimtab.report import cost_plots
from trimtab.report.card import card
from trimtab.report.page import page, sentence
from trimtab.report.plots import SKIPPED, Axis, _spread, block_error, heat_map, heat_maps, quality_size
from trimtab.report.table import comparison, count, mb, number, percent, print_bench, print_proof, proof_table

NASTY = "row | wanda(m=\"4\") <script>alert('x')</script> & co | [red]mask[/red]"


ROLES = ("attn.q", "mlp.experts.0.up", "mlp.experts.1.up")


def run(name, ppl, size, share, *, spread=0.0, proof="passed", warnings=()):
    before = {"perplexity": 4.0, "bits_per_byte": 1.25, "bytes": 11_500_000, "params": 5_700_000, "nonzero": 5_700_000,
              "decode_tok_s": 210.0, "prefill_tok_s": 3100.0}
    return {"recipe": name, "metric": "perplexity", "score": ppl, "recovery": 4.0 / ppl if ppl else None, "kl": 0.1,
            "top1_agreement": 0.875, "before": before, "after": {**before, "perplexity": ppl, "nonzero": 3_000_000},
            "packed": {"format": "bitmask", "bytes": size}, "block_error": [0.02, 0.05, 0.11],
            "zeros": {f"{b}.{r}": share + spread * b for b in range(3) for r in ROLES},
            "timing": {"speed": "measured", "runner": "torch", "dtype": "float32", "threads": 2, "repeats": 5,
                       "ratio": {"decode_tok_s": {"median": 0.99, "min": 0.96, "max": 1.03}}},
            "smaller": "no: 11.5 MB before, 11.5 MB after", "faster": "no: 0.99x decode with torch",
            "warnings": list(warnings), "proof": proof, "seconds": 8.25, "tokens": 8160}


RUNS = [run("magnitude 50%", 8.0, 6_800_000, 0.5), run(NASTY, 4.1, 6_800_000, 0.5),
        run("owl 60%", 5.0, 5_900_000, 0.4, spread=0.2),
        run("blocks", 90.0, 6_000_000, 0.5, warnings=["recovery 0.04 is low"]),
        run("broken", None, 6_400_000, 0.9, proof="failed")]


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attrs, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += [(tag, k, v or "") for k, v in attrs]

    def handle_data(self, data):
        self.text.append(data)


def test_page_holds_everything_and_loads_nothing():
    samples = {"prompt": "def f(x):\n", "magnitude 50%": "    x x x", "owl 60%": "    return <b>&",
               "dense": "    return x"}
    text = page("five <recipes>", RUNS, samples, {"cpu": "two & <cores>", "run": ["trimtab demo", "make demo"]})
    seen = Elements(text)
    words = "".join(seen.text)
    for r in RUNS:
        assert words.count(r["recipe"]) >= 2
    for word in ("five <recipes>", "def f(x):", "return <b>&", "two & <cores>", "make demo", "dense (baseline)",
                 "4.100", "97.6%", "6.8 MB bitmask", "0.99x", "recovery 0.04 is low", "8,160 held-out tokens"):
        assert word in words, word
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(seen.tags)
    assert not [a for a in seen.attrs if a[1] in ("src", "href", "srcset", "data") or a[1].startswith("on")]
    assert not re.search(r"url\(|@import|https?:", text)
    assert seen.tags.count("svg") == 1 + 2 + len(heat_maps(RUNS))
    assert seen.tags.count("tr") == 2 + len(RUNS)
    table = words[words.index("dense (baseline)"):]
    order = [table.index(n) for n in (NASTY, "owl 60%", "magnitude 50%", "blocks", "broken")]
    assert words.index("    return x") < words.index("return <b>&") < words.index("    x x x")
    assert order == sorted(order)  # best recovery first, the broken one last


def test_the_sentence_does_not_flatter():
    said = sentence(RUNS[:1])
    assert "50.0% of the dense model's quality" in said and "perplexity 8.00 against 4.00" in said
    assert "6.8 MB instead of 11.5 MB" in said and said.endswith("it is not faster.")
    assert sentence(RUNS).startswith(f"Of 5 recipes, {NASTY} keeps the most: 97.6%")
    assert "no saving in bytes" in sentence([{**RUNS[0], "packed": None}])
    quick = {**RUNS[2], "faster": "yes: 1.5x decode"}
    assert sentence([RUNS[0], quick]).endswith("; faster: owl 60%.")
    assert "not a number" in sentence(RUNS[-1:])


@pytest.mark.parametrize("draw", [quality_size, block_error])
def test_plots_are_well_formed_and_name_every_recipe(draw):
    root = ElementTree.fromstring(draw(RUNS))
    titles = [t.text for t in root.iter("title")]
    for r in RUNS if draw is block_error else RUNS[:-1]:  # no point for a figure that is not a number
        assert any(r["recipe"] in t for t in titles)
    wide = float(root.get("width"))
    for t in root.iter("text"):
        if float(t.get("x")) > wide / 2 and t.get("text-anchor") is None:
            assert float(t.get("x")) + 6.6 * len(t.text) < wide + 8


def test_scatter_puts_points_where_their_numbers_say():
    three = [run("a", 5.0, 4e6, 0.5), run("b", 6.0, 8e6, 0.5), run("c", 40.0, 8e6, 0.5)]
    root = ElementTree.fromstring(quality_size(three))
    at = {c.find("title").text[0]: (float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")}
    assert at["a"][0] < at["b"][0] == at["c"][0]
    assert at["a"][1] > at["b"][1] > at["c"][1]  # a worse perplexity stands higher
    assert any(t.text == "c (40.0)" for t in root.iter("text"))  # cut off at twice the dense one, with its value
    labels = sorted(float(t.get("y")) for t in root.iter("text") if t.text[0] in "bc" and "fill" in t.get("style", ""))
    assert len(labels) == 2 and labels[1] - labels[0] >= 15


def test_spread_keeps_order_gap_and_limits():
    out = _spread([100, 101, 102, 103], 15, 0, 300)
    assert all(b - a >= 15 - 1e-9 for a, b in pairwise(out))
    assert sum(out) / 4 == pytest.approx(101.5)
    assert _spread([290, 299], 15, 0, 300) == [285, 300] and _spread([50], 15, 0, 300) == [50]


def test_axis_ticks_lie_inside_and_map_in_order():
    for values, log in (([0.02, 0.9], 20.0), ([4.1, 4.4], math.inf), ([0.0, 11.5], math.inf), ([3.0, 3.0], 6.0)):
        axis = Axis(values, 0, 100, log)
        marks = [axis.at(t) for t in axis.ticks()]
        assert len(marks) >= 2 and marks == sorted(marks) and marks[0] >= -1e-9 and marks[-1] <= 100 + 1e-9


def test_heat_maps_show_uneven_recipes_and_gather_even_ones():
    captions = [c for c, _ in heat_maps(RUNS)]
    assert captions[0] == "owl 60%" and len(captions) == 3
    assert any(c.startswith("50% in every site") and "magnitude 50%" in c and NASTY in c for c in captions)
    root = ElementTree.fromstring(heat_map(RUNS[2]))
    cells = [r.find("title").text for r in root.iter("rect")]
    assert len(cells) == 6 and "block 2 mlp.experts.up: 80.0%" in cells  # two experts, one row


def test_what_gates_skip_is_said_and_drawn():
    sites = {f"{b}.{r}": {"target": 0.5, "reached": 0.4 + 0.1 * b} for b in range(3) for r in ("attn.q", "mlp.down")}
    gated = {**RUNS[0], "sparsity": {"target": 0.5, "reached": 0.4875, "sites": sites}}
    said = "gates skip 48.8% of the weights of 6 layers on held-out text, 50.0% asked; of one layer 40.0% to 60.0%"
    words = "".join(Elements(page("gates", [gated, RUNS[1]], {}, {})).text)
    assert said in words and "What gates skip" in words and said in card(gated, "m", [])
    assert "What gates skip" not in page("none", RUNS, {}, {}) and "sparsity" not in card(RUNS[1], "m", [])
    [(caption, drawing)] = heat_maps([gated, RUNS[1]], SKIPPED)
    assert caption == "magnitude 50%" and "block 2 mlp.down: 60.0%" in drawing


def test_the_terminal_says_what_gates_skip(capsys):
    print_proof({**RUNS[0], "sparsity": {"target": None, "reached": 0.25, "sites": {"0.attn.q": {"target": None, "reached": 0.25}}}})
    assert "sparsity: gates skip 25.0% of the weights of 1 layers on held-out text; of one layer" in capsys.readouterr().out


def shown(table):
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_terminal_tables():
    text = shown(comparison(RUNS))
    assert all(r["recipe"] in text for r in RUNS) and "87.5%" in text and "6.8 MB" in text
    one = shown(proof_table(RUNS[1]))
    assert NASTY in one and "4.100" in one and "97.6%" in one and "3.00 M" in one
    none = dict.fromkeys(("after", "packed", "recovery", "kl", "top1_agreement"))
    alone = shown(proof_table({**RUNS[0], **none}))
    assert "4.000" in alone and "recovery" not in alone


def test_bench_prints_one_model_or_two(capsys):
    side = {"decode_tok_s": 210.0, "prefill_tok_s": 3100.0, "first_token_s": 0.02, "bytes": 40_000_000, "resident_bytes": 50_000_000,
            "weight_bytes": 38_000_000, "share_of_read_bandwidth": 0.31,
            "quartiles": {"decode_tok_s": [200.0, 220.0], "prefill_tok_s": [3000.0, 3200.0], "first_token_s": [0.01, 0.03]}}
    result = {"before": side, "after": None, "ratio": {}, "speed": "measured", "runner": "torch", "dtype": "float32",
              "threads": 2, "repeats": 5, "prompt": 64, "new": 16, "batch": 1, "machine": {"cpu": "x"}, "isa": "avx2",
              "read_gb_s": 33.3, "peak_gflop_s": {"f32": 230.0}, "cache": ""}
    print_bench(result)
    out = capsys.readouterr().out
    assert "210.0 (200 to 220)" in out and "33.3 GB/s" in out and "31.0%" in out
    print_bench({**result, "after": side, "ratio": {"decode_tok_s": {"median": 1.25}}})
    assert "1.25x" in capsys.readouterr().out


def test_card_says_what_happened():
    text = card(RUNS[1], "builtin:lm", ["trimtab trim builtin:lm wanda -o out"])
    assert text.startswith("---\n") and f"`{NASTY}`" in text and "trimtab trim builtin:lm wanda -o out" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in rows) and "| recovery |  | 97.6% |" in rows
    assert "do not serve" in card(RUNS[-1], "m", []) and "do not serve" not in text
    assert "| recovery" not in card({"recipe": "wanda", "zeros": {}}, "m", [])  # no proof yet


@pytest.mark.parametrize(("value", "text"), [(4.4567, "4.457"), (1234567.0, "1.235e+06"), (31234.6, "31,235"), (0, "0"),
                                             (0.00123456, "0.001235"), (math.nan, "—"), (None, "—")])
def test_numbers_have_sensible_digits(value, text):
    assert number(value) == text


def test_units():
    assert (mb(11_549_999), percent(0.9321), count(5_700_000), count(97)) == ("11.5 MB", "93.2%", "5.70 M", "97")
    assert html.escape(NASTY) in quality_size(RUNS) or html.escape(NASTY, quote=False) in quality_size(RUNS)


def gated(recipe: str, setting: str, seed: int, reached: float, value: float | None) -> dict:
    skipped = {"target": reached, "reached": reached}
    return {"recipe": recipe, "setting": setting, "seed": seed, "skipped": skipped, "value": value, "dense": 10.0}


def test_what_gates_cost_is_drawn_and_read_between_the_measured_points():
    rows = [gated("a", "gates-25%", 0, 0.2, 10.05), gated("a", "gates-25%", 1, 0.3, 10.05), gated("a", "gates-50%", 0, 0.5, 10.32),
            gated("b", "gates-25%", 0, 0.25, 20.0), gated("b", "gates-50%", 0, 0.5, None), gated("b", "gates-50%", 1, 0.5, 10.0),
            gated("c", "gates-80%", 0, 0.8, 10.001), {**gated("d", "gates-80%", 0, 0.8, 9.0), "skipped": None}]
    found = cost_plots.points(rows)
    assert found.keys() == {"a", "b", "c"} and len(found["b"]) == 1
    assert found["a"][0] == pytest.approx((0.25, 0.005)) and found["a"][1] == pytest.approx((0.5, 0.032))
    shares = {name: cost_plots.share_at(points, 0.01) for name, points in found.items()}
    assert shares == {"a": "34%", "b": "below 25%", "c": "above 80%"}
    drawn = ElementTree.fromstring(cost_plots.cost(found, "gates").replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
    tips = [e.text for e in drawn.iter() if e.tag.endswith("title")]
    assert len(tips) == 4 and "a: 50.0% skipped, 3.20% more" in tips
