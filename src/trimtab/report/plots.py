"""Three plots as SVG text, drawn here so that a report needs no plotting library and no script.

Colours come from CSS variables with a fallback: one drawing fits a light page, a dark page and a file of its own.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from trimtab.report.table import Run, mb, name, number, percent, ranked, stored

# Hues after Okabe and Ito, told apart with any colour vision; the page overrides them on a dark ground.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5588f", "#b07d00", "#3a8fc4")
HALO = "paint-order:stroke;stroke:var(--bg,#fff);stroke-width:4px"  # lines pass behind a label, not through it
DASHES = ("", "7 3", "2 3", "9 3 2 3")


def _ink(i: int) -> str:
    return f"var(--c{i % len(COLOURS)},{COLOURS[i % len(COLOURS)]})"


def _text(x: float, y: float, s: str, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {extra}>{escape(s)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" style="{style}"/>'


def _short(s: str, most: int = 30) -> str:
    return s if len(s) <= most else s[:most - 1] + "…"


def _svg(width: float, height: float, label: str, body: list[str]) -> str:
    return (f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img" '
            f'aria-label="{escape(label)}" font-family="system-ui, sans-serif" font-size="12" fill="currentColor">'
            + "".join(body) + "</svg>")


def _marker(i: int, x: float, y: float, tip: str) -> str:
    """A shape per run of six colours, so that colour is never the only difference."""
    r = 5.5
    shape = (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"',
             f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}"',
             f'<path d="M{x:.1f} {y - r - 1:.1f}l{r + 1} {2 * r}h{-2 * r - 2}z"')[i // len(COLOURS) % 3]
    return f'{shape} style="fill:{_ink(i)}"><title>{escape(tip)}</title></{shape[1:].split(" ")[0]}>'


class Axis:
    """Values to pixels, with round ticks; logarithmic where the values span more than `log` times."""

    def __init__(self, values: list[float], begin: float, end: float, log: float = math.inf) -> None:
        low, high = min(values), max(values)
        self.log = low > 0 and high / low > log
        a, b = (math.log10(low), math.log10(high)) if self.log else (low, high)
        pad = (b - a) * 0.08 or abs(b) * 0.1 or 1.0
        self.low, self.high, self.begin, self.end = a - pad, b + pad, begin, end
        if low >= 0 and not self.log:
            self.low = max(0.0, self.low)

    def at(self, v: float) -> float:
        v = math.log10(v) if self.log else v
        return self.begin + (v - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        if self.log:
            marks = [m * 10.0 ** e for e in range(math.floor(self.low), math.ceil(self.high) + 1) for m in (1, 2, 5)]
            inside = [v for v in marks if self.low <= math.log10(v) <= self.high]
            return inside if len(inside) <= 7 else [v for v in inside if f"{v:e}"[0] == "1"]
        raw = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step) + 1)]


def _grid(x: Axis, y: Axis, xs: list[tuple[float, str]], ys: list[tuple[float, str]]) -> list[str]:
    faint = "stroke:currentColor;stroke-opacity:.13"
    out = [_line(x.begin, y.at(v), x.end, y.at(v), faint) for v, _ in ys]
    out += [_text(x.begin - 8, y.at(v) + 4, s, 'text-anchor="end" opacity=".7"') for v, s in ys]
    out += [_text(x.at(v), y.begin + 18, s, 'text-anchor="middle" opacity=".7"') for v, s in xs]
    return [*out, _line(x.begin, y.begin, x.end, y.begin, "stroke:currentColor;stroke-opacity:.5")]


def _spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Heights as near to the sorted ones wanted as `gap` between neighbours and the limits allow."""
    out = list(wanted)
    for k in range(1, len(out)):
        out[k] = max(out[k], out[k - 1] + gap)
    shift = sum(w - o for w, o in zip(wanted, out, strict=True)) / max(1, len(out))
    out = [max(o + shift, low + gap * k) for k, o in enumerate(out)]
    for k in range(len(out) - 1, -1, -1):
        out[k] = min(out[k], high - gap * (len(out) - 1 - k))
    return out


