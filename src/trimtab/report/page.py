"""One self-contained HTML page: no script, no font, no picture from elsewhere; it opens offline and prints."""
from __future__ import annotations

from html import escape
from typing import Any

from trimtab.report import activation_plots, plots
from trimtab.report.table import (
    LAYERS,
    UTILISED,
    Run,
    activation_lines,
    activation_rows,
    count,
    layer_rows,
    looked_at,
    mb,
    met,
    name,
    number,
    percent,
    ranked,
    ratio,
    skips,
    stored,
    times,
    took,
    utilisation_line,
    zeros,
)

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#16202a;--soft:#5a6875;--line:#dfe5ea;--panel:#f5f8fa;--accent:#0b6e8a;
--good:#0a7a55;--warn:#9a6200;--bad:#b3361b;--on:#fff}
@media (prefers-color-scheme:dark){:root{--bg:#11171d;--ink:#e4eaef;--soft:#94a3b0;--line:#2a343d;--panel:#18212a;
--accent:#5cc3de;--good:#4cc79b;--warn:#e6b04c;--bad:#f08a6c;--on:#0c1116;
--c0:#5aa9e6;--c1:#f2813d;--c2:#3cc79a;--c3:#e08bbd;--c4:#e3b341;--c5:#86cdf2}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
.brand{display:flex;gap:10px;align-items:center;color:var(--accent);font-weight:650;letter-spacing:.01em}
h1{font-size:clamp(1.6rem,4.5vw,2.4rem);line-height:1.15;margin:.5em 0 .4em;letter-spacing:-.02em;text-wrap:balance}
h3{font-size:1rem;margin:1.8rem 0 .2rem}
h2{font-size:1.2rem;margin:3rem 0 .3rem;letter-spacing:-.01em}
p{max-width:72ch;margin:.3em 0 1em}.note{color:var(--soft);font-size:.92rem}
.lead{font-size:1.14rem;max-width:66ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(190px,46%),1fr));gap:12px;margin:1.6rem 0 0}
.tile{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.tile b{display:block;font-size:1.65rem;line-height:1.2;font-weight:650;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.88rem}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:10px;-webkit-overflow-scrolling:touch}
.plot{padding:14px 10px;min-width:0}.plot svg{display:block;max-width:none}
@media (min-width:990px){.plot svg{width:100%;height:auto}}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:8px 9px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
tr:last-child td{border-bottom:0}
th{color:var(--soft);font-weight:550;font-size:.84rem;background:var(--panel)}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--bg);white-space:normal;
min-width:130px;overflow-wrap:anywhere}
th:first-child{background:var(--panel)}
.base td{background:var(--panel)!important;font-weight:600}
.bar{display:inline-block;height:7px;border-radius:4px;background:var(--accent);opacity:.75;vertical-align:middle;margin-left:8px}
.rail{display:inline-block;width:52px;text-align:left}
.dot::before{content:"";display:inline-block;width:8px;height:8px;border-radius:50%;margin-right:7px;background:currentColor}
.passed{color:var(--good)}.warning{color:var(--warn)}.failed{color:var(--bad)}
.heats{display:flex;flex-wrap:wrap;gap:18px 28px}.heats figure{margin:0;max-width:100%}
.heats figcaption{font-size:.9rem;margin-bottom:4px;max-width:52ch}.heats .in{overflow-x:auto}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:14px}
.pair figure{margin:0;min-width:0}figcaption{font-weight:600;font-size:.92rem}
pre{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:12px 14px;
margin:.4em 0;overflow-x:auto;tab-size:4;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre i{font-style:normal;color:var(--soft)}
dl{display:grid;grid-template-columns:minmax(110px,max-content) 1fr;gap:4px 20px;font-size:.92rem;margin:.6em 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
details summary{cursor:pointer;color:var(--accent);font-size:.95rem;margin:.6em 0}
@media (max-width:560px){.rail{display:none}main{padding:24px 16px 48px}th,td{padding:7px 9px}
.wide{margin:0 -16px;border-radius:0;border-left:0;border-right:0}}
@media print{.wide{overflow:visible}details{display:block}}
"""
LOGO = ('<svg width="26" height="26" viewBox="0 0 26 26" aria-hidden="true">'
        '<path d="M3 3h11v20H8q-5-9-5-20z" fill="currentColor"/>'
        '<path d="M16 9l7 3v8l-7 3z" fill="currentColor" opacity=".55"/></svg>')


def quality(run: Run) -> str:
    """The figure a recipe is judged by, in words."""
    if run["metric"] == "perplexity":
        return f"perplexity {number(run['score'], 3)} against {number(run['before']['perplexity'], 3)}"
    return f"{run['metric']} {number(run['score'], 3)} to the dense model"


def sentence(runs: list[Run]) -> str:
    """What came of it, in one sentence that does not flatter."""
    best = ranked(runs)[0]
    if best.get("recovery") is None:
        return "Every recipe left a model whose output is not a number."
    many = f"Of {len(runs)} recipes, {name(best)} keeps the most" if len(runs) > 1 else f"{name(best)} keeps"
    out = f"{many}: {percent(best['recovery'])} of the dense model's quality ({quality(best)})"
    size, dense = stored(best), best["before"]["bytes"]
    if best.get("packed") and size < 0.99 * dense:
        out += f", and would take {mb(size)} instead of {mb(dense)} stored as {best['packed']['format']}"
    elif size < 0.99 * dense:
        out += f", in {mb(size)} instead of {mb(dense)}"
    else:
        out += ", at no saving in bytes"
    quick = [r for r in runs if str(r.get("faster", "")).startswith("yes")]
    timed = any(ratio(r) is not None for r in runs)
    subject = "none is" if len(runs) > 1 else "it is not"
    return out + (f"; faster: {', '.join(map(name, quick))}." if quick else f"; {subject} faster." if timed else ".")


def _tiles(runs: list[Run]) -> str:
    best, small = ranked(runs)[0], min(runs, key=stored)
    fast = max(runs, key=lambda r: ratio(r) or 0)
    a = runs[0]["before"]
    items = [(percent(best.get("recovery")), f"best quality kept: {name(best)}"),
             (number(a["perplexity"], 3), "perplexity of the dense model") if runs[0]["metric"] == "perplexity" else
             (number(best["score"], 4), f"best {best['metric']} to the dense model"),
             (mb(stored(small)), f"smallest stored: {name(small)} (dense: {mb(a['bytes'])})")]
    if ratio(fast) is not None:
        clear = "" if str(fast.get("faster", "")).startswith("yes") else "; no clear gain"
        items.append((times(ratio(fast)), f"best speed with torch: {name(fast)}{clear}"))
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><b>{escape(x)}</b><span>{escape(w)}</span></div>' for x, w in items) + "</div>"


def _table(runs: list[Run]) -> str:
    lm = runs[0]["metric"] == "perplexity"
    heads = ["recipe", "zeros", runs[0]["metric"], "recovery"] + (["KL", "top-1"] if lm else [])
    heads += ["on disk", "in its format", "speed", "seconds", "proof"]
    a = runs[0]["before"]
    base = ["dense (baseline)", "0%", number(a["perplexity"]) if lm else "1.000", f'100.0%{_bar(1.0)}']
    base += (["", ""] if lm else []) + [mb(a["bytes"]), "", "1.00x", "", ""]
    body = ['<tr class="base">' + "".join(f"<td>{c}</td>" for c in base) + "</tr>"]
    for run in ranked(runs):
        state = met(run)
        cells = [escape(name(run)), percent(zeros(run), 0), number(run["score"]),
                 percent(run.get("recovery")) + _bar(run.get("recovery"))]
        cells += [number(run.get("kl"), 3), percent(run.get("top1_agreement"))] if lm else []
        packed = run.get("packed")
        cells += [mb(run["after"]["bytes"]), f"{mb(packed['bytes'])} {escape(packed['format'])}" if packed else "—",
                  times(ratio(run)), number(took(run), 3), f'<span class="dot {state}">{state}</span>']
        tip = escape("; ".join([f"smaller {run.get('smaller', '')}", f"faster {run.get('faster', '')}",
                                *run.get("warnings", [])]))
        body.append(f'<tr title="{tip}">' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return ('<div class="wide"><table><thead><tr>' + "".join(f"<th>{escape(h)}</th>" for h in heads) +
            f'</tr></thead><tbody>{"".join(body)}</tbody></table></div>')


def _bar(share: float | None) -> str:
    wide = 44 * min(1.0, max(0.0, share or 0.0))
    return f'<span class="rail"><span class="bar" style="width:{wide:.0f}px"></span></span>'


def _plots(runs: list[Run]) -> str:
    out = ["<h2>Quality against size</h2>",
           '<p class="note">Each recipe at the bytes it takes in its own storage format.</p>',
           f'<div class="wide plot">{plots.quality_size(runs)}</div>']
    if lines := plots.block_error(runs):
        out += ["<h2>Where the error arises</h2>",
                '<p class="note">How far the hidden state behind each block has moved from that of the dense model, '
                "each model on its own inputs: the error a recipe makes and carries on.</p>",
                f'<div class="wide plot">{lines}</div>']
    if heats := plots.heat_maps(runs):
        out += ["<h2>Where the zeros are</h2>",
                '<p class="note">Per cent of zeros in each site of each block, read from the files written.</p>',
                '<div class="heats">']
        out += [f'<figure><figcaption>{escape(c)}</figcaption><div class="in">{s}</div></figure>' for c, s in heats]
        out.append("</div>")
    if heats := plots.heat_maps(runs, plots.SKIPPED):
        out += ["<h2>What gates skip</h2>",
                '<p class="note">Per cent of the inputs of each site that its gate left out on held-out text.</p>', '<div class="heats">']
        out += [f'<figure><figcaption>{escape(c)}</figcaption><div class="in">{s}</div></figure>' for c, s in heats]
        out.append("</div>")
    return "\n".join(out)


def _samples(samples: dict[str, str], runs: list[Run]) -> str:
    """`prompt` is what all continue; every other key names who wrote the text. The dense one first, then by rank."""
    rank = {name(r): k for k, r in enumerate(ranked(runs))}
    texts = sorted(((who, text) for who, text in samples.items() if who != "prompt"), key=lambda t: rank.get(t[0], -1))
    if not texts:
        return ""
    prompt = samples.get("prompt", "")
    shown = [f"<figure><figcaption>{escape(who)}</figcaption><pre><i>{escape(prompt)}</i>"
             f"{escape(text.removeprefix(prompt))}</pre></figure>" for who, text in texts]
    first, rest = "".join(shown[:2]), "".join(shown[2:])
    more = f'<details><summary>{len(texts) - 2} more</summary><div class="pair">{rest}</div></details>' if rest else ""
    return ("<h2>What they write</h2>"
            '<p class="note">Greedy continuation of the same prompt (grey), the most likely token each time.</p>'
            f'<div class="pair">{first}</div>{more}')


def activations(a: dict[str, Any]) -> str:
    """What the hidden values of the MLPs say, as a section."""
    heads, rows = activation_rows(a)
    said = "".join(f"<p>{escape(x[:1].upper() + x[1:])}.</p>" for x in activation_lines(a))
    first = a["tolerances"][0]
    drawn = [("Zero, small, or not needed", f"Hidden values of each MLP. Small: below {a['small_below']:g} of a layer's root mean square. "
              "Left out: what all layers can do without at once while the network is at most so many per cent worse "
              f"({activation_plots.tolerance(a, first['p'])}), weak neurons first.", activation_plots.shares(a)),
             ("What leaving out costs", "Points: what the search for the tolerances measured, one threshold a layer for one relative error "
              "of all layers (CETT).", activation_plots.costs(a)),
             ("What a batch has in common", "Tokens decoded together share the weights that are read: neurons that none of them needs, by "
              f"{'exact zeros' if a['union']['mask'] == 'zeros' else a['union']['mask']}. Tokens of a batch are of different sequences.",
              activation_plots.unions(a)),
             ("Dead neurons", f"Over {a['tokens']:,} tokens; fewer are zero for every token the more of them are looked at.",
              activation_plots.neurons(a))]
    figures = "".join(f'<h3>{escape(title)}</h3><p class="note">{escape(note)}</p><div class="wide plot">{svg}</div>'
                      for title, note, svg in drawn if svg)
    return (f'<h2>What the hidden values say</h2><p class="note">{looked_at(a)}.</p>{said}'
            f"{_plain(heads, rows)}{figures}")


def utilised(result: dict[str, Any]) -> str:
    """How many directions layers use, as a section."""
    said = utilisation_line(result)
    return (f'<h2>How much of their rank layers use</h2><p>{escape(said[:1].upper() + said[1:])}.</p><p class="note">The fewer of the '
            f"directions that hold {percent(result['energy'], 0)} of a layer's inputs and of those that hold as much of its outputs, over "
            f'the shorter side of its weight.</p><div class="wide plot">{activation_plots.utilisation(result["sites"])}</div>')


def _plain(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _provenance(runs: list[Run], machine: dict[str, Any]) -> str:
    facts, commands = [], []
    for key, value in machine.items():
        if isinstance(value, list | tuple):
            commands += [str(v) for v in value]
        else:
            facts.append((key, str(value)))
    timing = runs[0].get("timing") or {}
    if timing:
        facts.append(("speed", f"{timing['speed']} with {timing['runner']} in {timing['dtype']}, "
                               f"{timing['threads']} threads, median of {timing['repeats']} alternating pairs"))
    if runs[0].get("tokens"):
        unit = "tokens" if runs[0]["metric"] == "perplexity" else "inputs"
        facts.append(("proof", f"{runs[0]['tokens']:,} held-out {unit}"))
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
    lines = "".join(f"<dt>{escape(name(r))}</dt><dd>smaller {escape(r.get('smaller', '—'))}<br>faster "
                    f"{escape(r.get('faster', '—'))}{'<br>sparsity: ' * bool(r.get('sparsity'))}{escape(skips(r))}"
                    f"{''.join('<br>' + escape(w) for w in r.get('warnings', []))}</dd>"
                    for r in ranked(runs))
    run = f"<pre>{escape(chr(10).join(commands))}</pre>" if commands else ""
    return (f"<h2>How this was measured</h2><dl>{listed}</dl>{run}"
            f"<details><summary>Smaller? Faster? One line for each recipe</summary><dl>{lines}</dl></details>")


def page(title: str, runs: list[Run], samples: dict[str, str], machine: dict[str, Any]) -> str:
    """The report. `runs`: results of trims of one network (see the guide for their keys), each with a `recipe` and
    optionally a shorter `name`; `samples`: {"prompt": text, who: text, ...}; `machine`: facts as words, a list of
    commands under any key. Everything given is escaped."""
    if not runs:
        raise ValueError("a report needs at least one run")
    return _document(title, sentence(runs), f"""{_tiles(runs)}
<h2>All recipes</h2>
<p class="note">Recovery is {'dense perplexity divided by trimmed perplexity' if runs[0]["metric"] == "perplexity" else
'the cosine to the dense model'}; speed is relative to the dense model, measured in turns with it.</p>
{_table(runs)}
{_plots(runs)}
{_samples(samples, runs)}
{_provenance(runs, machine)}""")


def inspect_page(model: str, result: dict[str, Any], facts: dict[str, str]) -> str:
    """What `inspect` found of one network, called `model`; `facts`: how, in words."""
    lead = (f"{result['family']}, {result['blocks']} blocks, {count(result['params'])} parameters, {count(result['params_in_sites'])} of "
            f"them in layers that a trim may touch, {mb(result['bytes'])}.")
    least = f"<p>Changes its input least: {escape(', '.join(result['most_redundant']))}.</p>" if result["most_redundant"] else ""
    used = utilised(result) if result.get("sites") else ""
    heads = [*LAYERS, *([UTILISED] if result.get("sites") else [])]
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return _document(f"trimtab inspect: {model}", lead, f"""<h2>Layers</h2>
{_plain(heads, layer_rows(result))}{least}{used}
{activations(result["activations"]) if result.get("activations") else ""}
<h2>How this was measured</h2><dl>{listed}</dl>""")


def _document(title: str, lead: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>
<header><div class="brand">{LOGO}<span>trimtab</span></div><h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p></header>
{body}
</main></body></html>
"""
