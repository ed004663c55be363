"""Weights as vectors of a codebook: outputs that lie side by side share an index, input by input."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.types import BadInput, Change

WIDEST = 16    # bits of an index
CHUNK = 16384  # vectors that are compared with a book together


@dataclass(frozen=True)
class Books:
    """A weight [out, in]: `index` [out / v rounded up, in] into a `book` float16 [k, v] of vectors of v outputs, times a scale of every
    output, `rows` float16 [out]. `residual`, of the same shape, is an index into a second book, `residual_book` [k', v], whose vectors
    are added before. Indices are uint8 where they fit, else int32; k and k' are powers of two up to 2^16."""

    index: Tensor
    book: Tensor
    rows: Tensor
    residual: Tensor | None = None
    residual_book: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.residual is None) != (self.residual_book is None):
            raise BadInput("a second index and a second book come together")
        if self.rows.ndim != 1 or not len(self.rows) or self.rows.dtype != torch.float16:
            raise BadInput(f"scales of outputs are float16 [out], not {self.rows.dtype} {list(self.rows.shape)}")
        for index, book in self.pairs:
            if book.dtype != torch.float16 or book.ndim != 2 or 0 in book.shape or book.shape[1] != self.book.shape[1]:
                raise BadInput(f"a book is float16 [k, v], one v for both, not {book.dtype} {list(book.shape)}")
            if len(book) & (len(book) - 1) or not 2 <= len(book) <= 1 << WIDEST:
                raise BadInput(f"a book has 2, 4, 8 to 65536 vectors, not {len(book)}")
            if index.dtype != typed(len(book)) or index.ndim != 2 or len(index) != -(-len(self.rows) // book.shape[1]) or not index.numel():
                raise BadInput(f"an index is {typed(len(book))} [out / v, in], not {index.dtype} {list(index.shape)}")
            low, high = index.aminmax()
            if int(low) < 0 or int(high) >= len(book):
                raise BadInput(f"indices into {len(book)} vectors are 0 to {len(book) - 1}, not {int(low)} to {int(high)}")

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Every index with its book."""
        second = [] if self.residual is None or self.residual_book is None else [(self.residual, self.residual_book)]
        return [(self.index, self.book), *second]

    def weight(self) -> Tensor:
        """What it stands for, float32 [out, in]."""
        first, *others = [book.float()[index.long()] for index, book in self.pairs]
        whole = first if not others else first + others[0]
        return (whole.transpose(1, 2).flatten(0, 1)[: len(self.rows)] * self.rows.float()[:, None]).contiguous()

    def parts(self) -> dict[str, Tensor]:
        """As a change carries them."""
        some = {"index": self.index, "book": self.book, "rows": self.rows, "residual": self.residual, "residual_book": self.residual_book}
        return {k: t for k, t in some.items() if t is not None}

    def change(self) -> Change:
        """As an edit returns it: the parts, and what they decode to."""
        return Change(self.weight(), self.parts())

    @staticmethod
    def among(parts: Mapping[str, Tensor]) -> Books | None:
        """The books among the parts of a change; None where there are none. BadInput where they contradict each other."""
        if "book" not in parts:
            return None
        return Books(parts["index"], parts["book"], parts["rows"], parts.get("residual"), parts.get("residual_book"))


def typed(count: int) -> torch.dtype:
    """Of indices into so many vectors."""
    return torch.uint8 if count <= 256 else torch.int32


def widths(vector: int, *bits: int) -> list[int]:
    """Bits of an index, of a first book and of further ones, that has so many bits a weight of its vectors. BadInput for what no book has:
    the first has one at least."""
    each = [n * vector for n in bits]
    if vector < 1 or each[0] < 1 or any(not 0 <= n <= WIDEST for n in each):
        wrong = next((n for n in each if not 0 <= n <= WIDEST), each[0])
        raise BadInput(f"an index has bits * vector bits, 1 to {WIDEST}, not {wrong}; take shorter vectors, or some bits as residual")
    return each


# ---- fitting ----------------------------------------------------------------------------------
def nearest(x: Tensor, weight: Tensor, book: Tensor) -> Tensor:
    """For vectors x [n, v] that of `book` [k, v] with the least error, every entry's square times `weight` [n, v]: int64 [n]."""
    squares = book.square().T.contiguous()
    each = [torch.addmm(s @ squares, s * t, book.T, alpha=-2).argmin(1) for t, s in zip(x.split(CHUNK), weight.split(CHUNK), strict=True)]
    return torch.cat(each)


def means(x: Tensor, weight: Tensor, count: int, iters: int, generator: torch.Generator, most: int) -> Tensor:
    """A book float16 [count, v] for vectors x [n, v], entries' squared errors times `weight` [n, v] >= 0: k-means by Lloyd, from `count` of
    the vectors, drawn by their weight. Of more than `most` vectors so many are drawn first."""
    if len(x) > most:
        some = torch.randperm(len(x), generator=generator, device=x.device)[:most]
        x, weight = x[some], weight[some]
    likely = weight.sum(1) * x.square().sum(1).sqrt()
    likely = likely.double() + 1e-6 * float(likely.mean()) + 1e-30
    # The largest of -log(u) / p are a draw without replacement for any number of them, which multinomial is not.
    u = torch.rand(len(x), generator=generator, device=x.device, dtype=torch.float64).clamp_min(1e-300)
    book = x[(-u.log() / likely).topk(count, largest=False).indices].clone()
    for _ in range(iters):
        at = nearest(x, weight, book)
        total, sums = torch.zeros_like(book), torch.zeros_like(book)
        total.index_add_(0, at, weight)
        sums.index_add_(0, at, weight * x)
        new = torch.where(total > 0, sums / total.clamp_min(1e-30), book)
        if bool((empty := torch.bincount(at, minlength=count) == 0).any()):  # they go where the error is largest
            worst = (weight * (x - new[at]).square()).sum(1).topk(int(empty.sum())).indices
            new[empty] = x[worst]
        if torch.equal(new, book):
            break
        book = new
    return book.clamp(-65504, 65504).half()
