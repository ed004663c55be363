"""A smaller network made of a larger one, to the sizes of a config: what was selected, entry by entry, and what is refused."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from tests import tiny
from tests.line.test_families import plain, stream
from tests.line.test_structure import FAST, of_blocks, trim
from trimtab import cli
from trimtab.core import resize
from trimtab.core.data import Batch
from trimtab.methods.unit.resize import ends, first
from trimtab.network import graph
from trimtab.network.stream import Network

# Source: 5 blocks of width 32, 48 neurons, 4 heads of 8 with 2 of keys and values. Target: two thirds of it, where nothing divides.
LARGE = {"num_hidden_layers": 5}
SMALL = {"num_hidden_layers": 3, "hidden_size": 20, "intermediate_size": 36, "num_attention_heads": 2, "num_key_value_heads": 1,
         "head_dim": 8}
SPELLED = "layers=3,width=20,neurons=36,heads=2,kv_heads=1"
NORMS = ("input_layernorm", "post_attention_layernorm")


pytestmark = pytest.mark.usefixtures("proof_in_this_process")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("larger"), {}

    def get(name: str, **how) -> Path:
        key = f"{name}{sorted(how.items())}"
        if key not in made:
            made[key] = tiny.save(name, root / str(len(made)), **{**LARGE, **how})
        return made[key]

    return get


def config(source: Path, out: Path, **changes) -> Path:
    """The source's config.json with changes, in a directory."""
    out.mkdir(exist_ok=True)
    said = {k: v for k, v in json.loads((source / "config.json").read_text()).items() if k not in ("head_dim", "layer_types")}
    (out / "config.json").write_text(json.dumps({**said, **changes}))
    return out


def tensors(path: Path) -> dict[str, Tensor]:
    return {k: v for f in path.glob("model*.safetensors") for k, v in load_file(f).items()}


