"""Every family, streamed block by block, against the same checkpoint in plain transformers."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import tiny
from trimtab.core.types import BadInput
from trimtab.network import graph
from trimtab.network.checkpoint import Checkpoint, write_like
from trimtab.network.stream import Network, load_module

NAMES = list(tiny.MODELS)
FUSED = ["phi3", "gpt2", "gpt_neox", "gpt_neox_serial"]
MOE = ["mixtral", "qwen2_moe", "qwen3_moe"]
PLAIN = [n for n in NAMES if n not in ("opt_post", "bert", "bert_masked", "gemma2", "gemma3_text", *MOE)]  # pre-norm and dense
PARALLEL = "gpt_neox"


def plain(path: Path, batch: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        out = load_module(path, dtype)(**batch)
    return out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state


def stream(net: Network, batch: dict[str, Tensor], edit=None) -> Tensor:
    with torch.no_grad():
        hidden, context = net.embed(batch)
        for i in range(net.n_blocks):
            module = net.block(i)
            if edit:
                edit(module, i)
            hidden = net.run(module, i, hidden, context)
        return net.finish(hidden, context, batch)


def tap(net: Network, name: str, i: int = 0, edit=None):
    """Inputs and sublayers seen while block i runs: (hidden in, hidden out, module, seen)."""
    batch, seen = tiny.inputs(name), []
    with torch.no_grad():
        hidden, context = net.embed(batch)
        for j in range(i):
            hidden = net.run(net.block(j), j, hidden, context)
        module = net.block(i)
        if edit:
            edit(module)
        with net.taps(module, i, {"input", "sublayer"}, lambda kind, key, *t: seen.append((kind, key, *t))):
            out = net.run(module, i, hidden, context)
        calls = len(seen)
        net.run(module, i, hidden, context)
        assert len(seen) == calls  # the hooks are gone
    return hidden, out, module, seen


def tokens(name: str, x: Tensor) -> Tensor:
    mask = tiny.inputs(name).get("attention_mask")
    x = x.reshape(-1, x.shape[-1])
    return x if mask is None else x[mask.flatten().bool()]


def halved(w: Tensor) -> Tensor:
    return torch.where(w.abs() >= w.abs().flatten().median(), w, 0)


# ---- outputs ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_streamed_output_equals_plain_transformers(saved, name):
    path, batch = saved(name), tiny.inputs(name)
    net = Network.open(path)
    assert net.family.name in ("gpt_neox" if "neox" in name else name, name.rsplit("_", 1)[0])
    want = plain(path, batch)
    torch.testing.assert_close(stream(net, batch), want, atol=1e-5, rtol=1e-5)
    if "input_ids" in batch:  # without a mask, and another length through the same network
        ids = {"input_ids": batch["input_ids"][:2, :7]}
        torch.testing.assert_close(stream(net, ids), plain(path, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", [{"shard": "20KB"}, {"dtype": torch.bfloat16}], ids=["sharded", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_site_edited_written_and_reloaded(saved, name, how, tmp_path):
    path, batch = saved(name, **how), tiny.inputs(name)
    net, edited, touched = Network.open(path), {}, set()
    if "shard" in how:
        assert len(net.checkpoint.files) > 2

    def edit(module: nn.Module, i: int) -> None:
        for s in net.sites_of(i):
            net.set_weight(module, s, halved(net.weight(module, s)))
            touched.add(s.name)
        edited.update(net.stored(module, i))

    got = stream(net, batch, edit)
    assert touched == {s.name for s in net.sites}
    write_like(net.checkpoint, tmp_path / "o", edited.get)
    torch.testing.assert_close(got, plain(tmp_path / "o", batch), atol=1e-5, rtol=1e-5)
    assert float((got - plain(path, batch)).abs().max()) > 1e-3
    again = Network.open(tmp_path / "o")
    assert {n: (e.dtype, e.shape) for n, e in again.checkpoint.tensors.items()} == {
        n: (e.dtype, e.shape) for n, e in net.checkpoint.tensors.items()}
    for i in range(again.n_blocks):
        module, fresh = again.block(i), net.block(i, edited)  # `replaced` is what the new files hold
        for s in again.sites_of(i):
            assert torch.equal(again.weight(module, s), net.weight(fresh, s))
            assert 0.4 < float((again.weight(module, s) == 0).float().mean()) < 0.6, s.name


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_unmodified_is_bit_for_bit_what_was_read(saved, name, tmp_path):
    net = Network.open(saved(name, dtype=torch.bfloat16))
    kept: dict[str, Tensor] = {}
    for i in range(net.n_blocks):
        module = net.block(i)
        for s in net.sites_of(i):
            net.set_weight(module, s, net.weight(module, s))
            assert net.stored_dtype(s) == torch.bfloat16
        kept |= net.stored(module, i)
    assert kept and all(t.is_contiguous() and torch.equal(t, net.checkpoint.read(n)) for n, t in kept.items())
    write_like(net.checkpoint, tmp_path / "o", kept.get)
    for f in net.checkpoint.files:
        assert f.read_bytes() == (tmp_path / "o" / f.name).read_bytes()


# ---- sites ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_sites_cover_every_linear_map_of_the_blocks_once(saved, name):
    from transformers.pytorch_utils import Conv1D

    net = Network.open(saved(name))
    assert len({s.name for s in net.sites}) == len(net.sites)
    assert [s.block for s in net.sites] == sorted(s.block for s in net.sites)
    by_name = {s.name: s for s in net.sites}
    for i in range(net.n_blocks):
        module = net.block(i)
        linear = {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        linear |= {n for n, p in module.named_parameters() if p.dim() == 3}
        linear -= {f"{r}.weight" for r in net.family.routers}
        assert set(net.site_params(module, i)) == linear
        for n in linear:
            module.get_parameter(n).zero_()
        for s in net.sites_of(i):
            assert s.name.startswith(f"{i}.{s.group}.") and s.name.endswith(f".{s.role}")
            assert tuple(net.weight(module, s).shape) == s.shape
            net.set_weight(module, s, net.weight(module, s) + 1)
            if s.consumer:
                assert by_name[s.consumer].shape[1] == s.shape[0] and by_name[s.consumer].role == "down"
        for n in linear:
            assert (module.get_parameter(n) == 1).all(), n
        assert sum(s.size for s in net.sites_of(i)) == sum(module.get_parameter(n).numel() for n in linear)
        assert {s.role for s in net.sites_of(i)} >= {"q", "k", "v", "o", "up", "down"}


@pytest.mark.parametrize("name", FUSED)
def test_rows_of_fused_attention_are_what_the_model_splits(saved, name):
    net = Network.open(saved(name))
    _, _, module, seen = tap(net, name)
    x = next(t[0] for kind, key, *t in seen if key == "attn.in")
    sites = {s.role: s for s in net.sites_of(0)}
    fused = module.get_submodule(sites["q"].param.removesuffix(".weight"))(x)
    if name == "phi3":
        want = fused.split([32, 16, 16], -1)
    elif name == "gpt2":
        want = fused.split(32, -1)
    else:  # per head: query, key, value
        want = [t.reshape(len(x), -1) for t in fused.view(len(x), 4, 3 * 8).chunk(3, -1)]
    for role, y in zip("qkv", want, strict=True):
        bias = net.bias(module, sites[role])
        mine = x @ net.weight(module, sites[role]).T
        torch.testing.assert_close(mine if bias is None else mine + bias, y, atol=1e-5, rtol=1e-5)
        assert (bias is None) == (name == "phi3")


@pytest.mark.parametrize("name", NAMES)
def test_values_feed_the_output_projection(saved, name):
    """Without values, attention gives every token the same: the values' bias."""
    net = Network.open(saved(name))
    sites = {s.role: s for s in net.sites_of(0)}
    for role, same in (("v", True), ("q", False), ("k", False)):
        s = sites[role]
        seen = tap(net, name, edit=lambda m, s=s: net.set_weight(m, s, torch.zeros(s.shape)))[3]
        mid = next(t[0] for kind, key, *t in seen if key == "attn.mid")
        assert (float((mid - mid[:1]).abs().max()) < 1e-5) == same, role


