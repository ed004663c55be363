"""Small ranks: what the methods for them compute, by other ways of saying it, and how many directions `inspect` says layers use."""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.test_laws import THREE, env, stats, weight
from trimtab import api, cli
from trimtab.core.registry import get
from trimtab.methods.edit.cur import places
from trimtab.methods.factors import Factors, rank_of
from trimtab.network.stream import Network


def numbers(name: str) -> tuple[np.ndarray, np.ndarray]:
    return weight(name).double().numpy(), stats(name)["gram"].double().numpy()


@pytest.mark.parametrize("name", THREE)
def test_svdllm_is_the_decomposition_behind_whitened_inputs(name):
    """As the paper has it: the inverse of a Cholesky factor behind what is left of the singular values."""
    w, gram = numbers(name)
    root = np.linalg.cholesky(gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram)))
    u, s, vt = np.linalg.svd(w @ root)
    for keep in (0.3, 0.7):
        r = rank_of(w.shape, keep)
        want = u[:, :r] @ np.diag(s[:r]) @ vt[:r] @ np.linalg.inv(root)
        np.testing.assert_allclose(get("edit/svdllm").fn(weight(name), keep, stats(name)["gram"]).w.numpy(), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("how", [{"rank": 3}, {"rank": 7}, {"energy": 0.5}, {"energy": 0.8}])
def test_utilised_projects_both_sides(name, how):
    """Onto the first eigenvectors of both second moments: those of a rank, the other side as far as it reaches then, or of an energy."""
    w, gram = numbers(name)
    sides = []
    for moment in (gram, w @ gram @ w.T):
        values, vectors = np.linalg.eigh(moment)
        sides.append((np.cumsum(values[::-1]) / values.sum(), vectors[:, ::-1]))
    energy = how.get("energy") or max(shares[how["rank"] - 1] for shares, _ in sides)
    counts = [int(np.argmax(shares >= energy - 1e-12)) + 1 for shares, _ in sides]
    inside, outside = (v[:, :k] @ v[:, :k].T for (_, v), k in zip(sides, counts, strict=True))
    new = get("edit/utilised").fn(weight(name), 0.5, stats(name)["gram"], **how)
    if "energy" in how and min(counts) * sum(w.shape) >= w.size:
        assert torch.equal(new.w, weight(name)) and not new.parts
        return
    assert Factors.among(new.parts).rank == min(counts) == how.get("rank", min(counts))
    np.testing.assert_allclose(new.w.numpy(), outside @ w @ inside, rtol=1e-3, atol=2e-5)


def test_utilised_refuses_an_energy_that_is_none():
    for how in ({"energy": 1.5}, {"energy": -0.1}, {"energy": 0.5, "rank": 3}):
        with pytest.raises(cli.BadInput, match=r"energy is .* a share above 0 and at most 1, such as 0.99, in place of a rank"):
            get("edit/utilised")(env(get("edit/utilised")), **how)


@pytest.mark.parametrize("name", THREE)
def test_cur_takes_rows_and_columns_of_the_weight(name):
    """The places are those of interpolation by solving for what is known; the link is the best one, in weights or in outputs."""
    w, gram = numbers(name)
    a, _, bt = np.linalg.svd(abs(w) * np.sqrt(np.diag(gram)))
    for r in (1, 4, 8):
        chosen = []
        for v in (a[:, :r], bt[:r].T):
            at = [int(abs(v[:, 0]).argmax())]
            for k in range(1, r):
                at.append(int(abs(v[:, k] - v[:, :k] @ np.linalg.solve(v[at][:, :k], v[at, k])).argmax()))
            assert places(torch.from_numpy(v.copy())).tolist() == at
            chosen.append(at)
        rows, columns = w[chosen[0]], w[:, chosen[1]]
        for whiten in (False, True):
            new = get("edit/cur").fn(weight(name), 1.0, stats(name)["gram"], rank=r, whiten=whiten)
            assert torch.equal(new.parts["right"], weight(name)[chosen[0]])
            moment = gram if whiten else np.eye(w.shape[1])
            link = np.linalg.inv(columns.T @ columns) @ columns.T @ w @ moment @ rows.T @ np.linalg.inv(rows @ moment @ rows.T)
            np.testing.assert_allclose(new.w.numpy(), columns @ link @ rows, rtol=1e-2, atol=1e-4)


def test_inspect_says_how_many_directions_layers_use(capsys, tiny_lm, calib, tmp_path):
    how = ["--calib", str(calib), "--samples", "4", "--seq-len", "32", "-q"]
    net, grams = Network.open(tiny_lm), api.calibrate(tiny_lm, {"gram"}, samples=4, seq_len=32, calib=(str(calib),))
    for energy in (0.99, 0.5):
        assert cli.main(["inspect", str(tiny_lm), *how, "--json", "--energy", str(energy)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["energy"] == energy and set(found["sites"]) == {s.name for s in net.sites}
        by_role = {}
        for i in range(net.n_blocks):
            module = net.block(i)
            for s in net.sites_of(i):
                w, gram = net.weight(module, s).double().numpy(), grams[s.name]["gram"].double().numpy()
                counts = [int((np.cumsum(np.sort(v)[::-1]) / v.sum() < energy).sum()) + 1
                          for v in (np.linalg.eigvalsh(gram), np.linalg.eigvalsh(w @ gram @ w.T))]
                its = found["sites"][s.name]
                assert its["utilised_rank"] == min(counts)
                assert its["utilisation"] == round(min(counts) / min(s.shape), 4)
                by_role.setdefault(f"{s.group}.{s.role}", []).append(its["utilisation"])
        for role, each in by_role.items():
            assert found["roles"][role]["utilisation"] == pytest.approx(np.mean(each), abs=1e-4)
        assert found["mean_utilisation"] == pytest.approx(np.mean([u["utilisation"] for u in found["sites"].values()]), abs=1e-4)
        assert found["mean_utilisation"] < 1
    page = tmp_path / "page.html"
    assert cli.main(["inspect", str(tiny_lm), *how, "--report", str(page)]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "utilised: " in words and "of the directions a layer has, on average, hold 99% of its inputs and of its outputs" in words
    text = page.read_text()
    assert "How much of their rank layers use" in text and text.count("<polyline") == len(by_role)
    assert cli.main(["inspect", str(tiny_lm), *how, "--energy", "0", "--json"]) == 0
    assert not {"sites", "energy", "mean_utilisation"} & set(json.loads(capsys.readouterr().out))
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(tiny_lm), "--energy", "1.5"])
