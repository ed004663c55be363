"""Two or four weights an output, and a second moment whose inverse is done in the head."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.cases import Case
from trimtab.methods.codes import Grid, integers
from trimtab.methods.gates import Gate
from trimtab.methods.unit.element import row


class Row:
    """The unit as a joint edit is given it."""

    free, period = True, None

    def __call__(self, s: torch.Tensor, keep: float) -> torch.Tensor:
        return row(s, keep)


class Whole:
    """The grid of so many bits as an edit is given it, one group a row; `scale` in place of the one that fits."""

    whole, blind = False, True

    def __init__(self, bits: int, scale: float = 0.0):
        self.bits, self.scale = bits, scale

    def group(self, w: torch.Tensor) -> int:
        return w.shape[1]

    def __call__(self, w: torch.Tensor) -> Grid:
        fitted = integers(w, self.bits)
        return replace(fitted, scales=torch.full_like(fitted.scales, self.scale)) if self.scale else fitted


class Pairs:
    """Two bits, one scale for two inputs."""

    whole, blind = False, True

    def group(self, w: torch.Tensor) -> int:
        return 2

    def __call__(self, w: torch.Tensor) -> Grid:
        return integers(w, 2, 2)


def site(w: list[list[float]], gram: list[list[float]], **more: Any) -> dict:
    t = torch.tensor(w)
    return {"w": t, "keep": 0.5, "mask": torch.ones_like(t, dtype=torch.bool), "unit": Row(),
            "gram": torch.tensor(gram), **more}


PAIR = site([[1.0, 2.0], [2.0, 1.0]], [[2.0, 1.0], [1.0, 1.0]])
EVEN = site([[1.0, 2.0]], [[4.0, 2.0], [2.0, 4.0]])

THREE = {"up": torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 9.0]])}  # neurons, two of them alike

CASES = {
    # The first two become one that counts twice.
    "edit/fuse": Case({"w": torch.tensor([[1.0, 1.0, 5.0]]), "keep": 2 / 3, "feeders": THREE, "act": torch.relu,
                       "source": torch.eye(2), "fed": torch.eye(3)[:2]}, [[2, 0, 5]], differs="edit/svd"),
    # The weight is as it was; what passes is the gate's to say.
    "edit/gated": Case({"w": torch.tensor([[1.0, 2.0]]), "keep": 0.5, "mask": torch.ones(1, 2, dtype=torch.bool),
                        "gate": lambda w, keep: Gate(torch.tensor([0.5]))}, [[1.0, 2.0]]),
    "edit/mask": Case({**PAIR, "mask": torch.tensor([[True, False], [False, True]])}, [[1, 0], [0, 1]],
                      differs="edit/sparsegpt"),
    # H^-1 = [[1, -1], [-1, 2]], so U = [[1, -1], [0, 1]] and the scores are the squares of the weights. First row: drop 1,
    # e = 1 / 1, and 2 - 1 * -1 = 3. Second row: drop the last, and nothing stands to its right (least squares would make 2
    # into 2.5).
    "edit/sparsegpt": Case(PAIR, [[0, 3], [2, 0]], {"damp": 0.0}, differs="edit/admm"),
    # n = (2, 2), A = [[1, 1/2], [1/2, 1]], V_0 = (2, 4): M = (0, 1), Z = (0, 4), U = (2, 0), Z - U - V_0 = (-4, 0);
    # (A + I)^-1 = [[8, -2], [-2, 8]] / 15, V = (2 - 32/15, 4 + 8/15), and (V + U) M / n = (0, 34/15), on its way to 5/2.
    "edit/admm": Case(EVEN, [[0, 34 / 15]], {"damp": 0.0, "iters": 1, "ramp": 1, "rho": 1.0}, differs="edit/sparsegpt"),
    # One gradient (1, 2); mean square 5/2, so ridge = 2/5 makes n lambda 1. Keep the second: what is lost is 1 * 2, and
    # 3/2 + 2 * 2 / (4 + 1) = 2.3; 1/2 * 0.4^2 + 1/2 * (2^2 + 0.8^2) = 2.4. The larger weight would cost 3.375.
    "edit/chita": Case(site([[2.0, 1.5]], [[1.0, 0.0], [0.0, 1.0]], grads=torch.tensor([[[1.0, 2.0]]])), [[0, 2.3]],
                       {"ridge": 0.4}, differs="edit/nettrim"),
    # Inputs that do not correlate: the l1 norm takes the same off every weight, 1.5 if the 2 is to stay and the 1 to go.
    "edit/nettrim": Case(site([[3.0, 1.0, -2.0, 0.5]], torch.eye(4).tolist()), [[1.5, 0, -0.5, 0]],
                         {"damp": 0.0, "rho": 1.0}, differs="edit/admm"),
    # Two orthogonal rows, so the singular values are their lengths, 6 and 3: of rank 1 the longer row is left.
    "edit/svd": Case(site([[2.0, 4.0, 4.0], [2.0, 1.0, -2.0]], torch.eye(3).tolist()), [[2, 4, 4], [0, 0, 0]], {"rank": 1},
                     differs="edit/mask"),
    # Outputs 1 and 2 have second moments 4 * 1 and 1 * 9 and nothing in common: of rank 1 the second is left, though its row is shorter.
    "edit/svdllm": Case(site([[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 9.0]]), [[0, 0], [0, 1]], {"rank": 1, "damp": 0.0},
                        differs="edit/svd"),
    # 9 of 10 parts of the inputs lie along the second, 36 of 45 of the outputs along the first: inputs are the narrower. Of rank 1 they
    # keep their second direction, and outputs all that is 9 of 10 of them, which is both.
    "edit/utilised": Case(site([[6.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 9.0]]), [[0, 0], [0, 1]], {"rank": 1}, differs="edit/svdllm"),
    # Inputs three to one, so |W| with them is (9, 4), (3, 3): the first column C = (3, 1) and the first row R = (3, 4). C^T W = (10, 15),
    # and with R^T 90, over |C|^2 |R|^2 = 10 * 25: U = 0.36.
    "edit/cur": Case(site([[3.0, 4.0], [1.0, 3.0]], [[9.0, 0.0], [0.0, 1.0]]), [[3.24, 4.32], [1.08, 1.44]], {"rank": 1},
                     differs="edit/svd"),
    # Two products of rank 1 are one of rank 1. Where the second input counts three times, rows (6, 3) and (1, -2) have nothing in common:
    # the longer one is left.
    "edit/fedpara": Case(site([[6.0, 1.0], [1.0, -2 / 3]], [[1.0, 0.0], [0.0, 9.0]]), [[6, 1], [0, 0]], {"rank": 1, "damp": 0.0},
                         differs="edit/svd", tol=1e-4),
    # One step is 1: what is nearer to 1 than to 2, or than to 0, is 1.
    "edit/rtn": Case(site([[1.4, 2.2]], [[2.0, 1.0], [1.0, 1.0]], grid=Whole(4, 1.0)), [[1, 2]], differs="edit/gptq"),
    # U as for sparsegpt: 1.4 becomes 1, e = 0.4, and 2.2 - 0.4 * -1 = 2.6 becomes 3.
    "edit/gptq": Case(site([[1.4, 2.2]], [[2.0, 1.0], [1.0, 1.0]], grid=Whole(4, 1.0)), [[1, 3]], {"damp": 0.0}, differs="edit/rtn"),
    # The last two inputs are spared, in two bits: their largest is one step, and 0.4 is none.
    "edit/spare": Case({**site([[1.0, 2.0, 0.4]], torch.eye(3).tolist()), "mask": torch.tensor([[False, True, True]])}, [[1, 2, 0]],
                       {"bits": 2}, differs="edit/mask"),
    # Sizes 3 1 / 1 3: the leading pair of singular vectors is even, its value 4, so every size becomes 2.
    "edit/onebit": Case(site([[3.0, -1.0], [1.0, -3.0]], torch.eye(2).tolist()), [[2, -2], [2, -2]], differs="edit/ptq161"),
    # Two inputs: a mean and a size of each row say all there is, 1/4 -+ 5/4 and 5/4 -+ 7/4.
    "edit/ptq161": Case(site([[1.5, -1.0], [-0.5, 3.0]], torch.eye(2).tolist()), [[1.5, -1], [-0.5, 3]], {"damp": 0.0},
                        differs="edit/onebit"),
    # A root mean square of 2, two values: 0 and 1 meet by 9 and 9 at 0.5, and 3 stays. Input 1 becomes 0.5, and input 2, which makes up for
    # it twice, 1 + 2 * 0.5: nearer to 3.
    "edit/vptq": Case(site([[0.0, 1.0, 1.0, 3.0, 3.0]], [[9.0, 0, 0, 0, 0], [0, 8.0, 2.0, 0, 0], [0, 2.0, 1.0, 0, 0], [0, 0, 0, 100.0, 0],
                                                         [0, 0, 0, 0, 100.0]], grid=Whole(4, 1.0)),
                      [[0.5, 0.5, 3, 3, 3]], {"bits": 1, "vector": 1, "damp": 0.0}, differs="edit/gptq", tol=1e-3),
    # A pair of scale 2 and another one: 0.9 becomes 0, and 2 + 0.9 stays within the range of 2 that was fitted to it before.
    "edit/ldlq": Case(site([[2.0, 0.9, 2.0, 0.5]], [[1.0, 0, 0, 0], [0, 2.0, 1.0, 0], [0, 1.0, 1.0, 0], [0, 0, 0, 1.0]], grid=Pairs()),
                      [[2, 0, 2, 0]], {"damp": 0.0}, differs="edit/gptq"),
    # Off by (-0.45, -0.2) a row loses 0.46, by (0.55, -0.2) 0.16, by (-0.45, 0.8) 0.76: the first goes up, which no sweep from it would do.
    "edit/adaround": Case(site([[1.45, 2.2]], [[1.0, 1.0], [1.0, 2.0]], grid=Whole(4, 1.0)), [[2, 2]], differs="edit/ldlq"),
    # 0.496 is 0, and 0.496^2 is lost. One step of Adam adds 0.01 to it and takes 0.01 off the scale: 1 code of 0.99, of which 0.494^2.
    "edit/adaquant": Case(site([[0.496]], [[1.0]], grid=Whole(4, 1.0)), [[0.99]], {"iters": 2}, differs="edit/rtn"),
    # A step of 4 a row loses the ones; a step a column loses nothing.
    "edit/adadim": Case(site([[4.0, 1.0], [4.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], grid=Whole(2)), [[4, 1], [4, 1]], differs="edit/rtn"),
    "edit/tie": Case({"other": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, [[1, 2], [3, 4]]),
    "edit/direct": Case({"other": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, [[1, 2], [3, 4]]),
    # Off by 4 and 3: one factor takes the 4, and the second output, which is left at 1 in place of 2, is made twice as large.
    "edit/adapt": Case({"w": torch.diag(torch.tensor([5.0, 2.0])), "other": torch.diag(torch.tensor([1.0, -1.0])), "gram": torch.eye(2)},
                       [[5, 0], [0, -2]], {"rank": 1}, differs="edit/tie", tol=1e-2),
}