# ---- taps -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_tapped_once_without_padding(saved, name):
    net = Network.open(saved(name))
    hidden, _, module, seen = tap(net, name, i=1)
    inputs = {key: t[0] for kind, key, *t in seen if kind == "input"}
    assert len(inputs) == sum(kind == "input" for kind, *_ in seen)
    count = len(tokens(name, hidden))
    for s in net.sites_of(1):
        x = inputs.get(s.input)
        if s.expert is None:
            assert x.shape == (count, s.shape[1]), s.name
        else:
            assert x is None or x.shape[1] == s.shape[1]
    sites = {s.name: s for s in net.sites_of(1)}
    act = next((m for n, m in module.named_modules() if n.endswith("act_fn")), None)
    checked = 0
    for s in sites.values():
        if s.role == "gate" and s.input in inputs:
            up = sites[s.name[:-4] + "up"]
            x, mid = inputs[s.input], inputs[sites[s.consumer].input]
            act = nn.functional.silu if act is None else act  # phi3 keeps it under another name

            def of(site, x=x):
                bias = net.bias(module, site)
                return x @ net.weight(module, site).T + (0 if bias is None else bias)

            torch.testing.assert_close(act(of(s)) * of(up), mid, atol=1e-5, rtol=1e-5)
            checked += 1
    assert checked or not any(s.role == "gate" for s in sites.values())


