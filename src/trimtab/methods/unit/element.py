"""Single weights, and whom they compete with. A unit turns scores [out, in] and a kept share into a mask."""
from __future__ import annotations

from torch import Tensor

from trimtab.core.registry import method
from trimtab.methods.select import top


@method("unit")
def row(s: Tensor, keep: float) -> Tensor:
    """The weights of one output compete.

    Formula: the round(keep * in) best of each row
    Source: Sun et al. 2023, arXiv:2306.11695, section 3
    Deviations: none
    """
    return top(s, round(keep * s.shape[1]))


@method("unit")
def site(s: Tensor, keep: float) -> Tensor:
    """All weights of a matrix compete.

    Formula: the round(keep * out * in) best
    Source: Han et al. 2015, arXiv:1506.02626
    Deviations: none
    """
    return top(s.reshape(1, -1), round(keep * s.numel())).reshape(s.shape)


@method("unit", joint=("budget",))
def model(s: Tensor, keep: float) -> Tensor:
    """All weights of the model compete.

    Formula: one threshold for every site: the global budget fixes each site's count, the site's best fill it
    Source: Han et al. 2015, arXiv:1506.02626
    Deviations: the threshold is read off merged histograms of 64 bins an octave; counts add up to the target exactly
    """
    return top(s.reshape(1, -1), round(keep * s.numel())).reshape(s.shape)


@method("unit", along="out")
def column(s: Tensor, keep: float) -> Tensor:
    """The weights that one input feeds compete.

    Formula: the round(keep * out) best of each column
    Source: DaSS, arXiv:2405.01943, section 3
    Deviations: none
    """
    return top(s.T, round(keep * s.shape[0])).T.contiguous()
