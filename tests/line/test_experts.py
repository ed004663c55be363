"""Dense MLPs as experts: the files are of a family that others run, what is exact is, and what cannot be is refused in one line."""
from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.line.test_families import plain, stream
from tests.line.test_structure import trim
from trimtab import cli
from trimtab.core.journal import Journal
from trimtab.methods.experts import balanced, clusters
from trimtab.network.stream import Network
from trimtab.network.surgery import Cut, apply

ROPE = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 32}}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


pytestmark = pytest.mark.usefixtures("proof_in_this_process")


@pytest.fixture
def ready(tmp_path):
    """Inputs to calibrate and to prove on, as a file."""
    save_file(tiny.inputs("llama"), tmp_path / "in.safetensors")
    return str(tmp_path / "in.safetensors")


# ---- the same outputs in transformers ---------------------------------------------------------
EXACT = [
    ("llama", {}, "experts", "MixtralForCausalLM"), ("llama", {"head_dim": 16}, "experts(parts=3)", "MixtralForCausalLM"),
    ("llama", ROPE, "experts", "MixtralForCausalLM"), ("llama", ROPE, "experts(always=1)", "Qwen2MoeForCausalLM"),
    ("llama", {}, "upcycle(active=3)", "MixtralForCausalLM"), ("llama", {"tie_word_embeddings": True}, "upcycle", "MixtralForCausalLM"),
    ("mistral", {}, "experts", "MixtralForCausalLM"), ("mistral", {"sliding_window": None}, "experts(always=2)", "Qwen2MoeForCausalLM"),
    ("qwen2", {}, "experts(parts=6,always=1)", "Qwen2MoeForCausalLM"), ("qwen2", {}, "upcycle(always=1)", "Qwen2MoeForCausalLM"),
    ("qwen3", {}, "experts", "Qwen3MoeForCausalLM"), ("qwen3", {"attention_bias": True}, "upcycle", "Qwen3MoeForCausalLM"),
    ("llama", {}, "moefication(parts=4,keep=1)", "MixtralForCausalLM"), ("llama", {}, "tomoe(parts=2,keep=1)", "MixtralForCausalLM"),
]