def sliced(big: dict[str, Tensor], layers: list[int], channels: list[int], neurons: list[list[int]], heads: list[list[int]],
           groups: list[list[int]]) -> dict[str, Tensor]:
    """By hand: what a Llama's tensors are of these layers, channels, and of every layer that stays these neurons, heads and groups."""
    def wide(which: list[int]) -> list[int]:
        return [8 * n + c for n in which for c in range(8)]

    c, small = torch.tensor(channels), {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in big:
            small[name] = big[name][:, c]
    small["model.norm.weight"] = big["model.norm.weight"][c]
    for j, i in enumerate(layers):
        def of(name: str, rows, columns=None, i: int = i, j: int = j) -> None:
            for end in ("weight", "bias"):
                if (full := big.get(f"model.layers.{i}.{name}.{end}")) is not None:
                    part = full[torch.as_tensor(rows)]
                    part = part if columns is None or end == "bias" else part[:, torch.as_tensor(columns)]
                    small[f"model.layers.{j}.{name}.{end}"] = part

        for norm in NORMS:
            of(norm, c)
        of("self_attn.q_proj", wide(heads[j]), c)
        of("self_attn.k_proj", wide(groups[j]), c)
        of("self_attn.v_proj", wide(groups[j]), c)
        of("self_attn.o_proj", c, wide(heads[j]))
        of("mlp.gate_proj", neurons[j], c)
        of("mlp.up_proj", neurons[j], c)
        of("mlp.down_proj", c, neurons[j])
    return small


def same(path: Path, want: dict[str, Tensor]) -> None:
    found = tensors(path)
    assert found.keys() == want.keys()
    for name, t in want.items():
        assert torch.equal(found[name], t), name


def opens(name: str, path: Path) -> None:
    """Plain transformers opens it, without a word of missing or unexpected tensors, and it computes what our own stream does."""
    batch, net = tiny.inputs(name), Network.open(path)
    _, said = getattr(transformers, tiny.MODELS[name][0]).from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    torch.testing.assert_close(plain(path, batch), stream(net, batch), atol=1e-5, rtol=1e-5)


# ---- which blocks -----------------------------------------------------------------------------
def test_blocks_out_of_the_middle():
    assert [ends(8, 4), ends(8, 5), ends(5, 3), ends(3, 1), ends(4, 2)] == [
        (0, 1, 6, 7), (0, 1, 2, 6, 7), (0, 1, 4), (0,), (0, 3)]
    assert all(len(set(ends(n, k))) == k and ends(n, n) == tuple(range(n)) for n in range(1, 9) for k in range(1, n + 1))
    assert first(8, 3) == (0, 1, 2)


# ---- select -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_select_takes_even_steps(saved, ready, name, tmp_path, capsys):
    big = saved(name)
    target = config(big, tmp_path / "target", **SMALL)
    code, result, err = trim(capsys, big, f"select(config={target})", tmp_path / "out", ready(name))
    assert code == 0, err
    channels = [0, 1, 3, 4, 6, 8, 9, 11, 12, 14, 16, 17, 19, 20, 22, 24, 25, 27, 28, 30]  # floor(1.6 i)
    neurons = [n for n in range(48) if n % 4 != 3]
    same(tmp_path / "out", sliced(tensors(big), [0, 1, 2], channels, [neurons] * 3, [[0, 1]] * 3, [[0]] * 3))
    opens(name, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: said[k] for k in SMALL} == SMALL and graph.PER_LAYER not in said
    found, want = (transformers.AutoConfig.from_pretrained(p).to_dict() for p in (tmp_path / "out", target))
    assert {k for k in found if found[k] != want.get(k)} <= {"_name_or_path", "architectures", "dtype", "transformers_version"}
    assert result["structure"] == [{"layers": [3, 4], "units": {
        "channels": {"kind": "channel", "of": 32, "went": sorted({*range(32)} - {*channels})},
        **{f"{i}.mlp": {"kind": "neuron", "of": 48, "went": list(range(3, 48, 4))} for i in range(3)},
        **{f"{i}.attn": {"kind": "head", "of": 4, "went": [2, 3]} for i in range(3)}}}]


def test_the_recipe_that_is_written_needs_no_config(saved, ready, tmp_path, capsys):
    big, calib = saved("llama"), ready("llama")
    target = config(big, tmp_path / "target", **SMALL)
    assert trim(capsys, big, f"select(config={target / 'config.json'})", tmp_path / "one", calib)[0] == 0
    (target / "config.json").unlink()
    assert trim(capsys, big, tmp_path / "one" / "recipe.yaml", tmp_path / "two", calib)[0] == 0
    assert trim(capsys, big, f"select({SPELLED})", tmp_path / "three", calib)[0] == 0
    for other in ("two", "three"):
        for file in ("model.safetensors", "config.json", "recipe.yaml"):
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / other / file).read_bytes()


@pytest.mark.parametrize("sizes, heads, groups", [
    ("heads=2", [0, 2], [0, 1]),                # one of each group
    ("kv_heads=1", [0, 1], [0]),                # a whole group
    ("heads=1,kv_heads=1", [0], [0]),
])
def test_heads_stay_whole_and_with_their_keys(saved, ready, sizes, heads, groups, tmp_path, capsys):
    big = saved("llama")
    assert trim(capsys, big, f"select({sizes})", tmp_path / "out", ready("llama"))[0] == 0
    every = [list(range(48))] * 5
    same(tmp_path / "out", sliced(tensors(big), [*range(5)], [*range(32)], every, [heads] * 5, [groups] * 5))
    opens("llama", tmp_path / "out")


def test_where_every_head_has_its_own_keys_they_go_together(saved, ready, tmp_path, capsys):
    big = saved("llama", num_key_value_heads=4)
    assert trim(capsys, big, "select(heads=2)", tmp_path / "out", ready("llama"))[0] == 0
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (said["num_attention_heads"], said["num_key_value_heads"], said["head_dim"]) == (2, 2, 8)
    q = "model.layers.4.self_attn.q_proj.weight"
    assert torch.equal(tensors(tmp_path / "out")[q], tensors(big)[q].view(4, 8, 32)[[0, 2]].flatten(0, 1))


