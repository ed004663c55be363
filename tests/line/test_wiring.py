"""The network rewritten as a whole: what is exact is, what is not is said, and what cannot be is refused in one line."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.line.test_families import plain, stream
from tests.line.test_structure import masked, trim
from trimtab.core import rewire
from trimtab.core.spec import parse
from trimtab.core.types import BadInput
from trimtab.export.source import Source
from trimtab.network import graph
from trimtab.network.stream import Network, silence
from trimtab.network.surgery import Cut, apply
from trimtab.runtime.decoder import open_decoder, supported

pytestmark = pytest.mark.usefixtures("proof_in_this_process")


def without(path: Path, out: Path, *blocks: int) -> Path:
    """The network without the attention of these blocks."""
    net = Network.open(path)
    apply(net, Cut(skips=dict.fromkeys(blocks, frozenset({"attn"}))), out, lambda i: {})
    return out


def changed(path: Path, *names: str) -> None:
    """Zeros in place of these tensors."""
    held = load_file(path / "model.safetensors")
    for n in held:
        if any(part in n for part in names):
            held[n] = torch.zeros_like(held[n])
    save_file(held, path / "model.safetensors", {"format": "pt"})


# ---- the basis of the residual stream ---------------------------------------------------------
TURNED = ("llama", "llama_tied", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("name", TURNED)
def test_a_turned_stream_computes_the_same_everywhere(saved, name, tmp_path, ready, capsys):
    path, batch = saved(name), tiny.inputs(name)
    code, result, err = trim(capsys, path, "principal", tmp_path / "out", ready(name))
    assert code == 0, err
    want = stream(Network.open(path), batch)
    torch.testing.assert_close(stream(Network.open(tmp_path / "out"), batch), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain(tmp_path / "out", batch), want, atol=1e-5, rtol=1e-5)
    assert result["structure"] == [{"turned": 32, **({"untied": True} if Network.open(path).tied_head else {})}]
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert all(bool((t == 1).all()) for n, t in held.items() if n.endswith(("layernorm.weight", "model.norm.weight")))


def test_a_turned_stream_without_a_sublayer_and_in_bfloat16(saved, tmp_path, ready, capsys):
    path = without(saved("llama", dtype=torch.bfloat16), tmp_path / "cut", 1)
    batch = tiny.inputs("llama")
    code, _, err = trim(capsys, path, "principal", tmp_path / "out", ready("llama"))
    assert code == 0, err
    small = Network.open(tmp_path / "out")
    assert not [s for s in small.sites_of(1) if s.group == "attn"]
    want = stream(Network.open(path), batch)
    assert float((stream(small, batch) - want).abs().max()) <= 1e-2 * float(want.abs().max())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_channels_that_carry_nothing_go_from_a_turned_stream(saved, name, tmp_path, ready, capsys):
    """Of 32 channels the stream is in 24 directions, none of them a channel: with these alone it computes the same."""
    path, gen = tmp_path / "flat", torch.Generator().manual_seed(3)
    path.mkdir()
    for f in saved(name).iterdir():
        (path / f.name).write_bytes(f.read_bytes())
    held = load_file(path / "model.safetensors")
    project = torch.linalg.qr(torch.randn(32, 24, generator=gen))[0]
    project = project @ project.T
    for n, t in held.items():
        if n.endswith("embed_tokens.weight"):
            held[n] = t @ project
        elif n.endswith(("o_proj.weight", "down_proj.weight")):
            held[n] = project @ t
    save_file(held, path / "model.safetensors", {"format": "pt"})
    code, _, err = trim(capsys, path, "principal ; channel(keep=0.75,multiple=1) | activation", tmp_path / "out", ready(name))
    assert code == 0, err
    small, batch = Network.open(tmp_path / "out"), tiny.inputs(name)
    assert small.config.hidden_size == 24
    torch.testing.assert_close(plain(tmp_path / "out", batch), plain(path, batch), atol=1e-4, rtol=1e-4)


def test_slicegpt_loses_less_than_channels_as_they_are(tiny_lm, calib, tmp_path, capsys):
    found = {}
    for recipe in ("slicegpt", "channel | activation"):
        code, result, err = trim(capsys, tiny_lm, recipe, tmp_path / "out", calib, "--keep", "0.7", "--force")
        assert code == 0, err
        found[recipe] = result["after"]["perplexity"]
        before = result["before"]["perplexity"]
    assert abs(found["slicegpt"] - before) < abs(found["channel | activation"] - before)


# ---- fusion -----------------------------------------------------------------------------------
FUSED = ("llama", "llama_tied", "mistral", "qwen3", "phi3", "gpt_neox_serial", "vit", "llama_base")
DEEP = {"num_hidden_layers": 5}


@pytest.mark.parametrize("name", FUSED)
def test_fusion_is_exact_where_no_mlp_depends_on_another(saved, name, tmp_path, ready, capsys):
    """The first two of three add nothing, so that all read the same; the last block keeps its attention."""
    path = without(saved(name, **DEEP), tmp_path / "cut", 2, 3)
    net = Network.open(path)
    roots = {".".join(graph.files_of(net.family, s.param, s.shape, True)[0].file.split(".")[:-1]) for s in net.sites if s.role == "down"}
    changed(path, *(f".{i}.{r}." for i in (1, 2) for r in {*roots, *(s.param.rpartition(".")[0] for s in net.sites if s.role == "down")}))
    code, result, _ = trim(capsys, path, "fusion", tmp_path / "out", ready(name))
    assert code == 0
    batch, small = tiny.inputs(name), Network.open(tmp_path / "out")
    want = stream(Network.open(path), batch)
    torch.testing.assert_close(stream(small, batch), want, atol=1e-5, rtol=1e-5)
    assert small.n_blocks == 3 and result["structure"] == [{"fused": [[1, 2, 3]]}]
    assert small.config_of(1).intermediate_size == 3 * 48 and small.config_of(0).intermediate_size == 48


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_how_much_one_mlp_depends_on_another(saved, name, tmp_path):
    """By what each adds where an earlier one is zeros, computed at once for all tokens that are no padding."""
    path = without(saved(name, **DEEP), tmp_path / "cut", 2, 3)
    net, batch = Network.open(path), tiny.inputs(name)
    step = parse("fusion(dependency=0.5)").passes[0].wiring
    given = rewire.Given([batch], tmp_path, None, lambda *a: None, lambda d, n: None)
    apart = rewire.dependencies(net, rewire.runs(net, step), given)
    assert list(apart) == [1]

    def adds(dropped: int) -> list[torch.Tensor]:
        """What the MLPs of blocks 1, 2 and 3 add."""
        found = []
        with torch.no_grad():
            hidden, context = net.embed(batch)
            for i in range(4):
                module, seen = net.block(i), []
                with net.taps(module, i, {"sublayer"}, lambda kind, key, x, y, seen=seen: seen.append(y - x) if key == "mlp" else None):
                    out = net.run(module, i, hidden, context)
                bare = net.block(i)
                silence(net.family, bare, {"mlp"}, i)
                hidden = net.run(bare, i, hidden, context) if i == dropped else out
                found += seen
        return found[1:]

    dense = adds(-1)
    for j in range(3):
        for i in range(j + 1, 3):
            want = 1 - torch.nn.functional.cosine_similarity(dense[i].double(), adds(1 + j)[i].double(), dim=-1).mean()
            assert float(apart[1][i, j]) == pytest.approx(float(want), abs=1e-6) and want > 1e-4
    assert not apart[1].triu().any()


def test_fusion_runs_packed_and_in_the_decoder(saved, tmp_path, ready, capsys):
    """Two of three made one: what is left of the third still lacks its attention."""
    path = without(saved("llama", **DEEP), tmp_path / "cut", 2, 3)
    batch = {"input_ids": tiny.inputs("llama")["input_ids"][:1]}
    assert trim(capsys, path, "fusion(length=2)", tmp_path / "out", ready("llama"))[0] == 0
    small = Network.open(tmp_path / "out")
    assert [small.config_of(i).intermediate_size for i in range(4)] == [48, 96, 48, 48]
    assert [any(s.group == "attn" for s in small.sites_of(i)) for i in range(4)] == [True, True, False, True]
    want = stream(small, batch)
    assert float((want - stream(Network.open(path), batch)).abs().max()) > 1e-3
    torch.testing.assert_close(open_decoder(tmp_path / "out", "float32").logits(batch["input_ids"][0]), want[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain(tmp_path / "out", batch), want, atol=1e-5, rtol=1e-5)
    packed = tmp_path / "packed"
    assert trim(capsys, path, "fusion(length=2)", packed, ready("llama"), "--pack")[0] == 0
    torch.testing.assert_close(open_decoder(packed, "float32").logits(batch["input_ids"][0]), want[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stream(Network.open(packed), batch), want, atol=1e-4, rtol=1e-4)


def test_fusion_goes_on_where_it_was_stopped(saved, tmp_path, ready, capsys, monkeypatch):
    """Stopped while it writes, and behind it: the same bytes in the end."""
    path, recipe = saved("llama", **DEEP), "ffn_fusion(keep=0.6,dependency=0.5) ; nm(n=2,m=4) | wanda"
    assert trim(capsys, path, recipe, tmp_path / "whole", ready("llama"))[0] == 0
    real, calls = rewire.write, []

    def dies(*a):
        calls.append(a)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(*a)

    monkeypatch.setattr(rewire, "write", dies)
    assert [trim(capsys, path, recipe, tmp_path / "part", ready("llama"), "--resume")[0] for _ in range(2)] == [1, 0]
    for f in ("model.safetensors", "config.json", "trimtab.safetensors"):
        assert (tmp_path / "whole" / f).read_bytes() == (tmp_path / "part" / f).read_bytes(), f
    said = [json.loads((tmp_path / d / "trimtab.json").read_text()) for d in ("whole", "part")]
    assert said[0]["structure"] == said[1]["structure"] and "fused" in said[0]["structure"][1]


BAD = [
    ("llama", "fusion", "attention stands between all MLPs"), ("llama", "mlp: fusion", "leave the scope out"),
    ("llama", "fusion | wanda", "is a pass by itself"), ("llama", "wanda ; fusion", "put it in front of"),
    ("llama", "fusion(keep=0.5)", "has neither keep nor order"), ("llama", "fusion(length=1)", "leaves nothing to fuse"),
    ("llama", "fusion(dependency=-0.1)", "leaves nothing to fuse"), ("llama", "attn: sublayer(keep=0.9) | influence ; fusion(length=-2)",
                                                                    "leaves nothing to fuse"),
    ("gemma2", "attn: sublayer | influence ; fusion", "a norm behind"), ("opt_post", "fusion", "a norm behind"),
    ("bert", "fusion", "a norm behind"), ("gpt_neox", "fusion", "attention beside"), ("gpt2", "fusion", "cannot do without its attention"),
    *((name, "parallel", "a norm behind") for name in ("gemma2", "opt_post", "bert")), ("gpt_neox", "parallel", "parallel as it is"),
    ("llama", "parallel(share=0.1)", "that is none"), ("llama", "parallel(share=0.0)", "is above 0"),
    ("llama", "parallel(by=middle)", "use damage, first or last"),
    ("bert", "offline", "lie behind"), ("opt_post", "offline", "lie behind"), ("llama", "offline(share=0.1)", "that is none"),
    *((name, "rms", "take no mean off the residual stream") for name in ("llama", "gemma2", "mixtral", "bert", "opt_post")),
    ("gpt2", "rms ; rms", "as it is; leave it out"), ("opt", "attn: rms", "leave the scope out"),
    ("opt", "fusion", "cannot do without its attention"), ("mixtral", "fusion", "attention stands between"),
]


@pytest.mark.parametrize("name, recipe, line", BAD)
def test_bad_input_is_one_line_and_writes_nothing(saved, name, recipe, line, tmp_path, ready, capsys):
    path = saved(name)
    capsys.readouterr()
    code, _, err = trim(capsys, path, recipe, tmp_path / "out", ready(name))
    assert code == 2 and line in err and len(err.strip().splitlines()) == 1, err
    assert [f.name for f in tmp_path.iterdir()] == ["in.safetensors"]


# ---- norms without a mean ---------------------------------------------------------------------
CENTRED = ("opt", "opt_plain", "gpt2", "gpt_neox", "gpt_neox_serial", "vit", "vit_base")


@pytest.mark.parametrize("name", CENTRED)
def test_norms_take_no_mean_off_and_nothing_changes(saved, name, tmp_path, ready, capsys, monkeypatch):
    """In our runtime, in plain transformers, and packed; a head that shared the table of embeddings has one of its own."""
    name, how = ("opt", {"word_embed_proj_dim": 32}) if name == "opt_plain" else (name, {})
    path, batch = saved(name, **how), tiny.inputs(name)
    code, result, _ = trim(capsys, path, "rms", tmp_path / "out", ready(name))
    assert code == 0 and result["structure"][0]["norms"] == "rms"
    net, want = Network.open(tmp_path / "out"), plain(path, batch)
    tied = Network.open(path).tied_head
    assert not (net.tied_head and name == "gpt2") and ("untied" in result["structure"][0]) == (tied and (name == "gpt2" or bool(how)))
    torch.testing.assert_close(stream(net, batch), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain(tmp_path / "out", batch), want, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(torch.nn.functional, "layer_norm", None)  # none is left in the blocks, and none behind
    torch.testing.assert_close(stream(net, batch), want, atol=1e-5, rtol=1e-5)
    monkeypatch.undo()
    model, said = getattr(transformers, tiny.MODELS[name][0]).from_pretrained(tmp_path / "out", dtype=torch.float32,
                                                                              output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    with torch.no_grad():
        out = model.eval()(**batch)
    torch.testing.assert_close(out.logits if "logits" in out else out.last_hidden_state, want, atol=1e-5, rtol=1e-5)
    hidden, context = net.embed(batch)
    for i in range(net.n_blocks):
        assert float(hidden.mean(-1).abs().max()) < 1e-5
        hidden = net.run(net.block(i), i, hidden, context)
    if name != "gpt2":
        code, _, err = trim(capsys, path, "rms", tmp_path / "packed", ready(name), "--pack")
        assert code == 0, err
        torch.testing.assert_close(stream(Network.open(tmp_path / "packed"), batch), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "vit"])
def test_what_comes_behind_leaves_no_mean(saved, name, tmp_path, ready, capsys):
    """Neurons go as a whole, and what other passes may touch reads the stream."""
    recipe = "rms ; mlp: neuron(keep=0.7) | wanda | uniform | mask | least_squares ; *.q,*.k,*.v,*.up: wanda"
    assert trim(capsys, saved(name), recipe, tmp_path / "out", ready(name))[0] == 0
    batch = tiny.inputs(name)
    net = Network.open(tmp_path / "out")
    held = {k: v for k, v in json.loads((tmp_path / "out" / "config.json").read_text()).items() if k != graph.OURS}
    want = stream(net, batch)
    (tmp_path / "out" / "config.json").write_text(json.dumps(held))
    torch.testing.assert_close(plain(tmp_path / "out", batch), want, atol=1e-4, rtol=1e-4)
    path = saved(name)
    capsys.readouterr()
    for model, text in ((path, "rms ; wanda"), (tmp_path / "out", "wanda")):
        (tmp_path / "out" / "config.json").write_text(json.dumps({**held, graph.OURS: {"norms": "rms"}}))
        code, _, err = trim(capsys, model, text, tmp_path / "again", ready(name))
        assert code == 2 and "would leave a mean" in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("ours", ["rms", {"norms": "layer"}, ["norms"]])
def test_what_config_says_to_us_is_checked(saved, ours, tmp_path, ready, capsys):
    path = tiny.save("opt", tmp_path / "opt")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, graph.OURS: ours}))
    capsys.readouterr()
    code, _, err = trim(capsys, path, "wanda", tmp_path / "out", ready("opt"))
    assert code == 2 and "update trimtab" in err and len(err.strip().splitlines()) == 1, err


# ---- side by side -----------------------------------------------------------------------------
PARALLEL = ("llama", "llama_tied", "mistral", "qwen3", "phi3", "opt", "gpt2", "gpt_neox_serial", "vit", "mixtral", "qwen2_moe")


def by_hand(net: Network, batch: dict, layers: list[int]) -> torch.Tensor:
    """From what each sublayer adds to the same input, the other one of its layer all zeros."""
    def alone(module: torch.nn.Module, i: int, group: str) -> torch.nn.Module:
        masked(net, Cut(skips={i: frozenset({"attn", "mlp"} - {group})}))(module, i)
        return module

    with torch.no_grad():
        hidden, context = net.embed(batch)
        for i in range(net.n_blocks):
            if i in layers:
                hidden = sum(net.run(alone(net.block(i), i, g), i, hidden, context) for g in ("attn", "mlp")) - hidden
            else:
                hidden = net.run(net.block(i), i, hidden, context)
        return net.finish(hidden, context, batch)


@pytest.mark.parametrize("name", PARALLEL)
def test_layers_side_by_side(saved, name, tmp_path, ready, capsys):
    """In our loading; plain transformers opens the files and runs them one after the other."""
    path, batch = saved(name, num_hidden_layers=3) if name not in ("gpt2",) else saved(name, n_layer=3), tiny.inputs(name)
    code, result, _ = trim(capsys, path, "parallel(share=0.34,by=last)", tmp_path / "out", ready(name))
    assert code == 0 and result["structure"] == [{"parallel": [2]}]
    assert any("side by side" in w and "plain transformers" in w for w in result["warnings"])
    net = Network.open(tmp_path / "out")
    want = by_hand(Network.open(path), batch, [2])
    torch.testing.assert_close(stream(net, batch), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain(tmp_path / "out", batch), want, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        out = getattr(transformers, tiny.MODELS[name][0]).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(**batch)
    torch.testing.assert_close(out.logits, plain(path, batch), atol=1e-5, rtol=1e-5)
    assert float((out.logits - want).abs().max()) > 1e-4


def test_the_layers_that_cost_least(saved, tmp_path, ready, capsys):
    """What each costs is told by the network with that one parallel; the cheapest are taken; what follows runs on them, packed too."""
    path, batch = saved("llama", num_hidden_layers=4), tiny.inputs("llama")
    code, result, _ = trim(capsys, path, "parallel(share=0.5) ; layer(keep=0.75) | block_influence", tmp_path / "out", ready("llama"))
    assert code == 0
    net, (said, less) = Network.open(path), result["structure"]

    def behind(layers: list[int]) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hook = net.model.base_model.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        by_hand(net, batch, layers)
        hook.remove()
        return seen[-1][batch["attention_mask"].bool()].double()

    own = behind([])
    for i in range(4):
        want = ((behind([i]) - own).square().sum(1) / own.square().sum(1)).mean()
        assert said["damage"][str(i)] == pytest.approx(float(want), rel=1e-3)
    least = sorted(range(4), key=lambda i: said["damage"][str(i)])
    assert said["parallel"] == sorted(least[:2])
    stay = [i for i in range(4) if i not in less["layers"]]
    small = Network.open(tmp_path / "out")
    assert [bool(getattr(small.config_of(j), "parallel", False)) for j in range(3)] == [i in said["parallel"] for i in stay]
    assert not supported(small.checkpoint)
    with pytest.raises(BadInput, match="some layers here are parallel"):
        open_decoder(tmp_path / "out")
    want = stream(small, batch)
    assert trim(capsys, tmp_path / "out", "*.q: wanda", tmp_path / "packed", ready("llama"), "--pack", "--keep", "1")[0] == 0
    torch.testing.assert_close(stream(Network.open(tmp_path / "packed"), batch), want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()(**batch)
    torch.testing.assert_close(out.logits, want, atol=1e-4, rtol=1e-4)


def test_sublayers_of_a_parallel_layer_are_told_apart(saved, tmp_path):
    """What attention adds and what the MLP adds, both to the block's input."""
    rewire.with_own(Network.open(saved("llama")), {1: {"parallel": True}}, tmp_path / "out")
    net, batch, seen = Network.open(tmp_path / "out"), tiny.inputs("llama"), {}
    with torch.no_grad():
        hidden, context = net.embed(batch)
        hidden = net.run(net.block(0), 0, hidden, context)
        module = net.block(1)
        with net.taps(module, 1, {"sublayer"}, lambda kind, key, x, y: seen.update({key: (x, y)})):
            out = net.run(module, 1, hidden, context)
        bare = net.block(1)
        silence(net.family, bare, {"mlp"}, 1)
        attn = net.run(bare, 1, hidden, context)
    real = context.mask
    for key, (x, y) in {"attn": (hidden, attn), "mlp": (hidden, out - attn + hidden), "block": (hidden, out)}.items():
        for got, want in zip(seen[key], (x, y), strict=True):
            torch.testing.assert_close(got, want.flatten(0, 1)[real], atol=1e-5, rtol=1e-5)