@pytest.mark.parametrize(("name", "how", "recipe", "architecture"), EXACT)
def test_experts_that_are_all_met_compute_the_same(saved, name, how, recipe, architecture, tmp_path, ready, capsys):
    path, batch = saved(name, **how), tiny.inputs(name)
    code, said, err = trim(capsys, path, recipe, tmp_path / "out", ready)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [architecture]
    assert said["recovery"] == pytest.approx(1, abs=1e-4)
    want = plain(path, batch)
    torch.testing.assert_close(plain(tmp_path / "out", batch), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    torch.testing.assert_close(stream(Network.open(tmp_path / "out"), batch), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("recipe", ["experts(parts=3)", "experts(parts=6,always=1)", "upcycle"])
def test_in_half_precision_they_are_as_near_as_it_can_tell(saved, recipe, tmp_path, ready, capsys):
    path, batch = saved("llama", dtype=torch.bfloat16), tiny.inputs("llama")
    code, _, err = trim(capsys, path, recipe, tmp_path / "out", ready)
    assert code == 0, err
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    want = plain(path, batch)
    assert float((plain(tmp_path / "out", batch) - want).abs().max()) < 1e-2 * float(want.abs().max())


def test_files_have_the_names_that_others_read(saved, tmp_path, ready, capsys):
    assert trim(capsys, saved("llama"), "experts", tmp_path / "out", ready)[0] == 0
    names, stem = load_file(tmp_path / "out" / "model.safetensors"), "model.layers.1.block_sparse_moe."
    assert {n for n in names if n.startswith(stem)} == {f"{stem}gate.weight"} | {
        f"{stem}experts.{e}.w{k}.weight" for e in range(4) for k in (1, 2, 3)}
    assert names[f"{stem}experts.3.w2.weight"].shape == (32, 12)


# ---- experts that are chosen ------------------------------------------------------------------
def test_a_token_meets_what_its_router_chooses(saved, tmp_path, ready, capsys):
    """What the files compute is what was fitted: dense MLPs whose neurons are masked as the router says."""
    path = saved("llama")
    code, said, err = trim(capsys, path, "moefication(parts=6,refit=false)", tmp_path / "out", ready, "--keep", "0.5")
    assert code == 0, err
    assert said["structure"] == [{"experts": {"family": "mixtral", "of": 6, "met": 3, "neurons": 8, "shared": 0}}]
    assert said["met"]["blocks"] == pytest.approx(1 - 0.5 * 3 * 48 * 32 / (3 * 48 * 32 + 2 * 32 * 32 + 2 * 16 * 32), abs=1e-6)
    files, net = load_file(tmp_path / "out" / "model.safetensors"), Network.open(path)
    for i in range(2):
        stem, module = f"model.layers.{i}.block_sparse_moe.", net.block(i)
        router = files[f"{stem}gate.weight"]
        rows = [files[f"{stem}experts.{e}.w1.weight"] for e in range(6)]
        dense = module.mlp.gate_proj.weight.detach()
        where = torch.stack([torch.cdist(r, dense).argmin(1) for r in rows])
        assert sorted(where.flatten().tolist()) == list(range(48))
        x = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
        h = module.mlp.act_fn(x @ dense.T) * (x @ module.mlp.up_proj.weight.T)
        mask = torch.zeros(20, 48)
        mask.scatter_(1, where[(x @ router.T).topk(3).indices].flatten(1), 1.0)
        written = Network.open(tmp_path / "out").block(i)
        want = (h * mask) @ module.mlp.down_proj.weight.T
        torch.testing.assert_close(written.mlp(x[None])[0], want, rtol=0.1, atol=0.05 * float(want.abs().max()))


@pytest.mark.parametrize(("name", "recipe"), [("llama", "moefication(parts=4)"), ("mistral", "moefication(parts=6,split=weights)"),
                                              ("qwen2", "moefication(parts=6,always=1)"), ("qwen3", "moefication(parts=4,split=random)"),
                                              ("llama", "tomoe"), ("qwen3", "tomoe(parts=3,refit=false)")])
def test_what_is_written_is_what_was_fitted(saved, name, recipe, tmp_path, ready, capsys):
    code, said, err = trim(capsys, saved(name), recipe, tmp_path / "out", ready, "--keep", "0.5")
    assert code == 0, err
    batch = tiny.inputs(name)
    torch.testing.assert_close(stream(Network.open(tmp_path / "out"), batch), plain(tmp_path / "out", batch), rtol=1e-4, atol=1e-4)
    assert 0 < said["recovery"] < 1.5


@pytest.mark.parametrize("recipe", ["moefication(parts=4", "tomoe(parts=2"])
def test_a_refit_is_nearer_than_none(saved, recipe, tmp_path, ready, capsys):
    kl = []
    for refit in ("false", "true"):
        code, said, err = trim(capsys, saved("llama"), f"{recipe},refit={refit})", tmp_path / refit, ready, "--keep", "0.5")
        assert code == 0, err
        kl.append(said["kl"])
    assert kl[1] < kl[0]


def test_the_same_files_whoever_stops_it(saved, tmp_path, ready, capsys, monkeypatch):
    """--resume after a stop behind the experts ends with the same bytes."""
    recipe, path = "moefication(parts=4,keep=0.5) ; rtn(bits=4,group=0)", saved("llama")
    assert trim(capsys, path, recipe, tmp_path / "whole", ready)[0] == 0
    publish = Journal.publish

    def stop(self, *given):
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "publish", stop)
    assert trim(capsys, path, recipe, tmp_path / "out", ready)[0] == 1
    monkeypatch.setattr(Journal, "publish", publish)
    assert trim(capsys, path, recipe, tmp_path / "out", ready, "--resume")[0] == 0
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("more", ["gptq(bits=4,group=0)", "row | wanda", "mlp: neuron | wanda"])
def test_what_comes_behind_sees_experts(saved, more, tmp_path, ready, capsys):
    """In the same recipe, and as a trim of its own."""
    kept = [] if "gptq" in more else ["--keep", "0.67"]
    assert trim(capsys, saved("llama"), "experts", tmp_path / "moe", ready)[0] == 0
    code, _, err = trim(capsys, tmp_path / "moe", more, tmp_path / "second", ready, *kept)
    assert code == 0, err
    code, _, err = trim(capsys, saved("llama"), f"experts ; {more}", tmp_path / "once", ready, *kept)
    assert code == 0, err
    for name, t in load_file(tmp_path / "once" / "model.safetensors").items():
        assert torch.equal(t, load_file(tmp_path / "second" / "model.safetensors")[name]), name


def test_it_can_be_looked_at(saved, tmp_path, ready, capsys):
    assert trim(capsys, saved("llama"), "moefication(parts=4,keep=0.5)", tmp_path / "out", ready)[0] == 0
    for command in (["inspect", tmp_path / "out", "--calib", ready, "--samples", "3", "--seq-len", "10"],
                    ["eval", tmp_path / "out", "--against", saved("llama"), "--text", ready]):
        assert cli.main([str(a) for a in command]) == 0
    assert "a token meets" in capsys.readouterr().out


# ---- refused ----------------------------------------------------------------------------------
REFUSED = [
    ("gpt2", {}, "experts", "no family has the blocks of a gpt2 with experts in them; there is one for llama, mistral, qwen2, qwen3"),
    ("gemma2", {}, "upcycle", "no family has the blocks of a gemma2"), ("mixtral", {}, "experts", "no family has the blocks of a mixtral"),
    ("llama", {"attention_bias": True}, "experts", "config.json says attention_bias, and a mixtral"),
    ("llama", {"mlp_bias": True}, "experts(always=1)", "config.json says mlp_bias, and a qwen2_moe"),
    ("llama", {"head_dim": 16}, "experts(always=1)", "4 of 16 are 64 of 32 here; leave always out"),
    ("mistral", {}, "experts(always=1)", "slides a window, and not every program that runs a qwen2_moe does; leave always out"),
    ("qwen2", {}, "experts", "a qwen2 with experts is a qwen2_moe, which has one that every token meets: use always=1 or more"),
    ("qwen2", WINDOW, "experts(always=1)", "slides a window"), ("qwen3", WINDOW, "experts", "take one with use_sliding_window off"),
    ("qwen3", {}, "experts(always=1)", "a qwen3 with experts is a qwen3_moe, which has none that every token meets: leave always out"),
    ("llama_base", {}, "experts", "LlamaModel is no language model"),
    ("llama", {}, "experts(parts=5)", "48 hidden neurons cannot be split into 5 equal parts; use parts=3, 4, 6"),
    ("llama", {}, "experts(parts=8)", "experts of 6 neurons take 24 bytes a row, and transformers multiplies rows of whole 16 bytes"),
    ("llama", {}, "experts(parts=1)", "parts=1 makes no experts; it is 2 or more"),
    ("llama", {}, "experts(always=4)", "always=4 of 4 parts leaves none to choose from; it is 0 to 3"),
    ("llama", {}, "upcycle(active=5)", "upcycle: a token cannot meet 5 of 4 copies"),
    ("llama", {}, "upcycle(active=0)", "upcycle: a token cannot meet 0 of 4 copies"),
    ("llama", {}, "moefication(parts=4,keep=0.1)", "a share of 0.1 of 4 parts, 0 of them always met, leaves none to choose; raise --keep"),
    ("llama", {}, "moefication(parts=4,always=2,keep=0.5)", "2 of them always met, leaves none to choose; raise --keep, or lower always"),
    ("llama", {}, "tomoe(keep=0.01)", "tomoe: parts=4 with a share of 0.01 of 48 neurons makes no experts"),
    ("llama", {}, "moefication(split=heads)", "split=heads is no way to split neurons; use coactive, weights, order, random"),
    ("llama", {}, "mlp: experts", "leave the scope out"), ("llama", {}, "experts(keep=0.5)", "has neither keep nor order"),
    ("llama", {}, "moefication(order=dense)", "has no order; leave it out"),
]


@pytest.mark.parametrize(("name", "how", "recipe", "reason"), REFUSED)
def test_what_cannot_be_is_refused_in_one_line(saved, name, how, recipe, reason, tmp_path, ready, capsys):
    path = saved(name, **how)
    capsys.readouterr()
    code, _, err = trim(capsys, path, recipe, tmp_path / "out", ready)
    assert code == 2
    assert reason in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("out*"))