# ---- subclone ---------------------------------------------------------------------------------
def seen(path: Path, batch: Batch) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """Of plain transformers: mean magnitudes of the channels, summed over all norms of blocks, of the inputs of down and of o, by layer."""
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    mask, sums, down, o = batch["attention_mask"].bool(), torch.zeros(32), dict[int, Tensor](), dict[int, Tensor]()

    def size(x: Tensor) -> Tensor:
        return x[mask].abs().mean(0)

    def add(m, args, y: Tensor) -> None:
        sums.add_(size(y))

    for i, block in enumerate(model.model.layers):
        for norm in NORMS:
            block.get_submodule(norm).register_forward_hook(add)
        block.mlp.down_proj.register_forward_pre_hook(lambda m, args, i=i: down.update({i: size(args[0])}))
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, args, i=i: o.update({i: size(args[0])}))
    with torch.no_grad():
        model(**batch)
    return sums, down, o


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize("scaled", [False, True])
def test_subclone_takes_the_largest_and_keeps_outputs_as_large(saved, ready, name, scaled, tmp_path, capsys):
    big = saved(name)
    target = config(big, tmp_path / "target", **SMALL)
    recipe = f"subclone(config={target}{',scaled=true' if scaled else ''})"
    code, _, err = trim(capsys, big, recipe, tmp_path / "out", ready(name))
    assert code == 0, err
    sums, down, o = seen(big, tiny.inputs(name))
    layers, heads, groups = [0, 1, 4], [], []
    for i in layers:
        worth = o[i].view(2, 2, 8).sum(2)
        groups.append([int(worth.sum(1).argmax())])
        heads.append([2 * groups[-1][0], 2 * groups[-1][0] + 1])
    neurons = [sorted(down[i].topk(36).indices.tolist()) for i in layers]
    want = sliced(tensors(big), layers, sorted(sums.topk(20).indices.tolist()), neurons, heads, groups)
    if scaled:
        for n, t in want.items():
            if n.endswith("norm.weight"):
                want[n] = t * math.sqrt(32 / 20)
            elif n.endswith("o_proj.weight"):
                want[n] = t * math.sqrt(4 / 2)
            elif n.endswith("down_proj.weight"):
                want[n] = t * math.sqrt(48 / 36)
    same(tmp_path / "out", want)
    opens(name, tmp_path / "out")


def test_scaled_outputs_keep_their_standard_deviation(saved):
    """Of inputs that do not correlate and are of one size, which is what the factor is made for."""
    net, gen = Network.open(saved("llama")), torch.Generator().manual_seed(0)
    factor = resize.scales(net, {**resize.sizes_of(net), "neurons": 12})["model.layers.1.mlp.down_proj.weight"]
    w, x = tensors(saved("llama"))["model.layers.1.mlp.down_proj.weight"], torch.randn(2000, 48, generator=gen)
    ratios = []
    for _ in range(40):
        stay = torch.randperm(48, generator=gen)[:12]
        ratios.append(float((x[:, stay] @ (factor * w[:, stay]).T).std() / (x @ w.T).std()))
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.03)


def test_any_score_ranks_what_stays(saved, ready, tmp_path, capsys):
    big = saved("llama")
    assert trim(capsys, big, "subclone(neurons=20) | magnitude", tmp_path / "out", ready("llama"))[0] == 0
    for i in range(5):
        down = tensors(big)[f"model.layers.{i}.mlp.down_proj.weight"]
        stay = down.abs().sum(0).topk(20).indices.sort().values
        assert torch.equal(tensors(tmp_path / "out")[f"model.layers.{i}.mlp.down_proj.weight"], down[:, stay])


