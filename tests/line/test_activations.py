"""What `inspect --activations` measures, against plain transformers and slow loops; and its page."""
from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import tiny
from trimtab import cli
from trimtab.core import data
from trimtab.network.stream import Network, load_module
from trimtab.prove.activations import NEAR, STEPS, Activations, Tail, activations, batches_of, dead, rounds, silent, small, union
from trimtab.prove.proof import answer
from trimtab.report.page import inspect_page

DOWN = {"llama": "model.layers.{}.mlp.down_proj", "phi3": "model.layers.{}.mlp.down_proj", "opt": "model.decoder.layers.{}.fc2",
        "gpt2": "transformer.h.{}.mlp.c_proj", "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h", "bert": "encoder.layer.{}.output.dense",
        "vit": "vit.layers.{}.mlp.fc2"}


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def samples_of(name: str, rows: int = 6, length: int = 12) -> list[dict[str, Tensor]]:
    """Single samples, the last one with padding."""
    batch = tiny.inputs(name, rows, length)
    return [{k: v[i:i + 1] for k, v in batch.items()} for i in range(rows)]


def taken(path: Path, samples: list[dict[str, Tensor]], scratch: Path) -> Activations:
    of = Activations(Network.open(path), samples, scratch)
    with torch.no_grad():
        of.take(lambda: None)
    return of


def plain(path: Path, name: str, samples: list[dict[str, Tensor]], gate=None) -> tuple[list[Tensor], float]:
    """Hidden values [tokens, neurons] of each block in plain transformers, and the mean loss; `gate`(block, x) changes them."""
    model, seen = load_module(path), {}

    def hook(i):
        def see(m, args):
            x = args[0] if gate is None else gate(i, args[0])
            seen.setdefault(i, []).append(x.reshape(-1, x.shape[-1])[real])
            return (x, *args[1:])
        return see

    for i in range(2):
        model.get_submodule(DOWN[name].format(i)).register_forward_pre_hook(hook(i))
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in samples:
            mask = batch.get("attention_mask")
            real = slice(None) if mask is None else mask.bool().flatten()
            out = model(**batch)
            if name not in ("bert", "vit"):
                ids = batch["input_ids"][0][mask[0].bool()]
                total += float(torch.nn.functional.cross_entropy(out.logits[0, :len(ids) - 1], ids[1:], reduction="sum"))
                count += len(ids) - 1
    return [torch.cat(seen[i]) for i in range(2)], total / max(count, 1)


# ---- the measures -----------------------------------------------------------------------------
def test_small_is_held_against_the_root_mean_square():
    h = torch.tensor([[0.0, 0.0, 4.0, -3.0], [0.2, -0.14, 0.3, 0.1]])  # rms 1.77: zeros, 0.14 and 0.1 are below 0.177
    assert small(h) == 4 / 8


def test_dead_neurons_are_told_apart():
    h = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
    assert dead(h, torch.tensor([True, False, False, False])) == {"static": 0.25, "dynamic": 0.5, "never_active": 0.25}


def layer(seed: int = 0, relu: bool = False) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randn(40, 24, generator=g), torch.randn(7, 24, generator=g)
    return h.relu() if relu else h, w


def slow_cett(h: Tensor, w: Tensor, eps: float) -> tuple[float, float]:
    """CETT and the share that is left out, neuron by neuron."""
    errors, dropped = [], 0
    for x in h.double():
        tail, whole = torch.zeros(len(w)).double(), torch.zeros(len(w)).double()
        for i, value in enumerate(x):
            n = value * w[:, i].double()
            whole += n
            if float(n.norm()) <= eps:
                tail += n
                dropped += 1
        errors.append(float(tail.norm() / whole.norm()) if float(whole.norm()) else 0.0)
    return sum(errors) / len(errors), dropped / h.numel()


