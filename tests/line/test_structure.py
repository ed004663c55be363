"""What is taken away of a network as a whole: the smaller checkpoint computes what the larger one does with zeros in its place."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from tests import tiny
from tests.line.test_families import MOE, NAMES, plain, stream
from trimtab import cli
from trimtab.core import structure
from trimtab.core.registry import get
from trimtab.core.types import BadInput
from trimtab.network import graph
from trimtab.network.checkpoint import SafeFile, write_like
from trimtab.network.stream import Network, load_module
from trimtab.network.surgery import Cut, apply
from trimtab.runtime.decoder import open_decoder

FAST = ["--samples", "4", "--seq-len", "32", "--proof-tokens", "64", "--no-speed", "-q"]


def some(n: int, kept: int, seed: int) -> Tensor:
    """Bool [n], `kept` of them, at random."""
    stay = torch.zeros(n, dtype=torch.bool)
    stay[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    return stay


def masked(net: Network, cut: Cut):
    """An edit that puts zeros where the cut takes something away."""
    def edit(module, i: int) -> None:
        for s in net.sites_of(i):
            if s.name in cut.inputs:
                net.set_weight(module, s, net.weight(module, s) * cut.inputs[s.name])
            if s.role in ("o", "down") and s.group in cut.skips.get(i, ()):
                net.set_weight(module, s, torch.zeros(s.shape))
                if (b := net.bias(module, s)) is not None:
                    net.add_to_bias(module, s, -b)
    return edit


def neurons(net: Network, kept: int) -> dict[str, Tensor]:
    return {s.name: some(s.shape[1], kept if s.shape[1] > kept else s.shape[1] // 2, k)
            for k, s in enumerate(net.sites) if s.role == "down"}


def heads(net: Network, groups: int) -> dict[str, Tensor]:
    """So many key/value groups of every attention."""
    found = {}
    for k, s in enumerate(s for s in net.sites if s.role == "o"):
        kv = graph.heads(net.config_of(s.block))[1]
        found[s.name] = some(kv, groups, k).repeat_interleave(s.shape[1] // kv)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_fewer_neurons_open_in_transformers_and_compute_the_same(saved, name, tmp_path):
    net, batch = Network.open(saved(name)), tiny.inputs(name)
    cut = Cut(neurons(net, 32))
    apply(net, cut, tmp_path / "out", lambda i: {})
    small = Network.open(tmp_path / "out")
    want = stream(net, batch, masked(net, cut))
    torch.testing.assert_close(plain(tmp_path / "out", batch), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stream(small, batch), want, atol=1e-5, rtol=1e-5)
    assert small.n_params < net.n_params and graph.PER_LAYER not in small.checkpoint.config
    assert float((want - plain(saved(name), batch)).abs().max()) > 1e-4


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("opt", "opt_post", "gpt2", "gpt_neox", "gpt_neox_serial", "bert",
                                                                "bert_masked", "vit", "vit_base")])
def test_fewer_heads_open_in_transformers_and_compute_the_same(saved, name, tmp_path):
    net, batch = Network.open(saved(name)), tiny.inputs(name)
    cut = Cut(heads(net, 1))
    apply(net, cut, tmp_path / "out", lambda i: {})
    want = stream(net, batch, masked(net, cut))
    torch.testing.assert_close(plain(tmp_path / "out", batch), want, atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == 1


def test_what_makes_an_input_counts_once(saved):
    """The weights of a shared key count in equal parts for the query heads that read it, and all together as much as there are."""
    net = Network.open(saved("llama"))
    of = {s.name: net.weight(net.block(s.block), s).abs() for s in net.sites}
    o, down = (next(s for s in net.sites if s.role == r) for r in ("o", "down"))
    for s in (o, down):
        mine = structure.feeders(net, s)
        found = structure.worth_of_feeders(net, s, lambda f: of[f.name])
        torch.testing.assert_close(found.sum(), sum(of[f.name].sum() for f in mine))
    q, k, v = (of[f"0.attn.{r}"] for r in "qkv")
    own = q.sum(1).view(4, 8) + ((k.sum(1) + v.sum(1)) / 2).view(2, 8).repeat_interleave(2, 0)
    torch.testing.assert_close(structure.worth_of_feeders(net, o, lambda f: of[f.name]), own.flatten())


def test_query_heads_go_alone_where_they_share_keys(saved, tmp_path):
    net, batch = Network.open(saved("llama")), tiny.inputs("llama")
    cut = Cut({s.name: torch.tensor([1, 0, 0, 1], dtype=torch.bool).repeat_interleave(8) for s in net.sites if s.role == "o"})
    apply(net, cut, tmp_path / "out", lambda i: {})
    torch.testing.assert_close(plain(tmp_path / "out", batch), stream(net, batch, masked(net, cut)), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 2, 8)
    uneven = Cut({s.name: torch.tensor([1, 1, 1, 0], dtype=torch.bool).repeat_interleave(8) for s in net.sites if s.role == "o"})
    with pytest.raises(BadInput, match="groups of heads would differ"):
        apply(net, uneven, tmp_path / "uneven", lambda i: {})


@pytest.mark.parametrize("name", NAMES)
def test_fewer_layers_open_in_transformers_and_compute_the_same(saved, name, tmp_path):
    net, batch = Network.open(saved(name)), tiny.inputs(name)
    for stay in ((0,), (1,)):
        apply(net, Cut(layers=stay), tmp_path / str(stay[0]), lambda i: {})
        with torch.no_grad():
            hidden, context = net.embed(batch)
            hidden = net.run(net.block(stay[0]), stay[0], hidden, context)
            want = net.finish(hidden, context, batch)
        torch.testing.assert_close(plain(tmp_path / str(stay[0]), batch), want, atol=1e-5, rtol=1e-5)
        names = {n for f in (tmp_path / str(stay[0])).glob("*.safetensors") for n in SafeFile(f).names}
        assert len(names) < len(net.checkpoint.tensors)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", *MOE])
@pytest.mark.parametrize("group", ["attn", "mlp"])
def test_a_layer_without_a_sublayer(saved, name, group, tmp_path):
    net, batch = Network.open(saved(name)), tiny.inputs(name)
    cut = Cut(skips={0: frozenset({group})})
    apply(net, cut, tmp_path / "out", lambda i: {})
    want = stream(net, batch, masked(net, cut))
    small = Network.open(tmp_path / "out")
    assert not [s for s in small.sites_of(0) if s.group == group]
    torch.testing.assert_close(stream(small, batch), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain(tmp_path / "out", batch), want, atol=1e-5, rtol=1e-5)  # without the module
    class_ = getattr(transformers, tiny.MODELS[name][0])
    with torch.no_grad():  # transformers does not read `skip`: there are zeros for it
        there = class_.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(**batch).logits
    torch.testing.assert_close(there, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3", "mistral"])
def test_layers_that_differ_run_in_torch_and_in_the_decoder(saved, name, tmp_path):
    net, batch = Network.open(saved(name)), tiny.inputs(name, rows=1, length=9)
    batch = {"input_ids": tiny.inputs(name, rows=1, length=9)["input_ids"]}
    cut = Cut({"0.mlp.down": some(48, 32, 0), "1.attn.o": heads(net, 1)["1.attn.o"]}, skips={0: frozenset({"attn"})})
    apply(net, cut, tmp_path / "out", lambda i: {})
    want = stream(net, batch, masked(net, cut))
    small = Network.open(tmp_path / "out")
    torch.testing.assert_close(stream(small, batch), want, atol=1e-5, rtol=1e-5)
    module = load_module(tmp_path / "out")
    torch.testing.assert_close(module(**batch).logits, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(open_decoder(tmp_path / "out", "float32").logits(batch["input_ids"][0]), want[0], atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # token by token: who asks the first layer for the positions so far is told them
        seen = module(batch["input_ids"][:, :5], use_cache=True)
        step = module(batch["input_ids"][:, 5:], past_key_values=seen.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([seen.logits, step.logits], 1), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(Exception, match=r"per-layer|heads"):  # transformers says so instead of running something else
        getattr(transformers, tiny.MODELS[name][0]).from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mistral", "qwen2", "qwen3"])
def test_fewer_channels_of_the_stream(saved, name, tmp_path):
    """Channels that nobody writes and nobody reads go without a trace but for the norms' mean, which the scale makes up for."""
    net, batch = Network.open(saved(name)), tiny.inputs(name)
    stay = some(32, 16, 3)
    zeros, norms = {}, [f"model.layers.{i}.{n}.weight" for i in range(2) for n in net.family.norms] + ["model.norm.weight"]
    for file in net.checkpoint.tensors:
        t = net.checkpoint.read(file).clone()
        if "embed" in file or "lm_head" in file:
            t[:, ~stay] = 0
        elif file.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
            t[~stay] = 0
        zeros[file] = t
    write_like(net.checkpoint, tmp_path / "zeros", zeros.get)
    dead = Network.open(tmp_path / "zeros")
    apply(dead, Cut(channels=stay, scales=dict.fromkeys(norms, 2 ** 0.5)), tmp_path / "out", lambda i: {})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == 16 and config["head_dim"] == graph.heads(net.config)[2]
    want = plain(tmp_path / "zeros", batch)
    torch.testing.assert_close(plain(tmp_path / "out", batch), want, atol=2e-3, rtol=2e-3)  # the norms' epsilon is worth more
    assert float((want - plain(saved(name), batch)).abs().max()) > 0.01


