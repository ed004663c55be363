"""Between text and token ids, read from a model's own files: no class of transformers is needed."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.types import BadInput
from trimtab.network.checkpoint import read_json

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
            end = read_json(path / name).get("eos_token_id")
            ids = end if isinstance(end, list) else [] if end is None else [end]
            if not all(type(i) is int for i in ids):
                raise BadInput(f"{path / name}: eos_token_id is {end!r}; it is a token id or a list of them")
            found |= set(ids)
            break
    settings = path / "tokenizer_config.json"
    end = read_json(settings).get("eos_token") if settings.exists() else None
    end = end.get("content") if isinstance(end, dict) else end
    if not isinstance(end, str | None):
        raise BadInput(f"{settings}: eos_token is {end!r}; it is the text of a token")
    token = tokenizer.token_to_id(end) if end else None
    return found if token is None else found | {token}


class Until:
    """A stream of text up to the first of some texts; what may be the beginning of one waits."""

    def __init__(self, texts: Sequence[str]):
        self._texts, self._waiting, self.reached = texts, "", False

    def add(self, piece: str) -> str:
        """What is sure not to belong to one of the texts. `reached`: one is complete; nothing follows."""
        text = self._waiting + piece
        ends = [(at + len(t), at) for t in self._texts if (at := text.find(t)) >= 0]
        self.reached = bool(ends)
        if ends:
            sure = min(ends)[1]
        else:
            sure = next(i for i in range(len(text) + 1) if i == len(text) or any(t.startswith(text[i:]) for t in self._texts))
        self._waiting = "" if ends else text[sure:]
        return text[:sure]

    def rest(self) -> str:
        """What waited when the stream ended."""
        return self._waiting


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
