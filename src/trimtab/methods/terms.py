"""A weight as what its parts add up to: codes, factors or books in a basis of their own, a product beside them, what was spared."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.core.types import BadInput, Change
from trimtab.methods.basis import Basis
from trimtab.methods.books import Books
from trimtab.methods.codes import Codes
from trimtab.methods.factors import Factors

INSIDE, OUTSIDE, COLUMNS = "in", "out", "columns_"  # before the names of parts: the basis of the inputs, of the outputs; spared columns
TRANSPOSED = "transposed"  # the part that says so
# Parts of a whole weight alone, not of some rows of one.
ALONE = ("left", "book", "entries", "columns", TRANSPOSED, *(f"{side}_{k}" for side in (INSIDE, OUTSIDE) for k in ("scale", "left")))


@dataclass(frozen=True)
class Spared:
    """What an edit kept out of the hands of later ones, of a weight [out, in]: single `entries` [n] at `at` [n, 2] (output, input), to be
    added, and whole `columns` (int32 [k], rising) with their `codes` [out, k], in place of the weight's."""

    entries: Tensor | None = None
    at: Tensor | None = None
    columns: Tensor | None = None
    codes: Codes | None = None

    def __bool__(self) -> bool:
        return self.entries is not None or self.columns is not None

    def others(self, inputs: int) -> Tensor:
        """The inputs whose columns were not spared, bool [inputs]."""
        left = torch.ones(inputs, dtype=torch.bool, device=None if self.columns is None else self.columns.device)
        if self.columns is not None:
            left[self.columns] = False
        return left

    def rest(self, w: Tensor) -> Tensor:
        """What is left of w [out, in] for others: [out, in - k], without the entries."""
        if self.entries is not None and self.at is not None:
            w = w.index_put((self.at[:, 0], self.at[:, 1]), -self.entries, accumulate=True)
        return w if self.columns is None else w[:, self.others(w.shape[1])]

    def whole(self, rest: Tensor) -> Tensor:
        """The weight [out, in] that `rest` [out, in - k] was left of."""
        w = rest
        if self.columns is not None and self.codes is not None:
            w = torch.empty(len(rest), rest.shape[1] + len(self.columns), device=rest.device)
            w[:, self.others(w.shape[1])] = rest
            w[:, self.columns] = self.codes.weight()
        if self.entries is not None and self.at is not None:
            w = w.index_put((self.at[:, 0], self.at[:, 1]), self.entries, accumulate=True)
        return w

    def parts(self) -> dict[str, Tensor]:
        """As a change carries them."""
        some = {"entries": self.entries, "entries_at": self.at, "columns": self.columns}
        codes = {f"{COLUMNS}{k}": t for k, t in self.codes.parts().items()} if self.codes is not None else {}
        return {k: t for k, t in some.items() if t is not None} | codes

    @staticmethod
    def among(parts: Mapping[str, Tensor]) -> Spared:
        """What was spared, among the parts; BadInput where they contradict each other."""
        entries, at, columns = (parts.get(k) for k in ("entries", "entries_at", "columns"))
        if (entries is None) != (at is None) or (entries is not None and at is not None and at.shape != (len(entries), 2)):
            raise BadInput("single entries have a place, output and input, each")
        codes = Codes.among({k.removeprefix(COLUMNS): t for k, t in parts.items() if k.startswith(COLUMNS)})
        if (columns is None) != (codes is None) or (columns is not None and codes is not None and codes.codes.shape[1] != len(columns)):
            raise BadInput("spared columns have codes, each of them")
        return Spared(entries, at, columns, codes)


NOTHING = Spared()


@dataclass(frozen=True)
class Terms:
    """A weight [out, in]: `codes`, `factors`, `books` or several of them added, behind a basis of the inputs (`inside`) and of the
    outputs (`outside`), and beside them what was `spared`. `transposed`: the codes are those of the weight's transpose, and so lie in
    groups of outputs."""

    codes: Codes | None
    factors: Factors | None
    inside: Basis | None = None
    outside: Basis | None = None
    spared: Spared = NOTHING
    transposed: bool = False
    books: Books | None = None

    @property
    def main(self) -> list[Codes | Factors | Books]:
        """Those that are added."""
        return [t for t in (self.codes, self.factors, self.books) if t is not None]

    @property
    def simple(self) -> bool:
        """Whether one matrix of codes, one pair of factors, or one of books, is all of it."""
        return len(self.main) == 1 and not (self.inside or self.outside or self.spared or self.transposed)

    def plain(self, w: Tensor) -> Tensor:
        """A weight in its bases as one that knows of none."""
        w = w if self.inside is None else self.inside.plain(w)
        return w if self.outside is None else self.outside.straight(w.T).T.contiguous()

    def weight(self) -> Tensor:
        """What it stands for, float32 [out, in]."""
        first, *others = [t.weight() for t in self.main]
        first = first.T.contiguous() if self.transposed else first
        for w in others:
            first = first + w
        return self.spared.whole(self.plain(first))

    def parts(self) -> dict[str, Tensor]:
        """As a change carries them."""
        own = {k: t for part in self.main for k, t in part.parts().items()}
        bases = {k: t for side, b in ((INSIDE, self.inside), (OUTSIDE, self.outside)) if b is not None for k, t in b.parts(side).items()}
        along = {TRANSPOSED: torch.ones(1, dtype=torch.uint8, device=self.codes.codes.device)} if self.transposed and self.codes else {}
        return own | bases | along | self.spared.parts()

    @staticmethod
    def among(parts: Mapping[str, Tensor]) -> Terms | None:
        """What the parts say; None where they say nothing but what was spared. BadInput where they contradict each other."""
        inside, outside = Basis.among(parts, INSIDE), Basis.among(parts, OUTSIDE)
        terms = Terms(Codes.among(parts), Factors.among(parts), inside, outside, Spared.among(parts), TRANSPOSED in parts,
                      Books.among(parts))
        return terms if terms.main else None


def of_site(parts: Mapping[str, Tensor], site: str) -> dict[str, Tensor]:
    """The parts of one site, by name, of those of many, by `<site>:<part>`."""
    return {n.rpartition(":")[2]: t for n, t in parts.items() if n.rpartition(":")[0] == site}


def put_together(new: Change, spared: Spared, inside: Basis | None, outside: Basis | None) -> Change:
    """What an edit made of the rest of a weight, in bases of its own, as a change of the whole weight."""
    terms = Terms.among(new.parts)
    if terms is None or not (inside or outside or spared):
        return new
    if (inside and terms.inside) or (outside and terms.outside):
        raise BadInput("what it leaves has a basis of its own, and a rewrite before it another one; leave the rewrite out")
    terms = replace(terms, inside=inside or terms.inside, outside=outside or terms.outside, spared=spared)
    mask = new.mask
    if mask is not None and spared.columns is not None:
        others = spared.others(mask.shape[1] + len(spared.columns))
        whole = torch.ones(len(mask), len(others), dtype=torch.bool, device=mask.device)
        whole[:, others] = mask
        mask = whole
    return Change(terms.weight().to(new.w.dtype), terms.parts(), mask, bias=new.bias)
