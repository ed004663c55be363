"""A repair that trains the whole network, along the line: what is written, packed, stopped and resumed, refused."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import tiny
from trimtab import cli
from trimtab.core import line, train
from trimtab.core.types import BadInput
from trimtab.network.checkpoint import Checkpoint, SafeFile

RILQ = "int(bits=2,group=32) | rtn | rilq(rank=2,epochs=4,accumulate=2,lr=0.01)"
FAST = ["--samples", "8", "--seq-len", "32", "--proof-tokens", "64", "--no-speed", "-q"]


pytestmark = pytest.mark.usefixtures("proof_in_this_process")


def trim(capsys, model, recipe, out, calib, *more: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in ("trim", model, recipe, "-o", out, "--calib", calib, "--text", calib, *FAST, "--json", *more)])
    return code, *capsys.readouterr()


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.glob("*.safetensors"))}


def test_it_brings_back_what_two_bits_lose(capsys, tmp_path):
    """On samples that training did not see, and packed as well as plain: codes and a product beside them."""
    model = tiny.save("llama", tmp_path / "model")
    ids = torch.randint(3, 80, (3, 24), generator=torch.Generator().manual_seed(0))
    for name, rows in (("calib", 12), ("text", 3)):
        from safetensors.torch import save_file

        save_file({"input_ids": ids.repeat(rows // 3, 1)}, tmp_path / f"{name}.safetensors")
    got = {}
    for recipe, more in (("int(bits=2,group=32) | rtn", []), (RILQ, []), (RILQ, ["--pack", "--head", "keep"])):
        out = tmp_path / f"o{len(got)}"
        code = cli.main([str(a) for a in ("trim", model, recipe, "-o", out, "--calib", tmp_path / "calib.safetensors", "--text",
                                          tmp_path / "text.safetensors", "--samples", 12, "--no-speed", "-q", "--json", *more)])
        said = capsys.readouterr()
        assert code == 0, said.err
        got[out] = json.loads(said.out)
    plain, trained, packed = got.values()
    assert trained["kl"] < 0.9 * plain["kl"] and trained["after"]["perplexity"] < plain["after"]["perplexity"]
    assert packed["kl"] == pytest.approx(trained["kl"], rel=0.05)
    labels = json.loads((tmp_path / "o2" / "trimtab.json").read_text())["formats"]
    assert labels.pop("lm_head") == "dense" and set(labels.values()) == {"dense i2 + lowrank"}
    assert set(trained["ranks"].values()) == {2}
    codes = [{n: f.read(n) for n in f.names if n.endswith((":codes", ":scales"))}
             for f in (SafeFile(tmp_path / o / "trimtab.safetensors") for o in ("o0", "o1"))]
    assert all(torch.equal(t, codes[1][n]) for n, t in codes[0].items()) and codes[0].keys() == codes[1].keys()


def test_killed_anywhere_and_resumed_gives_the_same_bytes(capsys, tiny_lm, tmp_path, calib, monkeypatch):
    """At checks, and between the blocks that are written behind the last; the second time in little memory, block by block."""
    monkeypatch.setattr(train, "EVERY", 3)
    assert trim(capsys, tiny_lm, RILQ, tmp_path / "whole", calib)[0] == 0
    out, original = tmp_path / "o", train.write_tensors
    for at, more in ((1, []), (2, ["--max-memory", "1MB"])):
        written = []

        def dying(path, *args, at=at, written=written):
            original(path, *args)
            written.append(path)
            if len(written) == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(train, "write_tensors", dying)
        assert trim(capsys, tiny_lm, RILQ, out, calib, "--resume", *more)[0] == 1
    monkeypatch.setattr(train, "write_tensors", original)
    block = line.Journal.write_block

    def stopped(self, sweep, i, *args):
        if (sweep, i) == (1, 1):
            raise KeyboardInterrupt
        block(self, sweep, i, *args)

    monkeypatch.setattr(line.Journal, "write_block", stopped)
    assert trim(capsys, tiny_lm, RILQ, out, calib, "--resume")[0] == 1
    monkeypatch.setattr(line.Journal, "write_block", block)
    assert trim(capsys, tiny_lm, RILQ, out, calib, "--resume")[0] == 0
    assert files(out) == files(tmp_path / "whole")
    assert any("left" in n for n in SafeFile(out / "trimtab.safetensors").names)


def test_only_its_own_sites_and_others_may_follow(capsys, tiny_lm, tmp_path, calib):
    recipe = "1.mlp.*: int(bits=2,group=32) | rtn | rilq(rank=2,epochs=4,accumulate=2,lr=0.01) ; attn: int(bits=8,group=32) | gptq"
    assert trim(capsys, tiny_lm, recipe, tmp_path / "o", calib)[0] == 0
    names = SafeFile(tmp_path / "o" / "trimtab.safetensors").names
    assert {n.split(":")[0] for n in names if n.endswith(":left")} == {"1.mlp.gate", "1.mlp.up", "1.mlp.down"}
    assert {n.split(":")[0] for n in names if ".attn." in n and n.endswith(":codes")} == {f"{i}.attn.{r}" for i in range(3) for r in "qkvo"}
    before, after = Checkpoint.open(tiny_lm), Checkpoint.open(tmp_path / "o")
    changed = {n for n in before.tensors if not torch.equal(before.read(n), after.read(n))}
    assert {n.split(".")[2] for n in changed if "mlp" in n} == {"1"}


@pytest.mark.parametrize(("recipe", "more", "message"), [
    ("row | wanda | rilq", [], "mends codes"),
    ("row | wanda | lorc", [], "mends codes"),
    ("svd | rilq", [], "both decide repair"),
    ("vptq | rilq", [], "would leave the books"),
    ("row | wanda ; int(group=32) | rtn | rilq", [], "would bring back weights"),
    ("int(group=32) | rtn | rilq ; mlp: int(group=32) | rtn", [], "would leave its grid"),
    ("int(group=32) | rtn | rilq | lorc", [], "put it last"),
    ("int(group=32) | rtn | rilq(rank=33)", [], "a rank is 1 to"),
    ("int(group=32) | rtn | rilq", ["--samples", "1"], "--samples 2"),
    ("int(group=32) | rtn | rilq(epochs=0)", [], "epochs=0 trains nothing"),
    ("int(group=32) | rtn | rilq(lr=-1)", [], "lr=-1 trains nothing"),
])
def test_what_does_not_fit_is_refused(capsys, tiny_lm, tmp_path, calib, recipe, more, message):
    code, _, err = trim(capsys, tiny_lm, recipe, tmp_path / "o", calib, *more)
    assert code == 2 and message in err, err
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_next_tokens_is_refused(tmp_path):
    model = tiny.save("bert", tmp_path / "model")
    with pytest.raises(BadInput, match="language model's next tokens"):
        line.trim(model, line_recipe("int(group=32) | rtn | rilq"), tmp_path / "o", line.Options(samples=4), lambda *a: None)
    assert not (tmp_path / "o").exists()


def line_recipe(text: str):
    from trimtab.core import spec

    return spec.load(text)


def test_a_dry_run_counts_the_training(capsys, tiny_lm, tmp_path, calib):
    minutes = []
    for recipe in ("int(group=32) | rtn", "int(group=32) | rtn | rilq(epochs=1000000)"):
        code, out, err = trim(capsys, tiny_lm, recipe, tmp_path / "o", calib, "--dry-run")
        assert code == 0, err
        minutes.append(json.loads(out)["estimate"]["minutes"])
    assert minutes[1] > 10 * minutes[0]