def test_layers_that_differ_are_refused(saved, tmp_path, ready, capsys):
    net = Network.open(saved("llama"))
    apply(net, Cut({"0.mlp.down": torch.arange(48) < 24}), tmp_path / "cut", lambda i: {})
    code, _, err = trim(capsys, tmp_path / "cut", "experts", tmp_path / "out", ready)
    assert code == 2
    assert "the layers of" in err
    assert "take a network whose layers are alike" in err


# ---- how neurons are clustered ----------------------------------------------------------------
def test_balanced_is_as_cheap_as_it_gets():
    """Against the best of all assignments to two clusters, and never dearer than the start where there are more."""
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        cost = torch.rand(6, 2, generator=g)
        got = balanced(cost, torch.arange(6) % 2)
        best = min(sum(float(cost[i, int(i not in some)]) for i in range(6)) for some in itertools.combinations(range(6), 3))
        assert float(cost[torch.arange(6), got].sum()) == pytest.approx(best)
        cost, start = torch.rand(12, 4, generator=g), torch.arange(12) % 4
        got = balanced(cost, start)
        assert torch.bincount(got).tolist() == [3] * 4
        assert float(cost[torch.arange(12), got].sum()) <= float(cost[torch.arange(12), start].sum())


def test_clusters_find_what_lies_together():
    g = torch.Generator().manual_seed(0)
    centres, which = torch.randn(4, 10, generator=g) * 5, torch.randperm(24, generator=g) % 4
    found = clusters(centres[which] + 0.1 * torch.randn(24, 10, generator=g), 4, 0)
    assert sorted(found.flatten().tolist()) == list(range(24))
    assert all(len(set(which[mine].tolist())) == 1 for mine in found)
