"""Numbers as people read them, and tables of proofs for the terminal."""
from __future__ import annotations

import math
from typing import Any

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


def percent(x: float | None, places: int = 1) -> str:
    return "—" if x is None or not math.isfinite(x) else f"{100 * x:.{places}f}%"


def times(x: float | None) -> str:
    return "—" if x is None else f"{x:.2f}x"


def name(run: Run) -> str:
    return str(run.get("name") or run["recipe"])


def zeros(run: Run) -> float | None:
    """Share of zeros over the sites, weighted by their size where the proof says it."""
    shares = list((run.get("sparsity") or {}).values())
    return run.get("zero_share", sum(shares) / len(shares) if shares else None)


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


def rows(run: Run) -> list[tuple[str, str, str]]:
    """(what, dense, trimmed) of one proof; the terminal and the model card show the same."""
    a, b = run["before"], run["after"]
    out = [(what, f(a.get(key)), f(b.get(key))) for what, key, f in (
        ("perplexity", "perplexity", number), ("bits per byte", "bits_per_byte", number), ("bytes on disk", "bytes", mb),
        ("parameters", "params", lambda n: number(n, 4)), ("nonzero", "nonzero", lambda n: number(n, 4)),
        ("decode tokens/s", "decode_tok_s", number), ("prefill tokens/s", "prefill_tok_s", number))]
    out = [r for r in out if r[1:] != ("—", "—")]
    if run.get("packed"):
        out.append((f"bytes as {run['packed']['format']}", "", mb(run["packed"]["bytes"])))
    out.append(("recovery", "", percent(run.get("recovery"))))
    out += [(what, "", f) for what, f in (("KL, nats per token", number(run.get("kl"), 3)),
                                          ("top-1 agreement", percent(run.get("top1_agreement")))) if f != "—"]
    return out


def proof_table(run: Run) -> Table:
    """One trim against the network it came from."""
    table = Table("", "dense", name(run), title="proof", title_justify="left")
    for row in rows(run):
        table.add_row(*row)
    colour = {"failed": "red", "warning": "yellow", "passed": "green"}[met(run)]
    for line in (f"smaller {run['smaller']}", f"faster {run['faster']}", *run.get("warnings", [])):
        table.caption = f"{table.caption}\n{line}" if table.caption else line
    table.caption_style, table.caption_justify = colour, "left"
    return table


def comparison(runs: list[Run]) -> Table:
    """Several recipes on one network, the network itself first, best recovery next."""
    lm = runs[0]["metric"] == "perplexity"
    table = Table("recipe", "zeros", runs[0]["metric"], "recovery", "KL", "top-1", "stored", "speed", "seconds")
    for column in table.columns[1:]:
        column.justify = "right"
    a = runs[0]["before"]
    table.add_row("dense", percent(0.0, 0), number(a["perplexity"]) if lm else "1.000", "100.0%", "", "", mb(a["bytes"]),
                  "1.00x", "", style="bold", end_section=True)
    for run in ranked(runs):
        table.add_row(name(run), percent(zeros(run), 0), number(run["score"]), percent(run["recovery"]),
                      number(run.get("kl"), 3), percent(run.get("top1_agreement")), mb(stored(run)), times(ratio(run)),
                      number(run.get("seconds"), 3), style={"failed": "red", "warning": "yellow"}.get(met(run)))
    return table


def ranked(runs: list[Run]) -> list[Run]:
    """Best recovery first; a broken run last."""
    return sorted(runs, key=lambda r: -(r["recovery"] if r.get("recovery") is not None else -math.inf))