def test_cut_reload_cut_again(saved, tmp_path):
    net, batch = Network.open(saved("llama")), tiny.inputs("llama")
    first = Cut({"0.mlp.down": some(48, 32, 0)}, skips={1: frozenset({"mlp"})})
    apply(net, first, tmp_path / "one", lambda i: {})
    second_net = Network.open(tmp_path / "one")
    second = Cut({"0.mlp.down": some(32, 16, 1), **heads(second_net, 1)})
    apply(second_net, second, tmp_path / "two", lambda i: {})
    torch.testing.assert_close(stream(Network.open(tmp_path / "two"), batch), stream(second_net, batch, masked(second_net, second)),
                               atol=1e-5, rtol=1e-5)
    third = Cut(layers=(0,))
    apply(Network.open(tmp_path / "two"), third, tmp_path / "three", lambda i: {})
    config = json.loads((tmp_path / "three" / "config.json").read_text())
    assert graph.PER_LAYER not in config and config["intermediate_size"] == 16 and config["num_hidden_layers"] == 1
    assert plain(tmp_path / "three", batch).isfinite().all()


@pytest.mark.parametrize("group", ["attn", "mlp"])
def test_zeros_of_what_is_gone_stay_in_the_files_when_more_is_cut(saved, group, tmp_path):
    """transformers would fill what it misses with random numbers: it finds zeros, of the sizes that all layers have now."""
    batch = tiny.inputs("llama")
    apply(Network.open(saved("llama")), Cut(skips={0: frozenset({group})}), tmp_path / "one", lambda i: {})
    one = Network.open(tmp_path / "one")
    more = Cut({**neurons(one, 32), **heads(one, 1)})
    apply(one, more, tmp_path / "two", lambda i: {})
    want = stream(one, batch, masked(one, more))
    torch.testing.assert_close(stream(Network.open(tmp_path / "two"), batch), want, atol=1e-5, rtol=1e-5)
    there = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float32).eval()(**batch).logits
    torch.testing.assert_close(there, want, atol=1e-5, rtol=1e-5)
    apply(Network.open(tmp_path / "two"), Cut(layers=(0,)), tmp_path / "three", lambda i: {})
    names = {n for f in (tmp_path / "three").glob("*.safetensors") for n in SafeFile(f).names}
    assert {n for n in names if f".{'self_attn' if group == 'attn' else 'mlp'}." in n}


