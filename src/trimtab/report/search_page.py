"""The report of a search: its front to be explored, every point with what was done where, what it costs and how to make it again.

All of it is there without the script, which adds tips, keys, sorting and copying, and shows the panel of one point at a time.
"""
from __future__ import annotations

import math
import re
from collections import Counter
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from trimtab.report.document import bar, document, plain, tiles
from trimtab.report.front_plot import BYTES, CIRCLE, COLOURS, FAMILIES, SPEED, Spot, colour, mark, plot
from trimtab.report.search_point import Point, Result, copied, few, micro, misses, options_of, panel, place, predicted, rise, spread
from trimtab.report.table import count, mb, met, number, percent, times


@cache
def _beside(name: str) -> str:
    """The text of a file beside this one."""
    return files("trimtab.report").joinpath(name).read_text("utf-8")


# What was asked, and what came of it

def _distance(point: Point, asked: dict[str, Any]) -> float:
    """How far a point is from what was asked: the greatest of the ratios by which it misses."""
    loss, size, speed = (point.get(key) for key in ("loss", "bytes", "speed"))
    ratios = [1.0]
    if (most := asked.get("max_loss")) is not None:
        ratios.append(math.inf if loss is None else (1 + loss) / (1 + most))
    if (most := asked.get("max_bytes")) is not None:
        ratios.append(math.inf if size is None else size / most)
    if (least := asked.get("min_speed")) is not None:
        ratios.append(least / speed if speed else math.inf)
    return max(ratios)


def _gain(point: Point, asked: dict[str, Any]) -> float:
    """The greater, the better, among points that meet what was asked: speed where loss was limited, else quality."""
    if asked.get("max_loss") is not None:
        return point.get("speed") or 0.0
    return -math.inf if point.get("loss") is None else -point["loss"]


def chosen(points: list[Point], asked: dict[str, Any]) -> Point | None:
    """The best that meets what was asked, else the nearest to it; with nothing asked the middle one by quality."""
    if not points:
        return None
    if all(v is None for v in asked.values()):
        return sorted(points, key=lambda p: -_gain(p, {}))[(len(points) - 1) // 2]
    if good := [p for p in points if not misses(p, asked)]:
        return max(good, key=lambda p: _gain(p, asked))
    return min(points, key=lambda p: (_distance(p, asked), -_gain(p, asked)))


def sentence(result: Result) -> str:
    """What was asked and what came of it, in words that do not flatter."""
    asked, front, dense = result.get("asked") or {}, result["front"], result["dense"]
    best = chosen(front, asked)
    if best is None:
        return "The search found no point that is worth more than the dense model."
    figures = (f"perplexity {number(best.get('perplexity'))} ({rise(best.get('loss'))}), {times(best.get('speed'))} the speed, "
               f"{mb(best.get('bytes'))} instead of {mb(dense.get('bytes'))}")
    whose = "its" if asked.get("max_loss") is not None else "the dense model's"
    wishes = [words for key, words in (
        ("max_loss", f"perplexity at most {percent(asked.get('max_loss'))} above the dense model's"),
        ("min_speed", f"at least {times(asked.get('min_speed'))} {whose} decode speed"),
        ("max_bytes", f"at most {mb(asked.get('max_bytes'))} on disk")) if asked.get(key) is not None]
    if not wishes:
        speeds = [p["speed"] for p in front if p.get("speed")]
        reach = f", from {times(min(speeds))} to {times(max(speeds))} the dense model's speed" if speeds else ""
        return f"No limit was given: {len(front)} points to choose from{reach}. In their middle {best['name']}: {figures}."
    said = f"Asked: {', '.join(wishes[:-1])}{' and ' * (len(wishes) > 1)}{wishes[-1]}. "
    if short := misses(best, asked):
        return said + f"No point of the front meets that. The nearest, {best['name']}, misses it: {'; '.join(short)} ({figures})."
    low = (best.get("speed_spread") or [math.inf])[0]
    slow = f" Some of its timings fall short: {spread(best)}." if low < (asked.get("min_speed") or 0.0) else ""
    return said + f"Met by {best['name']}: {figures}.{slow}{_rival(best, result)}"


def _rival(best: Point, result: Result) -> str:
    """How the best of a single family does by the same measure."""
    asked, known = result["asked"], [b for b in result.get("baselines") or [] if b.get("family") != "dense"]
    rival = chosen(known, asked)
    if rival is None:
        return ""
    if misses(rival, asked):
        return f" No point of a single family does, of {len(known)}."
    figures = f"{rival['name']} ({rise(rival.get('loss'))}, {times(rival.get('speed'))}, {mb(rival.get('bytes'))})"
    as_well = _gain(rival, asked) >= _gain(best, asked)
    return f" {'A single family does as well or better' if as_well else 'The best of a single family'}: {figures}."


def _tiles(result: Result) -> str:
    dense, best = result["dense"], chosen(result["front"], result.get("asked") or {})
    if best is None:
        return ""
    who, trials = best["name"], len(result.get("trials") or [])
    many = f"point{'s' * (len(result['front']) > 1)} on the front" + (f", of {trials:,} candidates" if trials else "")
    return tiles([
        (rise(best.get("loss")), f"perplexity of {who}: {number(best.get('perplexity'))}, dense {number(dense.get('perplexity'))}"),
        (times(best.get("speed")), f"decode speed of {who}, measured" + (f": {spread(best)}" if spread(best) else "")),
        (mb(best.get("bytes")), f"{who} on disk, dense {mb(dense.get('bytes'))}"),
        (str(len(result["front"])), many + (f" in {number(result['seconds'] / 60, 2)} minutes" if result.get("seconds") else ""))])


# The front

def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most - 1] + "…"


