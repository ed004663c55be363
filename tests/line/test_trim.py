"""The line end to end on a tiny model: what is written, resumed, refused, left alone."""
from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trimtab import builtin, cli
from trimtab.core import line
from trimtab.methods.format.panels import unpack_mask
from trimtab.network.checkpoint import Checkpoint, SafeFile

FAST = ["--samples", "4", "--seq-len", "32", "--proof-tokens", "64", "--no-speed", "-q"]


pytestmark = pytest.mark.usefixtures("proof_in_this_process")


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def trim(capsys, model, recipe, out, calib, *more):
    return run(capsys, "trim", model, recipe, "-o", out, "--calib", calib, "--text", calib, *FAST, *more)


def hashes(path: Path) -> dict[str, str]:
    """Every file but those that hold timings."""
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.rglob("*"))
            if p.is_file() and p.name not in ("trimtab.json", "README.md")}


def weights(path: Path) -> dict[str, torch.Tensor]:
    c = Checkpoint.open(path)
    return {n: c.read(n) for n in c.tensors}


@pytest.mark.fresh
def test_trim_writes_what_it_says(capsys, tiny_lm, tmp_path, calib):
    before = hashes(tiny_lm)
    code, out, _ = trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib, "--json", "--keep", "0.3")
    assert code == 0 and hashes(tiny_lm) == before
    result = json.loads(out)
    for key in ("recipe", "plan_hash", "before", "after", "recovery", "kl", "top1_agreement", "smaller", "faster", "warnings",
                "seconds", "peak_rss_bytes", "metric", "score"):
        assert key in result, key
    w = weights(tmp_path / "o")
    for name, dense in weights(tiny_lm).items():
        assert w[name].dtype == dense.dtype and w[name].shape == dense.shape
        if "_proj" in name:
            kept = (w[name] != 0).sum(1)
            assert (kept == round(0.3 * dense.shape[1])).all(), name
            assert torch.equal(w[name][w[name] != 0], dense[w[name] != 0])  # wanda moves nothing that stays
        else:
            assert torch.equal(w[name], dense)
    assert {"recipe.yaml", "README.md", "trimtab.json", "trimtab.safetensors", "config.json", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "o").iterdir()}
    assert not (tmp_path / "o.partial").exists()
    assert json.loads((tmp_path / "o" / "trimtab.json").read_text())["proof"] == "passed"
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype=torch.float32)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, w["model.layers.1.mlp.up_proj.weight"].float())


def test_perplexity_agrees_with_a_plain_loop(capsys, tiny_lm, tmp_path, calib):
    code, out, _ = trim(capsys, tiny_lm, "magnitude(unit=site)", tmp_path / "o", calib, "--json")
    assert code == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimtab.core import data

    ids = data.windows(data.tokens([Path(calib).read_text()], AutoTokenizer.from_pretrained(tiny_lm)), 2, 32, None, "x")
    for path, key in ((tiny_lm, "before"), (tmp_path / "o", "after")):
        model, total, n = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), 0.0, 0
        for row in ids:
            with torch.no_grad():
                logits = model(input_ids=row[None]).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
            n += len(row) - 1
        assert json.loads(out)[key]["perplexity"] == pytest.approx(torch.tensor(total / n).exp().item(), rel=1e-4)


def test_two_passes_keep_what_the_first_dropped(capsys, tiny_lm, tmp_path, calib):
    assert trim(capsys, tiny_lm, "magnitude(unit=row)", tmp_path / "one", calib, "--keep", "0.7")[0] == 0
    recipe = "row | magnitude(keep=0.7) ; all: site | sparsegpt(keep=0.4)"
    assert trim(capsys, tiny_lm, recipe, tmp_path / "two", calib)[0] == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        if "_proj" in name:
            assert not two[name][one[name] == 0].any(), name
            assert (two[name] != 0).float().mean() <= 0.41


def test_scopes_touch_only_their_sites(capsys, tiny_lm, tmp_path, calib):
    assert trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib, "--scope", "mlp")[0] == 0
    old, new = weights(tiny_lm), weights(tmp_path / "o")
    for name in old:
        assert torch.equal(old[name], new[name]) == ("mlp" not in name), name


