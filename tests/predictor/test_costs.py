"""What endpoints cost: what is late, what is short of room, what others send, and who gets nothing."""

from __future__ import annotations

from math import inf

import pytest
from msgspec.structs import replace

from pointsman.predictor.costs import STARVED_S, Costs
from pointsman.predictor.lengths import Lengths
from pointsman.predictor.speed import SAMPLE_S, Speeds
from pointsman.router import Flight
from pointsman.testing import fleet, request
from pointsman.types import Decision, Endpoint

ROOMY = {"kv_blocks": [1000, 1000], "block_tokens": [16, 16], "kv_usage": [0.2, 0.2]}


def send(endpoint: Endpoint, at_s: float, *, seen: bool = True) -> Flight:
    decision = Decision("r", "m", at_s, "p", [endpoint], endpoint, prompt_tokens=1000)
    return Flight(request(stream=True), decision, seen)


def waits(at_s: float, endpoints: list[Endpoint]) -> list[float]:
    """Until a first token, seconds."""
    costs = Costs(Speeds(), Lengths())
    costs.update(endpoints, at_s)
    return [costs.rows[e.slot][0] for e in endpoints]


def told(endpoint: Endpoint, **metrics: float) -> Endpoint:
    return replace(endpoint, metrics=replace(endpoint.metrics, **metrics))


def has_room(costs: Costs, endpoints: list[Endpoint], at_s: float) -> list[bool]:
    costs.update(endpoints, at_s)
    return [not costs.tight or costs.room[e.slot] > 0 for e in endpoints]


def test_an_endpoint_that_hangs_costs_more_the_longer_it_does() -> None:
    endpoints = fleet(2)
    flight = send(endpoints[0], 10.0)
    soon, other = waits(10.1, endpoints)
    late, _ = waits(13.0, endpoints)
    later, still = waits(20.0, endpoints)
    assert late > soon + 2
    assert later > late + 7
    assert still == other
    flight.first_output(20.0)
    assert waits(20.0, endpoints)[0] < soon


def test_where_nothing_tells_of_first_outputs_none_is_overdue() -> None:
    endpoints = fleet(1)
    send(endpoints[0], 10.0, seen=False)
    assert waits(20.0, endpoints) == waits(10.1, endpoints)


def test_an_engine_that_preempts_has_no_room_until_nothing_waits_there() -> None:
    costs, (one, other) = Costs(Speeds(), Lengths()), fleet(**ROOMY)
    assert has_room(costs, [one, other], 10.0) == [True, True]
    full = told(one, preemptions=1.0, waiting=2.0, running=3.0)
    assert has_room(costs, [full, other], 10.0 + SAMPLE_S) == [False, True]
    assert costs.learned(full, 10.0 + SAMPLE_S).kv_room_tokens == 0
    assert has_room(costs, [full, other], 10.0 + 2 * SAMPLE_S) == [False, True]
    emptier = told(full, waiting=0.0)
    assert has_room(costs, [emptier, other], 10.0 + 3 * SAMPLE_S) == [True, True]


def test_what_an_engine_preempted_before_it_was_known_is_no_sign() -> None:
    costs, endpoints = Costs(Speeds(), Lengths()), fleet(preemptions=[7.0, 0.0], waiting=[1.0, 0.0], **ROOMY)
    assert has_room(costs, endpoints, 10.0) == [True, True]


def test_prompts_that_wait_for_each_other_are_no_sign_of_a_full_cache() -> None:
    costs, (one, other) = Costs(Speeds(), Lengths()), fleet(**ROOMY)
    send(one, 10.0)
    for i in range(20):
        assert has_room(costs, [told(one, waiting=3.0, running=1.0), other], 10.0 + i * SAMPLE_S) == [
            True,
            True,
        ]


def test_requests_of_others_make_steps_longer_and_are_not_taken_for_slowness() -> None:
    costs, (one, other) = Costs(Speeds(), Lengths()), fleet(2)
    one.load.others = 20.0
    costs.update([one, other], 10.0)
    assert costs.step_s[0] > costs.step_s[1]
    assert costs.rows[0][1] > costs.rows[1][1], "its prefill delays them"


def test_the_share_of_others_is_what_lasts() -> None:
    costs, endpoints = Costs(Speeds(), Lengths()), fleet(2, requests=[1, 1])
    shared = []
    for i in range(400):
        for endpoint in endpoints:
            endpoint.load.others = 3.0
        costs.update(endpoints, 10.0 + i * SAMPLE_S)
        shared.append(costs.shared)
    assert not any(shared[:4])
    assert all(shared[20:])
    assert costs.others_share == pytest.approx(0.75, abs=0.01)


def test_the_usual_prompt_is_the_mean_from_the_first_on() -> None:
    costs, (endpoint,) = Costs(Speeds(), Lengths()), fleet(1)
    for tokens in (100, 300, 800):
        costs.sent(endpoint, tokens, tokens)
    assert costs._usual_prompt == pytest.approx(400)


def test_who_gets_little_while_others_are_busy_is_starved_after_a_while() -> None:
    costs, endpoints = Costs(Speeds(), Lengths()), fleet(3, requests=[4, 4, 0], tokens=[0, 0, 100_000])

    def starved(at_s: float) -> int | None:
        return costs.update(endpoints, at_s).starved

    assert starved(10.0) is None
    assert starved(9.0 + STARVED_S) is None
    assert starved(10.0 + STARVED_S) == 2
    endpoints[2].load.requests = 1
    assert starved(11.0 + STARVED_S) is None
    for endpoint in endpoints[:2]:
        endpoint.load.requests = 40
    assert starved(11.5 + 2 * STARVED_S) == 2, "one try does not end it"
    for endpoint in endpoints:
        endpoint.load.requests = 0
    endpoints[0].load.requests = 1
    assert starved(12.0 + 3 * STARVED_S) is None, "there is too little for three"


def test_who_gets_nothing_though_it_would_be_quick_is_not_starved() -> None:
    costs, endpoints = Costs(Speeds(), Lengths()), fleet(3, requests=[4, 4, 0])
    costs.update(endpoints, 10.0)
    assert costs.update(endpoints, 10.0 + 2 * STARVED_S).starved is None


def test_room_is_without_bounds_where_nothing_tells_of_a_cache() -> None:
    costs, endpoints = Costs(Speeds(), Lengths()), fleet(2)
    costs.update(endpoints, 10.0)
    assert [costs.room[e.slot] for e in endpoints] == [inf, inf]
