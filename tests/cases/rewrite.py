"""Two inputs, of which the second counts, and a grid of -1, 0 and 1 times the larger weight."""
from __future__ import annotations

import torch

from tests.cases import Case
from tests.cases.edit import Whole
from trimtab.methods.rounding import Rounding

ROOT = 10**0.25

CASES = {
    # As it is, 0.3 becomes 0. With a = 1/2, s = (1, sqrt 10) / 10^(1/4): both weights times s are near 0.55, and 0.3 becomes 0.316.
    "rewrite/awq": Case({"w": torch.tensor([[1.0, 0.3]]), "grid": Whole(2), "in_abs": torch.tensor([1.0, 10.0]),
                         "gram": torch.diag(torch.tensor([1.0, 100.0]))}, [1 / ROOT, ROOT], {"steps": 2}),
    # Inputs take the root of their size, and give the root of their weights'.
    "rewrite/smoothquant": Case({"w": torch.tensor([[1.0, 0.25]]), "absmax": torch.tensor([16.0, 1.0])}, [4, 2]),
    # Of three values by the token, the second input is met as 0. Down to 0.1 both are alike, and so are the weights.
    "rewrite/smooth": Case({"w": torch.tensor([[0.4, 1.0]]), "grid": Whole(2), "sample": torch.tensor([[10.0, 4.0]]),
                            "rounded": Rounding(2).of}, [100, 40], {"steps": 2}),
    # Ranges of 2 and 6, and 4 for both.
    "rewrite/channelwise": Case({"sample": torch.tensor([[2.0, -6.0], [1.0, 3.0]])}, [0.5, 1.5]),
    # One input, so turning it is a sign: S = (64 / 2^2)^(1/4) = 2, and the weight becomes 4. Of a basis the sizes of the weights in it.
    "rewrite/incoherent": Case({"w": torch.tensor([[2.0]]), "gram": torch.tensor([[64.0]])}, [[4.0]], differs="rewrite/hadamard"),
    # A weight of one input is spread over both.
    "rewrite/hadamard": Case({"w": torch.tensor([[1.0, 0.0]]), "gram": torch.eye(2)}, [[0.5**0.5, 0.5**0.5]], differs="rewrite/incoherent"),
    # As that, of the inputs that no neighbour turns; what neighbours share: tests/line/test_rotation.py.
    "rewrite/quarot": Case({"w": torch.tensor([[1.0, 0.0]]), "gram": torch.eye(2)}, [[0.5**0.5, 0.5**0.5]], differs="rewrite/incoherent"),
    # The first input's power is all there is: behind its direction comes the mixing, and the weight of it is spread evenly.
    "rewrite/klt": Case({"w": torch.tensor([[1.0, 0.0]]), "gram": torch.diag(torch.tensor([4.0, 0.0]))}, [[0.5**0.5, 0.5**0.5]],
                        differs="rewrite/incoherent"),
    # Without a step: the Hadamard matrix it begins with.
    "rewrite/kurtail": Case({"w": torch.tensor([[1.0, 0.0, 0.0, 0.0]]), "sample": torch.eye(4), "gram": torch.eye(4)},
                            [[0.5, 0.5, 0.5, 0.5]], {"iters": 0},
                            differs="rewrite/incoherent"),
}
