"""Trials: kept in a storage, made again where their worker died, and the front only ever better."""
from __future__ import annotations

import math
import time

import pytest

from tests.search.test_front import added, every, made
from trimtab.core.types import BadInput
from trimtab.search.front import Limits
from trimtab.search.options import HEAD
from trimtab.search.trials import Search, Trial, front_of, open_study, redo, study_of, trials_of


def searching(path, seed=0, evaluate=None, **how):
    space, costs, rises = made(seed)
    study = open_study(str(path / "trials.db"), seed=seed)

    def true(candidates):  # what is dropped together costs more than in sum
        return [added(c, rises) + 0.3 * math.comb(sum(o == "drop" for o in c.values()), 2) for c in candidates]

    return Search(study, space, costs, rises, evaluate or true, seed, **how), true


def test_the_front_only_gets_better_and_finds_the_best(tmp_path):
    work, true = searching(tmp_path)
    work.queue([work.space.dense], "program")
    before = []
    for _ in range(6):
        work.run(math.inf, most=24)
        now = front_of(trials_of(work.study, work.space))
        for t in before:
            assert any(n.rise <= t.rise and n.us <= t.us and n.bytes <= t.bytes for n in now)
        before = now
    assert len(trials_of(work.study, work.space)) == 144
    assert {t.by for t in trials_of(work.study, work.space)} >= {"program", "evolution", "predictor"}
    for limit in (20.0, 30.0, 40.0):  # 512 candidates in all
        least = min(true([c])[0] for c in every(work.space) if work.costs.time(c) <= limit)
        assert min(t.rise for t in before if t.us <= limit) <= least + 0.05


def test_trials_outlive_the_process_and_go_on(tmp_path):
    work, _ = searching(tmp_path)
    work.run(math.inf, most=16)
    again, _ = searching(tmp_path)
    assert len(trials_of(again.study, again.space)) == 16
    again.run(math.inf, most=8)
    assert len(trials_of(again.study, again.space)) == 24


def test_what_a_dead_worker_left_is_made_again(tmp_path):
    class Died(Exception):
        pass

    def dies(candidates):
        raise Died

    work, _ = searching(tmp_path, evaluate=dies, worker="7")
    work.queue([work.space.dense | {"0.mlp": "int4"}], "program")
    with pytest.raises(Died):
        work.run(math.inf, most=8)
    other, _ = searching(tmp_path)
    assert redo(other.study, "6") == 0 and redo(other.study, "7") == 8
    other.run(math.inf, most=8, guided=False)
    done = trials_of(other.study, other.space)
    assert len(done) == 8 and other.space.dense | {"0.mlp": "int4"} in [t.choices for t in done]
    assert redo(other.study) == 0


def test_time_is_kept_and_the_least_is_made_at_any_rate(tmp_path):
    work, _ = searching(tmp_path)
    assert work.run(time.monotonic() - 1, least=16) == 16
    assert work.run(time.monotonic() - 1) == 0


def test_trials_say_what_they_were(tmp_path):
    work, true = searching(tmp_path)
    work.queue([work.space.dense], "program")
    work.run(math.inf, most=8)
    first = trials_of(work.study, work.space)[0]
    assert first.choices == work.space.dense and first.rise == 0 and first.us == work.costs.time(work.space.dense) and first.by == "program"
    for t in trials_of(work.study, work.space):
        assert t.rise == pytest.approx(true([t.choices])[0]) and t.bytes == work.costs.size(t.choices) and HEAD in t.choices


def test_a_search_that_knows_more_options_goes_on_with_what_it_found(tmp_path):
    space, costs, rises = made(0)
    few = space.only(("int8",))
    store = str(tmp_path / "trials.db")

    def run(own):
        work = Search(study_of(store, "name", own, costs), own, costs, rises, lambda cs: [added(c, rises) for c in cs])
        had = trials_of(work.study, own)
        work.run(math.inf, most=8)
        return had, trials_of(work.study, own)

    def unlike(trials):
        return {tuple(sorted(t.choices.items())): (t.rise, t.us, t.bytes, t.by) for t in reversed(trials)}

    had, first = run(few)
    assert had == [] and len(first) == 8
    had, both = run(space)
    assert unlike(had) == unlike(first) and len(both) == len(had) + 8
    back, _ = run(few)  # of what was found since what lies in the smaller space
    assert unlike(back) == unlike(first) | {k: v for k, v in unlike(both).items() if {o for _, o in k} <= {"dense", "int8", "keep"}}
    assert trials_of(study_of(store, "name", space, costs, afresh=True), space) == trials_of(study_of(store, "name", few, costs), few) == []
    assert not trials_of(study_of(store, "another", space, costs), space)


def test_every_second_parent_lies_nearest_to_what_was_asked(tmp_path):
    work, _ = searching(tmp_path, limits=(Limits(), Limits(loss=0.1)))
    front = [Trial({"k": str(k)}, 0.001 * 1.5 ** k, 100.0 - k, 10, "") for k in range(30)]
    drawn = [int(work._parent(front)["k"]) for _ in range(600)]
    near = sorted(range(30), key=lambda k: abs(math.log(front[k].rise / (1.3 * math.log1p(0.1)))))[:5]
    assert 0.5 < sum(k in near for k in drawn) / 600 < 0.67 and len(set(drawn)) == 30
    work.limits = []
    assert sum(int(work._parent(front)["k"]) in near for _ in range(600)) / 600 < 0.25
    work.limits = [Limits(speed=work.costs.dense / 80.0)]
    assert sum(abs(front[int(work._parent(front)["k"])].us - 80.0) <= 2 for _ in range(600)) / 600 > 0.5


def test_a_storage_that_does_not_open_is_one_line(tmp_path):
    with pytest.raises(BadInput, match="does not open"):
        open_study("sqlite:////nowhere/at/all.db")
