"""The plan: every site's share is what the budget says of that site's own scores."""
from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import tiny
from trimtab.core import edits, line, spec
from trimtab.core.calibrate import Collector
from trimtab.core.measured import Gating, Measured, Tried, replaced
from trimtab.core.registry import get
from trimtab.core.types import BadInput, Change, Site, Summary
from trimtab.estimate import dry_run
from trimtab.methods.gates import Gate
from trimtab.network.checkpoint import SafeFile
from trimtab.network.stream import Network


@pytest.mark.parametrize("budget", ["owl(outlier=2)", "lamp", "global", "uniform"])
def test_shares_are_the_budgets(tiny_lm: Path, tmp_path: Path, budget: str) -> None:
    recipe = spec.parse(f"row | magnitude | {budget}")
    net = Network.open(tiny_lm)
    walk_on = line.walker(net, [], tmp_path, None, None)
    sweep = line.sweeps(recipe, net.sites)[0]
    shares = line.decide(net, sweep, 0, walk_on, None, [], tmp_path, None, line.Options(keep=0.3), lambda *_: None)
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
        through.through(i, module, [(k, replaced(net, module, weights)) for k, weights in mine])
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


# ---- shares of gates that are tried -------------------------------------------------------------
def samples_of(name: str) -> list[dict[str, torch.Tensor]]:
    batches = [tiny.inputs(name, rows=2), tiny.inputs(name, rows=3, length=7, seed=2)]  # the last row of each is padded
    return [{k: v[r:r + 1] for k, v in b.items()} for b in batches for r in range(len(next(iter(b.values()))))]


def decided(net: Network, text: str, samples: list[dict[str, torch.Tensor]], scratch: Path, keep: float) -> dict[str, float]:
    recipe = spec.parse(text)
    sweep = line.sweeps(recipe, net.sites)[0]
    walk_on = line.walker(net, samples, scratch, None, None)
    return line.decide(net, sweep, 0, walk_on, None, samples, scratch, None, line.Options(keep=keep), lambda *_: None)


def test_tried_errors_are_those_of_the_block(tmp_path: Path) -> None:
    """What transformers says of one layer whose inputs are masked by hand, padding left out; the block itself stays as it was."""
    net, samples = Network.open(tiny.save("llama", tmp_path / "m")), samples_of("llama")
    gates = {"attn.q": Gate(torch.tensor([0.6])), "mlp.down": Gate(torch.tensor([0.05]), of="hidden")}
    through = Tried(net, samples, tmp_path)
    for i in range(net.n_blocks):
        module = net.block(i)
        before = {n: p.clone() for n, p in module.named_parameters()}
        error = through.through(i, module)
        found = [error({f"{i}.{r}:{k}": t for r in roles for k, t in gates[r].parts().items()})
                 for roles in ((), ("attn.q",), ("attn.q", "mlp.down"))]
        assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
        assert not any(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())

        def outputs(gated: int, i: int = i) -> torch.Tensor:
            model, out = tiny.build("llama"), []
            layer = model.model.layers[i]
            layer.register_forward_hook(lambda m, args, y: out.append(y[0] if isinstance(y, tuple) else y))
            if gated > 0:
                layer.self_attn.q_proj.register_forward_pre_hook(lambda m, args: (args[0] * (args[0].abs() > 0.6),))
            if gated > 1:
                mlp, given = layer.mlp, []
                mlp.register_forward_pre_hook(lambda m, args: given.append(args[0]))
                mlp.down_proj.register_forward_pre_hook(
                    lambda m, args: (args[0] * (torch.nn.functional.silu(mlp.gate_proj(given[-1])).abs() > 0.05),))
            with torch.no_grad():
                for b in samples:
                    model(**b)
            return torch.cat([y[b["attention_mask"].bool()] for y, b in zip(out, samples, strict=True)])

        dense = outputs(0)
        want = [float((outputs(n) - dense).norm(dim=0).mean() / dense.norm(dim=0).mean()) for n in range(3)]
        assert found == pytest.approx(want, rel=1e-4, abs=1e-7)
        assert found[0] == 0 < found[1] < found[2]
    through.close()


@pytest.mark.parametrize(("name", "gate"), [
    ("llama", "gate_magnitude"), ("llama", "wina"), ("phi3", "wina(exact=false)"), ("gpt2", "gate_magnitude"), ("vit", "gate_magnitude"),
    ("llama", "gate_magnitude(exact=true)"),
])
def test_shares_that_are_tried_add_up_and_do_no_worse_than_one_for_all(tmp_path: Path, name: str, gate: str) -> None:
    """Every block computes the share of its weights that was asked for, the same ones whenever it is asked, and errs less for it."""
    net, samples = Network.open(tiny.save(name, tmp_path / "m")), samples_of(name)
    p = spec.parse(f"teal(step=0.05) | {gate}").passes[0]
    shares = decided(net, str(p), samples, tmp_path, 0.4)
    assert shares == decided(net, str(p), samples, tmp_path, 0.4)
    assert list(shares) == sorted(s.name for s in net.sites)
    walk, through, gains = line.walker(net, samples, tmp_path, None, None), Tried(net, samples, tmp_path), []

    def look(i: int, module: object, stats: Collector) -> None:
        sites = net.sites_of(i)
        assert sum(s.size * shares[s.name] for s in sites) == pytest.approx(0.4 * sum(s.size for s in sites))
        trial = Gating(p, sites, stats.of, lambda s: net.weight(module, s), through.through(i, module))
        own, even = trial.error({s.name: shares[s.name] for s in sites}), trial.error(dict.fromkeys(trial.sites, 0.4))
        assert 0 < own <= even
        gains.append(own < 0.95 * even)

    walk({s.name: p.needs for s in net.sites}, look, "dense", lambda *_: None, 0)
    assert any(gains)
    assert decided(net, str(p), samples, tmp_path, 1.0) == dict.fromkeys(shares, 1.0)