def test_global_budget_is_exact_over_the_model(capsys, tiny_lm, tmp_path, calib):
    assert trim(capsys, tiny_lm, "magnitude(unit=model)", tmp_path / "o", calib, "--keep", "0.3")[0] == 0
    w = {n: t for n, t in weights(tmp_path / "o").items() if "_proj" in n}
    assert sum(int((t != 0).sum()) for t in w.values()) == round(0.3 * sum(t.numel() for t in w.values()))
    assert len({float((t != 0).float().mean()) for t in w.values()}) > 1


@pytest.mark.parametrize("recipe, along", [("wanda(unit=2:4)", 1), ("sparsegpt(unit=1:4)", 1), ("dass(unit=2:4)", 0)])
def test_nm_holds_in_every_group_of_the_file(capsys, tiny_lm, tmp_path, calib, recipe, along):
    assert trim(capsys, tiny_lm, recipe, tmp_path / "o", calib, "--scope", "mlp")[0] == 0
    n = 1 if "1:4" in recipe else 2
    for name, w in weights(tmp_path / "o").items():
        if "mlp" in name:
            dim = 1 if "down" in name else along
            groups = (w if dim else w.T).reshape(-1, 4)
            assert int((groups != 0).sum(1).max()) <= n, name
            assert float((groups != 0).float().mean()) == pytest.approx(n / 4, abs=0.01)


def test_gradients_after_another_pass_are_refused_before_anything_is_written(capsys, tiny_lm, tmp_path, calib):
    code, _, err = trim(capsys, tiny_lm, "row | magnitude(keep=0.7) ; row | gblm(keep=0.5)", tmp_path / "o", calib)
    assert code == 2 and "put that pass first" in err and list(tmp_path.iterdir()) == []


def test_gradient_recipes_run(capsys, tiny_lm, tmp_path, calib):
    code, out, _ = trim(capsys, tiny_lm, "gblm", tmp_path / "o", calib, "--json")
    assert code == 0 and json.loads(out)["recovery"] > 0


@pytest.mark.parametrize("recipe", ["sparsegpt", "gblm", "2.*: row | gblm ; 0.*,1.*: row | wanda",
                                    "row | magnitude(keep=0.7) ; site | sparsegpt(keep=0.4)", "wanda_owl",
                                    "mlp: svd | owl ; attn: row | wanda"])
def test_killed_at_random_and_resumed_gives_the_same_bytes(capsys, tiny_lm, tmp_path, calib, recipe):
    assert trim(capsys, tiny_lm, recipe, tmp_path / "whole", calib)[0] == 0
    want = hashes(tmp_path / "whole")
    rng = random.Random(recipe)
    # The journal fails at the chosen write, as if the machine had gone: every finished block is kept.
    out, done = tmp_path / "o", False
    original = line.Journal.write_block
    for _ in range(8):
        stop = rng.randint(1, 2)
        seen = [0]

        def dying(self, *args, stop=stop, seen=seen):
            seen[0] += 1
            if seen[0] >= stop:
                raise KeyboardInterrupt
            original(self, *args)

        line.Journal.write_block = dying
        try:
            code, _, err = trim(capsys, tiny_lm, recipe, out, calib, "--resume")
        finally:
            line.Journal.write_block = original
        if code == 0:
            done = True
            break
        assert code == 1 and "--resume" in err and not out.exists()
    if not done:
        assert trim(capsys, tiny_lm, recipe, out, calib, "--resume")[0] == 0
    assert hashes(out) == want


