"""Two figures of the measured speed of single layers, for the docs: a roofline, and speed-up against the share kept.

Rows are those of benchmarks/kernels.py. What older ones do not say follows from their names; what does not is left out.
"""
from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass
from typing import Any

from trimtab.report.plots import HALO, Axis, _grid, _ink, _line, _spread, _svg, _text

FAMILIES = ("dense", "blocks", "bitmask", "sell", "n:m", "codes")  # a colour each
XS = ("f32", "bf16", "i8")                                        # a shape each
BITS = {"f32": 32.0, "bf16": 16.0, "i8": 8.0, "i4": 4.0, "i2": 2.0, "t": 1.6}  # a weight
ROWS = (1, 16, 512)
FAINT = 'opacity=".7"'


@dataclass(frozen=True)
class Layer:
    """One measured layer of ours. `flops` of a call, a multiplication and its addition being two; `peak` None where unknown."""

    name: str
    rows: int
    family: str
    type: str                # of the weights
    x: str                   # what x was multiplied as
    kept: float
    seconds: float
    flops: float
    bytes: int
    dense_bytes: int         # of the same type
    read: float              # bytes a second
    peak: float | None       # operations a second
    times: float | None      # the fastest other dense layer

    @staticmethod
    def of(row: dict[str, Any]) -> Layer | None:
        """None for what is no single layer of ours in a format of its own (an MLP, two maps), or does not say what it multiplied."""
        name = row["recipe"].removeprefix("trimtab ")
        shape, rows = re.match(r"one layer (\d+)x(\d+)", row["model"]), re.search(r"-batch-(\d+)$", row["setting"])
        kind = re.match(r"(?:(\S+) )?(f32|bf16|int8|int4|int2|ternary)\b", name)
        family = re.sub(r"\d:\d", "n:m", re.sub(r"bsr\d+", "blocks", kind[1] or "codes")) if kind else None
        if name == row["recipe"] or not (shape and rows and kind) or family not in FAMILIES or row["setting"].startswith("gates"):
            return None  # what gates leave of a row is no layer of its own
        entries, share = int(shape[1]) * int(shape[2]), re.search(r"(\d+)% kept", name)
        kept = int(share[1]) / 100 if share else 0.5 if family == "n:m" else 1.0
        weights = "t" if kind[2] == "ternary" else kind[2].replace("int", "i")
        asked = re.search(r"x (f32|int8)", name)
        told = asked[1].replace("int", "i") if asked else "f32" if family == "n:m" else weights
        return Layer(name, int(rows[1]), family, weights, row.get("x", told), kept, row["value"] / 1e3,
                     row.get("flops", 2 * entries * kept * int(rows[1])), row["bytes"],
                     int(entries * BITS[weights] / 8), row["read_gb_s"] * 1e9,
                     row["peak_gflop_s"] * 1e9 if "peak_gflop_s" in row else None, row.get("times_fastest_other"))


def layers(rows: list[dict[str, Any]], shape: str) -> list[Layer]:
    """Those of this shape, OUTxIN: one a name and number of rows of x, the last that was measured."""
    found = [x for r in rows if r["metric"] == "milliseconds" and r["model"].startswith(f"one layer {shape},")
             and (x := Layer.of(r)) is not None and x.rows in ROWS]
    return list({(x.name, x.rows): x for x in found}.values())


def _shape(x: str, family: str, px: float, py: float, tip: str) -> str:
    """Circles where x is float32, squares where it is bfloat16, triangles where it is eight bits."""
    r = 4.5
    paint = f'fill="{_ink(FAMILIES.index(family))}" stroke="var(--bg,#fff)"><title>{tip}</title>'
    if x == "f32":
        return f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{r}" {paint}</circle>'
    if x == "bf16":
        return f'<rect x="{px - r:.1f}" y="{py - r:.1f}" width="{2 * r}" height="{2 * r}" {paint}</rect>'
    return f'<path d="M{px:.1f} {py - r - 1:.1f}l{r + 1} {2 * r}h{-2 * r - 2}z" {paint}</path>'


