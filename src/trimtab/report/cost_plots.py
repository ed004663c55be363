"""What is lost against what is left out, for the docs, from measured rows: by gates, or of a network that became smaller."""
from __future__ import annotations

import math
from html import escape
from itertools import pairwise
from statistics import fmean
from typing import Any

from trimtab.report.plots import COLOURS, DASHES, Axis, _grid, _ink, _line, _short, _svg, _text
from trimtab.report.table import percent

Points = list[tuple[float, float]]  # share left out, perplexity over the dense one, less 1
WIDTH, HEIGHT, LEGEND = 940.0, 420.0, 370.0
LEAST, MOST = 0.001, 10.0  # of what is drawn, and the shares
FROM, TO = 0.1, 0.85
OF = {"skipped": "skipped on held-out text, of the weights behind gates", "removed": "removed, of the weights of the blocks"}


def cost(lines: dict[str, Points], label: str, what: str = "skipped", to: float = TO) -> str:
    """Perplexity above the dense one, logarithmic, against the share of the weights that was left out, up to `to`; one line a recipe."""
    begin = FROM if what == "skipped" else FROM / 2
    x = Axis([begin, to], 64, WIDTH - LEGEND)
    y = Axis([LEAST, MOST], HEIGHT - 46, 24, log=1)
    ys = [(v, percent(v, 1 if v < 0.01 else 0)) for v in (LEAST, 0.01, 0.1, 1.0, MOST)]
    out = _grid(x, y, [(v, percent(v, 0)) for v in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8) if v <= to], ys)
    out += [_text(x.begin, 12, "perplexity above that of the dense model", 'opacity=".7"'),
            _text(x.end, HEIGHT - 8, OF[what], 'text-anchor="end" opacity=".7"'),
            _line(x.begin, y.at(0.01), x.end, y.at(0.01), "stroke:currentColor;stroke-opacity:.6;stroke-dasharray:2 3")]
    for k, (name, points) in enumerate(sorted(lines.items(), key=lambda one: -max(v for _, v in one[1]))):
        dash = DASHES[k // len(COLOURS) % len(DASHES)]
        style = f"stroke:{_ink(k)};stroke-width:2" + (f";stroke-dasharray:{dash}" if dash else "")
        at = [(x.at(min(max(s, begin), to)), y.at(min(max(v, LEAST), MOST))) for s, v in sorted(points)]
        out.append(f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in at)}" style="fill:none;stroke-linejoin:round;{style}"/>')
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" style="{style};stroke-dasharray:none;fill:var(--bg,#fff)">'
                f"<title>{escape(name)}: {percent(s)} {what}, {percent(v, 2)} more</title></circle>"
                for (a, b), (s, v) in zip(at, sorted(points), strict=True)]
        out += [_line(x.end + 16, 34 + 18 * k, x.end + 40, 34 + 18 * k, style), _text(x.end + 48, 38 + 18 * k, _short(name, 42))]
    return _svg(WIDTH, max(HEIGHT, 50 + 18.0 * len(lines)), label, out)


def share_at(points: Points, more: float) -> str:
    """The share that costs `more` perplexity, between the measured ones on a logarithmic scale, or a bound."""
    known = sorted((s, math.log(max(v, 1e-6))) for s, v in points)
    want = math.log(more)
    if known[0][1] > want:
        return f"below {percent(known[0][0], 0)}"
    for (s, a), (t, b) in pairwise(known):
        if b > want:
            return percent(s + (t - s) * (want - a) / (b - a), 0)
    return f"above {percent(known[-1][0], 0)}"


def points(rows: list[dict[str, Any]], what: str = "skipped") -> dict[str, Points]:
    """Of rows of one model, one a recipe, setting and seed: by recipe the means over the seeds. One that broke the model breaks their mean,
    which has no place."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for r in rows:
        if r.get(what):
            more = math.nan if r["value"] is None else r["value"] / r["dense"] - 1
            found.setdefault(r["recipe"], {}).setdefault(r["setting"], []).append((r[what]["reached"], more))
    means = {name: [(fmean(s for s, _ in each), fmean(v for _, v in each)) for each in by.values()] for name, by in found.items()}
    return {name: whole for name, each in means.items() if (whole := [(s, v) for s, v in each if math.isfinite(v)])}
