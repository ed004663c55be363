"""Plots of what the hidden values of MLPs say, drawn as the others are."""
from __future__ import annotations

import math
from html import escape
from typing import Any

from trimtab.report.plots import COLOURS, DASHES, HALO, Axis, _grid, _ink, _line, _spread, _svg, _text
from trimtab.report.table import percent

Active = dict[str, Any]  # what `prove.activations` returns
Line = tuple[str, str, list[tuple[float, float]]]  # name, style, points
BOLD = "stroke:currentColor;stroke-width:2.5"
WIDTH, HEIGHT, LEGEND = 900.0, 340.0, 290.0


def tolerance(a: Active, p: float) -> str:
    """What a tolerance is called: PPL-1%, or cosine-1% of what has no perplexity."""
    return f"{'PPL' if a['metric'] == 'perplexity' else a['metric']}-{p:g}%"


def _style(k: int) -> str:
    dash = DASHES[k // len(COLOURS) % len(DASHES)]
    return f"stroke:{_ink(k)};stroke-width:2" + (f";stroke-dasharray:{dash}" if dash else "")


def _marks(axis: Axis) -> list[tuple[float, str]]:
    """Ticks of shares, with a decimal where they are no whole per cents."""
    whole = all(abs(100 * v - round(100 * v)) < 1e-6 for v in axis.ticks())
    return [(v, percent(v, 0 if whole else 1)) for v in axis.ticks()]


def _lines(lines: list[Line], x: Axis, y: Axis, label: str, below: str, above: str, xs: list[tuple[float, str]]) -> str:
    """Lines with their points and, in the order of their ends, a legend."""
    out = _grid(x, y, xs, _marks(y))
    out += [_text(x.begin, 12, above, 'opacity=".7"'), _text(x.end, HEIGHT - 8, below, 'text-anchor="end" opacity=".7"')]
    for name, style, points in lines:
        at = [(x.at(a), y.at(b)) for a, b in points]
        out.append(f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in at)}" style="fill:none;stroke-linejoin:round;{style}">'
                   f"<title>{escape(name)}</title></polyline>")
        out += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" style="{style};stroke-dasharray:none;fill:var(--bg,#fff)">'
                f"<title>{escape(name)}: {percent(v)}</title></circle>" for (px, py), (_, v) in zip(at, points, strict=True)]
    legend = sorted(lines, key=lambda one: -one[2][-1][1])
    gap = min(20.0, (HEIGHT - 60) / max(1, len(legend)))
    for k, (name, style, points) in enumerate(legend):
        at_y = 30 + gap * k
        out += [_line(x.end + 18, at_y, x.end + 42, at_y, style), _text(x.end + 50, at_y + 4, f"{name}: {percent(points[-1][1], 0)}")]
    return _svg(WIDTH, HEIGHT, label, out)


def _shares(lines: list[Line]) -> Axis:
    """Shares from 0, to 1 or what is needed of it."""
    most = max(v for _, _, points in lines for _, v in points)
    y = Axis([0.0, max(most, 0.02)], HEIGHT - 46, 22)
    y.high = 1.0 if most > 0.5 else y.high
    return y


def by_block(a: Active, lines: list[tuple[str, list[float]]], label: str, above: str) -> str:
    """One line a figure over the blocks."""
    blocks = [layer["block"] for layer in a["layers"]]
    x = Axis([float(min(blocks)), float(max(blocks))], 60, WIDTH - LEGEND)
    every = max(1, math.ceil(len(blocks) / 12))
    drawn = [(name, _style(k), list(zip(map(float, blocks), values, strict=True))) for k, (name, values) in enumerate(lines)]
    return _lines(drawn, x, _shares(drawn), label, "block", above, [(b, str(b)) for b in blocks[::every]])


def utilisation(sites: dict[str, dict[str, Any]]) -> str:
    """Of every block the directions that its layers use, as a share of those they have: a line a role, the mean over its experts."""
    found: dict[str, dict[int, list[float]]] = {}
    for name, s in sites.items():
        block, group, *_, role = name.split(".")
        found.setdefault(f"{group}.{role}", {}).setdefault(int(block), []).append(s["utilisation"])
    blocks = sorted({b for by in found.values() for b in by})
    some = {role: by for role, by in found.items() if len(by) == len(blocks)}  # not what some blocks alone have
    lines = [(role, [sum(by[b]) / len(by[b]) for b in blocks]) for role, by in some.items()]
    return by_block({"layers": [{"block": b} for b in blocks]}, lines, "utilisation by block", "share of the directions") if lines else ""


