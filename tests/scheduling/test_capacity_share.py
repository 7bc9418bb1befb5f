"""capacity-share-scorer: whose share of its capacity is least in use, and how capacity is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pointsman.registry import build
from pointsman.scheduling.cycle import Cycle
from pointsman.testing import cycle, fleet, request, services
from pointsman.types import Decision, Ending, Endpoint, Outcome, Usage


def scorer(**parameters: Any) -> Any:
    return build("capacity-share-scorer", parameters, "test")


def decided(pool: Sequence[Endpoint], to: Endpoint) -> tuple[Cycle, Decision]:
    asked = Cycle(request("text"), pool, services())
    return asked, Decision(
        request_id="r", model="m", at_s=0, profile="default", candidates=pool, chosen=to, prompt_tokens=1
    )


def serve(plugin: Any, pool: Sequence[Endpoint], to: Endpoint, token_s: float, **changed: Any) -> None:
    """A request is sent to ``to`` and ends; each of its 100 output tokens took ``token_s``."""
    asked, decision = decided(pool, to)
    plugin.on_dispatch(asked, decision)
    fields: dict[str, Any] = {
        "ending": Ending.OK,
        "status": 200,
        "duration_s": 100 * token_s,
        "usage": Usage(output_tokens=100),
    }
    plugin.on_outcome(asked.request, decision, Outcome(**(fields | changed)))


def test_the_share_in_use_counts() -> None:
    pool = fleet(requests=[10, 10, 0, 40], weight=[1.0, 2.0, 1.0, 2.0])
    assert scorer().score(cycle(pool)) == [0.5, 0.75, 1.0, 0.0]
    assert scorer().score(cycle(fleet(3))) == [1.0, 1.0, 1.0]


def test_without_experience_all_have_one_capacity() -> None:
    pool = fleet(requests=[10, 20], weight=[1.0, 9.0])
    assert scorer(capacity="learned").score(cycle(pool)) == [0.5, 0.0]


def test_capacity_is_learned_from_the_time_of_a_token_beyond_the_base() -> None:
    plugin, pool = scorer(capacity="learned", baseStepMs=6), fleet(requests=[9, 9, 9])
    for _ in range(3):
        serve(plugin, pool, pool[0], 0.016)
        serve(plugin, pool, pool[1], 0.026)
    # 10 in flight / 10 ms and / 20 ms, so 1,000 and 500; the third one is taken for 750.
    assert plugin.score(cycle(pool)) == pytest.approx([0.5, 0.0, 1 - 500 / 750])


def test_those_in_flight_are_the_mean_of_begin_and_end() -> None:
    plugin, pool = scorer(capacity="learned", baseStepMs=0), fleet(requests=[1, 1])
    asked, decision = decided(pool, pool[0])
    plugin.on_dispatch(asked, decision)  # the second request there
    pool[0].load.requests = 5  # it ends while five others are there
    usage = Usage(output_tokens=100)
    plugin.on_outcome(
        asked.request, decision, Outcome(ending=Ending.OK, status=200, duration_s=1, usage=usage)
    )
    pool[0].load.requests = 1
    serve(plugin, pool, pool[1], 0.01)  # two in flight, where the first had four on average
    assert plugin.score(cycle(pool)) == pytest.approx([0.5, 0.0])


def test_capacity_follows_an_endpoint_that_slows_down() -> None:
    plugin, pool = scorer(capacity="learned"), fleet(requests=[9, 9])
    for i in range(200):
        serve(plugin, pool, pool[0], 0.016 if i < 50 else 0.106)
        serve(plugin, pool, pool[1], 0.026)
    assert plugin.score(cycle(pool))[0] == 0.0


@pytest.mark.parametrize(
    "changed",
    [{"ending": ending} for ending in Ending if ending is not Ending.OK]
    + [{"usage": Usage()}, {"usage": Usage(output_tokens=0)}],
)
def test_nothing_is_learned_from_what_did_not_end_well(changed: dict[str, Any]) -> None:
    plugin, pool = scorer(capacity="learned"), fleet(requests=[9, 9])
    serve(plugin, pool, pool[0], 0.1)
    serve(plugin, pool, pool[1], 0.1, **changed)
    assert plugin.score(cycle(pool)) == [0.0, 0.0]
    assert len(plugin._sent) == 0


def test_time_below_the_base_is_a_great_capacity_not_a_negative_one() -> None:
    plugin, pool = scorer(capacity="learned"), fleet(requests=[9, 9])
    serve(plugin, pool, pool[0], 0.001)
    serve(plugin, pool, pool[1], 0.016)
    assert plugin.score(cycle(pool)) == pytest.approx([1 - 0.01, 0.0])


def test_a_request_that_outlives_its_endpoint_teaches_nothing_about_the_next() -> None:
    plugin, before, after = scorer(capacity="learned"), fleet(name=["old"]), fleet(name=["new"])
    asked, decision = decided(before, before[0])
    plugin.on_dispatch(asked, decision)
    serve(plugin, after, after[0], 0.016)
    usage = Usage(output_tokens=1)
    plugin.on_outcome(
        asked.request, decision, Outcome(ending=Ending.OK, status=200, duration_s=99, usage=usage)
    )
    assert plugin._learned.get(after[0]).value == pytest.approx(100)
    assert len(plugin._sent) == 0


def test_capacities_that_are_given_need_no_notes() -> None:
    plugin, pool = scorer(), fleet(2)
    asked, decision = decided(pool, pool[0])
    plugin.on_dispatch(asked, decision)
    assert len(plugin._sent) == 0