@pytest.mark.parametrize("relu", [False, True])
def test_thresholds_hit_their_cett_and_rise_with_it(relu):
    h, w = layer(relu=relu)
    tail, last = Tail.of(h, w), -1.0
    for target in (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9):
        eps = tail.threshold(h, w, target)
        assert eps >= last
        last = eps
        found, share = slow_cett(h, w, eps * (1 + 1e-6))
        assert found <= target + 1e-6 and abs(share - float((~tail.gate(eps).mask(h)).double().mean())) < 1e-12
        step = next(k for k in range(-1, STEPS + 1) if tail.eps(k) == eps)
        assert target - found <= NEAR or tail.cett(h, w, tail.eps(step + 1)) > target  # hit, or the next step is over it
    fresh = Tail.of(h, w)  # what was tried before changes nothing beyond the tolerance
    assert abs(slow_cett(h, w, fresh.threshold(h, w, 0.3))[0] - slow_cett(h, w, tail.threshold(h, w, 0.3))[0]) < 0.02


def test_a_cett_of_zero_leaves_out_zeros_and_nothing_else():
    h, w = layer(relu=True)
    tail = Tail.of(h, w)
    assert torch.equal(tail.gate(tail.threshold(h, w, 0.0)).mask(h), h != 0)
    h, w = layer()
    tail = Tail.of(h, w)
    assert tail.gate(tail.threshold(h, w, 0.0)).mask(h).all()


def test_the_greatest_threshold_is_a_quantile():
    h, w = layer()
    tail = Tail.of(h, w)
    kept = tail.gate(tail.threshold(h, w, 10.0)).mask(h)
    assert int(kept.sum()) == h.numel() - math.ceil(0.99 * h.numel())


def test_a_token_without_output_has_no_error():
    h, w = layer(relu=True)
    h[3] = 0
    tail = Tail.of(h, w)
    assert abs(tail.cett(h, w, 1.0) - slow_cett(h, w, 1.0)[0]) < 1e-6


def test_batches_mix_sequences_and_use_a_token_once():
    lengths = [5, 9, 1, 7]
    turns = rounds(lengths, torch.Generator().manual_seed(0))
    owner = torch.cat([torch.full((n,), k) for k, n in enumerate(lengths)])
    assert sorted(torch.cat(turns).tolist()) == list(range(sum(lengths)))
    assert all(len(set(owner[t].tolist())) == len(t) for t in turns)
    assert any(t.tolist() != sorted(t.tolist()) for t in turns)
    assert batches_of(1) == [1] and batches_of(6) == [1, 2, 4] and batches_of(5000)[-1] == 256


