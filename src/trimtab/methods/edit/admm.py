from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import Change
from trimtab.methods.select import top
from trimtab.methods.solvers import kernel, lengths, splitting


@method("edit", joint=("score", "repair"))
def admm(w: Tensor, keep: float, mask: Tensor, unit: Any, gram: Tensor, *, damp: float = 0.1, iters: int = 20,
         ramp: int = 15, rho: float = 1.0) -> Change:
    """Least squares on a mask that hardens while it is being solved.

    `w`, `mask` [out, in] (False = dropped by an earlier pass, stays zero), `gram` [in, in]; returns w [out, in].

    Formula: n_j = ||X_j||; A = G / (n n^T) + damp * I; V_0 = W * n; M = the best |V + U| at the share dropped
        s_t = s (1 - (1 - t/ramp)^3) until t = ramp; Z = (V + U) * M; U += V - Z;
        V = (V_0 A + rho (Z - U)) (A + rho I)^-1; W' = (V + U) * M / n
    Source: Boža 2024, arXiv:2401.02938; steps and defaults as in the released code (lib/admm.py)
    Deviations: s_t is applied to every unit (the released code computes it, then prunes at the final share at once,
        unless it compares per output or n:m); a unit of fixed share, n:m, protects its own choice and lets the rest go
        by s_t over the whole matrix, so its pattern holds from t = ramp on; rho is relative to a diagonal of 1
    """
    n = lengths(gram)
    v0 = w.float() * n
    last = max(min(ramp, iters) - 1, 0)
    now = mask

    def harden(x: Tensor, t: int) -> Tensor:
        nonlocal now
        if t <= last:
            gone = 1 - (1 - (t + 1) / (last + 1)) ** 3
            s = x.abs() * mask
            if unit.free:
                now = unit(s, keep if t == last else 1 - (1 - keep) * gone)
            else:
                safe = unit(s, keep)
                spare = w.numel() - round(gone * int((~safe).sum()))
                now = top(s.masked_fill(safe, torch.inf).view(1, -1), spare).view(s.shape)
            now = now & mask
        return x * now

    x = splitting(v0, kernel(gram, n, damp, rho), harden, max(iters, 1))
    new = (x / n).masked_fill(~now, 0)
    whole = now.all(1, keepdim=True)  # where nothing is dropped nothing is to be solved
    return Change(torch.where(whole, w, new.to(w.dtype)), mask=now)
