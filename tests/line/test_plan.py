"""The plan: every site's share is what the budget says of that site's own scores."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import tiny
from trimtab.core import edits, line, spec
from trimtab.core.measured import Measured
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
    shares = line.decide(net, sweep, 0, walk_on, [], tmp_path, None, line.Options(keep=0.3), lambda *_: None)
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


@pytest.mark.parametrize(("recipe", "least"), [
    ("knapsack(mean=4) | int(bits=2/3/4,group=32) | gptq", 3.7),
    ("measured(mean=4) | int(bits=2/3/4,group=32) | rtn", 2.5),  # where fewer bits happen to do better, they are taken
])
def test_every_site_takes_one_of_the_grids_within_the_bits(tiny_lm: Path, tmp_path: Path, calib: Path, recipe: str, least: float) -> None:
    """The plan names a grid a site, the sites of one input the same; the codes are on it, and take no more than was allowed."""
    opts = line.Options(samples=4, seq_len=32, calib=(str(calib),), text=(str(calib),), proof_tokens=64, speed=False, fresh=False)
    line.trim(tiny_lm, spec.load(recipe), tmp_path / "o", opts, lambda *_: None)
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
    assert least < size * 8 / sum(s.size for s in net.sites) <= 4


@pytest.mark.parametrize("spill", [None, 0])
def test_measured_losses_are_those_of_the_network(tmp_path: Path, spill: int | None) -> None:
    """What transformers says of the network with some sites changed, padding left out; hidden states in memory or in files."""
    net = Network.open(tiny.save("llama", tmp_path / "m"))
    batches = [tiny.inputs("llama", rows=2), tiny.inputs("llama", rows=1, length=7, seed=2)]
    samples = [{k: v[r:r + 1] for k, v in b.items()} for b in batches for r in range(len(b["input_ids"]))]
    sites = {s.name: s for s in net.sites}
    names = {"both": ("0.attn.q", "0.attn.k"), "down": ("1.mlp.down",), "last": ("1.attn.o",)}

    def loss(changed: tuple[str, ...]) -> float:
        model, total, count = tiny.build("llama"), 0.0, 0
        for n in changed:
            block = model.model.layers[sites[n].block]
            block.get_parameter(sites[n].param).data.zero_()
        for b in samples:
            with torch.no_grad():
                logits = model(**b).logits[:, :-1]
            on = b["attention_mask"][:, 1:].bool()
            total += float(torch.nn.functional.cross_entropy(logits[on], b["input_ids"][:, 1:][on], reduction="sum"))
            count += int(on.sum())
        return total / count

    through = Measured(net, samples, tmp_path, spill, len(names))
    for i in range(net.n_blocks):
        mine = [(k, {sites[n]: torch.zeros(sites[n].shape) for n in its}) for k, its in names.items() if its[0].startswith(f"{i}.")]
        module = net.block(i)
        before = {n: p.clone() for n, p in module.named_parameters()}
        through.through(i, module, mine)
        assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    rises = through.rises()
    through.close()
    assert not list(tmp_path.glob("hidden*"))
    own = loss(())
    for k, its in names.items():
        assert rises[k] == pytest.approx(loss(its) - own, abs=1e-5)
        assert abs(rises[k]) > 1e-4


def test_a_loss_that_is_not_there_is_not_measured(tmp_path: Path) -> None:
    opts = line.Options(samples=4, seq_len=32, speed=False, fresh=False)
    with pytest.raises(BadInput, match="a language model's loss"):
        line.trim(tiny.save("bert", tmp_path / "bert"), spec.load("measured(mean=4) | int(bits=2/3,group=16) | rtn"), tmp_path / "o", opts,
                  lambda *_: None)
    assert not (tmp_path / "o").exists()


def test_too_few_bits_are_refused_before_anything_is_written(tiny_lm: Path, tmp_path: Path) -> None:
    opts = line.Options(samples=4, seq_len=32, speed=False, fresh=False)
    with pytest.raises(BadInput, match=r"2.3 bits a weight are less than the smallest grids take, 2\.5"):
        line.trim(tiny_lm, spec.load("knapsack(mean=2.3) | int(bits=2/3/4,group=32) | gptq"), tmp_path / "o", opts, lambda *_: None)
    assert not list(tmp_path.iterdir())