# ---- norms by constants -----------------------------------------------------------------------
OFFLINE = ("llama", "qwen3", "phi3", "gemma2", "opt", "gpt2", "gpt_neox", "vit", "mixtral")


@pytest.mark.parametrize("name", OFFLINE)
def test_norms_by_constants(saved, name, tmp_path, ready, capsys):
    """Of one norm what it finds is put in its place; plain transformers runs the files as before."""
    path, batch = saved(name), tiny.inputs(name)
    code, result, _ = trim(capsys, path, "offline(share=0.25,by=first,outlier=1.02)", tmp_path / "out", ready(name))
    assert code == 0
    net, norm = Network.open(path), Network.open(path).family.norms[0]
    assert result["structure"] == [{"offline": [f"0.{norm}"]}]
    assert any("by a constant" in w or "a constant in place" in w for w in result["warnings"])
    with torch.no_grad():
        hidden, context = net.embed(batch)
        x = hidden.flatten(0, 1)[slice(None) if context.mask is None else context.mask].double()
        module = net.block(0).get_submodule(norm)
        mean = x.mean(1) if type(module) is torch.nn.LayerNorm else torch.zeros(len(x), dtype=torch.float64)
        size = ((x - mean[:, None]).square().mean(1) + graph.eps_of(module)).sqrt()
        near = size <= 1.02 * size.mean()
        assert not near.all()
        scale, less = float((-size[near].log().mean()).exp()), float(mean[near].mean())
        bias = getattr(module, "bias", None)

        def edit(block, i):
            if i == 0:
                w = block.get_submodule(norm).weight + net.family.norm_offset
                block.get_submodule(norm).forward = lambda x: (x - less) * scale * w + (0 if bias is None else bias)

        want = stream(net, batch, edit)
    got = Network.open(tmp_path / "out")
    torch.testing.assert_close(stream(got, batch), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain(tmp_path / "out", batch), want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        out = getattr(transformers, tiny.MODELS[name][0]).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(**batch)
    torch.testing.assert_close(out.logits, plain(path, batch), atol=1e-5, rtol=1e-5)
    assert float((out.logits - want).abs().max()) > 1e-4


def test_the_norms_that_cost_least(saved, tmp_path, ready, capsys):
    """They are those of the least measured damage, and what follows is calibrated on them, packed and in transformers, too."""
    path, batch = saved("llama", num_hidden_layers=3), tiny.inputs("llama")
    recipe = "offline(share=0.5) ; parallel(share=0.34) ; *.q: wanda(keep=1)"
    code, result, _ = trim(capsys, path, recipe, tmp_path / "out", ready("llama"))
    assert code == 0
    said = result["structure"][0]
    assert sorted(said["offline"]) == sorted(sorted(said["damage"], key=said["damage"].get)[:3]) and len(said["damage"]) == 6
    net = Network.open(tmp_path / "out")
    assert not supported(net.checkpoint)
    assert {f"{i}.{n}" for i in range(3) for n in getattr(net.config_of(i), "offline", {})} == set(said["offline"])
    assert [i for i in range(3) if getattr(net.config_of(i), "parallel", False)] == result["structure"][1]["parallel"]
    want = stream(net, batch)
    assert trim(capsys, path, recipe, tmp_path / "packed", ready("llama"), "--pack")[0] == 0
    torch.testing.assert_close(stream(Network.open(tmp_path / "packed"), batch), want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()(**batch)
    torch.testing.assert_close(out.logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["parallel(by=last)", "offline(by=last)"])
def test_what_nobody_else_computes_is_not_exported(saved, recipe, tmp_path, ready, capsys):
    assert trim(capsys, saved("llama", **DEEP), recipe, tmp_path / "out", ready("llama"))[0] == 0
    with pytest.raises(BadInput, match="in layer 4, which nobody else computes"):
        Source(tmp_path / "out")


def test_rewiring_takes_nothing_that_could_be_uniform(saved, tmp_path, ready, capsys):
    code, _, err = trim(capsys, saved("opt"), "rms", tmp_path / "out", ready("opt"), "--uniform")
    assert code == 2 and "--uniform says how parts" in err


def test_dry_run_of_a_rewiring(saved, tmp_path, ready, capsys):
    for recipe in ("rms", "offline ; *.q: wanda"):
        code, result, err = trim(capsys, saved("opt"), recipe, tmp_path / "out", ready("opt"), "--dry-run")
        assert code == 0 and result["estimate"]["memory"] > 0, err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", [{"offline": {"input_layernorm": [1.0]}}, {"offline": {"input_layernorm": ["x", 0.0]}},
                                 {"offline": {"none": [1.0, 0.0]}}, {"parallel": 1}, {"offline": [1.0]}])
def test_what_config_says_of_a_layer_is_checked(tmp_path, own, ready, capsys):
    path = tiny.save("llama", tmp_path / "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, graph.PER_LAYER: {"0": own}}))
    capsys.readouterr()
    code, _, err = trim(capsys, path, "wanda", tmp_path / "out", ready("llama"))
    assert code == 2 and len(err.strip().splitlines()) == 1, err
