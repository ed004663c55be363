"""A search from the model to the finished folder."""
from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab as tt
from trimtab.cli import main
from trimtab.core import data, line, spec
from trimtab.core.calibrate import StatCache
from trimtab.core.measured import loss_behind
from trimtab.core.types import BadInput, Failed
from trimtab.network.stream import Network
from trimtab.search import search as search_
from trimtab.search import timing
from trimtab.search.edited import Edited, tidy
from trimtab.search.options import DENSE, DROP, OPTIONS
from trimtab.search.quality import Assembled, InBytes, Judge
from trimtab.search.space import Space, recipe_of, space_of
from trimtab.search.timing import Runs, fastest_dense, prompts_of

FEW = (DENSE, "int8", "int4", "neurons50", DROP)
SMALL = {"samples": 4, "seq_len": 32, "proof_tokens": 128, "context": 8, "trials": 16, "points": 2, "threads": 1}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of its own, and few options."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(search_, "opened_by", lambda runtime: [OPTIONS[n] for n in FEW if runtime in OPTIONS[n].formats])
    monkeypatch.setitem(timing.race.__kwdefaults__, "rounds", 4)
    return tmp_path / "home"


@pytest.fixture
def small(calib):
    return {**SMALL, "calib": (calib,), "text": (calib,)}


@pytest.mark.parametrize("chosen", [
    {"0.attn": "int4"}, {"1.mlp": DROP}, {"1.mlp": "neurons50"}, {"2.attn": "heads50"}, {"0.mlp": "2:4", "1.attn": "int8"},
    {"1.attn": DROP, "1.mlp": DROP}, {"0.mlp": "neurons50", "2.mlp": DROP}, {"2.mlp": "rank50"}, {"1.attn": "gate50"},
], ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_a_network_assembled_is_the_one_that_is_written(tiny_lm, calib, tmp_path, monkeypatch, chosen, packed):
    """What choices say is what the model says that `trim` makes of them, where its passes see the dense network as options do."""
    net = Network.open(tiny_lm)
    samples = data.prepare(net, (calib,), "calibration", 8, 32, 0)
    space, edited = space_of(net, OPTIONS.values()), Edited(net, samples[:4], tmp_path / "home", StatCache())
    for place, option in chosen.items():
        edited.make(OPTIONS[option], place.partition(".")[2], lambda s, d, n: None)
    told = Assembled(net, space, samples[4:], edited.read, tmp_path, in_bytes=packed)
    recipe = recipe_of(space, chosen)
    recipe = replace(recipe, passes=tuple(replace(p, order="dense") for p in recipe.passes))
    files = {"pack": line.pack.AS_RECIPE, "pack_dtype": "float32", "head": "keep"} if packed else {}
    opts = line.Options(samples=4, seq_len=32, calib=(calib,), text=(calib,), proof_tokens=64, speed=False, fresh=False, **files)
    prepare = data.prepare  # of 8 samples the first 4 are not those of 4 asked for
    monkeypatch.setattr(data, "prepare", lambda *a: samples[:4] if a[2] == "calibration" else prepare(*a))
    line.trim(tiny_lm, recipe, tmp_path / "out", opts, lambda s, d, n: None)
    other = Network.open(tmp_path / "out")
    its = Written(other, space_of(other, []), samples[4:], edited.read, tmp_path)
    off, tokens = 0.0, 0
    for b, batch in enumerate(told.batches):  # the divergence in the words of torch
        p, q = (w.net.finish(w._own[b], w.contexts[b], batch)[:, :-1].flatten(0, 1).log_softmax(-1) for w in (told, its))
        off += float(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True))
        tokens += len(p)
    assert told.rises([space.dense]) == [0.0] and off > 0
    assert told.rises([space.dense | chosen])[0] == pytest.approx(off / tokens, rel=1e-3, abs=1e-6)


class Written(Assembled):
    """A network as its files say."""

    def _block(self, i, choices):
        module = self.net.block(i)
        self.net.as_said(module, i, self.net.said(i))
        self.net.as_packed(module, i)
        return module