def test_kill_nine_then_resume(tiny_lm, tmp_path, calib):
    """A real kill of the real process, at moments spread over its run."""
    argv = [sys.executable, "-m", "trimtab.cli", "trim", str(tiny_lm), "wanda", "--calib", calib, "--text", calib, *FAST, "--resume"]
    env = {**os.environ, "PYTHONPATH": str(Path(line.__file__).parents[2]), "OMP_NUM_THREADS": "2"}
    began = time.time()
    subprocess.run([*argv, "-o", str(tmp_path / "whole")], check=True, env=env, capture_output=True)
    length = time.time() - began
    want = hashes(tmp_path / "whole")
    for share in (0.5, 0.75):
        out = tmp_path / f"o{share}"
        p = subprocess.Popen([*argv, "-o", str(out)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(length * share)
        p.send_signal(signal.SIGKILL)
        p.wait()
        subprocess.run([*argv, "-o", str(out)], check=True, env=env, capture_output=True)
        assert hashes(out) == want
        assert json.loads((out / "trimtab.json").read_text())["proof"] == "passed"


def test_resume_with_another_plan_or_without_the_flag(capsys, tiny_lm, tmp_path, calib, monkeypatch):
    def full(self, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(line.Journal, "write_block", full)
        code, _, err = trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib)
    assert code == 1 and "disk is full" in err and "untouched" in err and not (tmp_path / "o").exists()
    code, _, err = trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib)
    assert code == 2 and "--resume" in err and "--force" in err
    code, _, err = trim(capsys, tiny_lm, "magnitude", tmp_path / "o", calib, "--resume")
    assert code == 2 and "another plan" in err
    assert trim(capsys, tiny_lm, "magnitude", tmp_path / "o", calib, "--force")[0] == 0


def test_a_forced_run_is_resumed_as_it_says(capsys, tiny_lm, tmp_path, calib, monkeypatch):
    assert trim(capsys, tiny_lm, "magnitude", tmp_path / "o", calib)[0] == 0
    first = hashes(tmp_path / "o")
    original, seen = line.Journal.write_block, []

    def dying(self, *args):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        original(self, *args)

    with monkeypatch.context() as m:
        m.setattr(line.Journal, "write_block", dying)
        code, _, err = trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib, "--force")
    assert code == 1 and "--resume" in err and hashes(tmp_path / "o") == first
    assert trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib, "--resume")[0] == 0
    assert hashes(tmp_path / "o") != first


def test_a_folder_of_somebody_else_is_left_alone(capsys, tiny_lm, tmp_path, calib):
    (tmp_path / "o.partial").mkdir()
    (tmp_path / "o.partial" / "thesis.txt").write_text("mine")
    for flag in ("--resume", "--force"):
        code, _, err = trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib, flag)
        assert code == 2 and "not made by trimtab" in err and (tmp_path / "o.partial" / "thesis.txt").read_text() == "mine"


def test_force_replaces_only_what_trimtab_wrote(capsys, tiny_lm, tmp_path, calib, monkeypatch):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("mine")
    for flag in ("--resume", "--force"):
        code, _, err = trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib, flag)
        assert code == 2 and "no output of trimtab" in err and (tmp_path / "o" / "thesis.txt").read_text() == "mine"
    code, _, err = run(capsys, "demo", "--out", tmp_path / "o", "--force")
    assert code == 2 and "no output of trimtab" in err
    code, _, err = run(capsys, "demo", "--out", tmp_path / "o" / "thesis.txt", "--force")
    assert code == 2 and "another --out folder" in err
    assert trim(capsys, tiny_lm, "magnitude", tmp_path / "p", calib)[0] == 0
    monkeypatch.chdir(tmp_path / "p")
    code, _, err = trim(capsys, tiny_lm, "wanda", ".", calib, "--force")
    assert code == 2 and "no output of trimtab" in err
    assert not (tmp_path / "o.partial").exists()


def test_an_output_that_appears_meanwhile_is_not_replaced(capsys, tiny_lm, tmp_path, calib, monkeypatch):
    original = line.write_like

    def appear(*args):
        (tmp_path / "o").mkdir()
        (tmp_path / "o" / "mine.txt").write_text("mine")
        original(*args)

    monkeypatch.setattr(line, "write_like", appear)
    code, _, err = trim(capsys, tiny_lm, "magnitude", tmp_path / "o", calib)
    assert code == 1 and "appeared" in err and (tmp_path / "o" / "mine.txt").read_text() == "mine"


