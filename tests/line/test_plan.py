"""The plan: every site's share is what the budget says of that site's own scores."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trimtab.core import edits, line, spec
from trimtab.core.registry import get
from trimtab.core.types import BadInput, Change, Site, Summary
from trimtab.network.checkpoint import SafeFile
from trimtab.network.stream import Network


@pytest.mark.parametrize("budget", ["owl(outlier=2)", "lamp", "global", "uniform"])
def test_shares_are_the_budgets(tiny_lm: Path, tmp_path: Path, budget: str) -> None:
    recipe = spec.parse(f"row | magnitude | {budget}")
    net = Network.open(tiny_lm)
    walk_on = line.walker(net, [], tmp_path, None, None)
    sweep = line.sweeps(recipe, net.sites)[0]
    shares = line.decide(net, sweep, 0, walk_on, line.Options(keep=0.3), lambda *_: None)
    step = recipe.passes[0].steps["budget"]
    of = step.method.facts["of"] or (lambda s: s)
    scores = {s.name: Summary.of(s, of(net.weight(net.block(s.block), s).float().abs())) for s in net.sites}
    assert shares == pytest.approx(step.method({"scores": scores, "target": 0.3}, **step.bound))
    assert (len(set(shares.values())) == 1) == (budget == "uniform")


@pytest.mark.parametrize("text", ["row | wanda | mask", "site | sparsegpt", "row | admm", "nm(n=2,m=4) | wanda | obs"])
def test_a_site_keeps_what_an_earlier_pass_left(text: str) -> None:
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(8, 12, generator=g), torch.randn(40, 12, generator=g)
    prior = torch.rand(8, 12, generator=g) > 0.4
    site = Site("0.mlp.up", 0, "mlp", "up", "up", (8, 12), "mlp.in")
    p = spec.parse(text).passes[0]
    have = {n: get(f"stat/{n}").fn(x) / len(x) for n in p.needs}
    change = edits.edit_site(p, site, w * prior, 0.5, have, prior)
    assert isinstance(change, Change)
    assert not bool(change.w[~prior].any())
    assert change.mask is not None
    assert not bool((change.mask & ~prior).any())
    whole = edits.edit_site(p, site, w, 0.5, have, None)
    assert bool((whole.w != 0).logical_and(~prior).any())  # without a prior the same entries are used


def test_every_site_takes_one_of_the_grids_within_the_bits(tiny_lm: Path, tmp_path: Path, calib: Path) -> None:
    """The plan names a grid a site, the sites of one input the same; the codes are on it, and take no more than was allowed."""
    recipe = spec.load("knapsack(mean=4) | int(bits=2/3/4,group=32) | gptq")
    opts = line.Options(samples=4, seq_len=32, calib=(str(calib),), text=(str(calib),), proof_tokens=64, speed=False, fresh=False)
    line.trim(tiny_lm, recipe, tmp_path / "o", opts, lambda *_: None)
    chosen = json.loads((tmp_path / "o" / "trimtab.json").read_text())["shares"]
    parts, net = SafeFile(tmp_path / "o" / "trimtab.safetensors"), Network.open(tiny_lm)
    used: dict[tuple[int, str], set[int]] = {}
    size = 0
    for s in net.sites:
        levels, group = parts.read(f"{s.name}:grid").tolist()
        bits = (levels - 1).bit_length()
        assert (chosen[s.name], group) == (f"grid/int(bits={bits},group=32)", 32)
        used.setdefault((s.block, s.input), set()).add(bits)
        size += s.size * bits // 8 + parts.read(f"{s.name}:scales").nbytes
    assert all(len(bits) == 1 for bits in used.values())
    assert len({b for bits in used.values() for b in bits}) > 1
    assert 3.7 < size * 8 / sum(s.size for s in net.sites) <= 4


def test_too_few_bits_are_refused_before_anything_is_written(tiny_lm: Path, tmp_path: Path) -> None:
    opts = line.Options(samples=4, seq_len=32, speed=False, fresh=False)
    with pytest.raises(BadInput, match=r"2.3 bits a weight are less than the smallest grids take, 2\.5"):
        line.trim(tiny_lm, spec.load("knapsack(mean=2.3) | int(bits=2/3/4,group=32) | gptq"), tmp_path / "o", opts, lambda *_: None)
    assert not list(tmp_path.iterdir())