def test_passes_that_try_split_each_their_own_sites(tmp_path: Path) -> None:
    """Where only some inputs of a block have gates, those are what the share is of; one site takes it all."""
    net, samples = Network.open(tiny.save("llama", tmp_path / "m")), samples_of("llama")
    shares = decided(net, "*.down: teal | cats(keep=0.3) ; *.q,*.k,*.o: teal(step=0.05,keep=0.6) | wina", samples, tmp_path, 0.5)
    for i in range(net.n_blocks):
        attn = {s.name: s.size for s in net.sites_of(i) if s.role in "qko"}
        assert sum(shares[n] * size for n, size in attn.items()) == pytest.approx(0.6 * sum(attn.values()))
        assert len({shares[n] for n in attn}) > 1
        assert shares[f"{i}.mlp.down"] == 0.3
    assert len(shares) == 4 * net.n_blocks


def test_shares_are_tried_on_what_earlier_passes_left(tiny_lm: Path, tmp_path: Path, calib: str) -> None:
    """Rounded and gated in one run, or one after the other: the same shares, other than those of the dense network; files say them."""
    opts = line.Options(keep=0.5, samples=4, seq_len=32, calib=(calib,), text=(calib,), proof_tokens=64, speed=False, fresh=False)

    def trimmed(model: Path, text: str, out: str) -> dict:
        line.trim(model, spec.load(text), tmp_path / out, opts, lambda *_: None)
        return json.loads((tmp_path / out / "trimtab.json").read_text())

    at_once = trimmed(tiny_lm, "rtn(bits=2,group=16) ; teal(step=0.05) | gate_magnitude", "at_once")
    trimmed(tiny_lm, "rtn(bits=2,group=16)", "rounded")
    after = trimmed(tmp_path / "rounded", "teal(step=0.05) | gate_magnitude", "after")
    dense = trimmed(tiny_lm, "teal(step=0.05) | gate_magnitude", "dense")
    assert at_once["shares"] == after["shares"] != dense["shares"]
    assert at_once["sparsity"]["target"] == pytest.approx(0.5)
    assert {n: 1 - its["target"] for n, its in at_once["sparsity"]["sites"].items()} == pytest.approx(at_once["shares"])


def test_at_a_share_of_one_nothing_is_left_out(tiny_lm: Path, tmp_path: Path, calib: str) -> None:
    opts = line.Options(keep=1.0, samples=4, seq_len=32, calib=(calib,), text=(calib,), proof_tokens=64, speed=False, fresh=False)
    result = line.trim(tiny_lm, spec.load("teal"), tmp_path / "o", opts, lambda *_: None)
    assert (result["sparsity"]["target"], result["sparsity"]["reached"], result["kl"]) == (0, 0, 0)


@pytest.mark.parametrize(("text", "words"), [
    ("owl | gate_magnitude", "budget/owl splits what is dropped of weights, and gate/gate_magnitude drops none; leave it out, or split "
                             "what is computed by teal"),
    ("row | wanda | teal", "budget/teal splits what gates compute, and mask is none; name a gate, such as teal | gate_magnitude"),
    ("teal | svd", "splits what gates compute, and svd is none"),
    ("teal(step=0) | wina", "teal: step is 0; the share of a block's weights that is dropped at a time is above 0 and at most 1"),
    ("gate_magnitude | teal(step=2.0)", "teal: step is 2; "),
])
def test_what_cannot_be_tried_is_refused_before_anything_is_written(tiny_lm: Path, tmp_path: Path, text: str, words: str) -> None:
    opts = line.Options(samples=4, seq_len=32, speed=False, fresh=False)
    with pytest.raises(BadInput, match=re.escape(words)) as e:
        line.trim(tiny_lm, spec.load(text), tmp_path / "o", opts, lambda *_: None)
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_the_shares_of_the_first_block(tiny_lm: Path, tmp_path: Path, calib: str) -> None:
    opts = line.Options(keep=0.5, samples=4, seq_len=32, calib=(calib,), text=(calib,), speed=False)
    said: list[str] = []
    found = dry_run(tiny_lm, spec.load("teal(step=0.05)"), tmp_path / "o", opts, lambda stage, *_: said.append(stage))
    line.trim(tiny_lm, spec.load("teal(step=0.05)"), tmp_path / "o", replace(opts, proof_tokens=64, fresh=False), lambda *_: None)
    shares = json.loads((tmp_path / "o" / "trimtab.json").read_text())["shares"]
    assert found["shares"] == {n: v for n, v in shares.items() if n.startswith("0.")}
    assert any(f"0.mlp.up {100 * shares['0.mlp.up']:.1f}%" in s for s in said)
