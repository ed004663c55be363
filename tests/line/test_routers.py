"""Gates that are no threshold on an input: what the network is measured with is what their parts say."""
from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from trimtab import cli
from trimtab.core.types import BadInput
from trimtab.methods.terms import of_site
from trimtab.network.checkpoint import PARTS, SafeFile, write_safetensors
from trimtab.network.stream import Network, load_module

FAST = ["--samples", "16", "--seq-len", "32", "--proof-tokens", "64", "--no-speed", "-q"]


pytestmark = pytest.mark.usefixtures("proof_in_this_process")


@pytest.fixture(scope="module", params=["llama", "opt", "phi3", "gpt2"])
def model(request, tmp_path_factory):
    """A gated MLP with grouped heads; ReLU; several maps in one tensor; weights stored transposed."""
    at = tmp_path_factory.mktemp("models")
    save_file(tiny.inputs(request.param, rows=16, length=32), at / "seen.safetensors")
    return tiny.save(request.param, at / "model"), at / "seen.safetensors"


def trim(capsys, model, recipe, out, seen, *more: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in ("trim", model, recipe, "-o", out, "--calib", seen, "--text", seen, *FAST, "--json", *more)])
    return code, *capsys.readouterr()


def logits(path, ids) -> torch.Tensor:
    """[sequences, tokens, vocabulary], block by block with its gates."""
    net = Network.open(path)
    with torch.no_grad():
        hidden, context = net.embed({"input_ids": ids})
        for i in range(net.n_blocks):
            module = net.block(i)
            net.as_said(module, i, net.said(i))
            hidden = net.run(module, i, hidden, context)
        return net.finish(hidden, context, {"input_ids": ids})


def by_hand(path, ids, passed) -> torch.Tensor:
    """The same by transformers, what is not `passed`(gate's parts, x, h) [sequences, tokens, in] of a site's input h taken away; x is what
    its sublayer is given."""
    net, parts = Network.open(path), SafeFile(path / PARTS)
    own = {n: parts.read(n) for n in parts.names}
    whole = load_module(path)
    for i in range(net.n_blocks):
        for s in net.sites_of(i):
            its = {k.removeprefix("gate_"): t for k, t in of_site(own, s.name).items()}
            if "of" not in its:
                continue
            feeder = next(f for f in net.sites_of(i) if f.consumer == s.name or (s.role, f.role) == ("o", "q"))
            at = [whole.get_submodule(net.block_file(i, t.param).removesuffix(".weight")) for t in (feeder, s)]
            given = {}
            at[0].register_forward_pre_hook(lambda m, a, given=given: given.update(x=a[0]))

            def gated(m, a, its=its, given=given):
                x, h = (t.reshape(*ids.shape, -1) for t in (given["x"], a[0]))
                return (h * passed(its, x, h)).reshape(a[0].shape)

            at[1].register_forward_pre_hook(gated)
    with torch.no_grad():
        return whole(input_ids=ids).logits


def without(path, out, name) -> None:
    """A copy of the model whose parts lack one."""

    shutil.copytree(path, out)
    parts = SafeFile(path / PARTS)
    left = {n: parts.read(n) for n in parts.names if n != name}
    write_safetensors(out / PARTS, {n: (t.dtype, tuple(t.shape)) for n, t in left.items()}, lambda n: left[n], parts.metadata)


def predicted(its, x, h) -> torch.Tensor:
    return x @ its["first"].T @ its["second"].T > its["threshold"]


def together(its, x, h) -> torch.Tensor:
    """One set for the sequences of a step, of which the largest it was made for are two."""
    passed = []
    for some in x.split(2):
        worth = (some @ its["first"].T @ its["second"].T).relu().sum(0)
        k = int(its["counts"][len(some) - 1])
        order = worth.sort(dim=1, descending=True, stable=True).indices  # many are worth nothing
        passed.append(torch.zeros_like(worth).scatter(1, order[:, :k], 1).bool().expand(len(some), -1, -1))
    return torch.cat(passed)


def of_heads(its, x, h) -> torch.Tensor:
    scores = (x @ its["second"].T + its["bias"]).unflatten(2, (-1, int(its["pool"]) if "pool" in its else 1)).amax(3)
    return (scores >= scores.topk(int(its["count"])).values[..., -1:]).repeat_interleave(int(its["group"]), 2)