def test_resume_of_a_finished_output(capsys, tiny_lm, tmp_path, calib):
    assert trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib)[0] == 0
    first, notes = hashes(tmp_path / "o"), json.loads((tmp_path / "o" / "trimtab.json").read_text())
    code, out, _ = trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib, "--resume", "--json")
    assert code == 0 and json.loads(out)["plan_hash"] == notes["plan_hash"]
    (tmp_path / "o" / "trimtab.json").write_text(json.dumps({**notes, "proof": "pending"}))
    assert trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib, "--resume")[0] == 0
    assert json.loads((tmp_path / "o" / "trimtab.json").read_text())["proof"] == "passed"
    code, _, err = trim(capsys, tiny_lm, "magnitude", tmp_path / "o", calib, "--resume")
    assert code == 2 and "not of this plan" in err and hashes(tmp_path / "o") == first


def test_an_earlier_output_survives_a_failed_replacement(capsys, tiny_lm, tmp_path, calib, monkeypatch):
    assert trim(capsys, tiny_lm, "magnitude", tmp_path / "o", calib)[0] == 0
    first = hashes(tmp_path / "o")
    code, _, err = trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib)
    assert code == 2 and "--force" in err and hashes(tmp_path / "o") == first
    with monkeypatch.context() as m:
        m.setattr(line, "write_like", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        assert trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib, "--force")[0] == 1
    assert hashes(tmp_path / "o") == first
    assert trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib, "--resume", "--force")[0] == 0
    assert hashes(tmp_path / "o") != first


def test_read_only_place(capsys, tiny_lm, tmp_path, calib, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, _, err = trim(capsys, tiny_lm, "magnitude", tmp_path / "o", calib)
    assert code == 2 and "cannot write" in err and len(err.strip().splitlines()) == 1


def test_min_recovery_marks_the_output(capsys, tiny_lm, tmp_path, calib):
    code, out, _ = trim(capsys, tiny_lm, "random(keep=0.02)", tmp_path / "o", calib, "--json", "--min-recovery", "1.0")
    result = json.loads(out)
    if result["recovery"] >= 1:  # a random model may not get worse; then the proof is met
        assert code == 0
    else:
        assert code == 1 and json.loads((tmp_path / "o" / "trimtab.json").read_text())["proof"] == "failed"
        import trimtab as tt

        with pytest.warns(UserWarning, match="did not pass"):
            tt.load(tmp_path / "o")


def test_the_seed_reaches_methods_that_draw(capsys, tiny_lm, tmp_path, calib):
    for name, argv in (("a", []), ("b", []), ("c", ["--seed", "1"])):
        assert trim(capsys, tiny_lm, "random", tmp_path / name, calib, *argv)[0] == 0
    a, b, c = (weights(tmp_path / n)["model.layers.0.mlp.up_proj.weight"] for n in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_dense_row_copies_and_proves(capsys, tiny_lm, tmp_path, calib):
    code, out, _ = trim(capsys, tiny_lm, "dense", tmp_path / "o", calib, "--json")
    assert code == 0 and json.loads(out)["recovery"] == pytest.approx(1)
    old, new = weights(tiny_lm), weights(tmp_path / "o")
    assert all(torch.equal(old[n], new[n]) for n in old)


def test_dry_run_writes_nothing(capsys, tiny_lm, tmp_path, calib):
    code, out, _ = trim(capsys, tiny_lm, "sparsegpt", tmp_path / "o", calib, "--dry-run", "--json")
    result = json.loads(out)
    assert code == 0 and list(tmp_path.iterdir()) == []
    assert result["estimate"]["memory"] > 0 and result["measured"]["block_seconds"] > 0 and "memory" in result["off_by"]


def test_parts_hold_the_mask_that_was_written(capsys, tiny_lm, tmp_path, calib):
    assert trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib)[0] == 0
    f = SafeFile(tmp_path / "o" / "trimtab.safetensors")
    w = weights(tmp_path / "o")["model.layers.2.mlp.down_proj.weight"]
    assert torch.equal(unpack_mask(f.read("2.mlp.down:mask"), tuple(w.shape)), w != 0)


# ---- bad input: one clear line, exit 2, nothing written ---------------------------------------
def copy(model: Path, to: Path) -> Path:
    import shutil

    shutil.copytree(model, to)
    return to


def break_nan(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    f = next(p for p in sorted(path.glob("model-*.safetensors")) if any("up_proj" in k for k in load_file(p)))
    t = load_file(f)
    name = next(k for k in t if "up_proj" in k)
    t[name][0, 0] = float("nan")
    save_file(t, f, metadata={"format": "pt"})


def break_config(path: Path) -> None:
    c = json.loads((path / "config.json").read_text())
    c["intermediate_size"] = 96
    (path / "config.json").write_text(json.dumps(c))


def break_family(path: Path) -> None:
    c = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**c, "model_type": "mamba", "architectures": ["MambaForCausalLM"]}))


