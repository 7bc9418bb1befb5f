"""How long a request waits at an engine without a place for it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from pointsman.predictor.waiting import Waiting
from pointsman.testing import fleet
from pointsman.types import Endpoint


def busy(waiting: float = 20) -> Endpoint:
    (endpoint,) = fleet(waiting=[waiting], running=[200], requests=[220])
    endpoint.load.first_outputs = 500
    return endpoint


def watched(
    endpoint: Endpoint, begun_per_s: float, seconds: float, prefill_s: float = 0.0, running_per_s: float = 0.0
) -> float:
    """What is expected after a queue has been seen for a time in which so many streams were begun."""
    waiting = Waiting()
    told = waiting.seconds(endpoint, 10.0, prefill_s)
    for i in range(1, round(seconds * 20) + 1):
        endpoint.load.first_outputs = 500 + round(i / 20 * begun_per_s)
        running = endpoint.metrics.running + running_per_s / 20
        endpoint = replace(endpoint, metrics=replace(endpoint.metrics, running=running))
        told = waiting.seconds(endpoint, 10.0 + i / 20, prefill_s)
    return told


@pytest.mark.parametrize("begun_per_s", [20.0, 60.0])
def test_a_queue_takes_as_long_as_it_moves(begun_per_s: float) -> None:
    assert watched(busy(), begun_per_s, 20) == pytest.approx(20 / begun_per_s, rel=0.15)


def test_a_queue_that_does_not_move_is_expected_to_last_as_long_again() -> None:
    assert watched(busy(1), 0.0, 1) == pytest.approx(1, rel=0.2)
    assert watched(busy(30), 0.0, 4) == pytest.approx(4, rel=0.3)


def test_a_queue_of_prompts_that_are_being_computed_is_none() -> None:
    assert watched(busy(), 2.0, 3, prefill_s=4.0) == 0.0
    assert watched(busy(), 2.0, 5, prefill_s=2.0) > 1.0


def test_an_engine_that_runs_more_and_more_has_room() -> None:
    assert watched(busy(), 2.0, 5, running_per_s=40.0) < 0.2
    assert watched(busy(), 2.0, 5, running_per_s=0.5) > 1.0


def test_a_queue_that_has_just_come_up_says_nothing_yet() -> None:
    assert watched(busy(), 0.0, 0) == 0.0


@pytest.mark.parametrize("change", [{"waiting": 0}, {"waiting": 0, "at_s": 3.0}])
def test_without_a_queue_there_is_no_wait_and_a_later_one_is_new(change: dict[str, float]) -> None:
    waiting, endpoint = Waiting(), busy()
    for i in range(9):
        waiting.seconds(endpoint, 1.0 + i / 8, 0.0)
    assert waiting.seconds(endpoint, 2.0, 0.0) > 0
    assert waiting.seconds(replace(endpoint, metrics=replace(endpoint.metrics, **change)), 2.1, 0.0) == 0.0
    assert waiting.seconds(endpoint, 2.2, 0.0) == 0.0


def test_another_endpoint_in_its_place_has_a_queue_of_its_own() -> None:
    waiting, endpoint = Waiting(), busy()
    for i in range(9):
        waiting.seconds(endpoint, 1.0 + i / 8, 0.0)
    assert waiting.seconds(replace(endpoint, name="next"), 2.05, 0.0) == 0.0


def test_endpoints_whose_streams_tell_nothing_are_not_waited_for() -> None:
    waiting = Waiting()
    (endpoint,) = fleet(waiting=[20], requests=[5])
    assert [waiting.seconds(endpoint, t / 2, 0.0) for t in range(9)] == [0.0] * 9