def shares(a: Active) -> str:
    """Of every block: zeros, small values, and what a tolerance leaves out."""
    lines = [("small", [x["small"] for x in a["layers"]])]
    if any(x["zeros"] for x in a["layers"]):
        lines.insert(0, ("exactly zero", [x["zeros"] for x in a["layers"]]))
    lines += [(f"left out at {tolerance(a, t['p'])}", [x["sparsity"][f"{t['p']:g}"] for x in a["layers"]]) for t in a["tolerances"]]
    return by_block(a, lines, "share of hidden values by block", "share of the hidden values")


def neurons(a: Active) -> str:
    """Of every block of a ReLU network: dead neurons; nothing for another one."""
    if not a["relu"]:
        return ""
    lines = [(name, [x["dead"][k] for x in a["layers"]]) for k, name in (
        ("dynamic", "dynamic dead: zero for a token"), ("never_active", "never active"), ("static", "static dead: zero for any input"))]
    return by_block(a, lines, "dead neurons by block", "share of the neurons")


def unions(a: Active) -> str:
    """What no token of a batch needs, against its size: the mean, were neurons independent (dashed), and up to five blocks."""
    sizes, layers = a["union"]["batch"], a["layers"]
    if len(sizes) < 2:
        return ""
    some = layers if len(layers) <= 6 else [layers[round(k * (len(layers) - 1) / 4)] for k in range(5)]
    at = [math.log2(b) for b in sizes]
    lines = [("mean of the blocks", BOLD, list(zip(at, a["union"]["sparsity"], strict=True))),
             ("mean, were neurons independent", f"{BOLD};stroke-dasharray:3 4", list(zip(at, a["union"]["independent"], strict=True)))]
    lines += [(f"block {x['block']}", _style(k), list(zip(at, x["union"]["sparsity"], strict=True))) for k, x in enumerate(some)]
    x = Axis([0.0, at[-1]], 60, WIDTH - LEGEND)
    return _lines(lines, x, _shares(lines), "union sparsity against batch size", "tokens of different sequences in a batch",
                  "share of the neurons that no token of a batch needs", [(v, str(b)) for v, b in zip(at, sizes, strict=True)])


def costs(a: Active) -> str:
    """How much worse the network is against what it leaves out: what the search measured, and the tolerances."""
    most = 5 * max(t["p"] for t in a["tolerances"]) / 100
    points = sorted((t["sparsity"], t["worse"]) for t in a["tried"] if math.isfinite(t["worse"]) and t["worse"] <= most)
    if len(points) < 2:
        return ""
    low = min(0.0, *(w for _, w in points))
    x, y = Axis([s for s, _ in points], 60, WIDTH - 150), Axis([low, *(w for _, w in points)], HEIGHT - 46, 22)
    if low < 0:
        y.low = min(y.low, low * 1.2)
    lm = a["metric"] == "perplexity"
    out = _grid(x, y, _marks(x), _marks(y))
    out += [_text(60, 12, f"{'perplexity above' if lm else 'cosine below'} that of the network itself", 'opacity=".7"'),
            _text(x.end, HEIGHT - 8, "share of the hidden values left out, all layers at once", 'text-anchor="end" opacity=".7"')]
    at = [(x.at(s), y.at(w)) for s, w in points]
    out.append(f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in at)}" style="fill:none;stroke:{_ink(0)};stroke-width:2"/>')
    out += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" style="fill:{_ink(0)}"><title>{percent(s)}: {percent(w, 2)}</title></circle>'
            for (px, py), (s, w) in zip(at, points, strict=True)]
    marks = [t for t in sorted(a["tolerances"], key=lambda t: -t["p"]) if y.low <= t["p"] / 100 <= y.high]
    for t, to in zip(marks, _spread([y.at(t["p"] / 100) for t in marks], 15, 24, HEIGHT - 50), strict=True):
        out += [_line(60, y.at(t["p"] / 100), x.end, y.at(t["p"] / 100), "stroke:currentColor;stroke-dasharray:4 4;stroke-opacity:.5"),
                _text(x.end + 8, to + 4, f"{tolerance(a, t['p'])}: {percent(t['sparsity'])}", f'style="{HALO}" font-weight="600"')]
    return _svg(WIDTH, HEIGHT, "how much worse against what is left out", out)