@pytest.mark.parametrize("said", [[1], {"x": {}}, {"0": {"skip": ["norm"]}}])
def test_a_config_that_says_nonsense_of_a_layer(said):
    assert graph.per_layer({}) == {}
    with pytest.raises(BadInput, match="no mapping"):
        graph.per_layer({"per_layer_config": said})


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "phi3", "gpt2"])
def test_neurons_that_are_there_twice_are_fused_without_a_trace(saved, name, tmp_path):
    net, batch = Network.open(saved(name)), tiny.inputs(name)
    n = next(s.shape[1] for s in net.sites if s.role == "down") // 2
    twice = torch.cat([torch.arange(n), torch.randperm(n, generator=torch.Generator().manual_seed(1))])
    zeroed: dict[int, dict[str, Tensor]] = {}
    tensors = {}
    for i in range(net.n_blocks):
        module = net.block(i)
        biases = set()
        for s in net.sites_of(i):
            if s.role == "down":
                net.set_weight(module, s, net.weight(module, s)[:, twice])
            elif s.consumer:
                net.set_weight(module, s, net.weight(module, s)[twice])
                if (b := net.bias(module, s)) is not None:
                    biases.add(net.set_bias(module, s, b[twice]))
        zeroed[i] = net.stored(module, i, biases)
        tensors |= zeroed[i]
    write_like(net.checkpoint, tmp_path / "twice", tensors.get)
    from safetensors.torch import save_file

    save_file(tiny.inputs(name), tmp_path / "in.safetensors")
    assert cli.main(["trim", str(tmp_path / "twice"), "mlp: neuron(multiple=1) | fuse(keep=0.5)", "-o", str(tmp_path / "out"), "--calib",
                     str(tmp_path / "in.safetensors"), "--text", str(tmp_path / "in.safetensors"), *FAST]) == 0
    assert next(s.shape[1] for s in Network.open(tmp_path / "out").sites if s.role == "down") == n
    torch.testing.assert_close(plain(tmp_path / "out", batch), plain(tmp_path / "twice", batch), atol=1e-5, rtol=1e-5)


