"""Dynamo's cost and LMetric: which endpoint is cheapest, and what is forgotten when requests end."""

from __future__ import annotations

from typing import Any

import pytest

from pointsman.registry import build
from pointsman.scheduling.cycle import Cycle
from pointsman.testing import cycle, fleet, request, services
from pointsman.types import Decision, Ending, Endpoint, Outcome

BLOCK = 4 * 64 * 4
"""The index's first block, in bytes; multiples of it end on later blocks, too."""


def holding(blocks: list[int], **columns: Any) -> Cycle:
    """A cycle for a prompt of four blocks, 1,024 tokens; endpoint i holds the first ``blocks[i]``."""
    given, text = services(block_tokens=64), "x" * BLOCK * 4
    made = cycle(fleet(len(blocks), **columns), text, given=given)
    for slot, n in enumerate(blocks):
        given.prefix.insert(slot, given.prefix.match(request(text[: n * BLOCK])).chains)
    made.match = given.prefix.match(made.request)
    return made


def send(plugin: Any, to: Endpoint, tokens: int, asked: Any = None) -> tuple[Any, Decision]:
    """A request of ``tokens`` prompt tokens is sent to ``to``."""
    asked = asked or request("y" * 4 * tokens)
    decision = Decision(
        request_id=asked.id,
        model="m",
        at_s=0,
        profile="default",
        candidates=[to],
        chosen=to,
        prompt_tokens=tokens,
    )
    plugin.on_dispatch(Cycle(asked, [to], services()), decision)
    return asked, decision


def end(plugin: Any, sent: tuple[Any, Decision], ending: Ending = Ending.OK) -> None:
    plugin.on_outcome(*sent, Outcome(ending=ending, status=200))


def dynamo(**parameters: Any) -> Any:
    return build("dynamo-cost-scorer", parameters, "test")


def test_dynamos_cost_of_an_idle_pool_is_what_is_not_cached() -> None:
    assert dynamo().score(holding([0, 4, 1])) == [0.0, 1.0, 0.25]


def test_dynamo_weighs_prefill_against_what_is_decoded() -> None:
    # e0 holds nothing and is idle, e1 holds everything and has a prompt of 3,000 tokens in flight.
    asked = holding([0, 4])
    for weight, best in ((1, [1.0, 0.0]), (2.9, [1.0, 0.0]), (3, [0.0, 1.0]), (4, [0.0, 1.0])):
        plugin = dynamo(overlapScoreWeight=weight)
        send(plugin, asked.endpoints[1], 3000)
        assert plugin.score(asked) == best, weight


def test_dynamo_counts_queued_prefill() -> None:
    asked = holding([0, 4], tokens=[0, 1025])
    assert dynamo().score(asked) == [1.0, 0.0]


@pytest.mark.parametrize("ending", Ending)
def test_dynamo_forgets_a_request_however_it_ends(ending: Ending) -> None:
    plugin, (e0, e1) = dynamo(), fleet(2)
    requests = [send(plugin, e0, 100), send(plugin, e1, 0), send(plugin, e1, 0), send(plugin, e0, 50)]
    end(plugin, requests[0], ending)
    assert plugin._tokens["e0"] == 50
    for one in requests[1:]:
        end(plugin, one, ending)
    end(plugin, requests[0], ending)
    assert (plugin._tokens, len(plugin._sent)) == ({}, 0)


def test_dynamo_counts_a_request_where_it_went_last() -> None:
    plugin, (e0, e1) = dynamo(), fleet(2)
    asked, _ = send(plugin, e0, 100)
    again = send(plugin, e1, 100, asked)
    assert plugin._tokens == {"e1": 100}
    end(plugin, again)
    assert (plugin._tokens, len(plugin._sent)) == ({}, 0)


def test_dynamo_tells_requests_with_one_id_apart() -> None:
    plugin, (e0, e1) = dynamo(), fleet(2)
    sent = [send(plugin, e0, 100), send(plugin, e1, 70)]
    assert plugin._tokens == {"e0": 100, "e1": 70}
    end(plugin, sent[0])
    assert plugin._tokens == {"e1": 70}


def lmetric(asked: Cycle) -> list[float]:
    plugin: Any = build("lmetric-scorer", {}, "test")
    return list(plugin.score(asked))


def test_lmetric_multiplies_prefill_tokens_and_requests() -> None:
    # 1024 * 1, (1000 + 0) * 3 and (0 + 768) * 4
    asked = holding([0, 4, 1], requests=[1, 3, 4], tokens=[0, 1000, 0])
    assert lmetric(asked) == pytest.approx([1.0, (3072 - 3000) / (3072 - 1024), 0.0])


def test_lmetric_prefers_idle_endpoints_and_among_them_those_with_the_prefix() -> None:
    assert lmetric(holding([0, 2, 3, 4], requests=[0, 0, 0, 1], tokens=[0, 0, 0, 1]))[3] == 0.0
    scores = lmetric(holding([0, 2, 1], requests=[0, 0, 0]))
    assert scores == pytest.approx([0.0, 1.0, 0.5])
