"""A tokenizer.json as the vocabulary of a GGUF file."""
from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from trimtab.core.types import BadInput
from trimtab.network.checkpoint import read_json
from trimtab.runtime.text import open_tokenizer

# How text is cut before bytes are merged: llama.cpp knows a few ways by name, tokenizer.json says it as a regular expression.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+{0}|" + r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*{0}|"
CUTS = {  # name in llama.cpp -> steps: a pattern, or None for digits one by one
    "gpt-2": (GPT2,),
    "llama-bpe": (_WORD + r"\p{N}{1,3}" + _REST,),
    "qwen2": (_WORD + r"\p{N}" + _REST,),
    "smollm": (None, GPT2),
    "tekken": (_CASED.replace("{0}", "") + r"\p{N}" + _TEKKEN_REST,),
    "gpt-4o": (_CASED.replace("{0}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"\p{N}{1,3}" + _TEKKEN_REST,),
}
TRIED = 1000  # lines of text that say how far two ways of cutting are apart


def add_vocabulary(writer: GGUFWriter, path: Path, config: dict[str, Any], size: int) -> list[str]:
    """Write the vocabulary of a model directory for `size` rows of embeddings. Returns warnings.

    Byte-level BPE becomes the model "gpt2". Of any other tokenizer, or none, the file holds nothing and takes token ids alone.
    BadInput where the tokenizer has more tokens than the model has rows.
    """
    tokenizer = open_tokenizer(path)
    file = path / "tokenizer.json"
    about = read_json(file) if tokenizer is not None else {}
    why = "there is no tokenizer.json" if tokenizer is None else _unfit(about)
    if why:
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(size)
        return [f"{why}: the file has no vocabulary and takes token ids alone"]
    model, added = about["model"], about.get("added_tokens") or []
    texts = {i: t for t, i in model["vocab"].items()} | {a["id"]: a["content"] for a in added}
    if max(texts) >= size:
        raise BadInput(f"{file} has tokens up to {max(texts)}, the model has embeddings for {size}; use the tokenizer it was made with")
    kinds = {a["id"]: TokenType.CONTROL if a.get("special") else TokenType.USER_DEFINED for a in added}
    writer.add_tokenizer_model("gpt2")
    warnings = _add_cut(writer, tokenizer, about)
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([kinds.get(i, TokenType.NORMAL if i in texts else TokenType.UNUSED) for i in range(size)])
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if merges:
        writer.add_token_merges(merges)
    _add_special(writer, path, config, tokenizer)
    return warnings


def _unfit(about: dict[str, Any]) -> str:
    """Why a tokenizer.json is no byte-level BPE; empty where it is."""
    model = about.get("model") or {}
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    levels = [s for s in _steps(about.get("pre_tokenizer")) if s["type"] == "ByteLevel"]
    if kind != "BPE" or model.get("byte_fallback") or not levels:
        return f"its tokenizer is no byte-level BPE ({kind}{' with bytes to fall back to' if model.get('byte_fallback') else ''})"
    return ""


def _steps(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre is None:
        return []
    return [s for p in pre["pretokenizers"] for s in _steps(p)] if pre["type"] == "Sequence" else [pre]


def _cut(about: dict[str, Any]) -> tuple[str | None, ...] | None:
    """How a tokenizer.json cuts text, as CUTS has it; None where it does something else."""
    found: list[str | None] = []
    for s in _steps(about.get("pre_tokenizer")):
        if s["type"] == "Split" and s["behavior"] in ("Isolated", "Removed") and s["invert"] == (s["behavior"] == "Removed") \
                and "Regex" in s["pattern"]:
            found.append(s["pattern"]["Regex"])
        elif s["type"] == "Digits" and s.get("individual_digits"):
            found.append(None)
        elif s["type"] == "ByteLevel" and not s.get("add_prefix_space"):
            found += [GPT2] if s.get("use_regex", True) else []
        else:
            return None
    return tuple(found)


def _add_cut(writer: GGUFWriter, tokenizer: Any, about: dict[str, Any]) -> list[str]:
    cut = _cut(about)
    if (name := next((n for n, steps in CUTS.items() if steps == cut), "")) != "":
        writer.add_tokenizer_pre(name)
        return []
    apart = {name: _apart(tokenizer, about, steps) for name, steps in CUTS.items()}
    name = min(apart, key=lambda n: apart[n])
    writer.add_tokenizer_pre(name)
    return [f"llama.cpp has no name for the way this tokenizer cuts text before it merges; the file says {name}, the nearest, which gives "
            f"other tokens for {apart[name]:.0%} of the lines of some source text: give llama.cpp token ids where that matters"]


@cache
def _lines() -> list[str]:
    from trimtab.builtin import corpus

    lines = [x for _, t in corpus.modules("validation") for x in t.splitlines(keepends=True) if x.strip()]
    return lines[::max(1, len(lines) // TRIED)][:TRIED]


def _apart(tokenizer: Any, about: dict[str, Any], steps: tuple[str | None, ...]) -> float:
    """The share of lines of source text that become other tokens where they are cut by `steps`."""
    from tokenizers import Tokenizer

    pre = [{"type": "Digits", "individual_digits": True} if s is None else
           {"type": "Split", "pattern": {"Regex": s}, "behavior": "Isolated", "invert": False} for s in steps]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    other = Tokenizer.from_str(json.dumps({**about, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*pre, level]},
                                           "truncation": None, "padding": None}))
    lines = _lines()
    ours, theirs = (t.encode_batch(lines, add_special_tokens=False) for t in (tokenizer, other))
    return sum(a.ids != b.ids for a, b in zip(ours, theirs, strict=True)) / len(lines)


def _add_special(writer: GGUFWriter, path: Path, config: dict[str, Any], tokenizer: Any) -> None:
    """Ids of the tokens that begin, end and fill a text, whether they are added to one, and the template of a conversation."""
    def settings(name: str) -> dict[str, Any]:
        return read_json(path / name) if (path / name).exists() else {}

    about, generation = settings("tokenizer_config.json"), settings("generation_config.json")

    def ids(kind: str) -> list[int]:
        text = about.get(f"{kind}_token")
        text = text.get("content") if isinstance(text, dict) else text
        own = tokenizer.token_to_id(text) if text else None
        given = generation.get(f"{kind}_token_id", config.get(f"{kind}_token_id"))
        every = [own, *(given if isinstance(given, list) else [given])]
        return list(dict.fromkeys(i for i in every if type(i) is int and i >= 0))

    bos, eos, pad = ids("bos"), ids("eos"), ids("pad")
    if bos:
        writer.add_bos_token_id(bos[0])
    if eos:
        writer.add_eos_token_id(eos[0])
        if len(eos) > 1:
            writer.add_eot_token_id(eos[1])
    if pad:
        writer.add_pad_token_id(pad[0])
    plain, full = (tokenizer.encode("a", add_special_tokens=s).ids for s in (False, True))
    writer.add_add_bos_token(bool(bos) and full[:1] == bos[:1] != plain[:1])
    writer.add_add_eos_token(bool(eos) and full[-1:] == eos[:1] != plain[-1:])
    template = about.get("chat_template")
    if isinstance(template, str):
        writer.add_chat_template(template)
    elif (path / "chat_template.jinja").exists():
        writer.add_chat_template((path / "chat_template.jinja").read_text(encoding="utf-8"))
