"""Work that processes and a Ray cluster do: the same figures, nothing lost when a worker is killed, and one line where it cannot be."""
from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest
import torch

from trimtab.core.calibrate import StatCache
from trimtab.core.types import BadInput, Failed
from trimtab.core.workers import ATTEMPTS, hired, spread
from trimtab.network.stream import Network
from trimtab.search.edited import Edited
from trimtab.search.options import OPTIONS
from trimtab.search.quality import Assembled
from trimtab.search.space import space_of
from trimtab.search.timing import Costs
from trimtab.search.trials import BATCH, Search, open_storage, open_study, trials_of
from trimtab.search.work import TABLE, opened, set_out, tables_by, trials_by

NAMES = ("dense", "int8", "int4", "drop")
MOST = 12 * BATCH  # enough for both workers to be met at work
WARNINGS = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """The URL of a server of our own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        import pgserver

        server = pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture
def found(tiny_lm, tmp_path):
    """A network with its options, and how long a made-up machine takes for them."""
    torch.set_num_threads(1)
    ids = torch.randint(3, 4096, (24, 1, 96), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": x} for x in ids]
    net = Network.open(tiny_lm)
    space = space_of(net, [OPTIONS[n] for n in NAMES])
    edited = Edited(net, samples[:4], tmp_path / "cache", StatCache())
    us = {p.name: {o: 10.0 / (1 + NAMES.index(o)) for o in p.options} for p in space.places}
    size = {p.name: {o: 1000 // (1 + NAMES.index(o)) for o in p.options} for p in space.places}
    costs = Costs(us, size, {"keep": 5.0, "int8": 3.0}, {"keep": 500, "int8": 200}, 1.0, 70.0)
    return edited, Assembled(net, space, samples[4:], edited.read, tmp_path), costs


def wanted(space):
    return [{"option": o, "group": g, "places": [p.name for p in space.places if p.group == g and o in p.options]}
            for o in NAMES[1:] for g in ("attn", "mlp")]


def processes_of(workers):
    """Those that are at work."""
    if hasattr(workers, "children"):
        return [c.pid for c in workers.children.values()]
    import psutil

    return [p.pid for p in psutil.Process().children(recursive=True) if p.cmdline()[:1] == ["ray::answer"]]


def kill_one(workers, storage, said):
    """While every worker has trials that it works on, and something is finished; again, where it was just then through with them."""
    study = open_study(storage)
    until = time.monotonic() + 120
    killed = 0
    while time.monotonic() < until and killed < ATTEMPTS:
        trials = study.get_trials(deepcopy=False)
        by_state = {s: [t for t in trials if t.state.name == s and "worker" in t.user_attrs] for s in ("COMPLETE", "RUNNING", "FAIL")}
        if by_state["FAIL"]:
            return
        if by_state["COMPLETE"] and len({t.user_attrs["worker"] for t in by_state["RUNNING"]}) == workers.count:
            os.kill(processes_of(workers)[0], signal.SIGKILL)
            said.update({t.number: t.values for t in by_state["COMPLETE"]})
            killed += 1
            time.sleep(2)
        time.sleep(0.01)


@pytest.mark.parametrize("in_bytes", [True, False])
def test_a_worker_opens_what_was_set_out(in_bytes, found, tmp_path):
    edited, assembled, _ = found
    assembled = Assembled(edited.net, assembled.space, assembled.samples, edited.read, tmp_path, in_bytes=in_bytes)
    (folder := tmp_path / "shared").mkdir()
    set_out(folder, edited, assembled)
    its = opened(folder)
    assert (its.assembled.space, its.assembled.in_bytes, its.edited.home) == (assembled.space, in_bytes, edited.home)
    assert its.assembled.dense == assembled.dense


@WARNINGS
@pytest.mark.parametrize("where", ["processes, a file", "Ray, PostgreSQL"])
def test_what_a_killed_worker_had_begun_is_done_again_and_nothing_is_lost(where, found, tmp_path, request):
    edited, assembled, costs = found
    cluster = where.startswith("Ray")
    storage = request.getfixturevalue("postgres") if cluster else str(tmp_path / "trials.db")
    with hired(2, "local" if cluster else "", storage, 1, edited.home) as workers:
        rises = {p.name: {"dense": 0.0} for p in assembled.space.places}
        for its, found_ in tables_by(workers, edited, assembled)(wanted(assembled.space)):
            for place, rise in found_.items():
                rises[place][its["option"]] = rise
        assert {(p, o) for p, r in rises.items() for o in r} == {(p.name, o) for p in assembled.space.places for o in p.options}
        here = assembled.rises([assembled.space.dense | {"1.mlp": o} for o in NAMES])  # of what the workers left in the cache
        assert here == pytest.approx([rises["1.mlp"][o] for o in NAMES], abs=1e-6)

        study = open_study(storage)
        work = Search(study, assembled.space, costs, rises, assembled.rises, 0)
        work.queue([assembled.space.dense], "program")
        nobody = study.ask().number  # begun, and its worker died before it had put its name to it
        before: dict = {}
        killer = threading.Thread(target=kill_one, args=(workers, storage, before))
        killer.start()
        made = trials_by(workers, work, storage)(float("inf"), most=MOST, guided=False)
        killer.join()
    every = study.get_trials()
    by_state = {s: [t for t in every if t.state.name == s] for s in {t.state.name for t in every}}
    assert set(by_state) == {"COMPLETE", "FAIL"} and before
    assert {n: every[n].values for n in before} == before
    assert MOST + 1 <= made <= len(by_state["COMPLETE"]) and nobody in {t.number for t in by_state["FAIL"]} and len(by_state["FAIL"]) > 1
    assert {t.user_attrs["worker"] for t in by_state["COMPLETE"]} == {"0", "1"}
    for lost in by_state["FAIL"]:
        asked = lost.params or lost.system_attrs.get("fixed_params", {})
        # One that was killed while it still drew has drawn a part of it, or nothing yet.
        assert any(t.params.items() >= asked.items() and t.number > lost.number for t in by_state["COMPLETE"])
    trials = trials_of(study, assembled.space)
    assert [t.rise for t in trials if t.choices == assembled.space.dense and t.by == "program"] == [0]
    some = trials[:: len(trials) // 4]
    assert [t.rise for t in some] == pytest.approx(assembled.rises([t.choices for t in some]), abs=1e-6)


class Scripted:
    """Workers that answer, refuse and die as they are told: by item, what comes of each attempt."""

    count = 2

    def __init__(self, script):
        self.script, self.begun = {k: list(v) for k, v in script.items()}, []

    def open(self):
        pass

    def begin(self, place, request):
        self.begun.append((place, request))

    def next(self):
        place, request = self.begun.pop(0)
        does = self.script[request["item"]].pop(0)
        return place, None if does == "dies" else {does: f"{does} of {request['item']}"}, "out of memory"

    def close(self):
        pass


def test_items_are_done_again_as_often_as_workers_may_die():
    lost: list[str] = []
    items = ({"item": k} for k in "abc")
    script = {"a": ["dies"] * (ATTEMPTS - 1) + ["result"], "b": ["result"], "c": ["result"]}
    done = {its["item"]: got for its, got in spread(Scripted(script), TABLE, items, lost.append)}
    assert done == {k: f"result of {k}" for k in "abc"} and len(lost) == ATTEMPTS - 1

    with pytest.raises(Failed, match=f"^{ATTEMPTS} workers died over the same work \\(out of memory\\); give fewer --workers"):
        list(spread(Scripted({"a": ["dies"] * ATTEMPTS}), TABLE, [{"item": "a"}]))


@pytest.mark.parametrize("reply, error", [("bad", BadInput), ("error", Failed)])
def test_what_a_worker_cannot_do_is_said_as_it_says_it(reply, error):
    with pytest.raises(error, match=f"^{reply} of a$"):
        list(spread(Scripted({"a": [reply]}), TABLE, [{"item": "a"}]))


def test_a_folder_that_a_worker_does_not_see_is_one_line(tmp_path):
    with hired(2, "", "", 1, tmp_path) as workers, pytest.raises(BadInput, match=r"^/not/there is not there on .*TRIMTAB_CACHE$"):
        list(spread(workers, TABLE, [{"folder": "/not/there", "option": "int8", "group": "mlp", "places": []}]))


def test_one_worker_is_this_process(tmp_path):
    with hired(1, "", "", 0, tmp_path / "none") as workers:
        assert workers is None and not list(tmp_path.iterdir())
    work = Search(None, space_of_nothing(), None, {}, lambda c: [], 0)
    assert trials_by(None, work, "") == work.run


def space_of_nothing():
    from trimtab.search.space import Space

    return Space(0, ())


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match=r"pip install 'trimtab\[ray\]'"), hired(1, "local", "", 1, tmp_path):
        pass
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(BadInput, match=r"pip install 'trimtab\[postgres\]'"):
        open_storage("postgresql://me:secret@127.0.0.1:1/none")


def test_a_database_that_does_not_answer_is_one_line_without_its_password():
    with pytest.raises(BadInput) as e:
        open_storage("postgresql://me:secret@127.0.0.1:1/none")
    assert "127.0.0.1:1/none does not open" in str(e.value) and "\n" not in str(e.value) and "secret" not in str(e.value)


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path):
    with hired(1, "127.0.0.1:1", "", 1, tmp_path) as workers, pytest.raises(BadInput, match=r"^no Ray cluster answers at 127.0.0.1:1 "):
        list(spread(workers, TABLE, []))


@WARNINGS
def test_no_two_workers_take_the_same_trial(tmp_path):
    storage, together = str(tmp_path / "trials.db"), 4
    study = open_study(storage)
    for k in range(10 * together):
        study.enqueue_trial({"k": k})
    begin, taken = threading.Barrier(together), []

    def take():
        own = open_study(storage)
        begin.wait()
        for _ in range(10):
            taken.append(own.ask().number)

    threads = [threading.Thread(target=take) for _ in range(together)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(taken) == list(range(10 * together))
