"""Gates on the line: what plain files are measured with is what packed layers and the decoder do; bad input is told in one line."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests import tiny
from trimtab import cli
from trimtab.core.types import BadInput
from trimtab.methods.gates import Gate
from trimtab.network.checkpoint import PARTS, SafeFile, write_safetensors
from trimtab.network.stream import Network
from trimtab.prove import quality
from trimtab.runtime import native, packed
from trimtab.runtime.decoder import open_decoder

FAST = ["--samples", "4", "--seq-len", "32", "--proof-tokens", "64", "--no-speed", "-q"]
RECIPES = [
    "gate_magnitude(keep=0.5)",
    "gate_magnitude(keep=0.4,exact=true)",
    "wina(keep=0.5)",
    "cats(keep=0.4)",
    "chess(keep=0.5)",
    "nm(n=2,m=4) | magnitude ; gate_magnitude(keep=0.6)",
    "int(bits=8,group=0) | rtn ; gate_magnitude(keep=0.5)",
    "row | magnitude(keep=0.5) ; *.up,*.gate,*.down: wina(keep=0.5,exact=false)",
    "dejavu(keep=0.5)",
    "dejavu(keep=0.4,exact=true,rank=0)",
    "*.o: gate/heads(keep=0.5)",
    "int(bits=8,group=0) | rtn ; *.o: heads(keep=0.5,rank=3) ; *.down: predictor(keep=0.5)",
    "*.q,*.k,*.v,*.gate,*.up: gate_magnitude(keep=0.8) ; *.o: heads(keep=0.5) ; *.down: predictor(keep=0.5)",
]


pytestmark = pytest.mark.usefixtures("proof_in_this_process")


@pytest.fixture(scope="module")
def wide_lm(tiny_lm, tmp_path_factory):
    """The tiny model in float32: where files hold bfloat16, what is on the edge of a threshold is not the same in both."""
    path = tmp_path_factory.mktemp("models") / "wide"
    transformers.LlamaForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((tiny_lm / name).read_bytes())
    return path


def trim(capsys, model, recipe, out, calib, *more: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in ("trim", model, recipe, "-o", out, "--calib", calib, "--text", calib, *FAST, "--json", *more)])
    return code, *capsys.readouterr()


def save_ids(path: Path) -> Path:
    save_file({"input_ids": torch.randint(5, 80, (6, 32), generator=torch.Generator().manual_seed(0))}, path)
    return path


def apart(tmp_path, ids, *dirs) -> float:
    return quality.compare(*[Network.open(d) for d in dirs], [{"input_ids": ids[None]}], None, tmp_path, None)["kl"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_plain_and_packed_gate_alike(capsys, wide_lm, tmp_path, calib, recipe):
    for name, more in (("plain", []), ("packed", ["--pack", "--head", "keep"])):
        code, _, err = trim(capsys, wide_lm, recipe, tmp_path / name, calib, *more)
        assert code == 0, err
    ids = torch.arange(5, 40)
    does = apart(tmp_path, ids, wide_lm, tmp_path / "plain")
    assert does > 2e-6  # it does something
    # Codes meet x in eight bits there; elsewhere a value on the edge may go either way.
    assert apart(tmp_path, ids, tmp_path / "plain", tmp_path / "packed") < (0.05 if "int(" in recipe else 0.002) * does + 2e-8


@pytest.mark.skipif(not native.kernels(), reason="the native kernels were not built")
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_decoder_gates_as_the_packed_layers_do(capsys, wide_lm, tmp_path, calib, recipe):
    assert trim(capsys, wide_lm, recipe, tmp_path / "packed", calib, "--pack", "--head", "keep")[0] == 0
    ids = torch.arange(5, 40)
    decoder = open_decoder(tmp_path / "packed", "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    with torch.no_grad():
        want = model(input_ids=ids[None]).logits[0]
    whole, one_by_one = decoder.logits(ids), decoder.logits(ids, chunk=1)
    for got in (whole, one_by_one):
        agree = torch.softmax(got, -1), torch.log_softmax(got, -1) - torch.log_softmax(want, -1)
        assert float((agree[0] * agree[1]).sum(-1).mean()) < 2e-3, recipe


@pytest.mark.parametrize(("family", "recipe"), [("phi3", "wina(keep=0.5)"), ("phi3", "cats(keep=0.4)"), ("phi3", "dejavu(keep=0.4)")])
def test_sites_of_one_weight_have_gates_of_their_own(capsys, tmp_path, calib, family, recipe):
    """Rows of a stored weight that score the same inputs by other columns: maps one after the other, each with its gate."""
    tiny.save(family, tmp_path / "model")
    reached = {}
    ids = save_ids(tmp_path / "ids.safetensors")
    for name, more in (("plain", []), ("packed", ["--pack", "--head", "keep"])):
        capsys.readouterr()
        args = ("trim", tmp_path / "model", recipe, "-o", tmp_path / name, "--calib", ids, "--text", ids, *FAST, "--json", *more)
        code = cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        assert code == 0, err
        reached[name] = json.loads(out)["sparsity"]
    sites, packed_sites = reached["plain"]["sites"], reached["packed"]["sites"]
    assert sites.keys() == packed_sites.keys() and reached["plain"]["target"] == reached["packed"]["target"]
    for n, its in sites.items():
        assert abs(its["reached"] - packed_sites[n]["reached"]) < 0.02, n
    seen = torch.arange(5, 40)
    assert apart(tmp_path, seen, tmp_path / "plain", tmp_path / "packed") < 1e-4


def test_what_is_exported_has_no_gates_and_says_so(capsys, wide_lm, tmp_path, calib):
    assert trim(capsys, wide_lm, "gate_magnitude(keep=0.5)", tmp_path / "out", calib)[0] == 0
    assert cli.main(["export", str(tmp_path / "out"), "--to", "gguf", "-o", str(tmp_path / "g.gguf"), "--json"]) == 0
    assert "layers have gates, which trimtab alone runs" in capsys.readouterr().out


def test_what_was_gated_is_in_columns(capsys, wide_lm, tmp_path, calib):
    assert trim(capsys, wide_lm, "mlp: gate_magnitude(keep=0.5)", tmp_path / "out", calib, "--pack")[0] == 0
    formats = {name.rpartition(".")[2]: p for name, p in packed.open(tmp_path / "out").linears.items()}
    assert formats["up_proj"].format == formats["down_proj"].format == "columns" and "gate_threshold" in formats["up_proj"].buffers
    assert formats["q_proj"].format == "dense" and "gate_threshold" not in formats["q_proj"].buffers


@pytest.mark.parametrize(("recipe", "word"), [
    ("attn: gated | cats", "ends in"),
    ("gate_magnitude ; wina", "keep one of them"),
    ("gate_magnitude ; int(bits=4,group=32) | rtn", "put it behind"),
    ("magnitude | gate_magnitude", "in a pass of its own"),
])
def test_a_gate_that_does_not_fit_is_told_in_one_line(capsys, tiny_lm, tmp_path, calib, recipe, word):
    code, _, err = trim(capsys, tiny_lm, recipe, tmp_path / "out", calib, "--keep", "0.5")
    assert code == 2 and word in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_checkpoint_without_its_thresholds_is_told_in_one_line(capsys, wide_lm, tmp_path, calib):
    assert trim(capsys, wide_lm, "gate_magnitude(keep=0.5)", tmp_path / "out", calib)[0] == 0
    file = tmp_path / "out" / PARTS
    f = SafeFile(file)
    kept = {n: f.read(n) for n in f.names if not n.endswith("gate_threshold")}
    file.unlink()
    write_safetensors(file, {n: (t.dtype, tuple(t.shape)) for n, t in kept.items()}, kept.__getitem__, {})
    with pytest.raises(BadInput, match="has 1 of its 2 parts; trim the model again"):
        apart(tmp_path, torch.arange(5, 40), wide_lm, tmp_path / "out")


def test_a_family_without_a_gate_has_no_hidden_one(capsys, tmp_path, calib):
    tiny.save("gpt2", tmp_path / "gpt2")
    capsys.readouterr()
    code, _, err = trim(capsys, tmp_path / "gpt2", "*.down: gated | cats", tmp_path / "out", calib, "--keep", "0.5")
    assert code == 2 and "use gate_magnitude" in err and err.count("\n") == 1


@pytest.mark.parametrize(("recipe", "gate", "whom"), [
    ("*.down: gate/polar(batch=4)", "gate/polar(batch=4)", "step"),
    ("polar(batch=4)", "gate/polar(batch=4)", "step"),
    ("coreinfer(prompt=8)", "gate/core(prompt=8)", "sentence"),
    ("coreinfer_similar(prompt=8,clusters=2)", "gate/core_similar(clusters=2,prompt=8)", "sentence"),
])
def test_a_gate_that_is_not_packed_is_told_before_anything_is_written(capsys, tiny_lm, tmp_path, calib, recipe, gate, whom):
    code, _, err = trim(capsys, tiny_lm, recipe, tmp_path / "out", calib, "--keep", "0.5", "--pack")
    assert code == 2 and not (tmp_path / "out").exists()
    assert err == (f"trimtab: 0.mlp.down: {gate} decides for a whole {whom}, which runs on plain files alone; what is packed is gated "
                   "token by token: leave --pack out, or take gate_magnitude, wina, cats, chess, dejavu, or for heads *.o: gate/heads\n")


@pytest.mark.parametrize("gate", ["*.down: predictor", "*.o: gate/heads", "*.q,*.k,*.v: gate_magnitude", "*.o: wina"])
def test_what_a_shared_rotation_turns_under_a_gate_is_not_packed(capsys, tiny_lm, tmp_path, calib, gate):
    recipe = f"quarot | int(bits=8,group=0) | rtn ; {gate}(keep=0.5)"
    code, _, err = trim(capsys, tiny_lm, recipe, tmp_path / "out", calib, "--pack")
    assert code == 2 and "in another basis than the one it was made for; leave --pack out" in err and err.count("\n") == 1
    assert trim(capsys, tiny_lm, "quarot | int(bits=8,group=0) | rtn ; *.down: gate_magnitude(keep=0.5)", tmp_path / "out", calib, "--pack",
                "--dry-run")[0] == 0


ROUTED = "*.o: heads(keep=0.5) ; *.down: predictor(keep=0.4)"


def test_what_routers_reach_packed_is_what_they_reach_on_plain_files(capsys, wide_lm, tmp_path, calib):
    reached, sizes = {}, {}
    for name, more in (("plain", []), ("packed", ["--pack", "--head", "keep"])):
        code, out, err = trim(capsys, wide_lm, ROUTED, tmp_path / name, calib, *more)
        assert code == 0, err
        reached[name] = json.loads(out)["sparsity"]
    assert reached["plain"] == reached["packed"] and 0.3 < reached["plain"]["reached"] < 0.7
    model = packed.open(tmp_path / "packed", verify=True)
    parts = SafeFile(tmp_path / "plain" / PARTS)
    for i, leaf, site in ((0, "self_attn.o_proj", "attn.o"), (1, "mlp.down_proj", "mlp.down")):
        p = model.linears[f"model.layers.{i}.{leaf}"]
        mine = {n.rpartition(":")[2]: parts.read(n) for n in parts.names if n.startswith(f"{i}.{site}:")}
        assert p.format == "columns" and Gate.among(p.buffers).same(Gate.among(mine))
        sizes[site] = p.nbytes
        assert p.nbytes > p.buffers["values"].nbytes + p.buffers["gate_second"].nbytes


@pytest.mark.parametrize("family", ["opt", "phi3", "qwen2", "gemma2", "gpt_neox", "bert"])
def test_transformers_runs_routers_wherever_their_sublayers_begin(capsys, tmp_path, family):
    """Sublayers without a module of their own, stacked maps, blocks whose norms lie elsewhere."""
    tiny.save(family, tmp_path / "model")
    inputs = tiny.inputs(family, rows=6, length=32)
    save_file(inputs, tmp_path / "seen.safetensors")
    capsys.readouterr()
    for name, more in (("plain", []), ("packed", ["--pack"])):
        args = ("trim", tmp_path / "model", ROUTED, "-o", tmp_path / name, "--calib", tmp_path / "seen.safetensors", "--text",
                tmp_path / "seen.safetensors", *FAST, "--json", *more)
        code = cli.main([str(a) for a in args])
        assert code == 0, capsys.readouterr().err

    def by_blocks(path: Path) -> torch.Tensor:
        net = Network.open(path)
        with torch.no_grad():
            hidden, context = net.embed(inputs)
            for i in range(net.n_blocks):
                module = net.block(i)
                net.as_packed(module, i)
                net.as_said(module, i, net.said(i))
                hidden = net.run(module, i, hidden, context)
            return net.finish(hidden, context, inputs)

    auto = transformers.AutoModel if family == "bert" else transformers.AutoModelForCausalLM
    with torch.no_grad():
        whole = auto.from_pretrained(tmp_path / "packed", dtype=torch.float32)(**inputs)[0]
    plain, its = by_blocks(tmp_path / "plain"), by_blocks(tmp_path / "packed")
    size = plain.abs().max()
    assert float((by_blocks(tmp_path / "model") - plain).abs().max() / size) > 1e-3
    for got in (its, whole):
        assert float((got - plain).abs().max() / size) < 1e-4


def test_a_damaged_router_is_told_when_the_directory_is_opened(capsys, wide_lm, tmp_path, calib):
    assert trim(capsys, wide_lm, "dejavu(keep=0.5)", tmp_path / "out", calib, "--pack")[0] == 0
    file = tmp_path / "out" / "model.safetensors"
    name = "model.layers.0.mlp.down_proj.packed_gate_second"
    f = SafeFile(file)
    kept = {n: f.read(n) for n in f.names}
    for t, why in ((None, "a gate has 3 of its 4 parts"), (kept[name][1:].clone(), "the router of its gate makes")):
        changed = {n: v for n, v in {**kept, name: t}.items() if v is not None}
        file.unlink()
        write_safetensors(file, {n: (v.dtype, tuple(v.shape)) for n, v in changed.items()}, changed.__getitem__, f.metadata)
        with pytest.raises(BadInput, match=f"packed layer model.layers.0.mlp.down_proj is corrupt: .*{why}") as e:
            packed.open(tmp_path / "out")
        assert "\n" not in str(e.value)
