from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method


@method("score")
def dass(w: Tensor, act_norm: Tensor, *, alpha: float = 0.5) -> Tensor:
    """Gate and up: weight times the size of the neuron it belongs to. Made for units along the output: column, nm(dim=out).

    For gate and up, act_norm is [out], the hidden neurons; compared along a row it would cancel. For a site without a
    consumer it is [in], and the score is Wanda's. A square matrix is taken for gate or up, so scope it where it is not.

    Formula: S_ij = |W_ij| * ||Y_i||_2^alpha for gate and up; |W_ij| * ||Y_j||_2 elsewhere
    Source: DaSS, arXiv:2405.01943, section 3 as remembered
    Deviations: root mean square in place of the norm; the order inside a column is the same
    """
    if len(act_norm) == w.shape[0]:
        return w.float().abs() * act_norm[:, None] ** alpha
    return w.float().abs() * act_norm
