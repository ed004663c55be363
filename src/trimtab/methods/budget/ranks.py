from __future__ import annotations

from dataclasses import replace

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Choices, Spectrum
from trimtab.methods.budget.knapsack import least

WHOLE = "whole"


def tried(spectrum: Spectrum, steps: int) -> Choices:
    """The ranks that a site may have, evenly spread up to the greatest that saves parameters, and its weight as it is."""
    site = spectrum.site
    each, most = sum(site.shape), (site.size - 1) // sum(site.shape)
    some = sorted({max(1, most * k // steps) for k in range(1, steps + 1)} if most else set())
    return Choices(replace(site, input=site.name), (*map(str, some), WHOLE), (*(r * each for r in some), site.size),
                   (*(spectrum.lost[r] for r in some), 0.0))


@method("budget", spectra=True)
def ranks(spectra: dict[str, Spectrum], target: float, *, steps: int = 64) -> dict[str, float]:
    """A rank for every site, or its weight as it is: the least loss of all together that so many parameters allow.

    `steps`: how many ranks are tried for a site, evenly spread up to the greatest that saves parameters. Shares average to `target`, or
    to less by no more than a step of one site. BadInput where a rank of 1 everywhere takes more.

    Formula: min sum_l d_l(r_l) subject to sum_l c_l(r_l) <= k sum_l out_l in_l; c(r) = r (out + in), the weight as it is out in;
        d(r) = 1/2 sum_{n > r} D_n^2 sum_i h_i U_in^2 with W S = U D V^T, G = S S^T, h_i = sum_j E[g_ij^2] / tr G; whole: d = 0
    Source: ours: the knapsack of Hubara et al. 2020, arXiv:2006.10518, section 4, over ranks; what outputs lose by the whitened spectrum
        of Wang et al. 2024 (SVD-LLM), arXiv:2403.07378, section 3; what that costs the network as in Martens and Grosse 2015 (K-FAC),
        arXiv:1503.05671, section 3, with a diagonal second moment of the outputs' gradients
    Deviations: losses are told of the dense network, whatever makes the factors, and taken to add up; solved by dynamic programming over
        sizes, to within one part in 100,000
    """
    if steps < 1:
        raise BadInput(f"ranks: steps is {steps}; it is how many ranks are tried for a site, 1 or more")
    options = {n: tried(s, steps) for n, s in spectra.items()}
    total = sum(s.site.size for s in spectra.values())
    if (floor := sum(min(o.bytes) for o in options.values())) > target * total:
        raise BadInput(f"ranks: {target:g} of the parameters is less than factors of the least rank take, {floor / total:.3g}; keep more")
    chosen = least(options, 8 * target)
    return {n: 1.0 if chosen[n] == WHOLE else int(chosen[n]) * sum(s.site.shape) / s.site.size for n, s in spectra.items()}