def quality_size(runs: list[Run]) -> str:
    """Quality against bytes in the recipe's own format, one labelled point a recipe; the dense network as a line.

    Perplexities above twice the dense one stand at the upper edge with their value, or one failure hides the rest.
    """
    good = [(i, r) for i, r in enumerate(runs) if r.get("score") is not None]
    lm, width, height = runs[0]["metric"] == "perplexity", 900.0, max(430.0, 15.0 * len(runs) + 90)
    dense = runs[0]["before"]["perplexity"] if lm else 1.0
    size = runs[0]["before"]["bytes"]
    most = 2 * dense if lm else math.inf
    x = Axis([0.0, size / 1e6, *(stored(r) / 1e6 for _, r in good)], 60, width - 20)
    y = Axis([dense, *(min(most, r["score"]) for _, r in good)], height - 50, 24)
    out = _grid(x, y, [(v, f"{v:g}") for v in x.ticks()], [(v, f"{v:g}") for v in y.ticks()])
    faint = 'opacity=".7"'
    out += [_text(60, 12, f"{runs[0]['metric']} ({'lower' if lm else 'higher'} is better)", faint),
            _text(width - 20, height - 10, "MB stored in the recipe's own format (left is better)",
                  f'text-anchor="end" {faint}'),
            _line(60, y.at(dense), width - 20, y.at(dense),
                  "stroke:currentColor;stroke-dasharray:4 4;stroke-opacity:.5")]
    px, py = x.at(size / 1e6), y.at(dense)
    out += [f'<path d="M{px:.1f} {py - 8:.1f}l8 8l-8 8l-8 -8z" style="fill:none;stroke:currentColor;stroke-width:2">'
            f"<title>dense: {number(dense)}, {mb(size)}</title></path>",
            _text(px, py - 13, "dense", 'text-anchor="middle" font-weight="600"')]
    spots = sorted(((x.at(stored(r) / 1e6), y.at(min(most, r["score"])), i, r) for i, r in good), key=lambda s: s[:3])
    # Points of nearly one size share a column of labels at either side of them, joined by thin lines.
    columns: list[list[tuple[float, float, int, Run]]] = []
    for spot in spots:
        if columns and spot[0] - columns[-1][-1][0] < 170:
            columns[-1].append(spot)
        else:
            columns.append([spot])
    for column in columns:
        first, last = column[0][0], column[-1][0]
        cuts = [k for k in range(len(column)) if k == 0 or column[k][0] - column[k - 1][0] > 1]
        cut = min(cuts, key=lambda k: abs(2 * k - len(column)))  # as many labels left as right, one size one side
        for left, part in ((True, column[:cut]), (False, column[cut:])):
            mine = sorted(part, key=lambda s: s[1])
            for (px, py, i, run), at in zip(mine, _spread([s[1] for s in mine], 15, 30, height - 58), strict=True):
                label = _short(name(run)) + (f" ({number(run['score'], 3)})" if run["score"] > most else "")
                edge, anchor = (first - 22, "end") if left else (last + 22, "start")
                tip = f"{name(run)}: {runs[0]['metric']} {number(run['score'])}, {mb(stored(run))}"
                out += [_line(px, py, edge + (3 if left else -3), at, f"stroke:{_ink(i)};stroke-opacity:.4"),
                        _text(edge, at + 4, label, f'text-anchor="{anchor}" style="fill:{_ink(i)};{HALO}"'),
                        _marker(i, px, py, tip)]
    return _svg(width, height, f"{runs[0]['metric']} against size, one point a recipe", out)


def block_error(runs: list[Run]) -> str:
    """Relative error of the hidden state behind each block, one line a recipe; the legend in the order of the ends."""
    lines = [(i, r, [e for e in r["block_error"] if e is not None]) for i, r in enumerate(runs) if r.get("block_error")]
    if not any(any(v) for _, _, v in lines):
        return ""
    lines = [(i, r, v) for i, r, v in lines if v]
    lines.sort(key=lambda z: -z[2][-1])
    width, height, wide = 900.0, max(360.0, 20.0 * len(lines) + 70), 290.0
    depth = max(len(v) for _, _, v in lines)
    x = Axis([0, depth - 1], 60, width - wide)
    y = Axis([e for _, _, v in lines for e in v if e > 0], height - 50, 20, log=20)
    every = max(1, math.ceil(depth / 12))
    out = _grid(x, y, [(b, str(b)) for b in range(0, depth, every)],
                [(v, percent(v, 0 if v >= 0.01 else 2)) for v in y.ticks()])
    out += [_text(60, 12, "error relative to the dense hidden state", 'opacity=".7"'),
            _text(x.end, height - 10, "block", 'text-anchor="end" opacity=".7"')]
    for k, (i, run, v) in enumerate(lines):
        points = [(x.at(b), y.at(e)) for b, e in enumerate(v) if e > 0 or not y.log]
        dash = DASHES[i // len(COLOURS) % len(DASHES)]
        style = f"fill:none;stroke:{_ink(i)};stroke-width:2;stroke-linejoin:round"
        style += f";stroke-dasharray:{dash}" if dash else ""
        out.append(f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}" style="{style}">'
                   f'<title>{escape(name(run))}</title></polyline>')
        at = 30 + 20 * k
        out += [_line(width - wide + 18, at, width - wide + 42, at, style),
                _text(width - wide + 50, at + 4, f"{_short(name(run), 27)}  {percent(v[-1], 0)}")]
    return _svg(width, height, "error behind each block, one line a recipe", out)


