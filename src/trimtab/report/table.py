"""Numbers as people read them, and tables of proofs for the terminal."""
from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Run = dict[str, Any]  # the JSON of one trim: its recipe and its proof


def number(x: float | None, digits: int = 4) -> str:
    """`digits` significant figures, thousands grouped, no exponent below a million; an em dash for nothing."""
    if x is None or not math.isfinite(x):
        return "—"
    if x and (abs(x) >= 1e6 or abs(x) < 1e-4):
        return f"{x:.{digits - 1}e}"
    return f"{x:,.{max(0, digits - 1 - math.floor(math.log10(abs(x))) if x else 0)}f}"


def mb(size: float | None) -> str:
    return "—" if size is None else f"{size / 1e6:,.1f} MB"


def count(n: int | None) -> str:
    return "—" if n is None else f"{n / 1e6:,.2f} M" if n >= 1e5 else f"{n:,}"


def percent(x: float | None, places: int = 1) -> str:
    return "—" if x is None or not math.isfinite(x) else f"{100 * x:.{places}f}%"


def times(x: float | None) -> str:
    return "—" if x is None else f"{x:.2f}x"


def name(run: Run) -> str:
    return str(run.get("name") or run["recipe"])


def zeros(run: Run) -> float | None:
    """Share of zeros over the sites, weighted by their size where the proof says it."""
    shares = list((run.get("zeros") or {}).values())
    return run.get("zero_share", sum(shares) / len(shares) if shares else None)


def ranks(run: Run) -> str:
    """Of the layers that are factors: the least and the greatest."""
    low, high = min(run["ranks"].values()), max(run["ranks"].values())
    return str(low) if low == high else f"{low} to {high}"


def skips(run: Run) -> str:
    """What its gates skip, in one line; nothing where it has none."""
    if not (found := run.get("sparsity")):
        return ""
    each = [its["reached"] for its in found["sites"].values()]
    asked = "" if found["target"] is None else f", {percent(found['target'])} asked"
    return (f"gates skip {percent(found['reached'])} of the weights of {len(each)} layers on held-out text{asked}; "
            f"of one layer {percent(min(each))} to {percent(max(each))}")


def stored(run: Run) -> int:
    """Bytes of the model in the recipe's own format, or on disk where none was measured."""
    return (run.get("packed") or run["after"])["bytes"]


def ratio(run: Run) -> float | None:
    """Speed relative to the dense model: the median pair, decode where there is one."""
    pairs = (run.get("timing") or {}).get("ratio") or {}
    return (pairs.get("decode_tok_s") or pairs.get("prefill_tok_s") or {}).get("median")


def met(run: Run) -> str:
    """failed, warning or passed."""
    return "failed" if run.get("proof") == "failed" else "warning" if run.get("warnings") else "passed"


def took(run: Run) -> float | None:
    """Seconds of calibration and edit, or of everything where they were not timed apart."""
    return run.get("edit_seconds") or run.get("seconds")


def rows(run: Run) -> list[tuple[str, str, str]]:
    """(what, dense, trimmed) of one proof; the terminal and the model card show the same."""
    a, b = run["before"], run["after"] or {}
    out = [(what, f(a.get(key)), f(b.get(key))) for what, key, f in (
        ("perplexity", "perplexity", number), ("bits per byte", "bits_per_byte", number),
        ("bytes on disk", "bytes", mb), ("parameters", "params", count), ("nonzero", "nonzero", count),
        ("decode tokens/s", "decode_tok_s", number), ("prefill tokens/s", "prefill_tok_s", number))]
    out = [r for r in out if r[1:] != ("—", "—")]
    if run.get("packed"):
        out.append((f"bytes as {run['packed']['format']}", "", mb(run["packed"]["bytes"])))
    if gone := run.get("removed"):
        out.append(("weights of the blocks removed", "", percent(gone["blocks"])))
        if gone["became_time"]:
            out.append(("of the work removed, became time", "", ", ".join(f"{percent(v, 0)} {k}" for k, v in gone["became_time"].items())))
    if some := run.get("met"):
        out.append(("weights of the blocks that a token meets", "", percent(some["blocks"])))
    if run.get("ranks"):
        out += [("rank", "", ranks(run)), ("parameters left in factors", "", percent(run["factored_share"]))]
    out += [(what, "", f) for what, f in (
        ("recovery", percent(run.get("recovery")) + error(run)), ("KL, nats per token", number(run.get("kl"), 3)),
        ("top-1 agreement", percent(run.get("top1_agreement")))) if f != "—"]
    return out