# ---- families ---------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["select", "subclone"])
@pytest.mark.parametrize("name, sizes, changes", [
    ("mistral", "layers=3,width=16,neurons=24,kv_heads=1", {
        "hidden_size": 16, "num_key_value_heads": 1, "num_attention_heads": 2, "head_dim": 8}),
    ("qwen2", "layers=3,width=16,neurons=24,kv_heads=1", {"hidden_size": 16, "num_key_value_heads": 1, "num_attention_heads": 2}),
    ("qwen3", "layers=3,width=16,neurons=24,heads=2", {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 16}),
    ("gemma2", "layers=3,neurons=24,heads=2", {"num_attention_heads": 2, "head_dim": 16, "layer_types": ["sliding_attention"] * 3}),
    ("phi3", "layers=3,neurons=24,kv_heads=1", {"num_key_value_heads": 1, "num_attention_heads": 2, "head_dim": 8}),
    ("opt", "layers=3,neurons=24", {"ffn_dim": 24}), ("gpt2", "layers=3,neurons=24", {"n_inner": 24, "n_layer": 3}),
    ("gpt_neox", "layers=3,neurons=24", {}), ("bert", "layers=3,neurons=24", {}), ("vit", "layers=3,neurons=24", {}),
    ("mixtral", "layers=3,experts=24", {}), ("qwen2_moe", "neurons=24,experts=8,shared=12", {
        "num_hidden_layers": 5, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}),
])
def test_every_family_opens(saved, ready, recipe, name, sizes, changes, tmp_path, capsys):
    more = {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]} if name == "gemma2" else {}
    big, calib = saved(name, **more), ready(name)
    code, _, err = trim(capsys, big, f"{recipe}({sizes})", tmp_path / "spelled", calib)
    assert code == 0, err
    opens(name, tmp_path / "spelled")
    assert 0 < of_blocks(tmp_path / "spelled") < of_blocks(big)
    sized = {"num_hidden_layers": 3, "intermediate_size": 24} if name not in ("opt", "gpt2") else {"num_hidden_layers": 3}
    target = config(big, tmp_path / "target", **{**(sized if name != "gpt2" else {}), **changes})
    code, _, err = trim(capsys, big, f"{recipe}(config={target})", tmp_path / "config", calib)
    assert code == 0, err
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "spelled" / file).read_bytes() == (tmp_path / "config" / file).read_bytes()


# ---- on the line ------------------------------------------------------------------------------
def test_with_other_passes_resumed_and_packed(saved, tiny_lm, calib, tmp_path, capsys, monkeypatch):
    recipe = "layer(keep=0.7) | block_influence ; subclone(width=16,neurons=48,heads=2) | activation ; int(bits=8,group=0) | rtn"
    assert trim(capsys, tiny_lm, recipe, tmp_path / "whole", calib)[0] == 0
    from trimtab.core import line

    real, calls = line.Journal.write_block, []

    def dies(self, *a):
        calls.append(a)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        real(self, *a)

    monkeypatch.setattr(line.Journal, "write_block", dies)
    assert [trim(capsys, tiny_lm, recipe, tmp_path / "part", calib, "--resume")[0] for _ in range(3)] == [1, 1, 0]
    for f in ("model.safetensors", "config.json", "trimtab.safetensors"):
        assert (tmp_path / "whole" / f).read_bytes() == (tmp_path / "part" / f).read_bytes(), f
    code, _, err = trim(capsys, tiny_lm, recipe, tmp_path / "packed", calib, "--pack")
    assert code == 0, err
    assert [s.shape for s in Network.open(tmp_path / "packed").sites_of(0)][-1] == (16, 48)
    assert cli.main(["trim", str(tiny_lm), recipe, "-o", str(tmp_path / "dry"), "--calib", calib, "--text", calib, *FAST, "--dry-run"]) == 0
    assert not (tmp_path / "dry").exists()