def truncate(path: Path) -> None:
    f = next(path.glob("model-*.safetensors"))
    f.write_bytes(f.read_bytes()[:-100])


def lose_shard(path: Path) -> None:
    next(path.glob("model-*.safetensors")).unlink()


def only_pickle(path: Path) -> None:
    for p in path.glob("model*"):
        p.unlink()
    (path / "pytorch_model.bin").write_bytes(b"x")


@pytest.mark.parametrize("harm, words", [
    (break_nan, ["up_proj", "NaN"]), (break_config, ["intermediate", "shape"]), (break_family, ["mamba", "llama"]),
    (truncate, ["truncated"]), (lose_shard, ["missing"]), (only_pickle, ["pickle", "safetensors"]),
], ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_model_is_refused(capsys, tiny_lm, tmp_path, calib, harm, words):
    model = copy(tiny_lm, tmp_path / "m")
    harm(model)
    code, out, err = trim(capsys, model, "wanda", tmp_path / "o", calib)
    assert code == 2 and out == "" and len(err.strip().splitlines()) == 1, err
    assert any(w.lower() in err.lower() for w in words), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("argv, words", [
    (["nowhere/at/all", "wanda"], ["nowhere/at/all"]),
    (["MODEL", "wnada"], ["wnada", "wanda"]),
    (["MODEL", "wanda(colour=1)"], ["colour"]),
    (["MODEL", "wanda", "--keep", "0"], ["0", "share"]),
    (["MODEL", "wanda", "--keep", "1.2"], ["1.2"]),
    (["MODEL", "wanda(unit=2:5)"], ["0.attn.q", "5"]),
    (["MODEL", "wanda", "--scope", "nothing.*"], ["matches no site"]),
    (["MODEL", "wanda", "--seq-len", "4096"], ["positions"]),
    (["MODEL", "wanda", "--seq-len", "1"], ["nothing to predict"]),
    (["MODEL", "wanda", "--dtype", "bfloat16", "--scope", "x.*"], ["matches no site"]),
    (["MODEL", "row | wanda | nm"], ["0.attn.q", "keeps"]),
    (["MODEL", "wanda", "--samples", "none"], ["none"]),
    (["MODEL", "wanda", "--seed", "-1"], ["-1", "whole number"]),
    (["MODEL", "wanda", "--seed", "9" * 30], ["whole number"]),
], ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_bad_arguments_are_refused(capsys, tiny_lm, tmp_path, argv, words):
    argv = [str(tiny_lm) if a == "MODEL" else a for a in argv]
    try:
        code = cli.main(["trim", *argv, "-o", str(tmp_path / "o"), "-q"])
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert code == 2 and len(err.strip().splitlines()) == 1 and all(w in err for w in words), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, content, words", [
    ("empty.txt", b"", ["no text"]), ("bin.txt", b"\x00\xff\xfe\x01", ["text"]), ("zero.txt", b"abc\x00def", ["binary"]),
    ("short.txt", b"def f(): pass", ["shorter than one sequence"]), ("bad.jsonl", b"{\n", ["line 1"]),
])
def test_bad_calibration_text_is_refused(capsys, tiny_lm, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    code, _, err = run(capsys, "trim", tiny_lm, "wanda", "-o", tmp_path / "o", "--calib", tmp_path / name, *FAST)
    assert code == 2 and len(err.strip().splitlines()) == 1 and all(w in err for w in words), err
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("tensors, words", [
    ({"ids": torch.zeros(4, 32, dtype=torch.long)}, ["input_ids"]), ({"input_ids": torch.zeros(0, 32, dtype=torch.long)}, ["samples"]),
    ({"input_ids": torch.zeros(4, 32)}, ["whole numbers"]), ({"input_ids": torch.full((4, 32), 5000)}, ["5000", "4096"]),
    ({"input_ids": torch.zeros(4, 32, dtype=torch.long), "mask": torch.zeros(3, 32)}, ["disagree"]),
], ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_bad_calibration_tensors_are_refused(capsys, tiny_lm, tmp_path, tensors, words):
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "x.safetensors")
    code, _, err = run(capsys, "trim", tiny_lm, "wanda", "-o", tmp_path / "o", "--calib", tmp_path / "x.safetensors", *FAST)
    assert code == 2 and len(err.strip().splitlines()) == 1 and all(w in err for w in words), err
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_narrow_dtype_would_round_what_it_writes(capsys, tiny_lm, tmp_path, calib):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32).save_pretrained(tmp_path / "m")
    code, _, err = trim(capsys, tmp_path / "m", "magnitude", tmp_path / "o", calib, "--dtype", "bfloat16")
    assert code == 2 and "narrower" in err and not (tmp_path / "o").exists()


