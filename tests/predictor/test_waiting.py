"""How long a request waits at an engine without a place for it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from pointsman.predictor.waiting import Waiting
from pointsman.testing import fleet
from pointsman.types import Endpoint


def busy(waiting: float = 20) -> Endpoint:
    (endpoint,) = fleet(waiting=[waiting], requests=[200])
    endpoint.load.first_outputs = 500
    return endpoint


def watched(endpoint: Endpoint, begun_per_s: float, seconds: float) -> float:
    """What is expected after a queue has been seen for a time in which so many streams were begun."""
    waiting = Waiting()
    told = waiting.seconds(endpoint, 10.0)
    for i in range(1, round(seconds * 20) + 1):
        endpoint.load.first_outputs = 500 + round(i / 20 * begun_per_s)
        told = waiting.seconds(endpoint, 10.0 + i / 20)
    return told


@pytest.mark.parametrize("begun_per_s", [2.0, 10.0])
def test_a_queue_takes_as_long_as_it_moves(begun_per_s: float) -> None:
    assert watched(busy(), begun_per_s, 20) == pytest.approx(20 / begun_per_s, rel=0.15)


def test_a_queue_that_does_not_move_is_waited_for_longer_and_longer() -> None:
    assert 0.5 < watched(busy(1), 0.0, 1) < 2 < watched(busy(1), 0.0, 5)


def test_a_queue_that_has_just_come_up_says_nothing_yet() -> None:
    assert watched(busy(), 0.0, 0) == 0.0


@pytest.mark.parametrize("change", [{"waiting": 0}, {"waiting": 0, "at_s": 3.0}])
def test_without_a_queue_there_is_no_wait_and_a_later_one_is_new(change: dict[str, float]) -> None:
    waiting, endpoint = Waiting(), busy()
    for i in range(9):
        waiting.seconds(endpoint, 1.0 + i / 8)
    assert waiting.seconds(endpoint, 2.0) > 0
    assert waiting.seconds(replace(endpoint, metrics=replace(endpoint.metrics, **change)), 2.1) == 0.0
    assert waiting.seconds(endpoint, 2.2) == 0.0


def test_another_endpoint_in_its_place_has_a_queue_of_its_own() -> None:
    waiting, endpoint = Waiting(), busy()
    for i in range(9):
        waiting.seconds(endpoint, 1.0 + i / 8)
    assert waiting.seconds(replace(endpoint, name="next"), 2.05) == 0.0


def test_endpoints_whose_streams_tell_nothing_are_not_waited_for() -> None:
    waiting = Waiting()
    (endpoint,) = fleet(waiting=[20], requests=[5])
    assert [waiting.seconds(endpoint, t / 2) for t in range(9)] == [0.0] * 9
