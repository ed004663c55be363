from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.books import Books, means, nearest, typed, widths
from trimtab.methods.solvers import Settle, sweep

BLOCK = 128      # columns that are mended one by one before the rest
SAMPLE = 1 << 18  # vectors that a book is fitted to


@method("edit", joint=("unit", "score", "budget", "grid"), drops=False, books=True, zero=False,
        xfail={"rows": "outputs that lie side by side are one vector: in another order they are others"})
def vptq(w: Tensor, gram: Tensor, *, bits: int = 2, vector: int = 4, residual: int = 0, iters: int = 20, damp: float = 0.01,
         act_order: bool = True, seed: int = 0) -> Change:
    """Vectors of outputs that lie side by side, each the nearest of a codebook, column after column, with what that costs mended in the
    columns that are still to come.

    `w` [out, in], `gram` [in, in]; returns w [out, in] and the parts index, book, rows (a scale of each output) and, with a second book
    of `residual` bits a weight, residual and residual_book. A book has 2^(bits * vector) vectors of `vector` outputs, or as many as there
    are vectors in w, rounded down to a power of two. BadInput where that is not 1 to 16 bits.

    Formula: rows s_i = rms(w_i); book = argmin of sum_n d_n |x_n - c|^2 by k-means, d_n = h_j s^2; H = G + damp * mean(diag G) * I;
        H^-1 = U^T U; for each column j: q_j = the nearest vectors, e = (w_j - q_j) / U_jj, w_k -= e U_jk for k > j; second book: k-means of
        what the first sweep leaves, and a second sweep with both
    Source: Liu et al. 2024 (VPTQ), arXiv:2409.17066, section 3
    Deviations: outputs are scaled by their root mean square, and distances count what it was; no outliers of their own, which a pass of
        `spare` before it keeps; without fine-tuning
    """
    wanted = widths(vector, bits, residual)
    out, inputs = w.shape
    weight, count = w.float(), -(-out // vector) * inputs
    size, size_two = (1 << min(n, count.bit_length() - 1) for n in wanted)
    if size < 2:
        raise BadInput(f"{count} vector of {vector} outputs needs no book; take shorter ones")
    generator = torch.Generator(w.device).manual_seed(seed)
    rms = weight.square().mean(1).sqrt()
    rows = torch.where(rms > 0, rms, 1.0).clamp(2.0 ** -24, 65504).half()
    scale = rows.float()
    filled = torch.nn.functional.pad(scale, (0, -out % vector))  # what fills the last vectors up counts nothing
    each, divisor = filled.view(-1, vector), torch.where(filled > 0, filled, 1.0)
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(inputs, device=w.device)
    swept, turned = weight[:, order], gram[order][:, order]

    def vectors(t: Tensor) -> Tensor:
        """[out, n] -> [n, out / v, v], in scales of the outputs."""
        return (torch.nn.functional.pad(t.T, (0, -out % vector)) / divisor).unflatten(1, (-1, vector))

    def fitted(t: Tensor, size: int) -> Tensor:
        """A book for the vectors [n, out / v, v] of all columns."""
        d = turned.diagonal().float().clamp_min(0)
        d = d + 1e-4 * d.mean() + 1e-30
        counted = (d / d.mean())[:, None, None] * (each / each.mean()).square()
        return means(t.flatten(0, 1), counted.flatten(0, 1), size, iters, generator, SAMPLE)

    def quantised(books: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """A sweep with these books: an index [out / v, in] each, and what the vectors were that it rounded [in, out / v, v]."""
        found = [torch.empty(len(each), inputs, dtype=typed(len(b)), device=w.device) for b in books]
        seen = torch.empty(inputs, *each.shape, device=w.device)
        wide = [b.float() for b in books]

        def settle(begin: int, end: int) -> Settle:
            def column(cur: Tensor, _: Tensor, j: int) -> Tensor:
                left = vectors(cur[j][:, None])[0]
                seen[begin + j] = left
                whole = torch.zeros_like(left)
                for b, index in zip(wide, found, strict=True):
                    at = nearest(left - whole, each.square(), b)
                    index[:, begin + j] = at.to(index.dtype)
                    whole = whole + b[at]
                return whole.flatten()[:out] * scale

            return column

        sweep(swept, turned, settle, damp=damp, block=BLOCK)
        return found, seen

    books = [fitted(vectors(swept), size)]
    found, seen = quantised(books)
    if residual:
        books.append(fitted(seen - books[0].float()[found[0].T.long()], size_two))
        found, _ = quantised(books)
    back = torch.empty_like(order)
    back[order] = torch.arange(inputs, device=w.device)
    straight = [t[:, back].contiguous() for t in found]
    new = Books(straight[0], books[0], rows, *((straight[1], books[1]) if residual else ())).change()
    return replace(new, w=new.w.to(w.dtype))