def test_output_inside_the_input_and_not_enough_disk(capsys, tiny_lm, tmp_path, calib, monkeypatch):
    code, _, err = trim(capsys, tiny_lm, "magnitude", tiny_lm / "o", calib)
    assert code == 2 and "inside the input" in err and not (tiny_lm / "o").exists()
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 9, 1))
    code, _, err = trim(capsys, tiny_lm, "magnitude", tmp_path / "o", calib)
    assert code == 2 and "not enough disk" in err and list(tmp_path.iterdir()) == []


def test_no_tokenizer_and_no_calib(capsys, tiny_lm, tmp_path):
    model = copy(tiny_lm, tmp_path / "m")
    for f in model.glob("tokenizer*"):
        f.unlink()
    code, _, err = run(capsys, "trim", model, "wanda", "-o", tmp_path / "o", *FAST)
    assert code == 2 and "no tokenizer" in err and "--calib" in err


def test_catalogue_lists_everything(capsys):
    code, out, _ = run(capsys, "catalogue", "--json")
    found = json.loads(out)
    assert code == 0 and {"score/wanda", "edit/sparsegpt", "budget/owl"} <= set(found["methods"]) and "dass" in found["recipes"]
    assert all(m["Formula"] and m["Source"] and m["Deviations"] for m in found["methods"].values())
    code, out, _ = run(capsys, "catalogue", "--axis", "format")  # every format says what runs it here
    assert code == 0 and out.count("here: ") == sum(k.startswith("format/") for k in found["methods"])
    code, _, err = run(capsys, "catalogue", "wnada")
    assert code == 2 and "wanda" in err


def test_verify_says_what_is_wrong_with_its_file(capsys, tmp_path):
    code, _, err = run(capsys, "verify", "wanda", "-o", tmp_path / "none" / "rows.jsonl", "-q")
    assert code == 2 and "no directory" in err
    (tmp_path / "rows.jsonl").write_text('{"model": "x"\n')
    code, _, err = run(capsys, "verify", "wanda", "-o", tmp_path / "rows.jsonl", "-q")
    assert code == 2 and "line 1" in err
    code, _, err = run(capsys, "verify", "wanda", "--setting", "4-bit", "-q")
    assert code == 2 and "no setting '4-bit'; close: 4-bits" in err


