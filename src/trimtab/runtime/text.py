"""Between text and token ids, read from a model's own files: no class of transformers is needed."""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.types import BadInput

TAIL = 8  # tokens of the prompt that new ones are decoded behind: some decoders treat a first token differently


def open_tokenizer(path: Path) -> Any | None:
    """The fast tokenizer (`tokenizers.Tokenizer`) of a model directory, None if it has none."""
    file = path / "tokenizer.json"
    if not file.exists():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises nothing narrower
        raise BadInput(f"{file} is no tokenizer ({e}); fetch or save it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def stop_ids(path: Path, tokenizer: Any) -> set[int]:
    """What ends a text: of generation_config.json, or else config.json, and the tokenizer's own end of sequence."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (path / name).exists():
            end = _json(path / name).get("eos_token_id")
            found |= {end} if isinstance(end, int) else set(end or ())
            break
    settings = path / "tokenizer_config.json"
    end = _json(settings).get("eos_token") if settings.exists() else None
    token = tokenizer.token_to_id(end["content"] if isinstance(end, dict) else end) if end else None
    return found if token is None else found | {token}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise BadInput(f"{path} is not a JSON object; fetch or save it again")
    return value


class Pieces:
    """New pieces of text out of a stream of tokens; half a character waits for its other half."""

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int] = ()):
        self._decode, self._ids = decode, list(prompt[-TAIL:])
        self._begin, self._shown = 0, len(self._ids)

    def add(self, token: int) -> str:
        """What this token adds, which may be nothing yet."""
        self._ids.append(token)
        before, now = self._decode(self._ids[self._begin:self._shown]), self._decode(self._ids[self._begin:])
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return now[len(before):]
