"""Parts of a network so small that what becomes of them can be told by hand."""
from __future__ import annotations

import torch

from tests.cases import Case

ONE = {"up": torch.tensor([[1.0, 2.0]]), "down": torch.tensor([[1.0], [0.0]]), "norm": torch.tensor([2.0, 3.0])}
TWO = {"up": torch.tensor([[4.0, 5.0]]), "down": torch.tensor([[6.0], [7.0]]), "norm": torch.tensor([1.0, 10.0])}

# Four neurons of which 0 and 2 are active for the first two tokens, and 1 and 3 for the others: what comes first of x tells.
MLP = {"gate": torch.eye(4)[:, :2], "up": torch.eye(4)[:, :2], "down": torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])}
TOKENS = {"source": torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]),
          "fed": torch.tensor([[1.0, 0.0, 2.0, 0.0], [2.0, 0.0, 4.0, 0.0], [0.0, 3.0, 0.0, 1.0], [0.0, 6.0, 0.0, 2.0]])}

WIDE = {k: t.repeat(8, 1) for k, t in TOKENS.items()}

CASES = {
    # The eigenvectors of 3 and of 1, the larger first; of a vector and its negative, the one this gives.
    "wiring/principal": Case({"gram": torch.tensor([[1.0, 0.0], [0.0, 3.0]])}, [[0, 1], [1, 0]]),
    "wiring/experts": Case({"mlp": MLP}, {"neurons": [[1], [2], [3]], "active": 3, "router": [[0, 0]] * 3, "shared": [0], "copies": 0},
                           {"parts": 4, "always": 1}),
    "wiring/upcycle": Case({"mlp": MLP}, {"neurons": [[0, 1, 2, 3]] * 4, "active": 2, "router": [[0, 0]] * 4, "copies": 1}, {"parts": 4},
                           differs="wiring/experts"),
    # x tells which expert adds most: W is 1/2 and -1/2, made as small as logits are to be, 1/64. Nothing is missing of what it adds.
    "wiring/moefication": Case({"mlp": MLP, "keep": 0.5, **TOKENS}, {
        "neurons": [[0, 2], [1, 3]], "active": 1, "router": [[1 / 64, -1 / 64], [-1 / 64, 1 / 64]], "copies": 0, "down": MLP["down"]},
        {"parts": 2, "damp": 0.0}, differs="wiring/experts"),
    # Eight times each neuron: tokens meet the half that is not zero for them, and nothing is missing.
    "wiring/tomoe": Case({"mlp": {r: w.repeat_interleave(8, int(r == "down")) for r, w in MLP.items()}, "keep": 0.5,
                          "source": WIDE["source"], "fed": WIDE["fed"].repeat_interleave(8, 1)}, {
        "neurons": [[*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]], "active": 1, "copies": 0,
        "router": [[1, -1], [-1, 1]]}, {"parts": 2, "epochs": 1, "refit": False}, tol=0.05),
    # Columns of what reads the norm take its weight: [1 * 2, 2 * 3] and [4 * 1, 5 * 10].
    "wiring/fusion": Case({"mlps": [ONE, TWO], "apart": torch.zeros(2, 2)}, {
        "norm": [1, 1], "up": [[2, 6], [4, 50]], "down": [[1, 6], [0, 7]]}),
    # Tables without a mean: 2 * 1 and 3 * 1 against 1 * 1, twice each; what else the head has of the other channel is nothing to G = I.
    "wiring/table": Case({"embed": torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]),
                          "head": torch.tensor([[2.0, 0.0], [-2.0, 0.0], [1.0, 3.0], [-1.0, -3.0]]), "gram": torch.eye(2)}, [2, 3],
                         {"damp": 0.0}),
    # The last but one costs least.
    "wiring/parallel": Case({"damage": torch.tensor([0.3, 0.2, 0.1, 0.4])}, [0, 0, 1, 0]),
    # Of 1 and 4 the geometric mean is 2; 100 is above twice their mean, and so is left out.
    "wiring/offline": Case({"sizes": torch.tensor([[1.0, 4.0, 100.0], [5.0, 5.0, 5.0]]), "damage": torch.tensor([0.1, 0.2]),
                            "means": torch.tensor([[1.0, 2.0, 9.0], [0, 0, 0]])}, {"which": [1, 0], "constants": [[0.5, 1.5], [0.2, 0]]},
                           {"share": 0.5, "outlier": 2.0}),
    # Channels first: means 2 and 5.
    "wiring/rms": Case({"writes": torch.tensor([[1.0, 3.0], [3.0, 7.0]])}, [[-1, -2], [1, 2]]),
}