def test_union_sparsity_is_what_a_loop_counts():
    active = torch.rand(60, 33, generator=torch.Generator().manual_seed(3)) < torch.linspace(0.01, 0.9, 33)
    turns = rounds([12] * 5, torch.Generator().manual_seed(0))
    one = union(active, turns, 1)
    assert abs(one["sparsity"] - (1 - float(active.double().mean()))) < 1e-12 and abs(one["sparsity"] - one["independent"]) < 1e-12
    for batch in (2, 4):
        shares = []
        for t in turns:
            for k in range(len(t) // batch):
                mine = t[k * batch:(k + 1) * batch].tolist()
                shares.append(sum(not any(active[i, n] for i in mine) for n in range(33)) / 33)
        found = union(active, turns, batch)
        mean = sum(shares) / len(shares)
        assert abs(found["sparsity"] - mean) < 1e-12
        assert abs(found["std"] - math.sqrt(sum((s - mean) ** 2 for s in shares) / len(shares))) < 1e-12
        assert abs(found["independent"] - sum((1 - float(active[:, n].double().mean())) ** batch for n in range(33)) / 33) < 1e-12
    assert union(active, turns, 4)["sparsity"] < union(active, turns, 2)["sparsity"] < one["sparsity"]
    shared = active[:1].expand(60, 33)  # all tokens need the same: a batch needs no more than one of them
    assert abs(union(shared, turns, 4)["sparsity"] - union(shared, turns, 1)["sparsity"]) < 1e-12


# ---- of a network -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(DOWN))
def test_hidden_values_are_those_of_transformers(name, tmp_path):
    path, samples = tiny.save(name, tmp_path / "m"), samples_of(name)
    of, (hidden, loss) = taken(path, samples, tmp_path), plain(path, name, samples)
    try:
        assert of.relu == (name == "opt")
        assert of.tokens == len(hidden[0]) == sum(map(len, of.turns))
        for i, h in enumerate(hidden):
            assert torch.allclose(of.hidden[i][0], h, atol=1e-5)
            found = of.layers[i].found
            rms = math.sqrt(float(h.double().square().mean()))
            assert abs(found["rms"] - rms) < 1e-5
            assert abs(found["small"] - float((h.abs() < 0.1 * rms).double().mean())) < 1e-3
            assert abs(found["zeros"] - float((h == 0).double().mean())) < 1e-3
            assert (found["zeros"] > 0.1) == (name == "opt")
        if of.net.kind == "lm":
            assert abs(math.log(of.score(of.dense)) - loss) < 1e-4
    finally:
        of.close()


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_a_gated_network_is_what_transformers_makes_of_it(name, tmp_path):
    path, samples = tiny.save(name, tmp_path / "m"), samples_of(name)
    of = taken(path, samples, tmp_path)
    try:
        of.own = of.score(of.dense)
        with torch.no_grad():
            got = of.at(0.3, lambda: None)
        weights = [of.net.weight(of.net.block(i), of.layers[i].down).float() for i in range(2)]
        norms = [w.norm(dim=0) for w in weights]
        eps = list(got.eps.values())
        hidden, loss = plain(path, name, samples, lambda i, x: x.where(x.abs() * norms[i] > eps[i], 0.0))
        assert abs(math.log(got.score) - loss) < 1e-4 and abs(got.worse - (got.score / of.own - 1)) < 1e-9
        for i, h in enumerate(hidden):
            assert abs(got.sparsity[f"{i}.mlp"] - float((h == 0).double().mean())) < 2e-3
            assert abs(slow_cett(of.hidden[i][0], weights[i], eps[i])[0] - 0.3) < 0.01  # thresholds are of the ungated network
    finally:
        of.close()


def test_tolerances_are_kept_and_a_batch_of_one_is_a_token(tmp_path):
    path, samples = tiny.save("llama", tmp_path / "m"), samples_of("llama", 8, 20)
    before = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir()}
    found = activations(Network.open(path), samples, [0.05, 1.0], tmp_path, lambda s, d, n: None)
    assert before == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir()}
    one, more = found["tolerances"]
    assert one["worse"] <= 0.0005 and more["worse"] <= 0.01
    assert 0 < one["sparsity"] < more["sparsity"] < 1 and one["cett"] < more["cett"] and not more["whole_range"]
    over = min((t for t in found["tried"] if t["cett"] > one["cett"]), key=lambda t: t["cett"])
    assert over["worse"] > 0.0005 and over["cett"] - one["cett"] <= 1e-3  # a little more is too much
    assert found["union"]["mask"] == "PPL-0.05%" and found["union"]["batch"] == [1, 2, 4, 8]
    for x in found["layers"]:
        u = x["union"]["sparsity"]
        assert abs(u[0] - x["sparsity"]["0.05"]) < 1e-6 and u == sorted(u, reverse=True)
        assert x["zeros"] == 0 and x["dead"] is None
    assert found["tokens"] == 8 * 20 - 3  # without the padding


def test_a_relu_network_is_measured_by_its_zeros(tmp_path):
    path, samples = tiny.save("llama", tmp_path / "m", hidden_act="relu"), samples_of("llama")
    found = activations(Network.open(path), samples, [1.0], tmp_path, lambda s, d, n: None)
    assert found["relu"] and found["union"]["mask"] == "zeros"
    for x in found["layers"]:
        assert abs(x["union"]["sparsity"][0] - x["zeros"]) < 1e-9 and 0.2 < x["zeros"] < 0.8
        assert abs(x["dead"]["static"] + x["dead"]["dynamic"] - x["zeros"]) < 1e-9
        assert x["sparsity"]["1"] >= x["zeros"] - 0.02  # zeros are left out first


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_what_has_no_perplexity_is_held_to_its_outputs(name, tmp_path):
    path, samples = tiny.save(name, tmp_path / "m"), samples_of(name, 3)
    found = activations(Network.open(path), samples, [1.0], tmp_path, lambda s, d, n: None)
    assert found["metric"] == "cosine" and abs(found["score"] - 1) < 1e-9 and found["union"]["mask"] == "cosine-1%"
    assert found["tolerances"][0]["score"] >= 0.99 and found["tolerances"][0]["sparsity"] > 0


