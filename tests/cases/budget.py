from __future__ import annotations

from collections.abc import Mapping

import torch

from tests.cases import Case
from trimtab.core.types import Choices, Ranking, Site, Spectrum, Summary
from trimtab.methods.budget.lamp import lamp_scores


def summaries(sites: dict[str, list[float]], of=lambda s: s) -> dict[str, Summary]:
    """Sites `<block>.<group>.<role>` of one row, with these scores."""
    out = {}
    for name, s in sites.items():
        block, group, role = name.split(".")
        site = Site(name, int(block), group, role, role, (1, len(s)), f"{group}.in")
        out[name] = Summary.of(site, of(torch.tensor([s])))
    return out


# A small site with a spread of scores, a large one of larger scores.
TWO = {"0.mlp.up": [1.0, 2.0, 3.0, 4.0], "0.mlp.down": [10.0, 11.0, 12.0, 13.0]}
# Outliers above twice the mean: one of eight in block 0 (mean 2), none in block 1, one of four in block 2 (mean 3).
BLOCKS = {"0.attn.q": [1.0, 1.0, 1.0, 9.0], "0.attn.o": [1.0, 1.0, 1.0, 1.0], "1.attn.q": [1.0, 1.0, 1.0, 1.0],
          "2.attn.q": [1.0, 1.0, 1.0, 9.0]}
FLAT = {"0.attn.o": [1.0] * 4, "0.mlp.down": [1.0] * 4, "1.attn.o": [1.0] * 8}
COSINE = {"0.attn.o": torch.tensor([0.9]), "0.mlp.down": torch.tensor([0.8]), "1.attn.o": torch.tensor([0.1])}
LOSSES = {"0.attn.q": (6.0, 3.0, 2.0), "0.attn.k": (4.0, 2.0, 1.0), "0.attn.o": (5.0, 2.0, 1.0)}
GRIDS = {n: Choices(Site(n, 0, "attn", n[-1], n[-1], (1, 8), "attn.mid" if n.endswith("o") else "attn.in"), ("2", "3", "4"), (2, 3, 4), its)
         for n, its in LOSSES.items()}

# Of 4 x 4 weights rank 1 takes 8 parameters and the weight itself 16; of 2 x 6 rank 1 takes 8 and the weight 12.
LOST = {"0.attn.q": Spectrum(Site("0.attn.q", 0, "attn", "q", "q", (4, 4), "attn.in"), (9.0, 5.0, 1.0, 0.5, 0.0)),
        "0.attn.k": Spectrum(Site("0.attn.k", 0, "attn", "k", "k", (2, 6), "attn.in"), (9.0, 3.0, 0.0))}


# Of the same sites: the second's first stayed, the first's first two went last.
RANKED = {n: Ranking(s.site, its) for (n, s), its in zip(LOST.items(), ((-1.0, -2.0, -9.0, -9.0), (0.5, -5.0)), strict=True)}


class Costs:
    """Two sites of 6 and 18 weights; leaving out a share s of the inputs of each adds 2 s^2 and 3 s^2 to the squared error."""

    def __init__(self) -> None:
        self.sites = {"0.mlp.up": Site("0.mlp.up", 0, "mlp", "up", "up", (2, 3), "mlp.in"),
                      "0.mlp.down": Site("0.mlp.down", 0, "mlp", "down", "down", (3, 6), "mlp.mid")}

    def error(self, shares: Mapping[str, float]) -> float:
        return (2 * (1 - shares["0.mlp.up"]) ** 2 + 3 * (1 - shares["0.mlp.down"]) ** 2) ** 0.5


CASES = {
    "budget/uniform": Case({"scores": summaries(TWO), "target": 0.625}, {"0.mlp.up": 0.625, "0.mlp.down": 0.625},
                           differs="budget/global"),
    # One of four is worth something, and all of the others.
    "budget/alive": Case({"scores": summaries({"0.mlp.up": [0.0, 0.0, 3.0, 0.0], "0.mlp.down": [10.0, 11.0, 12.0, 13.0]})},
                         {"0.mlp.up": 0.25, "0.mlp.down": 1.0}),
    # The best five of eight: 13, 12, 11, 10 and 4.
    "budget/global": Case({"scores": summaries(TWO), "target": 0.625}, {"0.mlp.up": 0.25, "0.mlp.down": 1.0},
                          differs="budget/uniform"),
    # up: 1, 9/25, 4/29, 1/30; down, from the best: 1, 144/313, 121/434, 100/534. The best five: two and three.
    "budget/lamp": Case({"scores": summaries(TWO, lamp_scores), "target": 0.625}, {"0.mlp.up": 0.5, "0.mlp.down": 0.75},
                        differs="budget/uniform"),
    # Densities 1/8, 0, 1/4 over a window of 0.2: 0.1, 0, 0.2, whose mean goes to the target.
    "budget/owl": Case({"scores": summaries(BLOCKS), "target": 0.5},
                       {"0.attn.q": 0.5, "0.attn.o": 0.5, "1.attn.q": 0.4, "2.attn.q": 0.6},
                       {"outlier": 2.0, "spread": 0.1}, differs="budget/global"),
    # Ranks 0, 1/2, 1 over a window of 0.2: 0, 0.1, 0.2, whose mean, weighted by sizes 4, 4, 8, is 0.125.
    "budget/redundancy": Case({"scores": summaries(FLAT), "target": 0.5, "cosine": COSINE},
                              {"0.attn.o": 0.375, "0.mlp.down": 0.475, "1.attn.o": 0.575}, {"spread": 0.1},
                              differs="budget/owl"),
    # Eight weights take 2, 3 or 4 bytes, all three sites no more than 8: 2 above the least. Those save 5 where q and k take 3 bits, which
    # they do together, and 4 where o takes 4.
    "budget/knapsack": Case({"options": GRIDS}, {"0.attn.q": "3", "0.attn.k": "3", "0.attn.o": "2"}, {"mean": 8 * 8 / 24}),
    "budget/measured": Case({"options": GRIDS}, {"0.attn.q": "3", "0.attn.k": "3", "0.attn.o": "2"}, {"mean": 8 * 8 / 24}),
    # 28 parameters in all, of which 24 are asked for: 8 for the best, 8 for the next, 8 for the one after; one more would make 28.
    "budget/acip": Case({"ranking": RANKED, "target": 24 / 28, "scores": LOST}, {"0.attn.q": 1.0, "0.attn.k": 8 / 12},
                        differs="budget/uniform"),
    # 20 of 28 parameters: both of rank 1 take 16 and lose 8; q of rank 1 and k whole 20, losing 5; q whole takes 16 and k then none.
    "budget/ranks": Case({"spectra": LOST, "target": 20 / 28, "scores": LOST}, {"0.attn.q": 0.5, "0.attn.k": 1.0},
                         differs="budget/uniform"),
    # 15 of 24 weights are left out, 6 at a time: all of up, or a third of down. A third of down adds 1/3, up 2; the next third adds 1; the
    # last 3 weights add 2 / 4 from up, and from down (25 / 36 - 16 / 36) * 3 = 3/4. One share for both would add up to 5 * (5/8)^2 = 1.95,
    # this to 4/3 + 1/2.
    "budget/teal": Case({"trial": Costs(), "target": 0.375, "scores": Costs().sites}, {"0.mlp.up": 0.5, "0.mlp.down": 1 / 3},
                        {"step": 0.25}, differs="budget/uniform"),
}