def _tip(point: Point, dense: Point) -> str:
    timed = f"{times(point.get('speed'))}{f' ({spread(point)})' if spread(point) else ''} {predicted(point)}".strip()
    return "\n".join(line for line in (
        point["name"], f"perplexity {number(point.get('perplexity'))} ({rise(point.get('loss'))})", timed,
        f"{mb(point.get('bytes'))}, dense {mb(dense.get('bytes'))}", options_of(point), _cut(point.get("recipe") or "", 120)) if line)


def _spots(result: Result) -> list[Spot]:
    """The dense model, the front and the baselines, each with an address: its name where that is one, else a number."""
    dense = result["dense"] | {"name": "dense", "loss": 0.0, "speed": 1.0}
    out = [Spot("dense", "dense", dense, f"dense\nperplexity {number(dense.get('perplexity'))}\n{mb(dense.get('bytes'))}")]
    used = {"across-speed", "across-bytes"}  # the switch of the plot
    baselines = [b for b in result.get("baselines") or [] if b.get("family") != "dense"]  # that one is the dense model once more
    for kind, points in (("front", result["front"]), ("baseline", baselines)):
        for k, point in enumerate(points):
            name = point["name"]
            own = name if re.fullmatch(r"[A-Za-z][\w.-]*", name, re.ASCII) and name not in used else f"{kind}:{k + 1}"
            used.add(own)
            out.append(Spot(own, kind, point, _tip(point, dense)))
    return out


def _legend(spots: list[Spot], trials: int) -> str:
    families = {s.point.get("family") for s in spots if s.kind == "baseline"}
    items = [("front", mark(CIRCLE), "front of the search")]
    items += [(colour(f), mark(shape), f"{f} alone") for f, shape in FAMILIES.items() if f in families]
    items += [("fx", mark(CIRCLE), "others")] if families - set(FAMILIES) else []
    items += [("dots", mark("M-5 3h0M0-4h0M5 2h0"), f"{trials:,} candidates")] if trials else []
    return '<ul class="legend">' + "".join(f'<li class="{c}">{m}{escape(w)}</li>' for c, m, w in items) + "</ul>"


def _front(result: Result, spots: list[Spot]) -> str:
    trials = result.get("trials") or []
    drawn = [plot(spots, trials, result.get("asked") or {}, result["dense"]["perplexity"], across) for across in (SPEED, BYTES)]
    if not any(drawn):
        return ""
    cloud = " Dots: candidates as the search saw them, with predicted speed and on its own text." if trials else ""
    switch = ('<input type="radio" name="across" id="across-speed" checked><input type="radio" name="across" id="across-bytes"><div class='
              '"switch"><label for="across-speed">speed</label><label for="across-bytes">bytes</label></div>') if all(drawn) else ""
    return ('<h2>The front</h2><p class="note">Points: measured, on text that the search never saw; the line joins those of the front that '
            f'no other of it beats.{cloud} Hover for figures, click for all of a point.</p><div class="front-box">{switch}'
            f'{_legend(spots, len(trials))}{"".join(drawn)}</div>')


def _panels(result: Result, spots: list[Spot], first: Point | None) -> str:
    out = ""
    for kind in ("front", "baseline"):
        same = [None, *(s for s in spots if s.kind == kind), None]
        out += "".join(panel(s, result, s.point is first, a, b) for a, s, b in zip(same, same[1:], same[2:], strict=False) if s)
    return out


# Tables