def error(run: Run) -> str:
    """What another text may say of the recovery: its standard error."""
    e = run.get("recovery_error")
    return f" ± {percent(e, 2)}" if e and math.isfinite(e) else ""


def proof_table(run: Run) -> Table:
    """One trim against the network it came from, or one network by itself."""
    pair = run.get("after") is not None
    table = Table("", "dense" if pair else "", *([escape(name(run))] if pair else []))
    for row in rows(run):
        table.add_row(*row[:3 if pair else 2])
    return table


def console() -> Console:
    """Stdout; where it is no terminal (a log, a pipe) wide enough that no name is cut."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=max(out.width, 120))


def print_proof(run: Run) -> None:
    """The proof on the terminal, and under it in words whether it is smaller, faster, good enough."""
    out = console()
    out.print(proof_table(run))
    for what in ("smaller", "faster"):
        if run.get(what):
            out.print(f"{what}: {escape(run[what])}", soft_wrap=True)
    if run.get("sparsity"):
        out.print(f"sparsity: {skips(run)}", soft_wrap=True)
    for line in run.get("warnings", []):
        out.print(f"[yellow]warning[/]: {escape(line)}", soft_wrap=True)
    if "proof" in run:
        colour = {"failed": "red", "warning": "yellow", "passed": "green"}[met(run)]
        out.print(f"proof: [{colour}]{run['proof']}[/]")
    if run.get("out"):
        out.print(f"written: {escape(str(run['out']))}", soft_wrap=True)


def print_runs(runs: list[Run]) -> None:
    console().print(comparison(runs))


def print_bench(result: dict[str, Any]) -> None:
    """The machine, and speed and memory of one checkpoint or two: medians with their quartiles."""
    pair = result.get("after") is not None
    sides = [result[side] for side in ("before", "after")[:1 + pair]]
    table = Table("median (quartiles)", *(["against", "model", "ratio"] if pair else ["model"]))
    for key, what in (("decode_tok_s", "decode tokens/s"), ("prefill_tok_s", "prefill tokens/s"),
                      ("first_token_s", "first token, s")):
        if result["before"][key] is not None:
            spread = [[number(x, 3) for x in side["quartiles"][key]] for side in sides]
            cells = [f"{number(side[key])} ({low} to {high})" for side, (low, high) in zip(sides, spread, strict=True)]
            table.add_row(what, *cells, *([times(result["ratio"].get(key, {}).get("median"))] if pair else []))
    def in_cache(x: float | None) -> str:
        return percent(x) + " (in cache)" * ((x or 0) > 1)

    for key, what, shown in (("bytes", "bytes on disk", mb), ("resident_bytes", "resident", mb),
                             ("weight_bytes", "weights read a step", mb), ("share_of_read_bandwidth", "of the read bandwidth", in_cache)):
        if any(side[key] is not None for side in sides):
            ratio = times(sides[-1][key] / sides[0][key]) if all(side[key] for side in sides) else ""
            table.add_row(what, *(shown(side[key]) for side in sides), *([ratio] if pair else []))
    out = console()
    out.print(table)
    new = f" and {result['new']} new" if result["new"] else ""
    cache = f", cache {result['cache']}" if result["cache"] else ""
    out.print(f"{result['speed']} with {result['runner']}, torch in {result['dtype']}, {result['threads']} threads, "
              f"prompt {result['prompt']}{new}, batch {result['batch']}, {result['repeats']} rounds taking turns{cache}", soft_wrap=True)
    line = f"{result['machine']['cpu']}, kernels {result['isa']}"
    if result["read_gb_s"]:
        peaks = ", ".join(f"{t} {number(x, 3)}" for t, x in result["peak_gflop_s"].items())
        line += f": reads {number(result['read_gb_s'], 3)} GB/s, multiplies at most {peaks} GFLOP/s"
    out.print(escape(line), soft_wrap=True)


LAYERS, UTILISED = ("layer", "sites", "out x in", "parameters", "near zero", "outliers"), "utilised"


def layer_rows(result: dict[str, Any]) -> list[list[str]]:
    """A row a role of what `inspect` found, under LAYERS, and under UTILISED where that was looked at."""
    rows = []
    for role, r in result["roles"].items():
        row = [role, str(r["sites"]), " x ".join(map(str, r["shape"])), count(r["params"]), percent(r["near_zero"])]
        rows.append([*row, percent(r["outliers"], 2), *([percent(r["utilisation"])] if result.get("sites") else [])])
    return rows


def utilisation_line(result: dict[str, Any]) -> str:
    """The mean, the least and the most of the directions that layers use."""
    each = sorted((u["utilisation"], n, u["utilised_rank"]) for n, u in result["sites"].items())
    low, high = (f"{n} {percent(share)} (rank {rank})" for share, n, rank in (each[0], each[-1]))
    return (f"utilised: {percent(result['mean_utilisation'])} of the directions a layer has, on average, hold "
            f"{percent(result['energy'], 0)} of its inputs and of its outputs; {low} to {high}")


def print_inspect(result: dict[str, Any]) -> None:
    """What a network is made of, and where it looks redundant."""
    out = console()
    out.print(f"{escape(result['model'])}: {result['family']}, {result['blocks']} blocks, {count(result['params'])} "
              f"parameters ({count(result['params_in_sites'])} in the layers a trim may touch), {mb(result['bytes'])}",
              soft_wrap=True)
    table = Table(*LAYERS, *([UTILISED] if result.get("sites") else []))
    for row in layer_rows(result):
        table.add_row(*row)
    out.print(table)
    if result.get("sites"):
        out.print(utilisation_line(result), soft_wrap=True)
    if result.get("activations"):
        print_activations(out, result["activations"])
    if result.get("most_redundant"):
        out.print(f"changes its input least: {escape(', '.join(result['most_redundant']))}", soft_wrap=True)
    if result.get("verified") is not None:
        out.print(f"verified: {result['verified']} tensors and what describes them are what was written")
    if result.get("recipe"):
        out.print(f"already trimmed: {escape(str(result['recipe']))}", soft_wrap=True)


def activation_rows(a: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads, and a row an MLP, of what its hidden values say."""
    tolerances = [f"{t['p']:g}" for t in a["tolerances"]]
    name = "PPL" if a["metric"] == "perplexity" else a["metric"]
    last = a["union"]["batch"][-1]
    heads = ["MLP", "neurons", "zero", f"below {a['small_below']:g} rms", *(f"out at {name}-{p}%" for p in tolerances)]
    heads += [f"union of {last}"] if last > 1 else []
    heads += ["dynamic dead", "never active"] if a["relu"] else []
    rows = []
    for x in a["layers"]:
        row = [x["layer"], f"{x['neurons']:,}", percent(x["zeros"]), percent(x["small"]), *(percent(x["sparsity"][p]) for p in tolerances)]
        row += [percent(x["union"]["sparsity"][-1])] if last > 1 else []
        row += [percent(x["dead"]["dynamic"]), percent(x["dead"]["never_active"])] if a["relu"] else []
        rows.append(row)
    return heads, rows


