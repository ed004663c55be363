from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method

# The paper's calibration set. Its two terms grow with the root of these; fixing them fixes their ratio for any set.
SEQUENCES, TOKENS = 128, 2048


@method("score")
def gblm(w: Tensor, in_sq: Tensor, grad_sq: Tensor, *, scale: float = 100.0) -> Tensor:
    """Weight times the size of its input and the size of its gradient.

    Formula: S_ij = |W_ij| * (||X_j||_2 + scale * ||g_ij||_2); ||X_j||_2 = sqrt(2048 * E_t[x_tj^2]) is over the tokens of a
        sequence, ||g_ij||_2 = sqrt(128 * E_n[g_nij^2]) over sequences
    Source: GBLM-Pruner, arXiv:2311.04902, section 3 as remembered, in the form of the authors' code
    Deviations: both norms are scaled from means to the paper's 128 sequences of 2048 tokens, so that `scale` weighs the
        terms as in the paper whatever the calibration set; the gradient of a shorter sequence is still a noisier one, which
        raises the second term; gradients in float32 where the authors store float16
    """
    return w.float().abs() * ((TOKENS * in_sq).sqrt() + scale * (SEQUENCES * grad_sq).sqrt())