def _row(s: Spot, picked: bool) -> str:
    """A cell carries the figure that the script sorts by."""
    p, state, name = s.point, "", escape(s.point["name"])
    if (p.get("proof") or {}).get("proof"):
        state = met(p["proof"])
    kind = {"dense": "", "front": "front"}.get(s.kind, f"{p.get('family') or 'other'}, {p.get('how') or 'uniform'}")
    link = name if s.kind == "dense" else f'<a href="#{escape(s.id)}">{name}</a>'
    recipe = p.get("recipe") or ""
    made = options_of(p) or _cut(recipe, 200)
    cells: list[tuple[str, Any]] = [
        (f'<span class="{s.family}">{mark(s.shape, s.kind == "dense")}</span>{link}', p["name"]), (escape(kind), kind),
        (number(p.get("perplexity")), p.get("perplexity")), ("" if s.kind == "dense" else rise(p.get("loss")), p.get("loss")),
        (mb(p.get("bytes")).removesuffix(" MB"), p.get("bytes")), (times(p.get("speed")), p.get("speed")),
        (spread(p).replace(" to ", "–"), (p.get("speed_spread") or [None])[0]), (number(p.get("decode_tok_s"), 3), p.get("decode_tok_s")),
        (f'<span class="dot {state}">{state}</span>' if state else "", state),
        (f'<span title="{escape(chr(10).join([made, _cut(recipe, 600)]))}">{escape(made)}</span>' if made else "", made)]
    row = "".join(f'<td data-v="{"" if v is None else escape(str(v))}">{text}</td>' for text, v in cells)
    return f'<tr class="{"base" if s.kind == "dense" else "pick" if picked else ""}">{row}</tr>'


def _table(spots: list[Spot], first: Point | None) -> str:
    heads = ["point", "kind", "perplexity", "rise", "MB", "speed", "timings", "tokens/s", "proof", "made of"]
    return ('<h2>All points</h2><p class="note">Measured: the dense model, the front, single families. Rise: of perplexity over the dense '
            f'model, on text that the search never saw. Timings: their range.</p><div class="wide"><table class="sorted">'
            f'<thead><tr>{"".join(f"<th>{h}</th>" for h in heads)}</tr></thead><tbody>{"".join(_row(s, s.point is first) for s in spots)}'
            "</tbody></table></div>")


ZERO = 5e-5  # nats: less is nothing


def _thousandths(nats: float) -> str:
    v = 1000 * nats
    return "0" if abs(nats) < ZERO else "∞" if math.isinf(v) else f"{v:.1f}" if abs(v) < 9.95 else f"{v:,.0f}"


