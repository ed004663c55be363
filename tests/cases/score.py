from __future__ import annotations

import torch

from tests.cases import Case

W = torch.tensor([[1.0, -2.0], [-3.0, 4.0], [5.0, 6.0]])
# 1.0 is stored as 127 << 23; it is the second weight of the first row, and there is one row.
CHANCE = torch.rand(1, 2, generator=torch.Generator().manual_seed(2 * (127 << 23) + 1 + 7 * 1_000_003))

# What a head of two dimensions makes of two tokens: |1 + 2| + |-3 + 0.5| and |2 - 2| + |-6 - 0.5|, 5.5 and 6.5; half of their mean each.
AMP = [3.0, 3.0]

CASES = {
    "score/magnitude": Case({"w": W, "in_sq": torch.tensor([9.0, 1.0])}, [[1, 2], [3, 4], [5, 6]], differs="score/wanda"),
    "score/wanda": Case({"w": W, "in_sq": torch.tensor([9.0, 1.0])}, [[3, 2], [9, 4], [15, 6]], differs="score/magnitude"),
    # The first weight is zero already.
    "score/random": Case({"w": torch.tensor([[0.0, 1.0]])}, [[0, CHANCE[0, 1]]], {"seed": 7}, differs="score/magnitude"),
    # Rows times the roots 2, 3, 1.
    "score/dass": Case({"w": W, "act_norm": torch.tensor([4.0, 9.0, 1.0]), "in_sq": torch.tensor([4.0, 9.0])},
                       [[2, 4], [9, 12], [5, 6]], differs="score/wanda"),
    # Norms of the inputs 3 and 1, a hundred times the norms of the gradients 1 and 2.
    "score/gblm": Case({"w": torch.tensor([[2.0, -1.0]]), "in_sq": torch.tensor([9.0, 1.0]) / 2048,
                        "grad_sq": torch.tensor([[1e-4, 4e-4]]) / 128}, [[8, 3]], differs="score/wanda"),
    # H = [[6, 2], [2, 4]] has determinant 20, its inverse the diagonal 0.2 and 0.3: 1 / 0.2 and 9 / 0.3.
    "score/obs": Case({"w": torch.tensor([[1.0, -3.0]]), "gram": torch.tensor([[5.0, 2.0], [2.0, 3.0]])}, [[5, 30]],
                      {"damp": 0.25}, differs="score/magnitude"),
    # First block: F = [[1, 0.5], [0.5, 1]], its inverse has 4/3 on the diagonal. The last weight stands alone: F = 2.5.
    "score/obert": Case({"w": torch.tensor([[2.0, 4.0, 1.0]]), "grads": torch.tensor([[[1.0, 1.0, 2.0]], [[0.0, 0.0, 0.0]]])},
                        [[1.5, 6, 1.25]], {"block": 2, "damp": 0.5}, differs="score/magnitude"),
    "score/taylor": Case({"w": torch.tensor([[2.0, -1.0]]), "grad": torch.tensor([[-3.0, 0.5]])}, [[6, 0.5]],
                         differs="score/magnitude"),
    "score/amp": Case({"w": torch.tensor([[1.0, 2.0], [-3.0, 0.5]]), "heads": torch.tensor([1, 1]), "in_abs": torch.tensor([1.0, 2.0]),
                       "in_sq": torch.tensor([1.0, 4.0]), "sample": torch.tensor([[1.0, 1.0], [2.0, -1.0]])}, AMP,
                      differs="score/transact"),
    # One head of four: the mean of 1, 2, 3 and 6 and 10 / 4 of the largest are 3 + 15, a quarter of it each.
    "score/transact": Case({"heads": torch.tensor([1, 1]), "in_sq": torch.tensor([1.0, 4.0, 9.0, 36.0]), "sentence_abs": torch.ones(4)},
                           [4.5] * 4, differs="score/minitron"),
    # The norm of 3 and 4, half of it each.
    "score/minitron": Case({"heads": torch.tensor([1, 1]), "sentence_abs": torch.tensor([3.0, 4.0]), "in_sq": torch.ones(2)}, [2.5, 2.5],
                           differs="score/transact"),
    "score/activation": Case({"in_abs": torch.tensor([3.0, 4.0]), "sentence_abs": torch.tensor([1.0, 9.0]), "heads": torch.tensor([1, 1])},
                             [3.0, 4.0], differs="score/minitron"),
    "score/influence": Case({"cosine": torch.tensor([0.75]), "block_cosine": torch.tensor([0.5])}, [0.25], differs="score/block_influence"),
    "score/block_influence": Case({"cosine": torch.tensor([0.75]), "block_cosine": torch.tensor([0.5])}, [0.5], differs="score/influence"),
    # Twice and four times as wide: the mean of log 2 and log 4.
    "score/entropy": Case({"stream_std": torch.tensor([[1.0, 1.0], [2.0, 4.0]]), "cosine": torch.tensor([0.5])},
                          [1.5 * 0.6931471805599453], differs="score/influence"),
    "score/shallow": Case({"depth": torch.tensor(0.25), "cosine": torch.tensor([0.5])}, [1.75], differs="score/influence"),
    "score/peak": Case({"w": W, "absmax": torch.tensor([9.0, 1.0]), "in_sq": torch.tensor([9.0, 1.0])}, [[9, 1], [9, 1], [9, 1]],
                       differs="score/wanda"),
    "score/spike": Case({"w": W, "absmax": torch.tensor([9.0, 1.0]), "in_sq": torch.tensor([9.0, 1.0])}, [[9, 2], [27, 4], [45, 6]],
                        differs="score/wanda"),
}
