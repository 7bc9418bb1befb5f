"""Latency predictors: what they learn from outcomes, and whom they prefer then."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pointsman.registry import build
from pointsman.scheduling.cycle import Cycle
from pointsman.testing import cycle, fleet, request, services
from pointsman.types import Decision, Ending, Endpoint, Outcome, Usage

POOL, ENDPOINT = "pool-latency-scorer", "endpoint-ttft-scorer"


def predictor(name: str, **parameters: Any) -> Any:
    return build(name, parameters, "test")


def send(
    plugin: Any, pool: Sequence[Endpoint], to: Endpoint, tokens: int, **fields: Any
) -> tuple[Any, Decision]:
    asked = Cycle(request("y" * 4 * tokens, **({"stream": True} | fields)), pool, services())
    decision = Decision(
        request_id="r", model="m", at_s=0, profile="default", candidates=pool, chosen=to, prompt_tokens=tokens
    )
    plugin.on_dispatch(asked, decision)
    return asked.request, decision


def end(
    plugin: Any,
    sent: tuple[Any, Decision],
    ttft_s: float,
    tpot_s: float = 0.02,
    told: bool = True,
    **changed: Any,
) -> None:
    fields: dict[str, Any] = {
        "ending": Ending.OK,
        "status": 200,
        "ttft_s": ttft_s if told else None,
        "duration_s": ttft_s + 99 * tpot_s,
        "usage": Usage(output_tokens=100),
    }
    plugin.on_outcome(*sent, Outcome(**(fields | changed)))


def train(
    plugin: Any,
    pool: Sequence[Endpoint],
    ttft_s: Callable[[Endpoint, int], float],
    tpot_s: Callable[[Endpoint], float] = lambda _: 0.02,
    rounds: int = 400,
) -> None:
    """Requests of many sizes to all endpoints under many loads."""
    rng = random.Random(1)
    for i in range(rounds):
        to, tokens = pool[i % len(pool)], rng.choice((10, 1000, 4000))
        to.load.requests, to.load.tokens = rng.randrange(50), rng.choice((0, 0, 2000, 20_000))
        end(plugin, send(plugin, pool, to, tokens), ttft_s(to, tokens), tpot_s(to))
    for endpoint in pool:
        endpoint.load.requests = endpoint.load.tokens = 0


def prefill(tokens_per_s: float) -> Callable[[Endpoint, int], float]:
    return lambda endpoint, tokens: 0.02 + (endpoint.load.tokens + tokens) / tokens_per_s


def speeds(endpoint: Endpoint, tokens: int) -> float:
    """The first endpoint prefills four times as fast as the others."""
    return prefill(20_000 if endpoint.slot == 0 else 5_000)(endpoint, tokens)


def asked_of(pool: Sequence[Endpoint], tokens: int) -> Cycle:
    return cycle(pool, "z" * 4 * tokens)


def test_the_endpoint_predictor_learns_who_is_fast() -> None:
    plugin, pool = predictor(ENDPOINT), fleet(3)
    train(plugin, pool, speeds)
    fast, *slow = plugin.score(asked_of(pool, 2000))
    assert fast == 1.0
    assert max(slow) < 0.1
    pool[0].load.tokens = 9_000  # (9,000 + 2,000) / 20,000 is more than 2,000 / 5,000
    fast, *slow = plugin.score(asked_of(pool, 2000))
    assert fast == 0.0
    assert min(slow) > 0.9


def test_the_pool_predictor_takes_all_endpoints_for_alike() -> None:
    plugin, pool = predictor(POOL), fleet(3)
    train(plugin, pool, speeds)
    assert plugin.score(asked_of(pool, 2000)) == [1.0, 1.0, 1.0]
    pool[0].load.tokens = 1
    assert plugin.score(asked_of(pool, 2000)) == [0.0, 1.0, 1.0]


def test_the_pool_predictor_weighs_a_cached_prefix_against_a_queue() -> None:
    plugin, pool, given = predictor(POOL), fleet(2), services(block_tokens=64)
    train(plugin, pool, prefill(10_000))
    asked = cycle(pool, "z" * 4 * 2048, given=given)
    given.prefix.insert(1, given.prefix.match(request("z" * 4 * 2048)).chains)
    for queued, scores in ((1500, [0.0, 1.0]), (2500, [1.0, 0.0])):
        pool[1].load.tokens = queued
        assert plugin.score(Cycle(asked.request, pool, given)) == scores, queued


def test_the_pool_predictor_counts_the_time_of_all_output_tokens() -> None:
    # Decoding is slower where more requests run; there is nothing to choose in TTFT but a short queue.
    pool = fleet(running=[5.0, 40.0])
    pool[0].load.tokens = 100

    def decoding(endpoint: Endpoint) -> float:
        return 0.01 + 0.001 * endpoint.metrics.running

    for weight, scores in ((1.0, [1.0, 0.0]), (0.0, [0.0, 1.0])):
        plugin = predictor(POOL, tpotWeight=weight)
        train(plugin, pool, prefill(10_000), decoding)
        pool[0].load.tokens = 100
        assert plugin.score(asked_of(pool, 1000)) == scores, weight


@pytest.mark.parametrize("name", [POOL, ENDPOINT])
@pytest.mark.parametrize("ending", Ending)
def test_a_request_is_forgotten_however_it_ends(name: str, ending: Ending) -> None:
    plugin, pool = predictor(name), fleet(2)
    sent = send(plugin, pool, pool[0], 100)
    assert len(plugin._sent) == 1
    end(plugin, sent, 0.1, ending=ending)
    assert len(plugin._sent) == 0


@pytest.mark.parametrize("name", [POOL, ENDPOINT])
@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"stream": False}, {}),
        ({}, {"told": False}),
        *(({}, {"ending": ending}) for ending in Ending if ending is not Ending.OK),
    ],
)
def test_only_streams_that_ended_well_teach(
    name: str, fields: dict[str, Any], changed: dict[str, Any]
) -> None:
    explored = {"exploreRequests": 1} if name == ENDPOINT else {}
    plugin, pool = predictor(name, **explored), fleet(tokens=[0, 5000])
    for i in range(20):
        end(plugin, send(plugin, pool, pool[i % 2], 100, **fields), 1.0, **changed)
    assert plugin.score(asked_of(pool, 1000)) == [1.0, 1.0]
    for i in range(20):
        end(plugin, send(plugin, pool, pool[i % 2], 100), 1.0 + 3.0 * (i % 2))
    assert plugin.score(asked_of(pool, 1000)) == [1.0, 0.0]


def test_an_answer_of_one_token_tells_nothing_of_the_time_between_tokens() -> None:
    plugin, pool = predictor(POOL), fleet(2)
    end(plugin, send(plugin, pool, pool[0], 100), 1.0, usage=Usage(output_tokens=1))
    assert (plugin._ttft.samples, plugin._tpot.samples) == (1, 0)


def test_each_endpoint_gets_a_few_requests_before_it_is_judged() -> None:
    plugin, pool, given = predictor(ENDPOINT, exploreRequests=5), fleet(4), services(seed=2)
    picker: Any = build("max-score-picker", {}, "test")
    counts: Counter[str] = Counter()
    for _ in range(40):
        asked = Cycle(request("y" * 400, stream=True), pool, given)
        (chosen,) = picker.pick(asked, plugin.score(asked))
        counts[chosen.name] += 1
        decision = Decision(
            request_id="r",
            model="m",
            at_s=0,
            profile="default",
            candidates=pool,
            chosen=chosen,
            prompt_tokens=100,
        )
        plugin.on_dispatch(asked, decision)
        end(plugin, (asked.request, decision), 0.1 if chosen is pool[2] else 9.0)
    assert counts == {"e0": 5, "e1": 5, "e2": 25, "e3": 5}


def test_a_new_endpoint_is_explored_and_until_it_has_answered_is_taken_for_an_average_one() -> None:
    plugin, pool = predictor(ENDPOINT, exploreRequests=2), fleet(3)
    train(plugin, pool[:2], speeds)
    assert plugin.score(asked_of(pool, 2000))[2] == 1.0
    for _ in range(2):
        send(plugin, pool, pool[2], 10)
    fast, slow, new = plugin.score(asked_of(pool, 2000))
    assert (fast, slow) == (1.0, 0.0)
    assert 0.1 < new < 0.99


def test_an_endpoint_in_the_slot_of_one_that_left_is_a_new_one() -> None:
    plugin, before, after = predictor(ENDPOINT), fleet(name=["a", "b"]), fleet(name=["a", "c"])
    train(plugin, before, speeds)
    late = send(plugin, before, before[1], 10)
    assert plugin.score(asked_of(before, 2000)) == [1.0, 0.0]
    assert plugin.score(asked_of(after, 2000)) == [0.0, 1.0], "c answers at once, as far as is known"
    send(plugin, after, after[1], 10)
    end(plugin, late, 50.0)
    assert plugin._known.get(after[1]).ttft.samples == 0