def _sensitivity(s: dict[str, Any] | None, options: dict[str, Any]) -> str:
    """What one option costs at one place with all else dense: options down, places across."""
    if not s or not s.get("options") or not s.get("places"):
        return ""
    found = [v for row in s["rise"] for v in row if v is not None and 0 < v < math.inf]
    high = math.log10(max(found, default=1.0))
    low = min(high, max(math.log10(min(found, default=1.0)), math.log10(ZERO), high - 4))

    def cell(k: int, j: int) -> str:
        nats = s["rise"][k][j]
        if nats is None:
            return "<td>·</td>"
        heat = min(1.0, max(0.0, (math.log10(nats) - low) / ((high - low) or 1.0))) if nats > ZERO else 0.0
        size, us = (s[key][k][j] if s.get(key) else None for key in ("bytes", "us"))
        option = s["options"][k]
        tip = [s["places"][j], (options.get(option) or {}).get("label") or option, f"{number(nats, 3)} nats"]
        tip += ([] if size is None else [f"{size:,.0f} bytes"]) + ([] if us is None else [f"{micro(us)} µs"])
        hot = ' class="hot"' if heat > 0.55 else ""
        return f'<td{hot} style="--t:{100 * heat:.0f}%" title="{escape(chr(10).join(tip))}">{_thousandths(nats)}</td>'

    body = ""
    for k, option in enumerate(s["options"]):
        text = (options.get(option) or {}).get("text") or option
        body += f'<tr><th title="{escape(text)}">{escape(option)}</th>{"".join(cell(k, j) for j in range(len(s["places"])))}</tr>'
    head = "".join(f"<th>{'<br>'.join(escape(w) for w in place(p) if w)}</th>" for p in s["places"])
    return ('<h2>Where it hurts</h2><p class="note">What one option costs at one place while all else stays dense: thousandths of a nat a '
            f"token, on the search's text. The colour is logarithmic, from {_thousandths(10 ** low)} to {_thousandths(10 ** high)}.</p>"
            f'<div class="wide heat"><table><thead><tr><th>option</th>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def _prediction(prediction: dict[str, Any] | None) -> str:
    pairs = [p for p in (prediction or {}).get("points") or [] if p.get("predicted") and p.get("measured")]
    if not prediction or not pairs:
        return ""
    off = prediction.get("median_error")
    said = "" if off is None else f" Half of the predictions are off by no more than {percent(off)}."
    body = [[str(p["name"]), times(p["predicted"]), times(p["measured"]), f"{100 * (p['predicted'] / p['measured'] - 1):+.1f}%"]
            for p in pairs]
    return ('<h2>Predicted and measured speed</h2><p class="note">The search reckons with times of single sublayers; what it chose is then '
            f"timed whole.{said}</p>{few(plain(['point', 'predicted', 'measured', 'predicted too fast by'], body))}")


def _proxies(proxies: list[dict[str, Any]] | None) -> str:
    if not proxies:
        return ""
    body = "".join(f"<tr><td>{escape(str(p['name']))}</td><td>{number(p.get('spearman'), 3)}{bar(p.get('spearman'))}</td>"
                   f'<td>{count(p.get("n"))}</td><td class="words">{escape(str(p.get("source") or ""))}</td></tr>' for p in proxies)
    heads = '<th>guess</th><th>rank correlation</th><th>candidates</th><th class="words">source</th>'
    return ('<h2>What ranks candidates without running them</h2><p class="note">Rank correlation (Spearman) of each cheap guess with the '
            'loss that was measured: 1 ranks as the measurement does, 0 as chance would.</p>'
            f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>')


def _whole(whole: dict[str, Any] | None) -> str:
    """What was chosen for all codes together, and what was lost by 4 bits everywhere with each of the ways that were tried."""
    def name(way: dict[str, Any]) -> str:
        return " and ".join(w for w in (way.get("rewrite"), way.get("repair")) if w) or "neither"

    if not whole or not whole.get("tried"):
        return ""
    tried = [f"{number(w['rise'], 3)} nats with {name(w)}" for w in sorted(whole["tried"], key=lambda w: float(w["rise"]))]
    return f"{name(whole)}; 4 bits everywhere lose {', '.join(tried)}"


def _measured(result: Result) -> str:
    given = f", {number(result['minutes'], 2)} minutes given" if result.get("minutes") else ""
    by = Counter(t.get("by") or "other" for t in result.get("trials") or [])
    dense = result["dense"]
    params = result.get("params") and count(result["params"])
    sizes = [f"{shown} {what}" for what, shown in (("blocks", result.get("blocks")), ("parameters", params)) if shown]
    steps = [f"{key} {result[key]}" for key in ("batch", "context") if result.get(key)]
    gap = result.get("gap") or {}
    facts = [("model", ", ".join([result["model"], *sizes])),
             ("dense model", ", ".join(w for w in (dense.get("runner"), f"{number(dense.get('decode_tok_s'), 3)} tokens a second") if w)),
             ("decoding", ", ".join(steps)),
             ("formats", result.get("formats") or ""),
             ("search", f"{number(result['seconds'], 3)} s{given}" if result.get("seconds") else ""),
             ("text of the search", "" if gap.get("median") is None else
              f"perplexity is off by {rise(gap['median'])} on the text of the proof, the median of {gap['points']} points"),
             ("candidates", ", ".join(f"{n:,} by {who}" for who, n in by.most_common())),
             ("rewrite and repair", _whole(result.get("whole")))]
    commands = []
    for key, value in (result.get("machine") or {}).items():
        if isinstance(value, list | tuple):
            commands += [str(v) for v in value]
        else:
            facts.append((key, str(value)))
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts if v)
    return f"<h2>How this was measured</h2><dl>{listed}</dl>{''.join(map(copied, commands))}"


def search_page(title: str, result: Result) -> str:
    """The page of one search, from its JSON. Parts that are missing or null are left out; everything given is escaped."""
    spots, first = _spots(result), chosen(result["front"], result.get("asked") or {})
    warnings = "".join(f"<li>{escape(w)}</li>" for w in result.get("warnings") or [])
    return document(title, sentence(result), f"""{_tiles(result)}
{f'<ul class="notice">{warnings}</ul>' if warnings else ""}
{_front(result, spots)}
{_panels(result, spots, first)}
{_table(spots, first)}
{_sensitivity(result.get("sensitivity"), result.get("options") or {})}
{_prediction(result.get("prediction"))}
{_proxies(result.get("proxies"))}
{_measured(result)}""", COLOURS + _beside("search.css"), _beside("search.js"))
