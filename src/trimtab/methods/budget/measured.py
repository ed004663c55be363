from __future__ import annotations

from trimtab.core.registry import method
from trimtab.core.types import Choices
from trimtab.methods.budget.knapsack import least


@method("budget", chooses="trials")
def measured(options: dict[str, Choices], *, mean: float = 3.0) -> dict[str, str]:
    """As `knapsack`, by what the loss rises by where the sites that read one input are rounded and all others are not.

    `mean` counts codes, scales, zero points and tables; returns {site: the grid's name}. BadInput where even the smallest grids take more.
    It takes a forward of what is behind them for every input and grid, on 16 sequences.

    Formula: as `knapsack`, d_l the mean loss of a next token with Q(W_l) in place of W_l less that without, Q to the nearest value
    Source: Hubara et al. 2020, arXiv:2006.10518, section 4, equation 8
    Deviations: solved as `knapsack`; sites that read one input are rounded together, and each counts as an equal part of what that costs;
        weights alone are rounded
    """
    return least(options, mean)
