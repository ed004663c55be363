"""A training that ranks all singular values once: what it learns, what is written, other sizes of the same ranking, stopped and refused."""
from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.test_laws import edited
from trimtab import cli
from trimtab.core import line
from trimtab.methods.budget.acip import STOP, learned, parameters
from trimtab.methods.factors import Factors, rank_of

FAST = ["--samples", "6", "--seq-len", "32", "--proof-tokens", "64", "--no-speed", "-q", "--json"]
SHORT = "lr=0.2,epochs=4,accumulate=1"


pytestmark = pytest.mark.usefixtures("proof_in_this_process")


def trim(capsys, model, recipe, out, calib, *more: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in ("trim", model, recipe, "-o", out, "--calib", calib, "--text", calib, *FAST, *more)])
    return code, *capsys.readouterr()


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.suffix in (".safetensors", ".json") and p.name != "trimtab.json"}


def weights(out: Path) -> dict[str, bytes]:
    return {n: data for n, data in files(out).items() if n.startswith("model")}


def as_factors(net):
    """The network of the laws with all singular values of its sites as factors, and those of one direction that nothing reads."""
    read, useless = net.read, {}

    def new(i):
        stored, _ = read(i)
        module, parts = net.net.block(i, stored), {}
        for s in net.of_block[i]:
            u, size, vt = torch.linalg.svd(net.net.weight(module, s).float(), full_matrices=False)
            size[-3:] = 0
            useless[s.name] = len(size) - 3
            both = Factors(u * size.sqrt(), size.sqrt()[:, None] * vt)
            parts |= {f"{s.name}:{k}": t for k, t in both.parts().items()}
        return stored, parts

    net.read = new
    return net, useless


def ranked(seed: int):
    """Scores, what did nothing, shapes, and of every update the masks before it and their slopes."""
    net, useless = as_factors(edited())
    seen, updates = [], net.updates

    def watched(*how, **knobs):
        for own, grads in updates(*how, **knobs):
            before = {n: its["mask"].clone() for n, its in own.items()}
            yield own, grads
            seen.append((before, {n: its["mask"].clone() for n, its in grads.items()}))

    net.updates = watched
    return learned(net, lr=0.2, epochs=16, accumulate=1, seed=seed), useless, {s.name: s.shape for s in net.trained}, seen


def test_what_does_nothing_goes_first_and_stays_away():
    scores, useless, shapes, seen = ranked(0)
    assert scores.keys() == shapes.keys()
    kept = {n: int((s > 0).sum()) for n, s in scores.items()}
    assert parameters(kept, shapes) <= STOP * sum(a * b for a, b in shapes.values())  # it ends there
    for n, s in scores.items():
        assert s.shape == (min(shapes[n]),) and float(s[useless[n]:].max()) == float(s.min()) < 0
    for (mask, slopes), (later, _) in pairwise(seen):
        for n in mask:
            assert not bool(slopes[n][mask[n] <= 0].any()) and bool((later[n][mask[n] <= 0] <= 0).all())
    nothing = [torch.cat([its[1][n][useless[n]:] for n in shapes]).amax() for its in seen[:3]]  # slopes of these are the penalty alone
    assert nothing[0] > 0 and float(nothing[2] / nothing[1]) == pytest.approx(float(nothing[1] / nothing[0])) == pytest.approx(1.1)
    again, *_ = ranked(0)
    assert all(torch.equal(t, again[n]) for n, t in scores.items())


def test_other_sizes_come_from_the_same_ranking(capsys, tiny_lm, tmp_path, calib, monkeypatch):
    recipe = f"acip({SHORT}) | svd"
    code, out, err = trim(capsys, tiny_lm, recipe, tmp_path / "first", calib, "--keep", "80%")
    assert code == 0, err
    assert 0.7 < json.loads(out)["factored_share"] <= 0.8
    shares = json.loads((tmp_path / "first" / "trimtab.json").read_text())["shares"]
    assert len(set(shares.values())) > 1 and len(json.loads((tmp_path / "first" / line.RANKING).read_text())) == len(shares)
    assert trim(capsys, tiny_lm, recipe, tmp_path / "small", calib, "--keep", "50%")[0] == 0

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(line, "Net", never)
    for name, more in (("again", ["--keep", "80%"]), ("smaller", ["--keep", "50%"]), ("packed", ["--keep", "50%", "--pack"])):
        code, out, err = trim(capsys, tiny_lm, f"acip(source={tmp_path / 'first'}) | svd", tmp_path / name, calib, *more)
        assert code == 0, err
    assert weights(tmp_path / "again") == weights(tmp_path / "first")
    assert weights(tmp_path / "smaller") == weights(tmp_path / "small")
    assert (tmp_path / "packed" / line.RANKING).read_bytes() == (tmp_path / "first" / line.RANKING).read_bytes()
    notes = json.loads((tmp_path / "packed" / "trimtab.json").read_text())
    assert json.loads(out)["factored_share"] <= 0.5 and all(notes["shares"][n] <= shares[n] for n in shares)
    assert all(rank == rank_of((32, 32), notes["shares"][n]) for n, rank in notes["ranks"].items() if n.endswith(".q"))


def test_a_stopped_run_continues_to_the_same_bytes(capsys, tiny_lm, tmp_path, calib, monkeypatch):
    recipe = f"acip({SHORT}) | svd"
    assert trim(capsys, tiny_lm, recipe, tmp_path / "whole", calib)[0] == 0
    write, seen = line.write_json, []

    def dying(path, data):
        write(path, data)
        seen.append(path.name)
        if path.name == line.RANKING:
            raise KeyboardInterrupt

    monkeypatch.setattr(line, "write_json", dying)
    assert trim(capsys, tiny_lm, recipe, tmp_path / "o", calib)[0] == 1 and line.RANKING in seen
    monkeypatch.setattr(line, "write_json", write)
    assert trim(capsys, tiny_lm, recipe, tmp_path / "o", calib, "--resume")[0] == 0
    assert files(tmp_path / "o") == files(tmp_path / "whole")


@pytest.mark.parametrize(("recipe", "message"), [
    ("acip | wanda", "chooses the ranks of factors, and edit/mask leaves none"),
    ("acip | svd(rank=4)", "fixes its own"),
    ("acip(lr=0.0) | svd", "lr=0 trains nothing"),
    ("acip(epochs=0) | svd", "epochs=0 trains nothing"),
    ("acip(source=nowhere) | svd", "nowhere has no ranking.json"),
    ("acip(source={odd}) | svd", "does not rank the 32 singular values of 0.attn.q"),
    ("acip(source={other}) | svd", "does not rank the 32 singular values of 0.attn.q"),
])
def test_what_does_not_fit_is_refused(capsys, tiny_lm, tmp_path, calib, recipe, message):
    for name, said in (("odd", '{"0.attn.q": 3}'), ("other", '{"0.attn.q": [1, 2]}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / line.RANKING).write_text(said)
    code, _, err = trim(capsys, tiny_lm, recipe.format(odd=tmp_path / "odd", other=tmp_path / "other"), tmp_path / "o", calib)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd", "other"]
    for name in ("odd", "other"):
        shutil.rmtree(tmp_path / name)


def test_a_share_less_than_the_least_ranks_is_refused(capsys, tiny_lm, tmp_path, calib):
    assert trim(capsys, tiny_lm, f"acip({SHORT}) | svd", tmp_path / "o", calib)[0] == 0
    code, _, err = trim(capsys, tiny_lm, f"acip(source={tmp_path / 'o'}) | svd", tmp_path / "p", calib, "--keep", "1%")
    assert code == 2 and "less than factors of the least rank take" in err