def _number(v: float) -> str:
    return f"{v:g}" if v < 1000 else f"{v:,.0f}"


def roofline(found: list[Layer]) -> str:
    """Operations a second against multiplications a stored byte, under what memory and arithmetic allow; both logarithmic."""
    width, height, right = 900.0, 560.0, 130.0
    peaks = {x: statistics.median(p) / 1e9 for x in XS if (p := [f.peak for f in found if f.peak and f.x == x])}
    reads = [f.read / 1e9 for f in found]
    spots = [(f.flops / 2 / f.bytes, f.flops / f.seconds / 1e9, f) for f in found]
    x = Axis([s[0] for s in spots], 60, width - right, log=1)
    y = Axis([*(s[1] for s in spots), *peaks.values()], height - 50, 40, log=1)
    out = _grid(x, y, [(v, _number(v)) for v in x.ticks()], [(v, _number(v)) for v in y.ticks()])
    out += [_text(60, 16, "GFLOP/s; a multiplication and its addition are two", FAINT),
            _text(x.end, height - 12, "multiplications a stored byte", f'text-anchor="end" {FAINT}')]

    def clipped(gb: float) -> tuple[float, float, float, float]:
        """The line of a bandwidth in pixels, from the left edge to the upper one."""
        left, high = 10.0 ** x.low, 10.0 ** y.high
        end = min(high / 2 / gb, 10.0 ** x.high)
        return x.at(left), y.at(max(10.0 ** y.low, 2 * gb * left)), x.at(end), y.at(2 * gb * end)

    (ax, ay, bx, by), (cx, cy, dx, dy) = clipped(min(reads)), clipped(max(reads))
    out.append(f'<path d="M{ax:.1f} {ay:.1f}L{bx:.1f} {by:.1f}L{dx:.1f} {dy:.1f}L{cx:.1f} {cy:.1f}z" fill="currentColor" opacity=".1"/>')
    middle = clipped(statistics.median(reads))
    out.append(_line(*middle, "stroke:currentColor;stroke-width:1.5"))
    slope = (middle[3] - middle[1]) / (middle[2] - middle[0])
    along = 0.55 * (middle[2] - middle[0])
    lx, ly = middle[0] + along, middle[1] + along * slope - 14
    out.append(_text(lx, ly, f"reads {min(reads):.0f} to {max(reads):.0f} GB/s",
                     f'transform="rotate({math.degrees(math.atan(slope)):.1f} {lx:.1f} {ly:.1f})" style="{HALO}"'))
    high = sorted(peaks, key=lambda k: -peaks[k])
    for kind, to in zip(high, _spread([y.at(peaks[k]) for k in high], 15, 40, height - 220), strict=True):
        at = y.at(peaks[kind])
        out += [_line(x.at(max(peaks[kind] / 2 / max(reads), 10.0 ** x.low)), at, x.end, at, "stroke:currentColor;stroke-width:1.5"),
                _text(x.end + 8, to + 4, f"x {_called(kind)}: {peaks[kind]:,.0f}")]
    for px, py, f in sorted(spots, key=lambda s: (s[2].rows, s[2].name)):
        out.append(_shape(f.x, f.family, x.at(px), y.at(py), f"{f.name}, {f.rows} rows of x: {py:,.0f} GFLOP/s"))
    for rows in ROWS:
        mine = [s for s in spots if s[2].rows == rows]
        if mine:
            middle_x = statistics.median(x.at(s[0]) for s in mine)
            out.append(_text(middle_x, min(height - 58.0, max(y.at(s[1]) for s in mine) + 22), f"{rows} row{'s' * (rows > 1)} of x",
                             f'text-anchor="middle" style="{HALO}" font-weight="600"'))
    at = height - 190
    for k, family in enumerate(FAMILIES):
        out += [_shape("f32", family, x.end + 20, at + 18 * k, family),
                _text(x.end + 32, at + 18 * k + 4, family, f'style="fill:{_ink(k)}"')]
    for k, kind in enumerate(XS):
        out.append(_shape(kind, "dense", x.end + 20, at - 66 + 18 * k, kind).replace(_ink(0), "currentColor"))
        out.append(_text(x.end + 32, at - 62 + 18 * k, f"x {_called(kind)}"))
    return _svg(width, height, "operations a second against multiplications a stored byte, one point a layer", out)