def test_inspect_names_every_kind_of_layer(capsys, tiny_lm, calib):
    code, out, _ = run(capsys, "inspect", tiny_lm, "--calib", calib, "--samples", "2", "--seq-len", "32", "-q")
    assert code == 0 and all(word in out for word in ("attn.q", "mlp.down", "changes its input least"))


def test_bench_counts_what_the_model_holds(capsys, tiny_lm):
    code, out, _ = run(capsys, "bench", tiny_lm, "--prompt", "4", "--new", "4", "--dtype", "bfloat16", "--json", "-q")
    found = json.loads(out)
    assert code == 0 and found["dtype"] == "bfloat16" and found["rss_bytes"] > 0
    code, out, _ = run(capsys, "bench", tiny_lm, "--against", tiny_lm, "--prompt", "4", "--new", "4", "-q")
    assert code == 0 and "resident" in out and "ratio" in out


def test_the_card_says_how_to_make_it_again(capsys, tiny_lm, tmp_path, calib):
    assert trim(capsys, tiny_lm, "wanda", tmp_path / "o", calib, "--keep", "0.25")[0] == 0
    card = (tmp_path / "o" / "README.md").read_text()
    command = next(text for text in card.splitlines() if text.startswith("trimtab trim"))
    assert f"--calib {calib} --text {calib}" in command and "keep=0.25" in command and "--samples 4" in command
    assert "out" not in json.loads((tmp_path / "o" / "trimtab.json").read_text())  # a directory may be moved


def test_generate_continues(capsys, tiny_lm):
    code, out, _ = run(capsys, "generate", tiny_lm, "def f(", "--max-new-tokens", "5", "--json")
    assert code == 0 and isinstance(json.loads(out)["text"], str)
    import trimtab as tt

    ids = list(tt.load(tiny_lm).generate("def f(", max_new_tokens=5, return_ids=True))
    assert ids == list(tt.load(tiny_lm).generate("def f(", max_new_tokens=5, return_ids=True)) and len(ids) <= 5


@pytest.mark.parametrize("notes", ["{", "[]", "[" * 100_000])
def test_damaged_notes_are_one_line(capsys, tiny_lm, tmp_path, calib, notes):
    model = copy(tiny_lm, tmp_path / "m")
    (model / "trimtab.json").write_text(notes)
    for name, *more in (("generate", "x"), ("bench",), ("eval", "--text", calib), ("inspect",)):
        code, out, err = run(capsys, name, model, *more)
        assert (code, out, err.count("\n")) == (2, "", 1), (name, err)
        assert "trimtab.json is not" in err and "remove it, or write the directory again" in err


def test_ready_inputs_are_drawn_by_the_seed(tiny_lm, tmp_path):
    from safetensors.torch import save_file

    from trimtab.core import data
    from trimtab.network.stream import Network

    ids = torch.arange(8 * 16).view(8, 16)
    save_file({"input_ids": ids}, tmp_path / "x.safetensors")
    net = Network.open(tiny_lm)

    def drawn(samples, seed):
        found = data.prepare(net, (str(tmp_path / "x.safetensors"),), "calibration", samples, 16, seed)
        return [int(b["input_ids"][0, 0]) // 16 for b in found]

    assert drawn(8, 0) == drawn(20, 1) == list(range(8))
    draws = {tuple(drawn(3, seed)) for seed in range(6)}
    assert len(draws) > 1 and all(len(set(d)) == 3 and list(d) == sorted(d) for d in draws)
    assert drawn(3, 4) == drawn(3, 4) and drawn(3, None) == [0, 1, 2]


def test_built_in_models_go_by_their_names(capsys):
    for name, activation in (("builtin:lm", "silu"), ("builtin:lm-relu", "relu")):
        path = cli.find_model(name)
        assert json.loads((path / "config.json").read_text())["hidden_act"] == activation and builtin.name_of(path) == name
    assert builtin.name_of(path.parent) is None
    assert cli.main(["inspect", "builtin:lmx"]) == 2
    assert capsys.readouterr().err.splitlines() == ["trimtab: no built-in model 'builtin:lmx'; there are builtin:lm and builtin:lm-relu"]
