"""Weights that several places of a network share: what is stored once, who takes whose, and what is refused."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import tiny
from trimtab import cli
from trimtab.core.types import BadInput
from trimtab.network.checkpoint import Checkpoint
from trimtab.network.stream import load_module
from trimtab.prove.size import sizes
from trimtab.runtime import layouts, packed

FAST = ["--no-speed", "--samples", "2", "--proof-tokens", "64", "--seq-len", "16", "-q"]


pytestmark = pytest.mark.usefixtures("proof_in_this_process")


def trim(capsys, model: Path, recipe: str, out: Path, text: str, *more: object) -> tuple[int, dict, str]:
    code = cli.main(["trim", str(model), recipe, "-o", str(out), "--calib", text, "--text", text, *FAST, "--json", *map(str, more)])
    said = capsys.readouterr()
    return code, json.loads(said.out) if code == 0 else {}, said.err


def tensors(path: Path) -> dict[str, Tensor]:
    return {k: v for f in path.glob("model*.safetensors") for k, v in load_file(f).items()}


def tied(path: Path, *pairs: tuple[int, int], name: str = "llama", **how) -> Path:
    """A model in which blocks have the linear weights of others."""
    model = tiny.build(name, **how)
    for j, i in pairs:
        own, other = (dict(model.model.layers[k].named_parameters()) for k in (j, i))
        for n, p in own.items():
            if "proj.weight" in n:
                p.data.copy_(other[n])
    model.save_pretrained(path)
    return path


# ---- storage ----------------------------------------------------------------------------------
def test_what_is_equal_is_stored_and_mapped_once(capsys, tmp_path, ready):
    model = tied(tmp_path / "m", (2, 0), num_hidden_layers=3)
    code, result, err = trim(capsys, model, "dense", tmp_path / "o", ready("llama"), "--pack")
    assert code == 0, err
    untied = tiny.save("llama", tmp_path / "n", num_hidden_layers=3)
    code, other, err = trim(capsys, untied, "dense", tmp_path / "p", ready("llama"), "--pack")
    assert code == 0, err
    c, m = Checkpoint.open(tmp_path / "o"), packed.open(tmp_path / "o", verify=True)
    own = tensors(model)
    assert not any(n.startswith("model.layers.2.") and ".packed_" in n for n in c.stored)
    for name, p in m.linears.items():
        assert torch.equal(layouts.restored(p), own[f"{name}.weight"])
        if name.startswith("model.layers.2."):
            first = m.linears[name.replace("layers.2", "layers.0")]
            assert all(t.data_ptr() == first.buffers[k].data_ptr() for k, t in p.buffers.items())
    notes = json.loads((tmp_path / "o" / "trimtab.json").read_text())
    per_block = [sum(n for k, n in notes["packed_bytes"].items() if f"layers.{i}." in k) for i in range(3)]
    assert per_block[0] == per_block[1] > 0 == per_block[2]
    gone = sum(w.numel() for n, w in own.items() if n.startswith("model.layers.2.") and w.dim() == 2)
    assert sizes(Checkpoint.open(tmp_path / "p"))["params"] - sizes(c)["params"] == gone
    assert other["after"]["params"] - result["after"]["params"] == gone
    assert other["after"]["bytes"] - result["after"]["bytes"] > 4 * gone
    x = tiny.inputs("llama")
    with torch.no_grad():
        want = load_module(model)(**x).logits
        torch.testing.assert_close(load_module(tmp_path / "o")(**x).logits, want, atol=1e-4, rtol=1e-4)


def test_a_description_that_names_no_stored_buffer_is_refused(capsys, tmp_path, ready):
    model = tied(tmp_path / "m", (1, 0))
    assert trim(capsys, model, "dense", tmp_path / "o", ready("llama"), "--pack")[0] == 0
    said = json.loads((tmp_path / "o" / "config.json").read_text())
    shared = said["quantization_config"]["shared"]
    one, two = list(shared)[:2]
    assert len(shared) == 7 and one.startswith("model.layers.1.")
    for k, wrong in enumerate(({one: one}, {one: two, two: one}, {one: "model.layers.9.packed_values"}, {one: "model.norm.weight"},
                               {shared[one]: shared[two]}, {"lm_head.weight": shared[one]}, {one: 3}, [], 7, "x")):
        out = tmp_path / str(k)
        shutil.copytree(tmp_path / "o", out)
        about = {**said["quantization_config"], "shared": {**shared, **wrong} if isinstance(wrong, dict) else wrong}
        (out / "config.json").write_text(json.dumps({**said, "quantization_config": about}))
        for reads in (Checkpoint.open, packed.open, load_module):
            with pytest.raises(BadInput, match="fetch") as e:
                reads(out)
            assert len(str(e.value).splitlines()) == 1


# ---- who takes whose --------------------------------------------------------------------------
def took(path: Path) -> dict[str, str]:
    return json.loads((path / "trimtab.json").read_text())["shared"]["took"]


def blocks_of(plan: dict[str, str]) -> dict[int, int]:
    found = {(int(a.split(".")[0]), int(b.split(".")[0])) for a, b in plan.items()}
    assert len(dict(found)) == len(found)  # a block takes all of one
    return dict(found)


def test_blocks_that_are_alike_are_found_and_nothing_changes(capsys, tmp_path, ready):
    """The cheapest pairs are those that have the same weights already."""
    model = tied(tmp_path / "m", (1, 0), (4, 2), num_hidden_layers=5)
    for k, (recipe, want) in enumerate((("tie(near=false)", [{0, 1}, {2, 4}]), ("tie(near=false,tried=false)", [{0, 1}, {2, 4}]),
                                        ("tie(keep=0.8)", [{0, 1}]))):
        code, result, err = trim(capsys, model, recipe, tmp_path / str(k), ready("llama"), *(["--keep", "0.6"] if k < 2 else []))
        assert code == 0, err
        assert sorted(map(sorted, blocks_of(took(tmp_path / str(k))).items())) == sorted(map(sorted, want))
        assert result["shared"]["gone"] == pytest.approx(len(want) / 5) and result["recovery"] == pytest.approx(1)
        assert all(torch.equal(w, tensors(tmp_path / str(k))[n]) for n, w in tensors(model).items())


def test_every_block_has_the_weights_that_the_plan_says(capsys, tmp_path, ready):
    model, text = tiny.save("phi3", tmp_path / "m", num_hidden_layers=5), ready("phi3")
    code, result, err = trim(capsys, model, "tie", tmp_path / "o", text, "--keep", "0.3")
    assert code == 0, err
    plan, before, after = blocks_of(took(tmp_path / "o")), tensors(model), tensors(tmp_path / "o")
    assert len(plan) == 4 and set(plan.values()) == {next(iter(plan.values()))}
    for n, w in after.items():
        at = n.split(".")
        i = int(at[2]) if at[1] == "layers" else None
        donor = plan.get(i, i) if n.endswith("proj.weight") else i
        assert torch.equal(w, before[n if i is None else ".".join([*at[:2], str(donor), *at[3:]])]), n
    code, packed_, err = trim(capsys, model, "tie", tmp_path / "p", text, "--keep", "0.3", "--pack")
    assert code == 0 and took(tmp_path / "p") == took(tmp_path / "o"), err
    assert packed_["recovery"] == pytest.approx(result["recovery"], rel=1e-4)
    assert any("stored once" in w and "no time is saved" in w for w in packed_["warnings"])
    of_layer = {n: p for n, p in packed.open(tmp_path / "p", verify=True).linears.items() if n.startswith("model.layers")}
    assert len({p.buffers["values"].data_ptr() for p in of_layer.values()}) == len(of_layer) / 5
    # once more: what is shared stays so
    code, again, err = trim(capsys, tmp_path / "o", "dense", tmp_path / "q", text, "--pack")
    assert code == 0 and again["after"]["bytes"] <= packed_["after"]["bytes"], err


def test_the_plan_follows_each_score_and_each_neighbour(capsys, tmp_path, ready):
    model, text = tiny.save("llama", tmp_path / "m", num_hidden_layers=5), ready("llama")
    assert trim(capsys, model, "shallow | tie(tried=false)", tmp_path / "a", text, "--keep", "0.6")[0] == 0
    assert blocks_of(took(tmp_path / "a")) == {3: 2, 4: 2}  # the deepest go, and take the weights beside them
    assert trim(capsys, model, "attn: shallow | adapt(rank=3,tried=true)", tmp_path / "b", text, "--keep", "0.9")[0] == 0
    assert set(blocks_of(took(tmp_path / "b"))) == {4} and all(".attn." in n for n in took(tmp_path / "b"))
    for recipe, keep, want in (("tie", 0.1, "less than the 20% that is left"), ("flexigpt(rank=99)", 0.5, "no smaller than"),
                               ("direct", 0.5, "scope it to"), ("rtn ; tie", 0.5, "its grid"), ("wanda ; tie", 0.5, "put it first"),
                               ("directshare", 0.1, "less than the 20%")):
        code, _, err = trim(capsys, model, recipe, tmp_path / "no", text, *(["--keep", keep]))
        assert code == 2 and want in err and err.count("\n") == 1 and not (tmp_path / "no").exists(), (recipe, err)


def test_a_replaced_block_is_the_other_one_with_its_own_beside_it(capsys, tmp_path, ready):
    model, text = tiny.save("llama", tmp_path / "m", num_hidden_layers=4), ready("llama")
    code, plain, err = trim(capsys, model, "flexigpt(rank=3)", tmp_path / "o", text, "--keep", "0.8")
    assert code == 0, err
    code, small, err = trim(capsys, model, "flexigpt(rank=3)", tmp_path / "p", text, "--keep", "0.8", "--pack")
    assert code == 0 and took(tmp_path / "o") == took(tmp_path / "p"), err
    assert small["recovery"] == pytest.approx(plain["recovery"], rel=1e-4)
    m, before, after = packed.open(tmp_path / "p", verify=True), tensors(model), tensors(tmp_path / "o")
    sites, own = 4 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48), 0
    for j, i in blocks_of(took(tmp_path / "p")).items():
        for name in (n for n in m.linears if n.startswith(f"model.layers.{j}.")):
            its, other = m.linears[name], m.linears[name.replace(f"layers.{j}.", f"layers.{i}.")]
            assert its.format == "based" and its.factors[0].format == "sum"
            shared, factors = its.factors[0].factors
            assert shared.buffers["values"].data_ptr() == other.buffers["values"].data_ptr() and factors.format == "lowrank"
            torch.testing.assert_close(layouts.restored(its), after[f"{name}.weight"], atol=1e-5, rtol=1e-4)
            off = [w - before[f"{name}.weight"] for w in (after[f"{name}.weight"], layouts.restored(other))]
            assert off[0].norm() < off[1].norm()
            own += 3 * sum(its.shape) + its.shape[0]
    gone = len(blocks_of(took(tmp_path / "p"))) / 4 - own / sites
    assert plain["shared"]["gone"] == pytest.approx(gone, abs=1e-6) and gone > 0.2 - 1e-9
    assert small["after"]["bytes"] < sum(f.stat().st_size for f in model.glob("*.safetensors")) + 8e4


def test_heads_have_the_rows_that_the_plan_says(capsys, tmp_path, ready):
    """Two query heads read a key; pieces of rows are stored once."""
    model, text = tiny.save("llama_tied", tmp_path / "m", num_hidden_layers=3, head_dim=32), ready("llama_tied")
    assert trim(capsys, model, "directshare", tmp_path / "o", text, "--keep", "0.7")[0] == 0
    assert trim(capsys, model, "directshare", tmp_path / "p", text, "--keep", "0.7", "--pack")[0] == 0
    before, after, plan = tensors(model), tensors(tmp_path / "o"), took(tmp_path / "o")

    def rows(of: dict[str, Tensor], place: str) -> Tensor:
        site, _, head = place.partition("/")
        i, _, role = site.split(".")
        n = {"q": 64}.get(role, 32)
        return of[f"model.layers.{i}.self_attn.{role}_proj.weight"][int(head) * n:(int(head) + 1) * n]

    def like(j: int, h: int, i: int, g: int, roles: str) -> float:
        a, b = (torch.cat([rows(before, f"{k}.attn.{r}/{x}").flatten() for r in roles]) for k, x in ((j, h), (i, g)))
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    # by hand: the best match of each head in an earlier block, and the most alike of them
    best = []
    for roles in ("qk", "v"):
        for j in (1, 2):
            for h in (0, 1):
                c, i, g = max((like(j, h, i, g, roles), i, g) for i in range(j) for g in (0, 1))
                best.append((c, roles, j, h, i, g))
    want, left = {}, 3 * (128 + 64 + 64)
    chosen = []
    for _, roles, j, h, i, g in sorted(best, reverse=True):
        if left > 0.7 * 3 * 256:
            left -= sum({"q": 64}.get(r, 32) for r in roles)
            chosen.append((roles, j, h, i, g))
    root = {(r, j, h): (i, g) for r, j, h, i, g in chosen}
    for r, j, h, i, g in chosen:
        while (r, i, g) in root:
            i, g = root[r, i, g]
        want |= {f"{j}.attn.{x}/{h}": f"{i}.attn.{x}/{g}" for x in r}
    assert plan == want and len(plan) > 2
    places = [f"{i}.attn.{r}/{h}" for i in range(3) for r in "qkv" for h in (0, 1)]
    for place in places:
        assert torch.equal(rows(after, place), rows(before, plan.get(place, place))), place
    m, shared = packed.open(tmp_path / "p", verify=True), 0
    for name, p in m.linears.items():
        if f"{name}.weight" in after:
            assert torch.equal(layouts.restored(p), after[f"{name}.weight"])
        shared += sum(Checkpoint.open(tmp_path / "p").place(name, k) != f"{name}.packed_{k}" for k in p.buffers)
    assert shared == len(plan)
    notes = json.loads((tmp_path / "p" / "trimtab.json").read_text())
    assert notes["shared_bytes"] == 4 * 32 * sum({"q": 64}.get(p[7], 32) for p in plan)


@pytest.mark.parametrize("recipe", ["tie(tried=false)", "flexigpt(rank=2,tried=true)", "*.q,*.k,*.v: direct"])
def test_a_stopped_run_goes_on_to_the_same_bytes(capsys, tmp_path, ready, recipe, monkeypatch):
    from trimtab.core import journal

    model, text, write = tiny.save("llama", tmp_path / "m", num_hidden_layers=4), ready("llama"), journal.write_tensors
    assert trim(capsys, model, recipe, tmp_path / "whole", text, "--keep", "0.6", "--pack")[0] == 0
    count = []

    def stops(*args) -> None:
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(journal, "write_tensors", stops)
    assert trim(capsys, model, recipe, tmp_path / "o", text, "--keep", "0.6", "--pack")[0] == 1
    assert json.loads((tmp_path / "o.partial" / "plan.json").read_text())["shares"]["0"]
    monkeypatch.setattr(journal, "write_tensors", write)
    assert trim(capsys, model, recipe, tmp_path / "o", text, "--keep", "0.6", "--pack", "--resume")[0] == 0
    for f in (tmp_path / "whole").glob("*.safetensors"):
        assert f.read_bytes() == (tmp_path / "o" / f.name).read_bytes()


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "qwen3_moe", "gpt_neox", "opt"])
def test_other_families_share_too(capsys, tmp_path, ready, name):
    layers = {"n_layer": 3} if name == "gpt2" else {"num_hidden_layers": 3}
    model, text = tiny.save(name, tmp_path / "m", **layers), ready(name)
    for k, recipe in enumerate(("flexigpt(rank=2)", "directshare")):
        code, result, err = trim(capsys, model, recipe, tmp_path / str(k), text, "--keep", "0.8", *(["--pack"] if name != "gpt2" else []))
        assert code == 0 and result["shared"]["gone"] > 0, (recipe, err)


# ---- one table --------------------------------------------------------------------------------
def test_a_head_that_is_nearly_the_table_becomes_it(capsys, tmp_path, ready):
    """A head that is the table times a factor a channel, and something that all words have: nothing changes but for that."""
    model, text = tiny.build("llama", seed=3), ready("llama")
    d = torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.5
    model.lm_head.weight.data = model.model.embed_tokens.weight.data * d + 0.1 * torch.randn(32)
    model.save_pretrained(tmp_path / "m")
    code, result, err = trim(capsys, tmp_path / "m", "table(damp=0.0000001)", tmp_path / "o", text, "--min-recovery", "0.99")
    assert code == 0, err
    before, after = tensors(tmp_path / "m"), tensors(tmp_path / "o")
    assert before.keys() - after.keys() == {"lm_head.weight"}
    assert json.loads((tmp_path / "o" / "config.json").read_text())["tie_word_embeddings"] is True
    torch.testing.assert_close(after.pop("model.norm.weight"), before["model.norm.weight"] * d, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(w, before[n]) for n, w in after.items())
    assert result["kl"] < 1e-5 and result["after"]["params"] == result["before"]["params"] - 80 * 32
    x = tiny.inputs("llama")
    with torch.no_grad():
        logits = [load_module(tmp_path / n)(**x).logits.log_softmax(-1)[:2] for n in "mo"]
    torch.testing.assert_close(logits[1], logits[0], atol=2e-3, rtol=1e-3)
    code, packed_, err = trim(capsys, tmp_path / "m", "tie_embeddings ; tie(keep=0.5)", tmp_path / "p", text, "--pack")
    assert code == 0 and packed_["structure"] == [{"tied": True}] and packed_["shared"]["gone"] == 0.5, err


def test_who_has_one_table_already_or_no_such_stream_is_told(capsys, tmp_path, ready):
    for name, want in (("llama_tied", "as it is; leave it out"), ("gpt2", "it takes language models"), ("bert", "takes language models")):
        model = tiny.save(name, tmp_path / name)
        capsys.readouterr()
        code, _, err = trim(capsys, model, "tie_embeddings", tmp_path / "o", ready(name))
        assert code == 2 and want in err and err.count("\n") == 1 and not (tmp_path / "o").exists()