@pytest.mark.parametrize(("name", "changes"), [("opt", {}), ("llama", {"hidden_act": "relu", "mlp_bias": True})])
def test_planted_dead_neurons_are_found(name, changes, tmp_path):
    model = tiny.build(name, **changes)
    up = model.get_submodule(DOWN[name].format(1).replace("fc2", "fc1").replace("down_proj", "gate_proj"))
    with torch.no_grad():
        up.bias[5] = -1e4                                       # never active
        up.weight[7], up.bias[7] = torch.zeros_like(up.weight[7]), -0.5  # no input reaches it
        up.weight[9], up.bias[9] = torch.zeros_like(up.weight[9]), 0.5   # a constant, not dead
    model.save_pretrained(tmp_path / "m")
    of = taken(tmp_path / "m", samples_of(name), tmp_path)
    try:
        h = of.hidden[1][0]
        static = silent(of.net, of.net.block(1), of.layers[1].down)
        assert static.nonzero().flatten().tolist() == [7]
        never = ((h == 0).all(0) & ~static).nonzero().flatten().tolist()
        assert 5 in never and 7 not in never and 9 not in never
        neurons = of.layers[1].down.shape[1]
        assert of.layers[1].found["dead"]["static"] == 1 / neurons
        assert abs(of.layers[1].found["dead"]["never_active"] - len(never) / neurons) < 1e-9
        assert of.layers[0].found["dead"]["static"] == 0
    finally:
        of.close()