@dataclass(frozen=True)
class Map:
    """What is drawn of every site: `what` it is a share of, in words, and `of` a run {site: share}, empty where there is none."""

    what: str
    of: Callable[[Run], dict[str, float]]


ZEROS = Map("zeros", lambda run: run.get("zeros") or {})
SKIPPED = Map("skipped inputs", lambda run: {n: its["reached"] for n, its in (run.get("sparsity") or {}).get("sites", {}).items()})


def _cells(shares: dict[str, float]) -> dict[str, dict[int, float]]:
    """{role: {block: share}}; the experts of one block are averaged."""
    sums: dict[str, dict[int, list[float]]] = {}
    for site, share in shares.items():
        block, _, role = site.partition(".")
        role = re.sub(r"experts\.\d+", "experts", role)
        sums.setdefault(role, {}).setdefault(int(block), []).append(share)
    return {role: {b: sum(v) / len(v) for b, v in row.items()} for role, row in sums.items()}


def even(shares: dict[str, float]) -> bool:
    """All sites have the same share, to half a per cent."""
    return not shares or max(shares.values()) - min(shares.values()) <= 0.005


def heat_map(run: Run, of: Map = ZEROS) -> str:
    """A share, sites down and blocks across; darker is sparser, on one scale for all recipes."""
    cells = _cells(of.of(run))
    depth = 1 + max((b for row in cells.values() for b in row), default=0)
    w, h = (34.0, 22.0) if depth <= 16 else (max(9.0, 544 / depth), 18.0)
    left = 12 + 7.0 * max(map(len, cells), default=0)
    out = [_text(left + (b + 0.5) * w, 14, str(b), 'text-anchor="middle" opacity=".7"')
           for b in range(0, depth, 1 if depth <= 16 else 8)]
    for k, (role, row) in enumerate(cells.items()):
        out.append(_text(left - 8, 20 + (k + 0.68) * h, role, 'text-anchor="end"'))
        for b, share in row.items():
            out.append(f'<rect x="{left + b * w:.1f}" y="{20 + k * h:.1f}" width="{w - 1:.1f}" '
                       f'height="{h - 1:.1f}" rx="2" style="fill:{_ink(0)};fill-opacity:{0.06 + 0.94 * share:.2f}">'
                       f'<title>block {b} {escape(role)}: {percent(share)}</title></rect>')
            if depth <= 16:
                fill = 'style="fill:var(--on,#fff)" ' if share > 0.7 else ""
                out.append(_text(left + (b + 0.5) * w - 0.5, 20 + (k + 0.68) * h, f"{100 * share:.0f}",
                                 f'{fill}text-anchor="middle" font-size="10.5" pointer-events="none"'))
    return _svg(left + depth * w + 4, 24 + h * len(cells), f"share of {of.what} per site and block: {name(run)}", out)


def heat_maps(runs: list[Run], of: Map = ZEROS) -> list[tuple[str, str]]:
    """(caption, drawing) for every recipe that is uneven over the sites; the even ones share one drawing at the end."""
    shown = [r for r in runs if of.of(r)]
    out = [(name(r), heat_map(r, of)) for r in ranked(shown) if not even(of.of(r))]
    if same := [r for r in ranked(shown) if even(of.of(r))]:
        groups: dict[int, list[Run]] = {}
        for r in same:
            groups.setdefault(round(100 * sum((shares := of.of(r)).values()) / len(shares)), []).append(r)
        out += [(f"{share}% in every site: {', '.join(map(name, g))}", heat_map(g[0], of)) for share, g in groups.items()]
    return out