# ---- on the line ------------------------------------------------------------------------------
def trim(capsys, model, recipe, out, calib, *more: object) -> tuple[int, dict, str]:
    code = cli.main([str(a) for a in ("trim", model, recipe, "-o", out, "--calib", calib, "--text", calib, *FAST, "--json", *more)])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else {}, said.err


def of_blocks(path: Path) -> int:
    net = Network.open(path)
    return sum(s.size for s in net.sites)


RECIPES = [
    ("mlp: neuron | wanda", 0.5), ("neuron | minitron", 0.6), ("mlp_fusion", 0.5), ("mlp: neuron | fuse(refit=true)", 0.5),
    ("mlp: neuron(feeders=true) | magnitude | uniform | mask | least_squares", 0.6),
    ("mlp: neuron | wanda | global", 0.6), ("mlp: neuron | random | global", 0.1),
    ("mlp: neuron(order=dense) | taylor", 0.5), ("attn: kvgroup | wanda", 0.5),
    ("attn: head(feeders=true) | transact", 0.7), ("amp", 0.6), ("transact", 0.7), ("shortgpt", 0.5), ("llm_drop", 0.7),
    ("deeper_attention", 0.5), ("attention_entropy", 0.5), ("channel | minitron", 0.7), ("channel(scaled=false) | magnitude", 0.5),
    ("layer(keep=0.5) | block_influence ; mlp: neuron(keep=0.5) | wanda", None),
    ("mlp: neuron(keep=0.6) | wanda ; int(bits=8,group=0) | rtn", None),
    ("mlp: neuron(keep=0.6) | wanda ; attn: kvgroup(keep=0.5) | amp", None),
]