@pytest.mark.parametrize("option", ["int8", "int4", "int3", "2:4-int4"])
def test_what_has_codes_meets_its_inputs_in_bytes_as_its_kernels_do(option, tmp_path):
    torch.manual_seed(0)
    model = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=320, num_hidden_layers=1, num_attention_heads=4,
                                 num_key_value_heads=2, max_position_embeddings=64)).save_pretrained(model)
    net = Network.open(model)
    samples = [{"input_ids": torch.randint(0, 512, (1, 32))} for _ in range(6)]
    space, edited = space_of(net, OPTIONS.values()), Edited(net, samples[:4], tmp_path / "home", StatCache())
    edited.make(OPTIONS[option], "mlp", lambda s, d, n: None)
    told = Assembled(net, space, samples[4:], edited.read, tmp_path)
    layouts = timing.Layouts(model, net, space, samples, tmp_path / "home", tmp_path, batch=1, context=8, machine={})
    other = Network.open(layouts.lay_out(space.uniform(option), 0))
    packed = other.block(0)
    other.as_packed(packed, 0)
    floats = Assembled(net, space, samples[4:], edited.read, tmp_path, in_bytes=False)
    for walk, choices, rounded in ((told, {"0.mlp": option}, True), (told, {}, False), (floats, {"0.mlp": option}, False)):
        block = walk._block(0, space.dense | choices)
        for name in ("gate_proj", "down_proj"):
            layer, theirs = block.mlp.get_submodule(name), packed.mlp.get_submodule(name)
            x = torch.randn(1, 5, layer.weight.shape[1])
            met = [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, InBytes)]
            assert len(met) == rounded
            if rounded:
                weight = theirs(torch.eye(layer.weight.shape[1])).T  # one input each, which bytes hold as it is
                assert torch.allclose(theirs(x), met[0](layer, (x,))[0] @ weight.T, rtol=1e-3, atol=1e-4)
                assert not torch.allclose(theirs(x), x @ weight.T, rtol=1e-3, atol=1e-4)
                assert torch.equal(layer(x), torch.nn.functional.linear(InBytes(met[0].group)(layer, (x,))[0], layer.weight))