def _called(x: str) -> str:
    return {"f32": "float32", "bf16": "bfloat16", "i8": "8 bits"}[x]


def speed_up(found: list[Layer]) -> str:
    """Times the fastest other dense layer against the share kept, both logarithmic; dashed what the stored bytes would allow."""
    some = [f for f in found if f.times and f.type in ("f32", "bf16")]
    kinds = [k for k in ("f32", "bf16") if any(f.type == k for f in some)]
    wide, high, gap = 230.0, 240.0, 62.0
    ranges = [f.times or 1 for f in some] + [f.dense_bytes / f.bytes for f in some]
    out = []
    for row, kind in enumerate(kinds):
        for column, rows in enumerate(ROWS):
            mine = [f for f in some if f.type == kind and f.rows == rows]
            left, top = 50 + column * (wide + gap), 50 + row * (high + 56)
            x = Axis([f.kept for f in some], left, left + wide, log=1)
            y = Axis(ranges, top + high, top, log=1)
            out += _grid(x, y, [(v, f"{v:.0%}") for v in (0.05, 0.1, 0.2, 0.5, 1)], [(v, f"{v:g}x") for v in y.ticks()])
            out += [_line(x.begin, y.at(1), x.end, y.at(1), "stroke:currentColor;stroke-opacity:.6"),
                    _text(left, top - 8, f"{_called(kind)}, {rows} row{'s' * (rows > 1)} of x", 'font-weight="600"')]
            ends = []
            for k, family in enumerate(FAMILIES):
                line = sorted((f for f in mine if f.family == family), key=lambda f: f.kept)
                if not line:
                    continue
                at = [(x.at(f.kept), y.at(f.times or 1), y.at(f.dense_bytes / f.bytes)) for f in line]
                if line[0].kept < line[-1].kept:
                    out += [_path([(a, c) for a, _, c in at], f"stroke:{_ink(k)};stroke-dasharray:3 3;stroke-opacity:.8"),
                            _path([(a, b) for a, b, _ in at], f"stroke:{_ink(k)};stroke-width:2")]
                elif line[0].kept < 1:
                    out += [_line(a - 6, c, a + 6, c, f"stroke:{_ink(k)};stroke-dasharray:3 3") for a, _, c in at]
                out += [_shape("f32", family, a, b, f"{f.name}, {rows} rows of x: {f.times:.2f} x")
                        for (a, b, _), f in zip(at, line, strict=True)]
                ends.append((at[-1][1], at[-1][0], k, family))
            ends.sort()
            heights = _spread([e[0] for e in ends], 14, top + 8, top + high - 6)
            for (_, px, k, family), to in zip(ends, heights, strict=True):
                side, anchor = (-9, "end") if px > x.end - 40 else (9, "start")
                out.append(_text(px + side, to + 4, family, f'text-anchor="{anchor}" style="fill:{_ink(k)};{HALO}"'))
    width, height = 50 + 3 * wide + 2 * gap + 30, 50 + len(kinds) * (high + 56)
    out += [_text(50, 14, "times the fastest other dense layer of the same precision; dashed: as the stored bytes would allow", FAINT),
            _text(width - 30, height - 6, "share of the weights kept", f'text-anchor="end" {FAINT}')]
    return _svg(width, height, "speed-up over the fastest other dense layer against the share kept", out)


def _path(points: list[tuple[float, float]], style: str) -> str:
    return f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}" style="fill:none;{style}"/>'


def standalone(svg: str) -> str:
    """As a file of its own, for renderers that know no CSS variables and pages of any ground; a line an element, for diffs."""
    svg = re.sub(r"var\(--\w+,([^)]+)\)", r"\1", svg).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" color="#222" ', 1)
    return svg.replace(">", '><rect width="100%" height="100%" fill="#fff"/>', 1).replace("><", ">\n<") + "\n"