@pytest.mark.parametrize("name", MOE)
def test_experts_see_the_tokens_that_chose_them(saved, name):
    net = Network.open(saved(name))
    hidden, _, _, seen = tap(net, name, i=1)
    mine = [t[0] for kind, key, *t in seen if kind == "input" and key.startswith("experts.") and key.endswith(".mlp.in")]
    assert sum(map(len, mine)) == 2 * len(tokens(name, hidden)) and len(mine) > 1  # two experts a token
    assert any(s.name == "1.mlp.shared.gate" for s in net.sites) == (name == "qwen2_moe")


@pytest.mark.parametrize("name", NAMES)
def test_sublayers_start_and_end_where_the_block_does(saved, name):
    net = Network.open(saved(name))
    hidden, out, module, seen = tap(net, name, i=1)
    taps = {key: t for kind, key, *t in seen if kind == "sublayer"}
    assert set(taps) == {"attn", "mlp", "block"} and sum(kind == "sublayer" for kind, *_ in seen) == 3
    (a, b), (c, d) = taps["attn"], taps["mlp"]
    x, y = tokens(name, hidden), tokens(name, out)
    torch.testing.assert_close(a, x)
    assert torch.equal(taps["block"][0], x) and torch.equal(taps["block"][1], y)
    if name == PARALLEL:
        torch.testing.assert_close(c, x)
        torch.testing.assert_close(x + (b - a) + (d - c), y, atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(b, c)
        torch.testing.assert_close(d, y)
    if name in PLAIN:  # each adds what its last projection gives
        inputs = {key: t[0] for kind, key, *t in seen if kind == "input"}
        sites = {s.role: s for s in net.sites_of(1)}
        for (before, after), role in (((a, b), "o"), ((c, d), "down")):
            bias = net.bias(module, sites[role])
            added = inputs[sites[role].input] @ net.weight(module, sites[role]).T + (0 if bias is None else bias)
            torch.testing.assert_close(after - before, added, atol=1e-4, rtol=1e-4)
    if name in ("bert", "opt_post"):  # behind the norm: mean 0 before its gain and bias
        norm = module.get_submodule("attention.output.LayerNorm" if name == "bert" else "self_attn_layer_norm")
        assert float(((b - norm.bias) / norm.weight).mean(-1).abs().max()) < 1e-5


# ---- gradients --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama_tied", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen2_moe", "gemma2", "opt"])
def test_gradients_of_sites_equal_those_of_the_whole_model(saved, name):
    path, batch = saved(name), {"input_ids": tiny.inputs(name)["input_ids"][:1]}
    net, model = Network.open(path), load_module(path)

    def loss(logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits[0, :-1], batch["input_ids"][0, 1:])

    loss(model(**batch).logits).backward()
    hidden, context = net.embed(batch)
    first, last = net.block(0), net.block(1)
    for i, m in enumerate((first, last)):
        for p in net.site_params(m, i).values():
            p.requires_grad_(True)
    h = hidden.clone().requires_grad_()
    loss(net.finish(net.run(last, 1, net.run(first, 0, h, context), context), context, batch)).backward()
    assert float(h.grad.abs().max()) > 0
    blocks = model.base_model.get_submodule(net.family.blocks)
    for i, m in enumerate((first, last)):
        for s in net.sites_of(i):
            want = blocks[i].get_parameter(s.param).grad
            torch.testing.assert_close(net.weight_grad(m, s), s.get(want), atol=1e-6, rtol=1e-4)
    unused = net.block(0)
    assert not net.weight_grad(unused, net.sites[0]).any()


# ---- phases -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_a_scale_that_is_folded_leaves_the_output(saved, name):
    """Every input that can be scaled, by anything from 1/4 to 4: its readers see it divided, and the model says what it said."""
    net, batch = Network.open(saved(name)), tiny.inputs(name)
    gen, before = torch.Generator().manual_seed(3), stream(net, batch)

    def scale(module: nn.Module, i: int) -> None:
        found = graph.folds(net.family, net.config, net.sites_of(i))
        assert {f.readers[0].role for f in found} >= ({"q", "o"} if name in PLAIN else {"o"})
        for fold in found:
            assert {s.input for s in fold.readers} == {fold.readers[0].input}
            assert {s.name for s in fold.readers} == {s.name for s in net.sites_of(i) if s.input == fold.readers[0].input}
            s = (torch.rand(fold.readers[0].shape[1], generator=gen) * 4 - 2).exp2()
            old = {r.name: net.weight(module, r) for r in fold.readers}
            real, changed = net.fold(module, fold, s)
            assert all(torch.equal(net.weight(module, r), old[r.name] * real) for r in fold.readers)
            assert bool(changed) == bool(fold.norm) or changed == {graph.bias_of(fold.writer)}
            if not fold.rows:
                torch.testing.assert_close(real, s, rtol=1e-6, atol=0)

    torch.testing.assert_close(stream(net, batch, scale), before, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "roles"), [
    ("opt", "qu"), ("gpt2", "qu"), ("gpt_neox", "qu"), ("vit", "qu"), ("opt_post", ""), ("bert", ""), ("llama", ""), ("qwen2", "")])