@pytest.mark.usefixtures("proof_in_this_process")
@pytest.mark.parametrize("recipe, keep", RECIPES, ids=[r for r, _ in RECIPES])
def test_recipes_leave_at_most_the_share_and_pass_their_proof(tiny_lm, calib, recipe, keep, tmp_path, capsys):
    code, result, err = trim(capsys, tiny_lm, recipe, tmp_path / "out", calib, *(["--keep", keep] if keep else []))
    assert code == 0, err
    assert result["structure"] and result["proof"] == "passed" and result["after"]["perplexity"] > 1
    if keep:
        scope = recipe.partition(":")[0] if ":" in recipe else "all"
        scope = {"deeper_attention": "attn", "attention_entropy": "attn", "mlp_fusion": "mlp"}.get(recipe, scope)
        total = sum(s.size for s in Network.open(tiny_lm).sites if scope in ("all", s.group))
        went = of_blocks(tiny_lm) - of_blocks(tmp_path / "out")
        assert 0 < went <= total and total - went <= keep * total * (1 + 1e-9)
        assert result["removed"]["blocks"] == pytest.approx(went / of_blocks(tiny_lm), abs=1e-5)
    packed = tmp_path / "packed"
    code, again, err = trim(capsys, tiny_lm, recipe, packed, calib, "--pack", *(["--keep", keep] if keep else []))
    assert code == 0, err
    assert again["after"]["perplexity"] == pytest.approx(result["after"]["perplexity"], rel=2e-3)
    assert sum(s.size for s in Network.open(packed).sites) == of_blocks(tmp_path / "out")


@pytest.mark.usefixtures("proof_in_this_process")
def test_resumed_is_the_same_bytes(tiny_lm, calib, tmp_path, capsys, monkeypatch):
    recipe = "layer(keep=0.5) | block_influence ; mlp: neuron(keep=0.5) | wanda ; nm(n=2,m=4) | wanda"
    assert trim(capsys, tiny_lm, recipe, tmp_path / "whole", calib)[0] == 0
    from trimtab.core import line

    real, calls = line.Journal.write_block, []

    def dies(self, *a):
        calls.append(a)
        if len(calls) in stops:
            raise KeyboardInterrupt
        real(self, *a)

    stops = {2, 6}
    monkeypatch.setattr(line.Journal, "write_block", dies)
    codes = [trim(capsys, tiny_lm, recipe, tmp_path / "part", calib, "--resume")[0] for _ in range(3)]
    assert codes == [1, 1, 0]
    for f in ("model.safetensors", "config.json", "trimtab.safetensors"):
        assert (tmp_path / "whole" / f).read_bytes() == (tmp_path / "part" / f).read_bytes(), f


@pytest.mark.usefixtures("proof_in_this_process")
def test_uniform_is_uniform_and_opens_in_transformers(tiny_lm, calib, tmp_path, capsys):
    recipe = "mlp: neuron(multiple=8) | wanda | global"
    assert trim(capsys, tiny_lm, recipe, tmp_path / "uneven", calib, "--keep", "0.6")[0] == 0
    assert graph.PER_LAYER in json.loads((tmp_path / "uneven" / "config.json").read_text())
    assert trim(capsys, tiny_lm, recipe, tmp_path / "even", calib, "--keep", "0.6", "--uniform")[0] == 0
    assert graph.PER_LAYER not in json.loads((tmp_path / "even" / "config.json").read_text())
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "even")


@pytest.mark.usefixtures("proof_in_this_process")
@pytest.mark.parametrize("recipe, options, line", [
    ("neuron | wanda", ("--keep", "0.1"), "is less than what it does not take"),
    ("mlp: neuron | sparsegpt", (), "takes a part of the network as a whole"),
    ("mlp: neuron | wanda | bitmask", (), "put format/bitmask in a pass of its own"),
    ("nm(n=2,m=4) | wanda ; neuron | wanda", (), "put it in front of"),
    ("attn: layer | block_influence", (), "takes blocks as a whole"), ("mlp: channel | minitron", (), "leave the scope out"),
    ("wanda", ("--uniform",), "--uniform says how parts"),
    ("llm_drop", ("--uniform",), "take whole layers"),
    ("dead_neurons", ("--keep", "0.5"), "fixes its own share"), ("wanda | alive", (), "says which parts of the network stay"),
    ("attn: neuron | wanda", (), "matches no site"), ("attn: head | wanda", ("--keep", "0.5"), "more than a share of"),
])
def test_bad_input_is_one_line_and_writes_nothing(tiny_lm, calib, recipe, options, line, tmp_path, capsys):
    code, _, err = trim(capsys, tiny_lm, recipe, tmp_path / "out", calib, *options)
    assert code == 2 and line in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("proof_in_this_process")
