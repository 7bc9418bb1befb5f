"""The ring of decisions, and the form in which one is told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pointsman.observability.decisions import MAX_SCORES, DecisionRing, render
from pointsman.testing import fleet, request
from pointsman.types import Decision, Ending, Outcome, Prediction

OK = Outcome(ending=Ending.OK, status=200, endpoint="e0")


def decision(request_id: str = "r1", n: int = 2, **fields: Any) -> Decision:
    endpoints = fleet(n)
    defaults = {"request_id": request_id, "model": "m", "at_s": 1.5, "profile": "default"}
    return Decision(**(defaults | {"candidates": endpoints, "chosen": endpoints[0]} | fields))


def ids(ring: DecisionRing, limit: int = 1000, request_id: str = "") -> list[str]:
    return [told["request_id"] for told in ring.recent(limit, request_id)]


def fill(ring: DecisionRing, count: int, n: int = 2) -> None:
    for i in range(count):
        ring(request(), decision(f"r{i}", n), OK)


class TestRing:
    def test_the_newest_come_first(self) -> None:
        ring = DecisionRing(10)
        fill(ring, 3)
        assert ids(ring) == ["r2", "r1", "r0"]
        assert ids(ring, limit=2) == ["r2", "r1"]
        assert ids(ring, request_id="r1") == ["r1"]
        assert ids(ring, request_id="r9") == []

    @pytest.mark.parametrize("keep", [0, 1, 7])
    def test_it_keeps_as_many_as_set(self, keep: int) -> None:
        ring = DecisionRing(keep)
        fill(ring, 20)
        assert len(ids(ring)) == keep

    def test_a_large_pool_keeps_fewer_but_some(self) -> None:
        ring = DecisionRing(1000)
        fill(ring, 150, n=500)
        assert len(ids(ring)) == MAX_SCORES // 500
        ring = DecisionRing(1000)
        fill(ring, 20, n=10_000)
        assert len(ids(ring)) == 16

    def test_requests_refused_before_a_decision_leave_none(self) -> None:
        ring = DecisionRing(10)
        ring(request(), None, Outcome(ending=Ending.REFUSED, status=404))
        assert ids(ring) == []


def test_a_decision_is_told_whole_as_json() -> None:
    endpoints = fleet(3)
    told = render(
        decision(
            candidates=endpoints,
            chosen=endpoints[1],
            fallbacks=(endpoints[0],),
            kept={"affinity": endpoints[:2]},
            scored=endpoints[:2],
            scores={"queue": [0.5, 1.0], "kv": [1.0, 0.25]},
            weights={"queue": 2.0, "kv": 1.0},
            prompt_tokens=100,
            matched_tokens=64,
            predicted=Prediction(0.5, 0.25, 0.01),
            tried=("e2",),
            outcome=OK,
        )
    )
    assert msgspec.json.decode(msgspec.json.encode(told)) == told
    assert told == {
        "request_id": "r1",
        "model": "m",
        "at_s": 1.5,
        "profile": "default",
        "candidates": ["e0", "e1", "e2"],
        "kept": {"affinity": ["e0", "e1"]},
        "scores": {
            "e0": {"total": 2.0, "queue": 0.5, "kv": 1.0},
            "e1": {"total": 2.25, "queue": 1.0, "kv": 0.25},
        },
        "weights": {"queue": 2.0, "kv": 1.0},
        "chosen": "e1",
        "fallbacks": ["e0"],
        "tried_before": ["e2"],
        "prompt_tokens": 100,
        "matched_tokens": 64,
        "matched_by": "sent",
        "predicted": {"queue_s": 0.5, "prefill_s": 0.25, "step_s": 0.01},
        "outcome": told["outcome"],
    }
    assert told["outcome"]["ending"] == "ok"


def test_one_still_under_way_has_no_outcome() -> None:
    assert render(decision())["outcome"] is None