# ---- bad input --------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe, options, line", [
    ("select", (), "say what is to come of it"), ("subclone(width=16,config=x)", (), "config and width both say"),
    ("select(neurons=49)", (), "neurons=49, and "), ("select(neurons=-1)", (), "a smaller network has 1 to 48"),
    ("select(layers=6)", (), "a smaller network has 1 to 5"), ("select(experts=8)", (), "has no experts; its sizes are"),
    ("select(heads=3)", (), "3 heads with 2 of keys and values"), ("select(kv_heads=1,heads=4)", (), "take 1 to 2 times as many heads"),
    ("select(width=31)", (), "refuses these sizes: "), ("select(layers=5)", (), "has these sizes already"),
    ("mlp: select(neurons=8)", (), "leave the scope out"), ("select(neurons=8)", ("--keep", "0.5"), "fixes its own share"),
    ("select(neurons=8,keep=0.5)", (), "leave keep out"), ("select(neurons=8) | wanda", (), "both decide score"),
    ("subclone(neurons=8) | influence", (), "says what a sublayer is worth"),
    ("subclone(neurons=8) | wanda | mask | least_squares", (), "leaves none"),
    ("wanda ; select(neurons=8)", (), "put it in front of"), ("select(config=5)", (), "should be of type str"),
])
def test_sizes_that_cannot_be(saved, ready, recipe, options, line, tmp_path, capsys):
    calib = ready("llama")
    big = saved("llama")
    capsys.readouterr()
    code, _, err = trim(capsys, big, recipe, tmp_path / "out", calib, *options)
    assert code == 2 and line in err and len(err.strip().splitlines()) == 1, err
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("changes, line", [
    ({"hidden_size": 64, "head_dim": 8}, "width=64, and "), ({"num_hidden_layers": 6}, "a smaller network has 1 to 5"),
    ({"model_type": "qwen2"}, "model_type is 'qwen2'"), ({"model_type": None}, "model_type is None"),
    ({"head_dim": 4}, "a head would be 4 wide"), ({"hidden_size": 16}, "a head would be 4 wide"),
    ({"vocab_size": 79}, "vocab_size is 79, and 80 in"), ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ({"rms_norm_eps": 1e-5}, "all but sizes has to be the same"), ({}, "and nothing would become smaller"),
    ({"hidden_size": 18, "num_attention_heads": 4}, "describes no llama: "), ({"intermediate_size": "many"}, "describes no llama: "),
    ({"intermediate_size": 0, "num_hidden_layers": 2}, "intermediate_size is 0; it is 1 to 48"),
    ({"num_key_value_heads": 1}, "4 heads with 1 of keys and values"),
    ({"per_layer_config": {"0": {"intermediate_size": 8}}}, "its layers differ"),
])
def test_configs_that_will_not_do(saved, ready, changes, line, tmp_path, capsys):
    big, calib = saved("llama"), ready("llama")
    target = config(big, tmp_path / "target", **changes)
    before = sorted(p.name for p in tmp_path.iterdir())
    code, _, err = trim(capsys, big, f"select(config={target})", tmp_path / "out", calib)
    assert code == 2 and line in err and len(err.strip().splitlines()) == 1, err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("text, line", [(None, "there is no "), ("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_files_that_are_none(saved, ready, text, line, tmp_path, capsys):
    big, calib = saved("llama"), ready("llama")
    file = tmp_path / "small.json"
    if text:
        file.write_text(text)
    code, _, err = trim(capsys, big, f"select(config={file})", tmp_path / "out", calib)
    assert code == 2 and line in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, sizes, line", [
    ("gpt2", "width=16", "it keeps its width of 32"), ("gpt2", "heads=2", "it keeps its 4"),
    ("gemma2", "width=16", "it keeps its width of 32"),
    ("llama_classifier", "width=16", "it keeps its width of 32"), ("mixtral", "neurons=8", "has no neurons; its sizes are"),
])
def test_families_that_cannot(saved, ready, name, sizes, line, tmp_path, capsys):
    more = {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]} if name == "gemma2" else {}
    big, calib = saved(name, **more), ready(name)
    capsys.readouterr()
    code, _, err = trim(capsys, big, f"select({sizes})", tmp_path / "out", calib)
    assert code == 2 and line in err and len(err.strip().splitlines()) == 1, err


def test_a_network_whose_layers_differ_is_refused(saved, ready, tmp_path, capsys):
    calib = ready("llama")
    assert trim(capsys, saved("llama"), "mlp: neuron(multiple=8) | wanda | global", tmp_path / "uneven", calib, "--keep", "0.6")[0] == 0
    code, _, err = trim(capsys, tmp_path / "uneven", "select(layers=2)", tmp_path / "out", calib)
    assert code == 2 and "differ; take a network whose layers are alike" in err
