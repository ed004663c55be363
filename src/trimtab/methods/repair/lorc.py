from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.factors import Factors, checked_rank
from trimtab.methods.solvers import damped, lower
from trimtab.methods.terms import Terms


@method("repair", keeps=("codes",), leaves=("factors",))
def lorc(w: Tensor, new: Change, gram: Tensor, *, rank: int = 8, whiten: bool = False, damp: float = 0.01) -> Change:
    """A product of small rank beside the codes, the nearest to what rounding lost.

    `w` [out, in] is the dense weight, `gram` [in, in]; returns `new` with the parts left ([out, rank]) and right ([rank, in]), bfloat16,
    whose product is added to what the codes decode to. `whiten`: nearest in the outputs instead of in the weights. A change without
    codes is left as it is. BadInput for a rank that is not between 1 and the shorter side.

    Formula: E = w - w'; E = U S V^T; left = U_r S_r^(1/2), right = S_r^(1/2) V_r^T; whitened, with G + damp mean(diag G) I = C C^T, E C in
        place of E and right C^-1 in place of right
    Source: Yao et al. 2023 (ZeroQuant-V2, LoRC), arXiv:2303.08302, section 5; whitening as in SVD-LLM, arXiv:2403.07378
    Deviations: factors are kept in bfloat16, where the paper has float16 or 8 bits; a row that this does not improve takes no part
    """
    terms = Terms.among(new.parts)
    if terms is None or terms.codes is None or new.mask is not None:
        return new
    checked_rank(w.shape, rank)
    off = w.double() - new.w.double()
    root = torch.linalg.cholesky(damped(gram, max(damp, 1e-6))) if whiten else None
    u, s, vt = torch.linalg.svd(off if root is None else off @ root, full_matrices=False)
    size = s[:rank].sqrt()
    left, right = u[:, :rank] * size, size[:, None] * vt[:rank]
    if root is not None:
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    both = Factors(left.bfloat16().contiguous(), right.bfloat16().contiguous())
    wins = lower(w, replace(terms, factors=both).weight(), new.w, gram)
    mended = replace(terms, factors=replace(both, left=both.left * wins[:, None]))
    return Change(mended.weight().to(new.w.dtype), mended.parts())