@pytest.mark.parametrize("name, recipe, line", [
    ("gpt2", "attn: kvgroup | magnitude", "none can go; take neurons"), ("bert", "sublayer | influence", "take whole layers"),
])
def test_families_that_cannot(saved, name, recipe, line, tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({k: v for k, v in tiny.inputs(name).items()}, tmp_path / "in.safetensors")
    code, _, err = trim(capsys, saved(name), recipe, tmp_path / "out", tmp_path / "in.safetensors")
    assert code == 2 and line in err, err


@pytest.mark.usefixtures("proof_in_this_process")
def test_neurons_that_never_fire_are_found_and_go(saved, tmp_path, capsys):
    """11 and 30 of 48 in the two blocks: what stays is rounded up to whole sixteenths, and what is computed is what it was."""
    from safetensors.torch import save_file

    net, batch = Network.open(saved("opt")), tiny.inputs("opt")
    tensors = {}
    for i, dead in enumerate((11, 30)):
        module = net.block(i)
        up = next(s for s in net.sites_of(i) if s.role == "up")
        b = torch.full((48,), 1e3)
        b[torch.randperm(48, generator=torch.Generator().manual_seed(i))[:dead]] = -1e3
        tensors |= net.stored(module, i, {net.set_bias(module, up, b)})
    write_like(net.checkpoint, tmp_path / "dead", tensors.get)
    save_file(batch, tmp_path / "in.safetensors")
    code, result, err = trim(capsys, tmp_path / "dead", "dead_neurons", tmp_path / "out", tmp_path / "in.safetensors")
    assert code == 0, err
    small = Network.open(tmp_path / "out")
    assert [s.shape[1] for s in small.sites if s.role == "down"] == [39, 18]
    assert [len(its["went"]) for its in result["structure"][0]["units"].values()] == [9, 30]
    torch.testing.assert_close(stream(small, batch), plain(tmp_path / "dead", batch), atol=1e-6, rtol=1e-6)
    code, _, err = trim(capsys, tmp_path / "dead", "dead_neurons", tmp_path / "even", tmp_path / "in.safetensors", "--uniform")
    assert code == 0 and [s.shape[1] for s in Network.open(tmp_path / "even").sites if s.role == "down"] == [39, 39], err
    torch.testing.assert_close(plain(tmp_path / "even", batch), plain(tmp_path / "dead", batch), atol=1e-6, rtol=1e-6)


def test_dead_neurons_go_without_a_trace(saved, tmp_path):
    """What no calibration token reaches has a score of zero, and is the first to go: exactly nothing changes."""
    net, batch = Network.open(saved("opt")), tiny.inputs("opt")
    stay = {s.name: some(s.shape[1], 32, 5) for s in net.sites if s.role == "down"}
    dead = Cut(stay)
    zeroed = {i: {} for i in range(net.n_blocks)}
    for i in range(net.n_blocks):
        module = net.block(i)
        masked(net, dead)(module, i)
        zeroed[i] = net.stored(module, i)
        s = next(s for s in net.sites_of(i) if s.role == "down")
        scores = get("score/wanda").fn(net.weight(module, s), torch.ones(s.shape[1]))
        kept = get("unit/neuron").fn(scores, 32 / 48)
        assert torch.equal(kept[0], stay[s.name])
    apply(net, dead, tmp_path / "out", lambda i: zeroed[i])
    torch.testing.assert_close(plain(tmp_path / "out", batch), stream(net, batch, masked(net, dead)), atol=1e-6, rtol=1e-6)
