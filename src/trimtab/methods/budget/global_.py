from __future__ import annotations

from trimtab.core.registry import method
from trimtab.core.types import Summary


@method("budget", xfail={"treats_equals_alike": "counts are whole: equal sites may differ by one entry"})
def global_(scores: dict[str, Summary], target: float) -> dict[str, float]:
    """One threshold for all sites: the best of the model stay, wherever they are.

    The counts of all sites add up to round(target * total), and round(share * size) gives a site's count back. Where the
    target falls between two counts, shares carry the rest, less than half an entry a site, so that their mean is exact.

    Formula: k_l = #{S_l > t} / size_l, t such that sum_l k_l * size_l = k * sum_l size_l
    Source: Han et al. 2015, arXiv:1506.02626; LAMP, arXiv:2010.07611, section 1 as remembered (global pruning)
    Deviations: t is found to within one bin of the merged histograms (1.1 %); inside that bin each site keeps the same
        share, whole entries by largest remainder, of equals the first site
    """
    names = sorted(scores, key=lambda n: (scores[n].site.block, n))  # the answer does not depend on the order given
    hists = [scores[n].hist for n in names]
    total = sum(scores[n].count for n in names)
    kept = round(target * total)
    from_top = sum(hists[1:], hists[0]).flip(0).cumsum(0)
    at = int((from_top < kept).sum())  # the bin of the threshold, counted from the top
    first = len(from_top) - at         # the lowest bin above it
    counts = [int(h[first:].sum()) for h in hists]
    inside = [int(h[first - 1]) for h in hists]
    missing, here = kept - sum(counts), sum(inside)
    if here:
        first_in_line = sorted(range(len(names)), key=lambda i: -(missing * inside[i] % here))
        counts = [c + missing * i // here for c, i in zip(counts, inside, strict=True)]
        for i in first_in_line[:kept - sum(counts)]:
            counts[i] += 1
    # just under half an entry at most, or rounding could take it for a whole one
    over = (target * total - kept) * (1 - 1e-7)
    room = [scores[n].count - c if over > 0 else c for n, c in zip(names, counts, strict=True)]
    return {n: (c + over * r / max(sum(room), 1)) / scores[n].count for n, c, r in zip(names, counts, room, strict=True)}
