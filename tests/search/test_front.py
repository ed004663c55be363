"""The integer program against all there is, limits, and who is better than whom."""
from __future__ import annotations

import ctypes
import itertools
import math
import random
from dataclasses import replace

import pytest

from trimtab.core.types import BadInput
from trimtab.search import front
from trimtab.search.front import Limits, best, fastest, first_front, nothing_said, program
from trimtab.search.options import DENSE, DROP, HEAD
from trimtab.search.space import KEEP, Place, Space, shape_of
from trimtab.search.timing import Costs, of_timed, sooner

OPTIONS = (DENSE, "int8", "int4", DROP)


def made(seed: int, places: int = 4) -> tuple[Space, Costs, dict[str, dict[str, float]]]:
    """A space with random costs: what is smaller is mostly quicker, and loses more."""
    draw = random.Random(seed)
    space = Space(2, tuple(Place(f"{i // 2}.{('attn', 'mlp')[i % 2]}", i // 2, ("attn", "mlp")[i % 2], OPTIONS) for i in range(places)))
    us = {p: {DENSE: 10.0, "int8": draw.uniform(5, 9), "int4": draw.uniform(3, 6), DROP: 0.0} for p in space.names}
    size = {p: {DENSE: 1000, "int8": 520, "int4": draw.randrange(260, 300), DROP: 0} for p in space.names}
    rises = {p: {DENSE: 0.0, "int8": draw.uniform(0, 0.01), "int4": draw.uniform(0.01, 0.2), DROP: draw.uniform(0.2, 2)}
             for p in space.names}
    costs = Costs(us, size, {KEEP: 8.0, "int8": 4.0}, {KEEP: 500, "int8": 600}, 2.0, 10.0 + 10.0 * places)
    return space, costs, rises


def lost(choices) -> bool:
    return all(o == DROP for p, o in choices.items() if p != HEAD)


def added(choices, rises) -> float:
    return sum(rises[p][o] for p, o in choices.items() if p != HEAD)


def every(space: Space):
    for options in itertools.product(*(p.options for p in space.places), space.heads):
        yield dict(zip([*space.names, HEAD], options, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_the_program_finds_what_trying_everything_finds(seed):
    space, costs, rises = made(seed)
    for time, size in ((30.0, math.inf), (18.0, math.inf), (math.inf, 2200.0), (25.0, 2500.0)):
        found = program(space, costs, rises, time=time, size=size)
        allowed = [c for c in every(space) if costs.time(c) <= time and costs.size(c) <= size and not lost(c)]
        assert found in allowed
        assert added(found, rises) == pytest.approx(min(added(c, rises) for c in allowed), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_of_a_loss_the_program_finds_the_quickest(seed):
    space, costs, rises = made(seed)
    most = sum(max(r.values()) for r in rises.values())
    for loss, size in ((0.02 * most, math.inf), (0.1 * most, math.inf), (0.3 * most, 2500.0)):
        found = program(space, costs, rises, loss=loss, size=size)
        allowed = [c for c in every(space) if added(c, rises) <= loss and costs.size(c) <= size and not lost(c)]
        assert found in allowed
        assert costs.time(found) == pytest.approx(min(costs.time(c) for c in allowed), rel=2e-3)


@pytest.mark.parametrize("seed", range(4))
def test_even_networks_lose_whole_blocks_and_are_of_one_shape(seed):
    space, costs, rises = made(seed, 6)
    space = replace(space, blocks=3, even=True)
    draw = random.Random(seed)
    for time in (50.0, 35.0, 25.0):
        found = program(space, costs, rises, time=time)
        allowed = [c for c in every(space) if costs.time(c) <= time and not lost(c) and space.allowed(c) == c]
        assert found in allowed and added(found, rises) == pytest.approx(min(added(c, rises) for c in allowed), abs=1e-6)
    wide = Space(2, tuple(Place(f"{i}.{g}", i, g, (DENSE, "neurons50", "neurons50-int8", "int8", DROP)) for i in range(2)
                          for g in ("attn", "mlp")), even=True)
    for _ in range(40):
        near = wide.allowed({p.name: draw.choice(p.options) for p in wide.places} | {HEAD: KEEP})
        assert wide.allowed(near) == near
        left = [i for i in range(2) if near[f"{i}.attn"] != DROP]
        assert left and all((near[f"{i}.attn"] == DROP) == (near[f"{i}.mlp"] == DROP) for i in range(2))
        assert len({shape_of(near[f"{i}.mlp"]) for i in left}) == 1


def test_what_cannot_be_is_nothing():
    space, costs, rises = made(0)
    assert program(space, costs, rises, time=fastest(space, costs) * 0.99) is None
    assert program(space, costs, rises, time=fastest(space, costs) * 1.001) is None  # everything dropped is no network
    least = min(costs.us[p]["int4"] for p in space.names)
    left = program(space, costs, rises, time=fastest(space, costs) + least * 1.001)
    assert sorted(left.values()) == ["drop"] * 3 + ["int4", "int8"]


def test_the_first_front_runs_from_the_dense_model_to_the_fastest_and_has_what_was_asked():
    space, costs, rises = made(1)
    found = first_front(space, costs, rises, Limits(speed=2.0))
    times = [costs.time(c) for c in found]
    assert max(times) <= costs.time(space.dense) and min(times) == min(costs.time(c) for c in every(space) if not lost(c))
    asked = min((c for c in every(space) if costs.speed(c) >= 2), key=lambda c: added(c, rises))
    assert any(costs.speed(c) >= 2 and added(c, rises) == pytest.approx(added(asked, rises), abs=1e-6) for c in found)
    assert len({tuple(sorted(c.items())) for c in found}) == len(found)


def test_the_first_front_looks_at_a_loss_and_around_it():
    space, costs, rises = made(2)
    without, found = first_front(space, costs, rises), first_front(space, costs, rises, Limits(loss=0.05))
    near = [c for c in found if c not in without]
    assert near and all(0.4 * 0.05 < added(c, rises) < 2.3 * 0.05 for c in near)
    assert program(space, costs, rises, loss=math.log1p(0.05)) in found
    small = first_front(space, costs, rises, Limits(bytes=2300))
    assert small and all(costs.size(c) <= 2300 for c in small)


def test_at_what_is_asked_there_is_a_choice_of_what_lies_about_as_near(monkeypatch):
    space, costs, rises = made(3, places=10)
    asked = Limits(speed=1.6)

    def near():
        found = [c for c in first_front(space, costs, rises, asked) if costs.speed(c) >= 1.6]
        least = min(added(c, rises) for c in found)
        return [c for c in found if added(c, rises) <= 1.5 * least]

    several = near()
    assert len(several) >= 3 and all(costs.speed(c) < 1.8 for c in several)
    monkeypatch.setattr(front, "SHAKEN", 0)
    assert len(near()) < len(several)


def test_the_best_are_those_that_nothing_beats():
    points = [(1, 5), (2, 4), (2, 6), (3, 3), (3, 3), (4, 4)]
    assert best(points, lambda p: p) == [(1, 5), (2, 4), (3, 3)]
    assert best([], lambda p: p) == []


def test_limits_are_met_or_missed_by_so_much():
    limits = Limits(loss=0.02, bytes=1000, speed=1.5)
    assert limits.met(0.02, 1000, 1.5) and not limits.met(0.021, 1000, 1.5)
    assert not limits.met(0.0, 1001, 1.5) and not limits.met(0, 0, 1.49)
    assert limits.short(0.02, 1000, 1.5) == 0 and limits.short(0.05, 1100, 0.75) == pytest.approx(0.03 + 0.1 + 0.5)
    assert Limits().met(9.0, 1e12, 0.1)
    assert str(limits) == "at most 2 % of loss, at most 0.0 MB, 1.5 times as fast"


def test_costs_add_up():
    space, costs, _ = made(2)
    one = space.dense | {"0.mlp": DROP, HEAD: "int8"}
    assert costs.time(space.dense) == 2 + 8 + 40 and costs.time(one) == 2 + 4 + 30
    assert costs.size(one) == 600 + 3000 and costs.speed(one) == pytest.approx(50 / 36)


def test_options_that_another_beats_in_both_are_not_looked_at():
    """If that one loses next to nothing there; and the sublayer as it is always stays."""
    space, costs, _ = made(3)
    costs.us["0.attn"] |= {"int8": 5.0, "int4": 4.0}
    rises = {"0.attn": {"int4": 0.0001}, "0.mlp": {"int4": 0.2}}
    left = {p.name: p.options for p in sooner(space, costs, rises).places}
    assert left["0.attn"] == (DENSE, "int4", DROP) and left["0.mlp"] == OPTIONS
    costs.us["1.attn"].pop("int8")
    assert "int8" not in {p.name: p.options for p in of_timed(space, costs).places}["1.attn"]


def test_without_the_extra_one_sentence_names_it(monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name)))
    with pytest.raises(BadInput, match=r"pip install 'trimtab\[search\]'"):
        front.extra("optuna", "optuna")


def test_what_c_code_says_is_not_in_what_programs_read(capfd):
    say = ctypes.CDLL(None).printf
    print("before")
    with nothing_said():
        say(b"HighsMipSolverData\n")
    print("behind", flush=True)
    assert capfd.readouterr().out == "before\nbehind\n"