def test_candidates_that_begin_alike_are_computed_once(tiny_lm, calib, tmp_path, monkeypatch):
    net = Network.open(tiny_lm)
    samples = data.prepare(net, (calib,), "calibration", 8, 32, 0)
    space, edited = space_of(net, OPTIONS.values()), Edited(net, samples[:4], tmp_path / "home", StatCache())
    for option in ("int4", DROP):
        edited.make(OPTIONS[option], "mlp", lambda s, d, n: None)
    told, ran = Assembled(net, space, samples[4:], edited.read, tmp_path), []
    run = net.run
    monkeypatch.setattr(net, "run", lambda module, i, x, context: ran.append(i) or run(module, i, x, context))
    batches = len(told.batches)
    found = told.rises([space.dense | {"2.mlp": "int4"}, space.dense | {"2.mlp": DROP}, space.dense | {"1.mlp": "int4"}])
    assert [ran.count(i) // batches for i in range(3)] == [1, 2, 3]
    ran.clear()
    assert told.rises([space.dense | {"2.mlp": DROP}]) == found[1:2] and not ran


def test_what_was_edited_once_is_known_again(tiny_lm, calib, tmp_path, monkeypatch):
    net = Network.open(tiny_lm)
    samples = data.prepare(net, (calib,), "calibration", 4, 32, 0)
    edited = Edited(net, samples, tmp_path, StatCache())
    edited.make(OPTIONS["int4"], "mlp", lambda s, d, n: None)
    monkeypatch.setattr(line, "run_sweeps", lambda *a: pytest.fail("made again"))
    Edited(net, samples, tmp_path, StatCache()).make(OPTIONS["int4"], "mlp", lambda s, d, n: None)
    assert not Edited(net, samples[:3], tmp_path, StatCache()).has(OPTIONS["int4"], "mlp")  # other text
    assert not edited.has(OPTIONS["int4"], "attn") and edited.has(OPTIONS[DENSE], "attn")
    tidy(tmp_path, 0)
    assert not edited.has(OPTIONS["int4"], "mlp")


def test_from_the_model_to_the_folder(tiny_lm, small, home, tmp_path, monkeypatch):
    out = tmp_path / "out"
    result = tt.search(tiny_lm, out, min_speed=0.5, **small)
    assert sorted(p.name for p in out.iterdir()) == ["models", "report.html", "search.json"]
    assert not (tmp_path / "out.partial").exists()
    said = json.loads((out / "search.json").read_text())
    assert {k: v for k, v in result.items() if k != "out"} == said
    assert result["meets"] and result["front"] and {b["family"] for b in result["baselines"]} >= {"dense", "quantise"}
    assert "<script src" not in (out / "report.html").read_text() and "answer" in (out / "report.html").read_text()
    for p in [*result["front"], *result["baselines"][1:]]:
        folder = out / p["out"]
        assert p["bytes"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        assert spec.parse(p["recipe"]).passes == spec.load(str(folder / "recipe.yaml")).passes
        again = tt.prove(tiny_lm, folder, text=small["text"], tokens=128, seq_len=32, speed=False)
        assert again["after"]["perplexity"] == pytest.approx(p["perplexity"], rel=1e-6)
        assert p["speed"] > 0 and p["predicted_speed"] > 0 and set(p["times"]) >= {"rest", "beside"}
        assert "".join(tt.load(folder).generate("def f1(a, b):", max_new_tokens=4)) is not None
    front = result["front"]
    assert not any(a["perplexity"] <= b["perplexity"] and a["speed"] > b["speed"] and a["bytes"] < b["bytes"] for a in front for b in front)
    assert len(result["trials"]) >= 16 and result["proxies"][0]["n"] >= 16
    whole = min(result["whole"]["tried"], key=lambda w: w["rise"])
    assert len(result["whole"]["tried"]) == 4 and {k: result["whole"][k] for k in ("rewrite", "repair")} == {
        k: whole[k] for k in ("rewrite", "repair")}
    for p in [*result["front"], *result["baselines"][1:]]:
        assert all(("rewrite/awq" in x) == (whole["rewrite"] == "awq") for x in p["recipe"].split(" ; ") if "edit/gptq" in x)
    # A second search of the same model makes no option and no layout again.
    monkeypatch.setattr(Edited, "make", lambda self, option, group, tick: self.has(option, group) or pytest.fail("made again"))
    monkeypatch.setattr("trimtab.search.timing.Layouts.lay_out", lambda *a: pytest.fail("laid out again"))
    assert tt.search(tiny_lm, tmp_path / "two", max_bytes=10**6, **small)["front"]


def test_a_search_that_was_stopped_goes_on(tiny_lm, small, home, tmp_path, monkeypatch):
    out, finish = tmp_path / "out", search_.Finisher.finish

    def stops(self, choices, name):
        if name == "answer":
            raise KeyboardInterrupt
        return finish(self, choices, name)

    monkeypatch.setattr(search_.Finisher, "finish", stops)
    with monkeypatch.context() as fewer, pytest.raises(Failed, match="--resume"):
        fewer.setattr(search_, "opened_by", lambda runtime: [OPTIONS[n] for n in FEW if n != "int8"])  # what there was time for
        tt.search(tiny_lm, out, min_speed=0.5, **small)
    assert not out.exists() and (tmp_path / "out.partial" / "trials.db").exists()
    with pytest.raises(BadInput, match="left from an unfinished run"):
        tt.search(tiny_lm, out, min_speed=0.5, **small)
    monkeypatch.setattr(search_.Finisher, "finish", finish)
    with pytest.raises(BadInput, match="belongs to another plan"):
        tt.search(tiny_lm, out, min_speed=0.5, **{**small, "seed": 1}, resume=True)
    result = tt.search(tiny_lm, out, min_speed=0.5, **small, resume=True)
    assert len(result["trials"]) >= 32 and not (tmp_path / "out.partial").exists()  # those of both runs
    with pytest.raises(BadInput, match="exists; choose another -o"):
        tt.search(tiny_lm, out, min_speed=0.5, **small)


def test_a_search_that_goes_on_makes_models_anew_that_are_others_now(tiny_lm, small, home, tmp_path, monkeypatch):
    """What stood under a name before it was stopped had another recipe: options are there now that were not."""
    out, finish = tmp_path / "out", search_.Finisher.finish

    def stops(self, choices, name):
        finish(self, {p: "int8" if o != "keep" else o for p, o in choices.items()}, name)
        finish(self, {p: "int4" if p == "0.mlp" else o for p, o in self.space.dense.items()}, "left")
        raise KeyboardInterrupt

    monkeypatch.setattr(search_.Finisher, "finish", stops)
    with monkeypatch.context() as fewer, pytest.raises(Failed, match="--resume"):
        fewer.setattr(search_, "WHOLES", (search_.PLAIN,))
        tt.search(tiny_lm, out, min_speed=0.5, **small)
    monkeypatch.setattr(search_.Finisher, "finish", finish)
    result = tt.search(tiny_lm, out, min_speed=0.5, **small, resume=True)
    assert {p.name for p in (out / "models").iterdir()} <= {p["name"] for p in [*result["front"], *result["baselines"]]} | {
        p["out"].removeprefix("models/") for p in [*result["front"], *result["baselines"][1:]]} | {f"p{k}" for k in range(9)}
    assert not (out / "models" / "left").exists()


def test_plain_models_are_opened_by_others(tiny_lm, small, home, tmp_path):
    from transformers import AutoModelForCausalLM

    result = tt.search(tiny_lm, tmp_path / "out", formats="plain", max_bytes=10**6, **small)
    used = {o for p in result["front"] for o in p["choices"].values()}
    assert used <= {DENSE, DROP, "neurons50", "keep"} and any("decoder" in w for w in result["warnings"])
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / result["front"][0]["out"])


def test_what_has_no_codes_is_no_point_for_runtimes_that_open_codes_alone(tiny_lm, small, home, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(search_, "Assembled", lambda *a, **more: made.append(more["in_bytes"]) or Assembled(*a, **more))
    result = tt.search(tiny_lm, tmp_path / "out", formats="compressed-tensors", **{**small, "points": 5})
    assert made == [False]  # as its proof has them
    assert all(set(p["choices"].values()) != {DENSE, "keep"} for p in result["front"])
    assert all((tmp_path / "out" / f"{p['out']}-compressed-tensors").is_dir() for p in result["front"])


@pytest.mark.parametrize(("limits", "says"), [
    ({"min_speed": 1e5}, "--min-speed 100000x cannot be: .* ask for less"),
    ({"max_bytes": 10}, "--max-bytes 0.0MB cannot be: .* more than"),
    ({"max_loss": 0.0001, "max_bytes": 272000}, "cannot be had here, as the tables tell: .*the nearest is"),
])
def test_what_cannot_be_is_said_early_and_nothing_is_written(tiny_lm, small, home, tmp_path, monkeypatch, limits, says):
    def rises(self, candidates):  # weights drawn at random lose nothing by anything
        return [0.5 * sum(o != DENSE for p, o in c.items() if p != "head") for c in candidates]

    monkeypatch.setattr(Assembled, "rises", rises)
    monkeypatch.setattr(Judge, "within", lambda self, choices, most: rises(None, [choices])[0] <= most)
    with pytest.raises(BadInput, match=says):
        tt.search(tiny_lm, tmp_path / "out", **limits, **small)
    assert not list(tmp_path.glob("out*"))


def test_bad_input_is_one_line(tiny_lm, small, home, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    packed = tmp_path / "packed"
    tt.trim(tiny_lm, "rtn(bits=8)", packed, pack="recipe", speed=False, fresh=False, proof_tokens=64, seq_len=32, text=small["text"])
    for arguments, says in (
        ([str(tiny_lm), "-o", str(tmp_path / "mine"), "--force"], "is no output of trimtab and is not replaced"),
        ([str(tiny_lm), "-o", str(tmp_path / "o"), "--formats", "onnx"], "invalid choice"),
        ([str(tiny_lm), "-o", str(tmp_path / "o"), "--minutes", "0"], "is not a number of minutes"),
        ([str(tiny_lm), "-o", str(tmp_path / "o"), "--min-speed", "fast"], "is not a number of times"),
        ([str(packed), "-o", str(tmp_path / "o")], "search from the model it was made from"),
        ([str(tmp_path / "none"), "-o", str(tmp_path / "o")], "none"),
    ):
        try:
            code = main(["search", *arguments, "-q"])
        except SystemExit as e:
            code = e.code
        said = capsys.readouterr().err.strip()
        assert code == 2 and says in said and "\n" not in said, said
    assert not list(tmp_path.glob("o*")) and (tmp_path / "mine" / "notes.txt").exists()


def test_rewrites_and_repairs_are_chosen_for_all_by_what_is_lost(tiny_lm, calib, tmp_path):
    net = Network.open(tiny_lm)
    space = space_of(net, [OPTIONS[n] for n in FEW])
    lost = {"int4": 3.0, "int4-awq-gain": 2.0, "int4-gain": 1.0, "int4-awq": 4.0}
    made = []

    class Told:
        def rises(self, candidates):
            return [lost[c["0.mlp"]] for c in candidates]

    def chosen(seconds, of=space):
        made.clear()
        edited = Edited(net, data.prepare(net, (calib,), "calibration", 4, 32, 0), tmp_path, StatCache())
        return search_.whole_of(net, of, edited, Told(), lambda its: made.extend(i["option"] for i in its) or [],
                                search_.Clock(time.monotonic(), seconds), lambda s, d, n: None)

    whole, tried = chosen(math.inf)
    assert (whole.rewrite, whole.repair) == ("", "gain") and [t["rise"] for t in tried] == [3.0, 2.0, 1.0, 4.0]
    assert set(made) == set(lost)
    assert {o for p in space.made(whole).places for o in p.options} == {DENSE, "int8", "int4-gain", "neurons50", DROP}
    assert recipe_of(space.made(whole), {"0.mlp": "int4-gain"}).text == "0.mlp.*: grid/int(bits=4,group=128) | edit/gptq | repair/gain"
    assert chosen(0.0)[0] == search_.PLAIN and set(made) == {"int4"}  # no time
    assert chosen(math.inf, space.only(("neurons50",))) == (search_.PLAIN, []) and not made


def test_what_is_searched_on_is_no_text_of_calibration(tiny_lm, calib, tmp_path):
    net, few = Network.open(tiny_lm), {"calib": (calib,), "seq_len": 40}
    calibration, split, more = search_.texts_of(net, search_.Asked(samples=4, **few))
    assert [len(calibration), len(split)] == [4, search_.SPLIT] and more

    def runs(samples):
        return {tuple(s["input_ids"][0, i:i + search_.ALIKE].tolist()) for s in samples for i in range(41 - search_.ALIKE)}

    assert not runs(calibration) & runs([*split, *more])
    assert runs(calibration) & runs(data.prepare(net, (calib,), "calibration", 4 + 256, 40, 0)[4:])  # drawn blindly it would be
    short = tmp_path / "short.txt"
    short.write_text("all of it is in every sample " * 12)
    _, split, _ = search_.texts_of(net, search_.Asked(calib=(short,), samples=4, seq_len=32))  # none is left: then all of it
    assert len(split) == search_.SPLIT


def test_what_is_left_of_the_time_is_raced_in():
    class Fast:
        def __init__(self):
            self.places = ["0.mlp"]

        def timed(self, prompts, new):
            time.sleep(0.001)
            return 1.0, [0.5, 0.25]

    began, told = time.monotonic(), []
    runs = timing.race({"a": Fast(), "b": Fast()}, [], rounds=3, until=began + 0.3, tick=lambda d, n: told.append((d, n)))
    assert 0.2 < time.monotonic() - began <= 0.3 + 0.1 and len(runs["a"].steps) == len(runs["b"].steps) > 3
    assert told[-1] == (3, 3) and told.count((3, 3)) == 1
    assert len(timing.race({"a": Fast()}, [], rounds=3)["a"].steps) == 3


def test_who_races_first_is_last_in_the_next_round():
    """Whoever comes behind the same one in every round is told by what that one leaves in the caches."""
    turns: list[str] = []

    class Fast:
        def __init__(self, name):
            self.name, self.places = name, ["0.mlp"]

        def timed(self, prompts, new):
            turns.append(self.name)
            return 1.0, [0.5]

    timing.race({n: Fast(n) for n in "abc"}, [], rounds=3)
    assert "".join(turns) == "abc" "cba" "abc" "cba"


def test_the_answer_to_a_loss_is_the_fastest_that_is_within_it_with_its_error():
    from tests.search.test_front import made

    space, costs, _ = made(0)
    choices = [space.dense | {"0.mlp": o} for o in ("drop", "int4", "int8")] + [space.dense]
    trials = [search_.Trial(c, rise, us, 10 * k, "") for k, (c, rise, us) in enumerate(
        zip(choices, (0.4, 0.2, 0.08, 0.0), (10.0, 20.0, 30.0, 40.0), strict=True))]
    true = {10.0: 0.11, 20.0: 0.07, 30.0: 0.03, 40.0: 0.0}
    asked, among = [], []

    class Told:
        def within(self, choices, most):
            asked.append(choices)
            return true[next(t.us for t in trials if t.choices == choices)] <= most

        def least(self, candidates):
            among.append(len(candidates))
            return min(range(len(candidates)), key=lambda k: true[next(t.us for t in trials if t.choices == candidates[k])])

    def answer(**limits):
        asked.clear()
        found = search_.answer_of(trials, search_.Limits(**limits), costs, Told())
        return found and found.us

    assert answer(loss=math.expm1(0.1)) == 20.0 and len(asked) == 2  # a divergence of 0.2, and a loss of 0.07 at most
    assert answer(loss=math.expm1(0.05)) == 30.0 and answer(loss=math.expm1(0.12)) == 10.0
    assert answer(loss=math.expm1(0.0695)) == 30.0  # of perplexity, not of nats: 7.2 %
    assert answer(loss=0.0) == 40.0 and not asked
    assert answer(loss=math.expm1(0.05), bytes=10) is None and answer(loss=math.expm1(0.08), bytes=10) == 20.0
    assert answer(speed=costs.dense / 20.0) == 20.0 and not asked
    trials.append(replace(trials[0], choices=space.dense | {"1.mlp": "drop"}, rise=0.45, us=18.0))  # farther and slower than the first
    true[18.0] = 0.12
    assert answer(loss=math.expm1(0.1)) == 20.0
    true[18.0] = 0.05
    assert answer(loss=math.expm1(0.1)) == 18.0 and answer(loss=math.expm1(0.089)) == 20.0  # five times that is less than its divergence
    trials.pop()
    true[10.0] = 0.06  # by divergence 0.4 and 0.2: near enough that the loss says which is best
    assert answer(speed=costs.dense / 20.0) == 10.0 and among[-1] == 2
    trials[0] = replace(trials[0], rise=0.41)
    assert answer(speed=costs.dense / 20.0) == 20.0 and among[-1] == 1
    true[19.5] = true[20.0]
    trials += [replace(trials[1], choices=trials[1].choices | {"head": "int8"}, us=19.5)]
    assert answer(speed=costs.dense / 20.0) == 19.5 and among[-1] == 1  # the same sublayers with another head
    trials.pop()
    trials += [replace(trials[1], choices=trials[1].choices | {"0.attn": a, "1.attn": b, "1.mlp": c}, us=19.0, rise=0.3)
               for a, b, c in [*itertools.product((DENSE, "int8", "int4"), repeat=3)][1:]]
    true[19.0] = 0.08
    assert answer(speed=costs.dense / 20.0) == 20.0 and among[-1] == search_.FINALISTS


def test_a_loss_is_within_what_is_asked_by_its_error_on_as_much_text_as_that_takes(tiny_lm, calib, tmp_path, monkeypatch):
    net = Network.open(tiny_lm)
    samples = data.prepare(net, (calib,), "calibration", 4 + 4 + 12, 32, 0)
    space, edited = space_of(net, [OPTIONS[n] for n in FEW]), Edited(net, samples[:4], tmp_path, StatCache())
    edited.make(OPTIONS["neurons50"], "mlp", lambda s, d, n: None)
    told = Assembled(net, space, samples[4:8], edited.read, tmp_path, samples[8:])
    chosen = space.dense | {"1.mlp": "neurons50"}
    each = []
    for batch in samples[4:]:  # one sample at a time
        one = Assembled(net, space, [batch], edited.read, tmp_path)
        hidden = one._behind([one._key(chosen)])[one._key(chosen)]
        each.append(loss_behind(one, hidden) - one.dense)
    off = torch.tensor(each, dtype=torch.float64)

    def said(n, sign):  # by so many samples
        return float(off[:n].mean() + sign * 2 * off[:n].std() / n ** 0.5)

    met = []
    offs = Assembled.offs
    monkeypatch.setattr(Assembled, "offs", lambda self, c: met.append(len(self.samples)) or offs(self, c))

    def within(most, **more):
        met.clear()
        return Judge(told, **more).within(chosen, most)

    assert within(said(4, 1) + 1e-6) and met == [4]
    assert not within(said(4, -1) - 1e-6) and met == [4]
    for sign in (0.5, -0.5):  # between the mean and its bounds: more text is asked
        within((said(4, 0) + said(4, 2 * sign)) / 2)
        assert sum(met) > 4
    middle = said(4, 0)
    expected = next(((True, n) if said(n, 1) <= middle else (False, n) for n in (4, 8, 16) if not said(n, -1) <= middle < said(n, 1)),
                    (False, 16))
    assert (within(middle), sum(met)) == expected and sum(met) > 4
    assert not within(middle, until=0.0) and met == [4]  # no time
    assert Judge(told).within(space.dense, 0.0)
    assert list(told.texts())[1].samples == samples[8:12]


class Texts:
    """Candidates with a divergence, and what the loss of 16 sequences rises by in mean, with its noise, and a seed of that; in texts of
    4, 4 and 8 sequences."""

    def __init__(self, **candidates):
        self.candidates, self.met = candidates, []

    def rises(self, names):
        return [self.candidates[n][0] for n in names]

    def texts(self):
        for begin, end in ((0, 4), (4, 8), (8, 16)):
            def offs(name, begin=begin, end=end):
                self.met.append((name, end))
                _, mean, noise, seed = self.candidates[name]
                drawn = torch.randn(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                return (mean + noise * (drawn - drawn.mean()))[begin:end].tolist()

            yield SimpleNamespace(samples=[None] * (end - begin), offs=offs)


@pytest.mark.parametrize(("candidates", "best", "runs"), [
    ({"a": (0.10, 0.12, 0.001, 0), "b": (0.11, 0.08, 0.001, 1)}, "b", 2),  # text is sure: the other one leaves at once
    ({"a": (0.10, 0.12, 5.0, 0), "b": (0.16, 0.08, 5.0, 1)}, "a", 6),      # it says nothing: what lies nearer
    ({"a": (0.10, 0.12, 5.0, 0), "b": (0.16, 0.08, 5.0, 0)}, "b", 2),      # but where both of them meet the same with every sequence
    ({"a": (0.10, 0.11, 0.1, 0), "b": (0.101, 0.07, 0.1, 1)}, "b", 6),     # of what lies as near, what text says
    ({"a": (0.10, math.nan, 0.1, 0), "b": (0.16, 0.2, 0.1, 1)}, "b", 2),
    ({"a": (0.10, math.nan, 0.1, 0), "b": (0.16, math.inf, 0.1, 1)}, "a", 2),
    ({"a": (0.0, 0.0, 0.0, 0), "b": (0.0, 0.0, 0.0, 0)}, "b", 6),
    ({"a": (0.10, 0.1, 0.1, 0)}, "a", 0),
])
def test_of_what_lies_as_near_text_says_what_loses_the_least(candidates, best, runs):
    told = Texts(**candidates)
    names = sorted(candidates, reverse=True)
    assert (names[Judge(told).least(names)], len(told.met)) == (best, runs)


def test_it_is_asked_of_no_more_text_than_there_is_time_for():
    told = Texts(a=(0.1, 0.1, 0.1, 0), b=(0.1, 0.11, 0.1, 1))
    Judge(told, until=0.0).least(["a", "b"])
    assert told.met == [("a", 4), ("b", 4)]



def test_a_layout_whose_head_is_slow_is_opened_and_timed_once_more(tmp_path, monkeypatch):
    """What is the same in all layouts takes the same; where it does not, the rest of that turn is not believed."""
    opened = []

    class Decoder:
        def __init__(self, name):
            self.places, self.slow = ["0.mlp"], {"b": 2.0 if opened.count("b") < 2 else 1.0, "c": 2.0}.get(name, 1.0)

        def timed(self, prompts, new):
            return self.slow * 4.0, [self.slow, self.slow * 2.0]

    monkeypatch.setattr(timing, "open_decoder", lambda path: opened.append(path.name) or Decoder(path.name))
    monkeypatch.setitem(timing.race.__kwdefaults__, "rounds", 3)
    layouts = object.__new__(timing.Layouts)
    layouts.samples, layouts.batch, layouts.context = [{"input_ids": torch.arange(20)[None]}], 1, 8
    layouts.space = Space(1, ())
    some = {n: tmp_path / n for n in "abcde"}
    dense = {n: Decoder("dense") for n in timing.AS_IT_IS}
    found = layouts._raced(dense, some, {n: {"head": "keep"} for n in some}, lambda *a: None, math.inf)
    assert opened == [*"abcde", "b", "c", "c"] and {n: run.steps[0] for n, (run, _) in found.items()} == {
        "a": 4.0, "b": 4.0, "c": 8.0, "d": 4.0, "e": 4.0}
    opened.clear()
    assert layouts._raced(dense, some, {n: {"head": "keep"} for n in some}, lambda *a: None, 0.0)["b"][0].steps[0] == 8.0  # no time
    assert opened == [*"abcde"]


def test_prompts_and_runs():
    samples = [{"input_ids": torch.arange(20)[None]}, {"input_ids": torch.arange(20, 40)[None]}]
    one, two = prompts_of(samples, 2, 8)
    assert one.tolist() == list(range(8)) and two.tolist() == list(range(8, 16))
    runs = Runs(["0.attn"], [3.0, 1.0, 2.0], [[1.0, 0.5], [0.4, 0.4], [0.6, 0.3]])
    other = Runs([], [6.0, 6.0, 2.0], [])
    assert runs.step == 2.0 and runs.against(other) == [2.0, 6.0, 1.0] and runs.speed(other) == 2.0
    assert runs.shares(other) == pytest.approx({"0.attn": 1 / 6, "rest": 0.5 / 6, "beside": 1.5 / 6})


def test_a_machine_that_is_slow_for_a_while_changes_no_speed():
    """Of nine rounds four are half as fast, for both, and one turns in the middle: the medians of each for itself say 1."""
    slow = [1, 1, 2, 2, 2, 2, 1, 1, 1]
    dense = Runs(["0.mlp"], [4.0 * s for s in slow], [[2.0 * s, 1.0 * s] for s in slow])
    own = Runs(["0.mlp"], [2.0 * s for s in slow[:-1]] + [4.0], [[0.5 * s, 1.0 * s] for s in slow[:-1]] + [[1.0, 2.0]])
    assert own.speed(dense) == 2.0 and own.shares(dense) == {"0.mlp": 0.125, "rest": 0.25, "beside": 0.125}
    assert dense.step / own.step == 1.0
    both = {"dense bfloat16": dense, "dense float32": own, "layout": own}
    assert fastest_dense(both) == "dense float32" and fastest_dense(both | {"dense float32": dense}) == "dense bfloat16"


def test_speeds_are_told_against_the_model_as_it_is(tiny_lm, calib, tmp_path, monkeypatch):
    """And not against one of the layouts, of which that with the smaller head and nothing else is faster."""
    def raced(decoders, prompts, tick):
        steps = {"head int8": 3.0, "dense float32": 5.0}
        return {n: Runs(d.places, [steps.get(n, 4.0)] * 3, [[0.25] * (len(d.places) + 1)] * 3) for n, d in decoders.items()}

    monkeypatch.setattr(timing, "race", raced)
    net = Network.open(tiny_lm)
    samples = data.prepare(net, (calib,), "calibration", 4, 32, 0)
    space = space_of(net, [OPTIONS[DENSE], OPTIONS["int8"]])
    costs = timing.Layouts(tiny_lm, net, space, samples, tmp_path / "home", tmp_path, batch=1, context=8, machine={}).costs(
        lambda s, d, n: None)
    assert costs.dense == 4e6 and costs.speed(space.dense) == 1.0 and costs.us["0.mlp"]["int8"] == 0.25e6


def test_a_search_that_finished_nothing_says_so(tiny_lm, small, home, tmp_path, monkeypatch):
    monkeypatch.setattr(search_, "WORST", -1.0)
    with pytest.raises(Failed, match="no model of the front was finished in the time given"):
        tt.search(tiny_lm, tmp_path / "out", **small)
    assert not (tmp_path / "out").exists()
