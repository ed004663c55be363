from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.books import WIDEST, Books, typed
from trimtab.methods.format.panels import VECTORS, Packed, Values, matrix, pack_bits, unpack_bits

INDICES = (("values", "book", "n"), ("residual", "residual_book", "m"))  # buffers of an index and its book, and which number is its width


def _bytes(count: int, width: int) -> int:
    """Of so many indices of so many bits."""
    return -(-count * min(width, 8) // 8) + -(-count * max(0, width - 8) // 8)


def _streams(index: Tensor, width: int) -> Tensor:
    """Indices below 2^width as a stream of their lower eight bits, then one of the others, uint8."""
    low = pack_bits(index & 255, min(width, 8))
    return low if width <= 8 else torch.cat([low, pack_bits(index >> 8, width - 8)])


def _indices(stored: Tensor, width: int, count: int) -> Tensor:
    """The inverse of `_streams`: uint8 or int32 [count]."""
    low = unpack_bits(stored, min(width, 8), count)
    if width <= 8:
        return low
    return low.int() | unpack_bits(stored[_bytes(count, 8):], width - 8, count).int() << 8


def size(shape: tuple[int, int], values: Values, kept: int, numbers: dict[str, Any]) -> dict[str, int]:
    vector, found = numbers["rows"], {"scales": 2 * shape[0]}
    for index, book, n in INDICES:
        if width := numbers[n]:
            found |= {index: _bytes(-(-shape[0] // vector) * shape[1], width), book: 2 * vector << width}
    return found


def stored(p: Packed) -> int:
    """All entries. BadInput unless vectors and widths are such as a book has, and its values are finite; an index of so many bits lies in
    its book whatever it is."""
    if p.type != VECTORS or p.rows < 1 or not 1 <= p.n <= WIDEST or not 0 <= p.m <= WIDEST or (p.cols, p.group, p.dim) != (1, 0, "in"):
        raise BadInput(f"book: an index has 1 to {WIDEST} bits and stands for a vector of outputs, not {p.n} (and {p.m}) bits for {p.rows}")
    for name in ("scales", "book", *(("residual_book",) if p.m else ())):
        if p.buffers[name].dtype != torch.float16 or not bool(torch.isfinite(p.buffers[name]).all()):
            raise BadInput(f"book: {name} are finite float16")
    return p.shape[0] * p.shape[1]


def restore(p: Packed) -> Tensor:
    out, inputs = p.shape
    lines = -(-out // p.rows)
    each = [(_indices(p.buffers[index], width, lines * inputs).reshape(lines, inputs), p.buffers[book].reshape(-1, p.rows))
            for index, book, n in INDICES if (width := getattr(p, n))]
    (index, book), (residual, residual_book) = each[0], each[1] if len(each) > 1 else (None, None)
    return Books(index.to(typed(len(book))), book, p.buffers["scales"].reshape(-1), residual, residual_book).weight()


@method("format", inverse=restore, holds="books", bytes=size, stored=stored)
def book(new: Change) -> Packed:
    """Vectors of outputs by their index in a codebook.

    `values` uint8: the indices of `n` bits, vectors of `rows` outputs, input by input, one after the other, lowest bits first (of more
    than eight bits: the lower eight of all, then the others); `book` float16 [2^n, rows]; `scales` float16 [out]; of a second book
    `residual`, indices of `m` bits, and `residual_book`. BadInput for a weight that is none.

    Formula: bytes = ceil(n * ceil(out / v) * in / 8) + 2 * v * 2^n, and again with m, + 2 * out
    Source: Liu et al. 2024 (VPTQ), arXiv:2409.17066
    Deviations: indices of more than eight bits lie in two streams, which makes them a byte longer at most
    """
    books = Books.among(new.parts)
    if books is None:
        matrix(new)
        raise BadInput("book: holds vectors of a codebook alone, no codes and no whole weight; quantise it (vptq), or store it as dense")
    buffers, widths = {"scales": books.rows.clone()}, [0, 0]
    for i, (t, b) in enumerate(books.pairs):
        widths[i] = len(b).bit_length() - 1
        buffers |= {INDICES[i][0]: _streams(t, widths[i]), INDICES[i][1]: b.clone()}
    shape = (len(books.rows), books.index.shape[1])
    return Packed("book", shape, VECTORS, buffers, rows=books.book.shape[1], n=widths[0], m=widths[1])
