"""The plan of faults, and the record that says whose fault it was."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from bench.soak.chaos import KINDS, REST_S, Event, Record, plan

from pointsman.sim.faults import parse

ENGINES = 8


@pytest.mark.parametrize("seed", range(20))
def test_never_more_than_half_of_the_engines_are_bad(seed: int) -> None:
    events = plan(random.Random(seed), 60.0, ENGINES)
    assert len(events) > 20
    for event in events:
        bad = {e.engine for e in events if e.at_s <= event.at_s < e.at_s + e.for_s + REST_S}
        assert len(bad) <= ENGINES // 2


@pytest.mark.parametrize("seed", range(5))
def test_an_engine_has_one_fault_at_a_time(seed: int) -> None:
    until_s: dict[int, float] = {}
    for event in plan(random.Random(seed), 60.0, ENGINES):
        assert event.at_s >= until_s.get(event.engine, 0.0)
        until_s[event.engine] = event.at_s + event.for_s


def test_a_seed_gives_the_same_plan_again() -> None:
    assert plan(random.Random(3), 30.0, ENGINES) == plan(random.Random(3), 30.0, ENGINES)
    assert plan(random.Random(3), 30.0, ENGINES) != plan(random.Random(4), 30.0, ENGINES)


def test_every_kind_comes_up_and_engines_understand_it() -> None:
    events = plan(random.Random(1), 2000.0, ENGINES)
    assert Counter(e.kind for e in events).keys() == KINDS.keys()
    for event in events:
        fault = parse(event.fault)
        assert fault.for_s == event.fields.get("for_s")


def test_two_engines_are_never_both_bad() -> None:
    events = plan(random.Random(2), 60.0, 2)
    ends = [e.at_s + e.for_s + REST_S for e in events]
    assert events
    assert all(end <= later.at_s for end, later in zip(ends, events[1:], strict=False))


def record() -> Record:
    """``a`` crashed from 10 to 12 s, ``b`` was slow all along."""
    record = Record()
    record.add("a", Event(0.0, 0, "crash", {"for_s": 2.0}), 10.0, 10.0)
    record.add("b", Event(0.0, 1, "slow", {"for_s": 60.0}), 0.0, 0.0)
    return record


@pytest.mark.parametrize(
    ("tried", "from_s", "to_s", "blamed"),
    [
        (["a"], 9.0, 11.0, True),
        (["a"], 11.0, 15.0, True),
        (["a"], 5.0, 9.0, False),
        (["a"], 13.0, 15.0, False),
        (["b"], 9.0, 11.0, False),
        (["a", "b"], 9.0, 11.0, False),
        ([], 9.0, 11.0, False),
    ],
)
def test_a_request_is_excused_when_every_engine_it_met_was_bad_meanwhile(
    tried: list[str], from_s: float, to_s: float, blamed: bool
) -> None:
    assert record().blamed(tried, from_s, to_s) is blamed


def test_a_fault_that_was_lifted_early_excuses_nothing_later() -> None:
    lifted = record()
    lifted.end_all(10.5)
    assert lifted.blamed(["a"], 10.2, 11.5)
    assert not lifted.blamed(["a"], 11.2, 11.5)
