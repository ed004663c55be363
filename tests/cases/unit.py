"""One matrix of scores for all units: whoever competes with whom, the answer changes."""
from __future__ import annotations

import torch

from tests.cases import Case

S = torch.tensor([[1.0, 2.0, 3.0, 9.0], [8.0, 4.0, 7.0, 6.0]])
HALF = {"s": S, "keep": 0.5}
TWO = torch.tensor([4, 2])  # four heads, each two of which share a key

CASES = {
    # The best two of each row.
    "unit/row": Case(HALF, [[0, 0, 1, 1], [1, 0, 1, 0]], differs="unit/site"),
    # 9, 8, 7 and 6.
    "unit/site": Case(HALF, [[0, 0, 0, 1], [1, 0, 1, 1]], differs="unit/column"),
    # As site: what makes it the model's is the share, which the global budget has found.
    "unit/model": Case(HALF, [[0, 0, 0, 1], [1, 0, 1, 1]], differs="unit/row"),
    # The better one of each column.
    "unit/column": Case(HALF, [[0, 0, 0, 1], [1, 1, 1, 0]], differs="unit/site"),
    # One of every two neighbours in a row.
    "unit/nm": Case(HALF, [[0, 1, 0, 1], [1, 0, 1, 0]], {"n": 1, "m": 2}, differs="unit/row"),
    # Squares of the 1 x 2 blocks: 5, 90, 80, 85. By plain sums the last would win: 3, 12, 12, 13.
    "unit/block": Case({"s": S, "keep": 0.25}, [[0, 0, 1, 1], [0, 0, 0, 0]], {"rows": 1, "cols": 2}, differs="unit/site"),
    # Sums of the columns: 9, 6, 10, 15; their means 4.5, 3, 5 and 7.5.
    "unit/inputs": Case(HALF, [[0, 0, 1, 1], [0, 0, 1, 1]], differs="unit/column"),
    # Sums of the columns: 9, 6, 10, 15. Of two neighbours: 15 and 25.
    "unit/neuron": Case({**HALF, "heads": TWO}, [[0, 0, 1, 1], [0, 0, 1, 1]], differs="unit/head"),
    "unit/channel": Case({**HALF, "heads": TWO}, [[0, 0, 1, 1], [0, 0, 1, 1]], differs="unit/head"),
    "unit/subclone": Case(HALF, [[0, 0, 1, 1], [0, 0, 1, 1]], differs="unit/select"),
    # The first of every two.
    "unit/select": Case(HALF, [[1, 0, 1, 0], [1, 0, 1, 0]], differs="unit/subclone"),
    "unit/kvgroup": Case({**HALF, "heads": TWO}, [[0, 0, 1, 1], [0, 0, 1, 1]], differs="unit/head"),
    # The better one of each pair.
    "unit/head": Case({**HALF, "heads": TWO}, [[1, 0, 0, 1], [1, 0, 0, 1]], differs="unit/kvgroup"),
    "unit/inner": Case({**HALF, "heads": TWO}, [[0, 0, 1, 1], [0, 0, 1, 1]], differs="unit/head"),
    "unit/sublayer": Case({"s": S, "keep": 0.4}, [[0, 0, 0, 0], [0, 0, 0, 0]], differs="unit/inputs"),
    "unit/layer": Case({"s": S, "keep": 0.6}, [[1, 1, 1, 1], [1, 1, 1, 1]], differs="unit/inputs"),
    "unit/above": Case(HALF, [[0, 0, 0, 1], [0, 0, 0, 1]], {"limit": 6.0}, differs="unit/inputs"),
}
