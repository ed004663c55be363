"""Two products of factors that are multiplied entry by entry: written, packed, opened again, continued and refused."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

import trimtab as tt
from tests.test_laws import THREE, env, error
from trimtab import cli
from trimtab.core.registry import get
from trimtab.core.types import BadInput
from trimtab.methods.entrywise import Entrywise, ranks_of
from trimtab.methods.factors import Factors, rank_of
from trimtab.methods.format.entrywise import entrywise
from trimtab.network.checkpoint import Checkpoint, SafeFile
from trimtab.runtime import layouts, native, packed
from trimtab.runtime.decoder import open_decoder

FAST = ["--samples", "4", "--seq-len", "32", "--proof-tokens", "64", "--no-speed", "-q", "--json"]
RECIPE = "mlp: fedpara(iters=30,keep=0.6)"


pytestmark = pytest.mark.usefixtures("proof_in_this_process")


def trim(capsys, model, recipe, out, calib, *more: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in ("trim", model, recipe, "-o", out, "--calib", calib, "--text", calib, *FAST, *more)])
    return code, *capsys.readouterr()


def hashes(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir() if p.name not in ("trimtab.json", "README.md")}


def test_it_is_nearer_than_factors_of_as_many_parameters():
    """In the weights, where inputs have nothing in common, nearer than any product of that rank can be, and in the outputs far nearer."""
    for name in THREE[:2]:  # of three columns in all there is nothing to gain
        at = env(get("edit/fedpara"), name, keep=0.7)
        alone = {**at, "gram": torch.eye(at["w"].shape[1])}
        off = [float((get(f"edit/{m}")(alone).w - at["w"]).norm()) for m in ("fedpara", "svd")]
        assert off[0] < 0.9 * off[1]
        out = [error(at["w"], get(f"edit/{m}")(at).w, at["gram"]) for m in ("fedpara", "svd")]
        assert out[0] < 0.6 * out[1]
        products = Entrywise.among(get("edit/fedpara")(at).parts)
        assert int(torch.linalg.matrix_rank(products.weight())) > products.rank


def test_plain_and_packed_are_one_model(capsys, tiny_lm, tmp_path, calib):
    for name, more in (("plain", []), ("packed", ["--pack"]), ("dense", ["--pack", "dense"])):
        code, out, err = trim(capsys, tiny_lm, RECIPE, tmp_path / name, calib, *more)
        assert code == 0, err
        if name == "packed":
            result = json.loads(out)
    notes = {n: json.loads((tmp_path / n / "trimtab.json").read_text()) for n in ("plain", "packed", "dense")}
    plain, parts = Checkpoint.open(tmp_path / "plain"), SafeFile(tmp_path / "plain" / "trimtab.safetensors")
    linears, whole = (packed.open(tmp_path / n, verify=True).linears for n in ("packed", "dense"))
    entries = gone = 0
    for block in range(3):
        for role in ("gate", "up", "down"):
            site, name = f"{block}.mlp.{role}", f"model.layers.{block}.mlp.{role}_proj"
            its = {k.rpartition(":")[2]: parts.read(k) for k in parts.names if k.startswith(f"{site}:")}
            products, p = Entrywise.among(its), linears[name]
            assert products.rank == rank_of(p.shape, 0.6) == notes["plain"]["ranks"][site] == notes["packed"]["ranks"][site]
            assert (products.first.rank, products.second.rank) == ranks_of(products.rank)
            assert torch.equal(plain.read(f"{name}.weight"), products.weight().bfloat16())
            assert (p.format, p.type, p.label) == ("entrywise", "bf16", "entrywise")
            assert torch.equal(layouts.restored(p), products.to(torch.bfloat16).weight())
            assert p.nbytes == notes["plain"]["packed_bytes"][site] == notes["packed"]["packed_bytes"][name]
            assert torch.equal(layouts.restored(whole[name]), plain.read(f"{name}.weight"))
            entries, gone = entries + sum(t.numel() for t in its.values()), gone + p.shape[0] * p.shape[1]
            if native.core():  # made into the weight it stands for: no warning, and the kernels of that
                linear = native.Linear(p)
                assert linear.packed.format == "dense" and linear.kernels and linear.weight_bytes == 2 * p.shape[0] * p.shape[1]
    assert result["after"]["params"] == result["before"]["params"] - gone + entries
    assert result["factored_share"] == pytest.approx(entries / gone) and entries / gone < 0.6
    ids = torch.arange(5, 30)
    want = tt.load(tmp_path / "plain").module(ids[None]).logits[0].detach()
    assert float((tt.load(tmp_path / "packed").module(ids[None]).logits[0].detach() - want).norm() / want.norm()) < 0.03
    if native.core():
        assert float((open_decoder(tmp_path / "packed", "float32").logits(ids) - want).norm() / want.norm()) < 0.03
    assert cli.main(["eval", str(tmp_path / "packed"), "--text", str(calib), "--seq-len", "32", "-q"]) == 0


def test_a_stopped_run_continues_to_the_same_bytes(capsys, tiny_lm, tmp_path, calib, monkeypatch):
    assert trim(capsys, tiny_lm, RECIPE, tmp_path / "whole", calib, "--pack")[0] == 0
    from trimtab.core.journal import Journal

    write = Journal.write_block

    def dying(self, k, i, *more):
        write(self, k, i, *more)
        if i == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write_block", dying)
    assert trim(capsys, tiny_lm, RECIPE, tmp_path / "again", calib, "--pack")[0] == 1
    monkeypatch.setattr(Journal, "write_block", write)
    assert trim(capsys, tiny_lm, RECIPE, tmp_path / "again", calib, "--pack", "--resume")[0] == 0
    assert hashes(tmp_path / "again") == hashes(tmp_path / "whole")


@pytest.mark.parametrize(("recipe", "message"), [
    ("hadamard | fedpara", "stays in another basis as codes or factors"),
    ("fedpara ; rtn(group=32)", "leaves factors, which hold nothing of the passes before it"),
    ("fedpara(rank=33)", "a rank is 1 to"),
    ("fedpara | rilq", "both decide"),
])
def test_what_does_not_fit_is_refused(capsys, tiny_lm, tmp_path, calib, recipe, message):
    code, _, err = trim(capsys, tiny_lm, recipe, tmp_path / "o", calib)
    assert code == 2 and message in err, err
    assert not list(tmp_path.iterdir())


def test_products_that_do_not_meet_are_refused():
    def some(out: int, inputs: int, rank: int, dtype: torch.dtype = torch.float32) -> Factors:
        return Factors(torch.ones(out, rank, dtype=dtype), torch.ones(rank, inputs, dtype=dtype))

    for a, b in ((some(4, 6, 2), some(4, 5, 2)), (some(4, 6, 2), some(4, 6, 2, torch.bfloat16)), (some(4, 6, 1), some(4, 6, 2)),
                 (some(4, 6, 3), some(4, 6, 1))):
        with pytest.raises(BadInput, match="products that are multiplied"):
            Entrywise(a, b)
    good = entrywise(Entrywise(some(4, 6, 2), some(4, 6, 1)).change())
    layouts.check(good)
    about = layouts.describe(good)
    assert torch.equal(layouts.restored(layouts.described("x", about, good.buffers)), layouts.restored(good))
    first, second = good.factors
    for factors in ((first,), (second, first), (first, first, first), (first, second.factors[0])):
        with pytest.raises(BadInput, match=r".{20,}"):
            layouts.check(type(good)("entrywise", good.shape, good.type, good.buffers, factors=factors))
    for bad in ({**about, "factors": about["factors"][:1]}, {**about, "factors": None}):
        with pytest.raises(BadInput, match="corrupt"):
            layouts.described("x", bad, good.buffers)