def test_an_input_that_is_moved_leaves_the_output(saved, name, roles):
    """Behind norms with a bias, where all that read have one: readers see it moved, and the model says what it said."""
    net, batch = Network.open(saved(name)), tiny.inputs(name)
    gen, before = torch.Generator().manual_seed(3), stream(net, batch)

    def move(module: nn.Module, i: int) -> None:
        found = [f for f in graph.folds(net.family, net.config, net.sites_of(i)) if net.moves(f)]
        assert "".join(f.readers[0].role[0] for f in found) == roles
        for fold in found:
            z, norm = torch.randn(fold.readers[0].shape[1], generator=gen), module.get_parameter(f"{fold.norm}.bias")
            old = norm.detach().clone()
            real, changed = net.move(module, fold, z)
            torch.testing.assert_close(old - real, norm.detach(), atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(real, z, atol=1e-6, rtol=1e-6)
            assert changed == {f"{fold.norm}.bias", *(graph.bias_of(r) for r in fold.readers)}

    torch.testing.assert_close(stream(net, batch, move), before, rtol=2e-4, atol=2e-5)


def test_an_input_that_somebody_reads_without_a_bias_cannot_be_moved(saved, monkeypatch):
    net = Network.open(saved("opt"))
    fold = next(f for f in graph.folds(net.family, net.config, net.sites_of(0)) if len(f.readers) > 1)
    assert net.moves(fold)
    monkeypatch.setattr(net, "has_bias", lambda s: s.name != fold.readers[0].name)
    assert not net.moves(fold)


def test_a_moved_norm_is_as_exact_as_its_type(saved):
    """In bfloat16 the shift in effect is what the rounded bias of the norm leaves of it, and the readers' biases take that one."""
    net = Network.open(saved("opt", dtype=torch.bfloat16))
    module = net.block(0)
    fold = next(f for f in graph.folds(net.family, net.config, net.sites_of(0)) if net.moves(f))
    z, norm = torch.linspace(-1, 1, fold.readers[0].shape[1]), module.get_parameter(f"{fold.norm}.bias").clone()
    before = {r.name: net.bias(module, r) for r in fold.readers}
    real, _ = net.move(module, fold, z)
    now = module.get_parameter(f"{fold.norm}.bias")
    assert torch.equal(now, now.bfloat16().float()) and not torch.equal(real, z)
    torch.testing.assert_close(now + real, norm, rtol=1e-6, atol=1e-7)
    for r in fold.readers:
        assert torch.equal(net.bias(module, r), (before[r.name] + net.weight(module, r).float() @ real).bfloat16().float())


@pytest.mark.parametrize(("name", "roles"), [
    ("llama", "qgod"), ("llama_tied", "qgod"), ("mixtral", "qod"), ("phi3", "qgod"), ("gpt2", "quo"), ("opt", "quod"), ("opt_post", "od"),
    ("bert", "o"), ("gpt_neox", "quo"), ("vit", "quo")])
def test_where_a_scale_can_go(saved, name, roles):
    """Before q, k, v and before gate and up from the norm, before o from v, before down from up where nothing bends between."""
    net = Network.open(saved(name))
    found = {f.readers[0].role[0] for f in graph.folds(net.family, net.config, net.sites_of(0))}
    assert found == set(roles)


def test_a_folded_norm_is_as_exact_as_its_type(saved):
    """In bfloat16 the scale in effect is what the rounded norm leaves of it, so that the product is what it was."""
    net, batch = Network.open(saved("llama", dtype=torch.bfloat16)), tiny.inputs("llama")

    def scale(module: nn.Module, i: int) -> None:
        fold = graph.folds(net.family, net.config, net.sites_of(i))[0]
        s = torch.linspace(0.3, 3, fold.readers[0].shape[1])
        norm = module.get_parameter(f"{fold.norm}.weight").clone()
        real, _ = net.fold(module, fold, s)
        now = module.get_parameter(f"{fold.norm}.weight")
        assert torch.equal(now, now.bfloat16().float()) and not torch.equal(real, s)
        torch.testing.assert_close(now * real, norm, rtol=1e-6, atol=0)

    torch.testing.assert_close(stream(net, batch, scale), stream(net, batch), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_masked", "vit", "gemma3_text", "llama_tied"])
def test_front_and_end_hold_only_their_own_weights(saved, name):
    net, batch = Network.open(saved(name)), tiny.inputs(name)

    def held() -> set[str]:
        return {n for n, p in net.model.named_parameters(remove_duplicate=False) if not p.is_meta}

    assert not held()
    with torch.no_grad():
        hidden, context = net.embed(batch)
        front = held()
        loaded = {n: p.data_ptr() for n, p in net.model.named_parameters() if not p.is_meta}
        net.embed(batch)
        assert loaded == {n: p.data_ptr() for n, p in net.model.named_parameters() if not p.is_meta}  # read once
        net.release()
        assert not held()
        net.finish(hidden, context, batch)
        end = held()
        net.release()
    assert not held() and front and end
    assert not any(w in n for n in front for w in ("lm_head", "decoder", "classifier", "model.norm", "ln_f", "vit.layernorm"))
    assert not any("embed_tokens" in n or "wte" in n or "word_embeddings" in n for n in end)
    with torch.no_grad():
        assert torch.equal(net.finish(hidden, context, batch), net.finish(hidden, context, batch))
        assert held() == end
        net.embed(batch)
        assert held() == front
    net.release()
    assert not held()


@pytest.mark.parametrize("name", [n for n in NAMES if tiny.MODELS[n][0].endswith(("CausalLM", "LMHeadModel"))])
def test_the_end_of_a_language_model_works_position_by_position(saved, name):
    net, batch = Network.open(saved(name)), tiny.inputs(name)
    assert net.kind == "lm"
    with torch.no_grad():
        hidden, context = net.embed(batch)
        whole = net.finish(hidden, context, batch)
        row = {k: v[1:2] for k, v in batch.items()}
        torch.testing.assert_close(net.finish(hidden[1:2, 3:6], context, row), whole[1:2, 3:6], atol=1e-5, rtol=1e-5)


def test_computing_in_bfloat16(saved):
    path, batch = saved("gemma2", dtype=torch.bfloat16), tiny.inputs("gemma2")
    net = Network.open(path, dtype=torch.bfloat16)
    got = stream(net, batch)
    assert got.dtype == torch.bfloat16 and torch.equal(got, plain(path, batch, torch.bfloat16))


# ---- layouts of names -------------------------------------------------------------------------
def renamed(path: Path, to: Path, rename) -> Path:
    """The same checkpoint with other tensor names; `rename` takes and gives {name: tensor}."""
    to.mkdir()
    save_file({n: t.contiguous() for n, t in rename(load_file(path / "model.safetensors")).items()}, to / "model.safetensors",
              metadata={"format": "pt"})
    (to / "config.json").write_bytes((path / "config.json").read_bytes())
    return to


def each(f):
    return lambda tensors: {f(n): t for n, t in tensors.items()}


def vit_new(n: str) -> str:
    for old, new in (("encoder.layer.", "layers."), ("attention.attention.query", "attention.q_proj"),
                     ("attention.attention.key", "attention.k_proj"), ("attention.attention.value", "attention.v_proj"),
                     ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"),
                     ("output.dense", "mlp.fc2")):
        n = n.replace(old, new)
    return n


def stacked(gate: str, up: str, down: str, moe: str):
    """Experts stored one by one, stacked as the module has them."""
    def f(tensors):
        out = {n: t for n, t in tensors.items() if ".experts." not in n}
        for i in range(2):
            def take(w, i=i):
                return torch.stack([tensors[f"model.layers.{i}.{moe}.experts.{e}.{w}.weight"] for e in range(4)])
            if f"model.layers.{i}.{moe}.experts.0.{up}.weight" in tensors:
                out[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.cat([take(gate), take(up)], 1)
                out[f"model.layers.{i}.mlp.experts.down_proj"] = take(down)
        return {n.replace(f".{moe}.", ".mlp."): t for n, t in out.items()}
    return f


@pytest.mark.parametrize("name, rename", [
    ("gpt2", each(lambda n: n.removeprefix("transformer."))),
    ("bert_masked", each(lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"))),
    ("bert", each(lambda n: "bert." + n)),
    ("llama_base", each(lambda n: "model." + n)),
    ("vit", each(vit_new)), ("vit_base", each(vit_new)),
    ("gpt_neox", each(lambda n: n.replace("embed_out", "lm_head"))),
    ("gpt_neox", each(lambda n: n.replace("lm_head", "embed_out"))),
    ("mixtral", stacked("w1", "w3", "w2", "block_sparse_moe")),
    ("qwen2_moe", stacked("gate_proj", "up_proj", "down_proj", "mlp")),
    ("qwen3_moe", stacked("gate_proj", "up_proj", "down_proj", "mlp")),
    ("llama", lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
], ids=lambda x: x if isinstance(x, str) else "")
def test_other_layouts_of_names_are_read_and_written_back(saved, name, rename, tmp_path):
    path = renamed(saved(name), tmp_path / "m", rename)
    net, batch = Network.open(path), tiny.inputs(name)
    want = stream(Network.open(saved(name)), batch)
    assert torch.equal(stream(net, batch), want)
    edited: dict[str, Tensor] = {}

    def edit(module: nn.Module, i: int) -> None:
        for s in net.sites_of(i):
            net.set_weight(module, s, halved(net.weight(module, s)))
        edited.update(net.stored(module, i))

    got = stream(net, batch, edit)
    write_like(net.checkpoint, tmp_path / "o", edited.get)
    assert set(edited) <= set(Checkpoint.open(path).tensors) == set(Checkpoint.open(tmp_path / "o").tensors)
    assert torch.equal(got, stream(Network.open(tmp_path / "o"), batch))
    assert not torch.equal(got, want)


def test_experts_are_stored_one_by_one_by_default(saved):
    names = set(Checkpoint.open(saved("mixtral")).tensors)
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names
    net = Network.open(saved("mixtral"))
    assert "model.layers.1.block_sparse_moe.experts.2.w3.weight" in net.stored(net.block(1), 1)


def test_a_head_that_differs_from_the_tied_table_is_used(saved, tmp_path):
    head = torch.randn(80, 32, generator=torch.Generator().manual_seed(5))
    path = renamed(saved("llama_tied"), tmp_path / "m", lambda t: {**t, "lm_head.weight": head})
    torch.testing.assert_close(stream(Network.open(path), tiny.inputs("llama")), plain(path, tiny.inputs("llama")))


# ---- refusals ---------------------------------------------------------------------------------
def with_config(path: Path, to: Path, **changes) -> Path:
    renamed(path, to, lambda t: t)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


def refused(path: Path, *words: str) -> None:
    with pytest.raises(BadInput) as e:
        Network.open(path)
    assert len(str(e.value).splitlines()) == 1 and all(w in str(e.value) for w in words), str(e.value)


def test_unknown_architecture_lists_what_is_known(saved, tmp_path):
    path = with_config(saved("llama"), tmp_path / "m", model_type="mamba", architectures=["MambaForCausalLM"])
    refused(path, "mamba", "MambaForCausalLM", *graph.FAMILIES)


def test_config_that_contradicts_the_tensors(saved, tmp_path):
    refused(with_config(saved("llama"), tmp_path / "a", intermediate_size=40), "mlp.gate_proj.weight", "[48, 32]", "[40, 32]")
    refused(with_config(saved("llama"), tmp_path / "b", num_hidden_layers=3), "model.layers.2.", "missing")
    refused(with_config(saved("mixtral"), tmp_path / "c", intermediate_size=40), "experts.0.w1.weight", "[48, 32]", "[40, 32]")
    refused(with_config(saved("llama"), tmp_path / "d", hidden_act="nonsense"), "config.json", "nonsense")
    refused(with_config(saved("llama"), tmp_path / "e", num_attention_heads="four"), "config.json")


def test_a_missing_tensor_is_named(saved, tmp_path):
    name = "model.layers.1.self_attn.v_proj.weight"
    refused(renamed(saved("llama"), tmp_path / "m", lambda t: {n: v for n, v in t.items() if n != name}), name, "missing")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_nan_is_named(saved, tmp_path, name):
    def spoil(t):
        t[name].view(-1)[-1] = float("nan")
        return t
    path = renamed(saved("llama"), tmp_path / "m", spoil)
    refused(path, name, "NaN")
    net = Network(Checkpoint.open(path))
    with pytest.raises(BadInput, match=name), torch.no_grad():
        net.block(1)
        batch = tiny.inputs("llama")
        net.finish(*net.embed(batch), batch)


def test_infinite_replacement_is_refused(saved):
    net = Network.open(saved("llama"))
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(BadInput, match=name):
        net.block(0, {name: torch.full((48, 32), float("inf"))})


def test_no_architectures_falls_back_on_the_family(saved, tmp_path):
    for name, kind in (("qwen3", "lm"), ("bert", "encoder"), ("vit_base", "vision")):
        path = with_config(saved(name), tmp_path / name, architectures=None)
        net = Network.open(path)
        assert net.kind == kind
        assert torch.equal(stream(net, tiny.inputs(name)), stream(Network.open(saved(name)), tiny.inputs(name)))


def test_kinds_sizes_and_tokenizer(saved):
    kinds = {"llama": "lm", "gpt2": "lm", "bert": "encoder", "bert_masked": "masked", "vit": "vision",
             "llama_classifier": "encoder", "llama_base": "encoder"}
    assert {n: Network.open(saved(n)).kind for n in kinds} == kinds
    for name in ("llama_tied", "mixtral", "gpt2", "vit"):
        net = Network.open(saved(name))
        assert net.n_params == sum(p.numel() for p in load_module(saved(name)).parameters())
        assert net.tokenizer() is None


# ---- coupled dimensions -----------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_groups_cover_the_dimensions_of_their_sites(saved, name):
    net = Network.open(saved(name))
    for i in range(net.n_blocks):
        sites, module = {s.name: s for s in net.sites_of(i)}, net.block(i)
        groups = graph.coupled(net.family, net.config, net.sites_of(i))
        touched: dict[str, set[str]] = {}
        for g in groups:
            for m in g.members:
                size = g.count * m.size
                if m.side == "norm":
                    for p in module.get_submodule(m.name).parameters():
                        assert p.shape == (size,)
                else:
                    assert sites[m.name].shape[m.side == "in"] == size, (g.kind, m)
                    touched.setdefault(m.name, set()).add(m.side)
        assert all(touched[n] == {"in", "out"} for n in sites)


def _shrink(saved, name: str, kind: str, unit: int, tmp_path: Path, config: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Logits with one unit of every block zeroed, and of a smaller model from which it was cut out."""
    net, batch = Network.open(saved(name)), tiny.inputs(name)
    cut, zeroed = load_file(saved(name) / "model.safetensors"), {}
    for i in range(net.n_blocks):
        module = net.block(i)
        group = next(g for g in graph.coupled(net.family, net.config, net.sites_of(i)) if g.kind == kind)
        sites = {s.name: s for s in net.sites_of(i)}
        for m in group.members:
            w = net.weight(module, sites[m.name])
            stored = f"model.layers.{i}.{sites[m.name].param}"
            keep = torch.ones(w.shape[m.side == "in"], dtype=torch.bool)
            keep[m.at(unit)] = False
            cut[stored] = (cut[stored][keep] if m.side == "out" else cut[stored][:, keep]).contiguous()
            w[~keep if m.side == "out" else slice(None), slice(None) if m.side == "out" else ~keep] = 0
            net.set_weight(module, sites[m.name], w)
        zeroed |= net.stored(module, i)
    write_like(net.checkpoint, tmp_path / "zeroed", zeroed.get)
    with_config(renamed(saved(name), tmp_path / "x", lambda t: cut), tmp_path / "cut", **config)
    return plain(tmp_path / "zeroed", batch), plain(tmp_path / "cut", batch)


@pytest.mark.parametrize("kind, config", [
    ("neuron", {"intermediate_size": 47}), ("kvgroup", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
])
@pytest.mark.parametrize("unit", [0, 1])
def test_zeroing_a_group_equals_removing_it(saved, kind, config, unit, tmp_path):
    zeroed, cut = _shrink(saved, "llama", kind, unit, tmp_path, config)
    torch.testing.assert_close(zeroed, cut, atol=1e-5, rtol=1e-5)
    assert float((zeroed - plain(saved("llama"), tiny.inputs("llama"))).abs().max()) > 1e-4


def test_a_head_of_a_grouped_query_is_its_queries_and_outputs(saved):
    net = Network.open(saved("llama"))
    groups = {g.kind: g for g in graph.coupled(net.family, net.config, net.sites_of(0))}
    assert {m.name for m in groups["head"].members} == {"0.attn.q", "0.attn.o"} and groups["head"].count == 4
    assert {(m.name, m.size) for m in groups["kvgroup"].members} == {
        ("0.attn.q", 16), ("0.attn.k", 8), ("0.attn.v", 8), ("0.attn.o", 16)} and groups["kvgroup"].count == 2
    assert groups["kvgroup"].members[1].at(1) == slice(8, 16)