def looked_at(a: dict[str, Any]) -> str:
    return f"{a['tokens']:,} tokens of {a['sequences']} sequence{'s' * (a['sequences'] > 1)}"


def activation_lines(a: dict[str, Any]) -> list[str]:
    """What the measures of activations come to, a line each."""
    lm = a["metric"] == "perplexity"
    out = []
    for t in a["tolerances"]:
        cost = f"perplexity {number(t['score'])} for {number(a['score'])}" if lm else f"cosine {number(t['score'])} to the outputs without"
        end = "; not more, since a CETT of 1 is the end of the search" if t["whole_range"] else ""
        out.append(f"{'PPL' if lm else 'cosine'}-{t['p']:g}%: {percent(t['sparsity'])} of the hidden values can be left out in all layers "
                   f"at once, {cost} (CETT {number(t['cett'], 3)}){end}")
    u = a["union"]
    if u["batch"][-1] > 1:
        out.append(f"union: no token of {u['batch'][-1]} needs {percent(u['sparsity'][-1])} of the neurons, against "
                   f"{percent(u['sparsity'][0])} for one ({percent(u['independent'][-1])} if neurons were independent; mask: {u['mask']})")
    if a["left_out"]:
        out.append(a["left_out"])
    return out


def print_activations(out: Console, a: dict[str, Any]) -> None:
    heads, rows = activation_rows(a)
    table = Table(*heads, title=f"hidden values over {looked_at(a)}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    out.print(table)
    for line in activation_lines(a):
        out.print(escape(line), soft_wrap=True)


def comparison(runs: list[Run]) -> Table:
    """Several recipes on one network, the network itself first, best recovery next."""
    lm = runs[0]["metric"] == "perplexity"
    table = Table("recipe", "zeros", runs[0]["metric"], "recovery", "KL", "top-1", "stored", "speed", "seconds")
    for column in table.columns[1:]:
        column.justify = "right"
    a = runs[0]["before"]
    base = number(a["perplexity"]) if lm else "1.000"
    table.add_row("dense", "0%", base, "100.0%", "", "", mb(a["bytes"]), "1.00x", "",
                  style="bold", end_section=True)
    for run in ranked(runs):
        table.add_row(escape(name(run)), percent(zeros(run), 0), number(run["score"]), percent(run["recovery"]),
                      number(run.get("kl"), 3), percent(run.get("top1_agreement")), mb(stored(run)), times(ratio(run)),
                      number(took(run), 3), style={"failed": "red", "warning": "yellow"}.get(met(run)))
    return table


def ranked(runs: list[Run]) -> list[Run]:
    """Best recovery first; a broken run last."""
    return sorted(runs, key=lambda r: -(r["recovery"] if r.get("recovery") is not None else -math.inf))


def search_line(result: dict[str, Any]) -> str:
    """What was asked, and what came of it."""
    asked = result["asked"]
    said = ", ".join(x for x in (f"at most {100 * asked['max_loss']:g}% loss" if asked["max_loss"] is not None else "",
                                 f"at most {mb(asked['max_bytes'])}" if asked["max_bytes"] is not None else "",
                                 f"{asked['min_speed']:g}x as fast" if asked["min_speed"] is not None else "") if x)
    each = {p["name"]: p for p in result["front"]}
    best = each[(result["meets"] or [result["nearest"]])[0]]
    is_ = f"{best['name']}: perplexity {number(best['perplexity'])} ({100 * best['loss']:+.1f}%), {mb(best['bytes'])}, "
    is_ += times(best["speed"])
    if not said:
        return f"{len(each)} points of the front; the first is {is_}"
    return f"asked: {said}; found: {is_}" if result["meets"] else f"asked: {said}; nothing that was finished meets it, the nearest is {is_}"


def print_search(result: dict[str, Any]) -> None:
    """The front and what stands beside it, and where everything is."""
    out = console()
    table = Table("", "perplexity", "loss", "bytes", "speed", "told", "of", title=f"{result['model']}, decoding {result['batch']} behind "
                  f"{result['context']} tokens")
    for column in table.columns[1:6]:
        column.justify = "right"
    for kind, points in (("front", result["front"]), ("baseline", result["baselines"])):
        for k, p in enumerate(points):
            table.add_row(escape(p["name"]), number(p["perplexity"]), f"{100 * p['loss']:+.1f}%", mb(p["bytes"]), times(p["speed"]),
                          times(p["predicted_speed"]), p.get("family", kind), end_section=k == len(points) - 1,
                          style="bold" if p["name"] in result["meets"] else None)
    out.print(table)
    out.print(search_line(result), soft_wrap=True)
    off = result["prediction"]["median_error"]
    out.print(f"{len(result['trials'])} candidates were run; times were told to within {percent(off)} (median)", soft_wrap=True)
    out.print(f"written: {escape(result['out'])}/report.html, models/ and search.json", soft_wrap=True)


def print_export(result: dict[str, Any]) -> None:
    """What was written, of which types, and what to know of it."""
    out = console()
    types = ", ".join(f"{n} {kind}" for kind, n in result.get("types", {}).items())
    size = f"{mb(result['bytes'])} in {result['to']}, from {mb(result['model_bytes'])}"
    out.print(size + (f"; tensors: {types}" if types else ""), soft_wrap=True)
    for line in result["warnings"]:
        out.print(f"[yellow]warning[/]: {escape(line)}", soft_wrap=True)
    out.print(f"written: {escape(result['out'])}", soft_wrap=True)