def test_an_up_projection_without_weights_is_silent_too(tmp_path):
    model = tiny.build("llama", hidden_act="relu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0
    model.save_pretrained(tmp_path / "m")
    net = Network.open(tmp_path / "m")
    assert silent(net, net.block(0), net.sites_of(0)[-1]).nonzero().flatten().tolist() == [3]


def test_experts_are_left_out_in_one_line(capsys, tmp_path):
    save_file({"input_ids": tiny.inputs("qwen2_moe", 4, 12)["input_ids"]}, tmp_path / "x.safetensors")
    tiny.save("qwen2_moe", tmp_path / "m", intermediate_size=40)
    tiny.save("mixtral", tmp_path / "n")
    capsys.readouterr()
    code, out, err = run(capsys, "inspect", tmp_path / "m", "--calib", tmp_path / "x.safetensors", "--activations", "--json", "-q")
    found = json.loads(out)["activations"]
    assert code == 0 and not err and [x["layer"] for x in found["layers"]] == ["0.mlp", "1.mlp.shared"]
    assert found["left_out"] == "4 experts are not measured: 1.mlp.experts.0.down to 1.mlp.experts.3.down"
    code, out, _ = run(capsys, "inspect", tmp_path / "m", "--calib", tmp_path / "x.safetensors", "--activations", "-q")
    assert code == 0 and "4 experts are not measured" in out
    code, out, err = run(capsys, "inspect", tmp_path / "n", "--calib", tmp_path / "x.safetensors", "--activations", "-q")
    assert (code, out, err.count("\n")) == (2, "", 1) and "experts alone" in err and "leave --activations out" in err


def test_gates_of_the_checkpoint_are_in_force(tmp_path, capsys, tiny_lm, calib, monkeypatch):
    monkeypatch.setattr("trimtab.prove.proof.run_fresh", answer)
    code, _, err = run(capsys, "trim", tiny_lm, "*.mlp.down: gate_magnitude", "-o", tmp_path / "o", "--keep", "0.5", "--text", calib,
                       "--calib", calib, "--samples", "4", "--seq-len", "32", "--proof-tokens", "64", "--no-speed", "-q")
    assert code == 0, err
    of = taken(tmp_path / "o", data.prepare(Network.open(tmp_path / "o"), (calib,), "calibration", 4, 32, 0), tmp_path)
    try:
        assert all(abs(x.found["zeros"] - 0.5) < 0.02 for x in of.layers.values())
        of.own = of.score(of.dense)
        with torch.no_grad():
            more = of.at(0.2, lambda: None)  # gates on top of those that are there
        assert all(more.sparsity[x.name] > x.found["zeros"] + 0.02 for x in of.layers.values())
    finally:
        of.close()


# ---- the command and the page -----------------------------------------------------------------
def test_the_command_writes_a_page(capsys, tmp_path, tiny_lm, calib):
    page, fast = tmp_path / "page.html", ["--calib", calib, "--samples", "4", "--seq-len", "32", "-q"]
    code, out, _ = run(capsys, "inspect", tiny_lm, "--activations", "--ppl", "1", "5%", "--report", page, *fast)
    assert code == 0 and all(word in out for word in ("PPL-1%", "PPL-5%", "union of 4", "0.mlp", "128 tokens of 4 sequences"))
    text = page.read_text()
    assert "PPL-5%" in text and not re.search(r"<script|https?:|url\(", text) and not list(tmp_path.glob("*.partial"))
    svgs = [ElementTree.fromstring(x) for x in re.findall(r"<svg viewBox.*?</svg>", text, re.S) if "aria-label" in x]
    assert len(svgs) == 4  # shares, utilised rank, cost, union; no dead neurons without ReLU
    assert "tilised" in text
    for svg in svgs:
        for t in svg.iter("text"):
            if t.get("text-anchor") is None:
                assert float(t.get("x")) + 6.6 * len(t.text) < float(svg.get("width")) + 8, t.text
    code, out, err = run(capsys, "inspect", tiny_lm, "--report", page, *fast)
    assert (code, out, err.count("\n")) == (2, "", 1) and "exists" in err and "--force" in err
    code, out, _ = run(capsys, "inspect", tiny_lm, "--report", page, "--force", *fast)
    assert code == 0 and "PPL" not in page.read_text() and "mlp.down" in page.read_text()


@pytest.mark.parametrize(("options", "said"), [
    (["--ppl", "1"], "give --activations with it"),
    (["--activations", "--ppl", "0"], "'0' is not a number of per cent"),
    (["--activations", "--ppl", "nan"], "'nan' is not a number of per cent"),
    (["--activations", "--ppl", "none"], "'none' is not a number of per cent"),
    (["--report", "no/such/folder/page.html"], "is no folder"),
    (["--report", "page.txt"], "is no .html file"),
    (["--report", "."], "is no .html file"),
    (["--activations", "--seq-len", "4096"], "more than the model's 128 positions"),
    (["--activations", "--seq-len", "32", "--calib", "nothing.txt"], "no such file"),
])
def test_bad_input_is_one_line(capsys, tiny_lm, options, said):
    try:
        code, out, err = run(capsys, "inspect", tiny_lm, *options, "-q")
    except SystemExit as e:
        code, (out, err) = e.code, capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err


def test_no_text_and_no_tokenizer_is_one_line(capsys, tmp_path):
    tiny.save("opt", tmp_path / "m")
    capsys.readouterr()
    code, out, err = run(capsys, "inspect", tmp_path / "m", "--activations", "-q")
    assert (code, out, err.count("\n")) == (2, "", 1) and "has no tokenizer: give --calib" in err


def test_the_page_of_a_relu_network_shows_dead_neurons(tmp_path, capsys):
    save_file({"input_ids": tiny.inputs("opt", 4, 12)["input_ids"]}, tmp_path / "x.safetensors")
    tiny.save("opt", tmp_path / "m")
    capsys.readouterr()
    _, out, _ = run(capsys, "inspect", tmp_path / "m", "--calib", tmp_path / "x.safetensors", "--activations", "--json", "-q")
    text = inspect_page("<opt>", json.loads(out), {"text": "a & b"})
    assert "Dead neurons" in text and "never active" in text and "exactly zero" in text
    assert "&lt;opt&gt;" in text and "a &amp; b" in text
