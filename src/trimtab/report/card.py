"""The README.md every output directory gets: what was done to the model, what it cost, what it bought."""
from __future__ import annotations

from trimtab.report.table import Run, name, percent, ranks, rows, skips, zeros


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    return "`` " + text.replace("\n", " ") + " ``" if "`" in text else f"`{text}`"


def card(run: Run, base: str, commands: list[str]) -> str:
    """Markdown for one trim. `base` names the model it came from; `commands` reproduce and use it, one a line."""
    state = run.get("proof", "pending")
    words = {"passed": "passed", "failed": "**failed: do not serve this model**", "pending": "not yet measured"}
    factored = [f"Ranks of the layers in factors: {ranks(run)}, with {percent(run['factored_share'])} of their parameters  "] \
        if run.get("ranks") else []
    out = ["---", "library_name: transformers", "tags: [trimtab, pruned]", "---", "", f"# {base}, trimmed", "",
           f"Recipe: {_code(str(run['recipe']))}  ", f"Zeros in the trimmed layers: {percent(zeros(run))}  ",
           *factored, f"Proof: {words.get(state, state)}", ""]
    if state != "pending":
        out += [f"| | dense | {_cell(name(run))} |", "|---|---:|---:|"]
        out += [f"| {what} | {_cell(a)} | {_cell(b)} |" for what, a, b in rows(run)]
        out += ["", f"- smaller: {run['smaller']}", f"- faster: {run['faster']}"]
        out += [f"- sparsity: {skips(run)}"] if run.get("sparsity") else []
        out += [f"- warning: {w}" for w in run.get("warnings", [])]
    fence = "```"
    out += ["", "## Commands", "", fence + "sh", *commands, fence, "", "## Limits", "",
            "- The figures hold for the held-out text and the machine they were measured on, and for no other.",
            "- Perplexity and agreement do not see all a model may lose: rare facts, long contexts, other languages.",
            "- The layers are packed for trimtab's kernels: transformers opens the files after `import trimtab`, and not without it."
            if "pack" in run.get("header", {}) else
            "- Zeros and products of factors are stored as ordinary numbers here, so that plain transformers opens the files; "
            "the lines above say what that does to bytes and seconds.",
            "- License and intended use are those of the model it came from.", ""]
    return "\n".join(out)