def own_core(its, x, h) -> torch.Tensor:
    """Of the first four tokens, by loops."""
    passed = torch.ones_like(h, dtype=torch.bool)
    for sentence, its_own in zip(h, passed, strict=True):
        count = [0] * h.shape[2]
        for token in sentence[:4].tolist():
            above = sorted((-v, j) for j, v in enumerate(token) if v > 0)
            for _, j in above[:-(-2 * len(above) // 5)]:
                count[j] += 1
        core = sorted(range(h.shape[2]), key=lambda j: (-count[j], j))[:int(its["count"])]
        if "centres" in its:
            own = torch.zeros(h.shape[2])
            own[core] = 1
            core = its["cores"][(its["centres"] - own).square().sum(1).argmin()].nonzero()[:, 0].tolist()
        its_own[4:] = False
        its_own[4:, core] = True
    return passed


RULES = {"*.down: core(prompt=4)": own_core, "*.down: core_similar(prompt=4,clusters=2)": own_core,
         "*.down: predictor(rank=8)": predicted, "*.down: gate/polar(rank=8,batch=2,recall=0.6)": together, "*.o&!0.*: heads": of_heads}


@pytest.mark.parametrize(("recipe", "rule"), RULES.items())
def test_the_network_is_gated_as_the_parts_say(capsys, model, tmp_path, recipe, rule):
    path, seen = model
    code, _, err = trim(capsys, path, recipe, tmp_path / "out", seen, "--keep", "0.4")
    assert code == 0, err
    ids = torch.randint(3, 80, (3, 20), generator=torch.Generator().manual_seed(1))
    got, want, dense = logits(tmp_path / "out", ids), by_hand(tmp_path / "out", ids, rule), logits(path, ids)
    assert float((got - dense).abs().max()) > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", RULES)
def test_all_of_it_is_the_network_itself(capsys, model, tmp_path, recipe):
    path, seen = model
    code, _, err = trim(capsys, path, recipe, tmp_path / "out", seen, "--keep", "1")
    assert code == 0, err
    ids = torch.randint(3, 80, (3, 20), generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(tmp_path / "out", ids), logits(path, ids))


@pytest.mark.parametrize("recipe", RULES)
def test_parts_that_are_missing_are_told(capsys, model, tmp_path, recipe):
    path, seen = model
    code, _, err = trim(capsys, path, recipe, tmp_path / "out", seen)
    assert code == 0, err
    names = [n for n in SafeFile(tmp_path / "out" / PARTS).names if n.startswith("1.")]
    assert len(names) > 2
    for k, name in enumerate(names):
        without(tmp_path / "out", tmp_path / str(k), name)
        with pytest.raises(BadInput, match=rf"^{re.escape(name.partition(':')[0])}: .*trim the model again$"):
            logits(tmp_path / str(k), torch.arange(3, 9)[None])
    assert cli.main(["eval", str(tmp_path / "0"), "--text", str(seen), "-q"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(("recipe", "words"), [
    ("predictor", r"0\.attn\.q: .*predictor is made for \*\.down"), ("attn: predictor", r"0\.attn\.q: .*\*\.down"),
    ("*.down: predictor(rank=-1)", "rank=-1 makes no router"), ("*.down: predictor(epochs=0)", "epochs=0 makes no router"),
    ("*.down: predictor(lr=0.0)", "lr=0 learns nothing"), ("*.down: predictor ; *.down: wina", "both decide which inputs"),
    ("*.down: heads", r"0\.mlp\.down: .*heads is made for \*\.o"), ("*.down: gate/polar(batch=0)", "batch=0 makes no router"),
    ("*.down: gate/polar(recall=2.0)", "recall=2 is no share"), ("!nothing: gate/polar", "unknown scope 'nothing'"),
    ("*.down: core(prompt=0)", "prompt=0 decides nothing"), ("coreinfer_similar(clusters=0)", "clusters=0 decides nothing"),
    ("*.up: core", r"up: .*core is made for \*\.down"),
])
def test_what_does_not_fit_is_told_before_anything_is_written(capsys, model, tmp_path, recipe, words):
    path, seen = model
    code, _, err = trim(capsys, path, recipe, tmp_path / "out", seen)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert re.search(words, err), err
    assert not list(tmp_path.iterdir())


def test_experts_have_no_router(capsys, tmp_path):
    save_file(tiny.inputs("mixtral", rows=4, length=32), tmp_path / "seen.safetensors")
    path = tiny.save("mixtral", tmp_path / "model")
    code, _, err = trim(capsys, path, "*.down: predictor", tmp_path / "out", tmp_path / "seen.safetensors")
    assert code == 2
    assert "an expert is none of its own" in err
