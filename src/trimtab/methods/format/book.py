from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.books import WIDEST, Books, typed
from trimtab.methods.format.panels import VECTORS, Packed, Values, matrix

INDICES = (("values", "book", "n"), ("residual", "residual_book", "m"))  # buffers of an index and its book, and which number is its width
BESIDE, INPUTS = 16, 4       # vectors of a panel, and inputs of theirs that lie together
UNIT = BESIDE * INPUTS
LONGEST = 16                 # vectors that a kernel takes


def _parts(width: int) -> list[int]:
    """Bits of an index that are stored together, the lowest first."""
    return [8] * (width // 8) + [n for n in (4, 2, 1) if width % 8 & n]


def _units(shape: tuple[int, int], vector: int) -> tuple[int, int]:
    """Panels of vectors, and units of inputs in each."""
    return -(-shape[0] // (vector * BESIDE)), -(-shape[1] // INPUTS)


def _shifts(width: int, device: torch.device) -> Tensor:
    """Of the fields of so many bits in a byte, uint8 [8 / width, 1]."""
    return width * torch.arange(8 // width, dtype=torch.uint8, device=device)[:, None]


def _words(index: Tensor, width: int) -> Tensor:
    """Indices [out / v, in] below 2^width as they are stored, uint8 [panels, units, 8 * width]."""
    t = torch.nn.functional.pad(index.int(), (0, -index.shape[1] % INPUTS, 0, -len(index) % BESIDE))
    t = t.unflatten(1, (-1, INPUTS)).unflatten(0, (-1, BESIDE)).transpose(1, 2).flatten(2)
    found, shift = [], 0
    for n in _parts(width):
        fields = (t >> shift & (1 << n) - 1).to(torch.uint8).unflatten(2, (8 // n, 8 * n))
        found.append((fields << _shifts(n, t.device)).sum(2, dtype=torch.uint8))
        shift += n
    return torch.cat(found, 2)


def _indices(stored: Tensor, width: int, shape: tuple[int, int], vector: int) -> Tensor:
    """The inverse of `_words`: uint8 or int32 [out / v, in]."""
    panels, units = _units(shape, vector)
    stored, whole, shift = stored.reshape(panels, units, -1), torch.zeros(panels, units, UNIT, dtype=torch.int32, device=stored.device), 0
    for part, n in zip(stored.split([8 * n for n in _parts(width)], 2), _parts(width), strict=True):
        fields = part[:, :, None] >> _shifts(n, part.device) & (1 << n) - 1
        whole |= fields.flatten(2).int() << shift
        shift += n
    whole = whole.unflatten(2, (BESIDE, INPUTS)).transpose(1, 2).flatten(2).flatten(0, 1)
    return whole[: -(-shape[0] // vector), : shape[1]].to(typed(1 << width)).contiguous()


def size(shape: tuple[int, int], values: Values, kept: int, numbers: dict[str, Any]) -> dict[str, int]:
    vector, found = numbers["rows"], {"scales": 2 * shape[0]}
    for index, book, n in INDICES:
        if width := numbers[n]:
            panels, units = _units(shape, vector)
            found |= {index: panels * units * 8 * width, book: 2 * vector << width}
    return found


def stored(p: Packed) -> int:
    """All entries. BadInput unless vectors and widths are such as a book has, and its values are finite; an index of so many bits lies in
    its book whatever it is."""
    sound = 1 <= p.rows <= LONGEST and 1 <= p.n <= WIDEST and 0 <= p.m <= WIDEST
    if p.type != VECTORS or not sound or (p.cols, p.group, p.dim) != (1, 0, "in"):
        raise BadInput(f"book: an index has 1 to {WIDEST} bits and stands for 1 to {LONGEST} outputs of one input, "
                       f"not {p.n} (and {p.m}) bits for {p.rows}")
    for name in ("scales", "book", *(("residual_book",) if p.m else ())):
        if p.buffers[name].dtype != torch.float16 or not bool(torch.isfinite(p.buffers[name]).all()):
            raise BadInput(f"book: {name} are finite float16")
    return p.shape[0] * p.shape[1]


def restore(p: Packed) -> Tensor:
    each = [(_indices(p.buffers[index], width, p.shape, p.rows), p.buffers[book].reshape(-1, p.rows))
            for index, book, n in INDICES if (width := getattr(p, n))]
    (index, book), (residual, residual_book) = each[0], each[1] if len(each) > 1 else (None, None)
    return Books(index, book, p.buffers["scales"].reshape(-1), residual, residual_book).weight()


@method("format", inverse=restore, holds="books", bytes=size, stored=stored)
def book(new: Change) -> Packed:
    """Vectors of outputs by their index in a codebook.

    `values` uint8: the indices of `n` bits, vectors of `rows` outputs: of sixteen vectors side by side, a panel, four inputs after four
    inputs, which are a unit of 64 indices, vector by vector: of all of them the lowest eight bits, then the next eight, four, two and
    one, as many as n has; of fewer than eight, n', index i is in byte i mod 8 n', the lowest bits first. What fills the last ones up is
    index 0. `book` float16 [2^n, rows]; `scales` float16 [out]; of a second book `residual`, indices of `m` bits, and `residual_book`.
    BadInput for a weight that is none, and for vectors of more than sixteen outputs.

    Formula: bytes = 8 * n * ceil(in / 4) * ceil(out / 16 v) + 2 * v * 2^n, and again with m, + 2 * out
    Source: Liu et al. 2024 (VPTQ), arXiv:2409.17066
    Deviations: indices lie as the kernels read them
    """
    books = Books.among(new.parts)
    if books is None:
        matrix(new)
        raise BadInput("book: holds vectors of a codebook alone, no codes and no whole weight; quantise it (vptq), or store it as dense")
    if books.book.shape[1] > LONGEST:
        raise BadInput(f"book: vectors have 1 to {LONGEST} outputs, not {books.book.shape[1]}; take shorter ones, or store it as dense")
    buffers, widths = {"scales": books.rows.clone()}, [0, 0]
    for i, (t, b) in enumerate(books.pairs):
        widths[i] = len(b).bit_length() - 1
        buffers |= {INDICES[i][0]: _words(t, widths[i]), INDICES[i][1]: b.clone()}
    shape = (len(books.rows), books.index.shape[1])
    return Packed("book", shape, VECTORS, buffers, rows=books.book.shape[1], n=widths[0], m=widths[1])
