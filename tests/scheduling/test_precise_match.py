"""One pool where some engines tell what they hold and others do not."""

from __future__ import annotations

import random
from array import array

import pytest

from pointsman.observability.decisions import render
from pointsman.prefix.approximate import PrefixIndex
from pointsman.prefix.kv_wire import Removed, Stored
from pointsman.prefix.precise import PreciseIndex
from pointsman.scheduling.cycle import Cycle, Services
from pointsman.scheduling.presets import build_scheduler, load_policy
from pointsman.scheduling.scheduler import Scheduler
from pointsman.testing import fleet, request
from pointsman.types import InferenceRequest, Tokenized

BLOCK = 16
TOKENS = array("I", range(1000, 1512))
TEXT = "x" * 4 * len(TOKENS)


def asked(**fields: object) -> InferenceRequest:
    given = {"tokenized": (Tokenized(TOKENS.tobytes()),), "prompt_tokens": len(TOKENS)}
    return request(TEXT, **(given | fields))


class Place:
    """Three endpoints, of which e0 and e1 publish events."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.precise = PreciseIndex()
        self.services = Services(PrefixIndex(), lambda: self.now_s, random.Random(0), self.precise)
        self.endpoints = fleet(3)
        for endpoint in self.endpoints:
            self.services.prefix.add(endpoint.slot)
        for slot in (0, 1):
            self.precise.add(slot)
            self.precise.apply(slot, [Removed([1])], 0.0)

    def store(self, slot: int, blocks: int, medium: str = "gpu") -> None:
        ids = TOKENS[: blocks * BLOCK].tobytes()
        event = Stored(list(range(1, blocks + 1)), None, ids, BLOCK, medium=medium)
        self.precise.apply(slot, [event], self.now_s)

    def cycle(self, asked: InferenceRequest) -> Cycle:
        return Cycle(asked, self.endpoints, self.services)

    def scheduler(self, preset: str) -> Scheduler:
        return build_scheduler(load_policy(preset), self.services)


def test_what_engines_tell_counts_and_for_the_others_what_was_sent() -> None:
    place = Place()
    for slot in range(3):
        place.services.prefix.insert(slot, place.services.prefix.match(asked()).chains)
    place.store(0, 5)
    match = place.cycle(asked()).match
    assert [match.tokens(slot) for slot in range(3)] == [5 * BLOCK, 0, len(TOKENS)]
    assert [match.ratio(slot) for slot in range(3)] == [5 * BLOCK / len(TOKENS), 0.0, 1.0]
    assert [match.by_events(slot) for slot in range(3)] == [True, True, False]


def test_of_an_engine_that_has_not_told_all_the_better_of_both_counts() -> None:
    place = Place()
    for slot in (0, 1):
        place.precise.missed(slot)
    place.services.prefix.insert(0, place.services.prefix.match(asked()).chains)
    for slot in (0, 1):
        place.store(slot, 5)
    match = place.cycle(asked()).match
    assert [match.tokens(slot) for slot in (0, 1)] == [len(TOKENS), 5 * BLOCK]
    assert [match.cached_tokens(slot) for slot in (0, 1)] == [len(TOKENS), 5 * BLOCK]
    assert [match.by_events(slot) for slot in (0, 1)] == [False, True]


def test_without_token_ids_what_was_sent_answers_for_all_and_the_record_says_so() -> None:
    place = Place()
    place.services.prefix.insert(1, place.services.prefix.match(asked()).chains)
    place.store(0, 5)
    late = asked(tokenized=(), untokenized="not ready in time")
    assert [place.cycle(late).match.tokens(slot) for slot in range(3)] == [0, len(TOKENS), 0]
    decision = place.scheduler("least-cost").schedule(late, place.endpoints)
    told = render(decision)
    assert (told["matched_by"], told["untokenized"]) == ("sent", "not ready in time")


def test_a_slower_tier_is_worth_less_to_the_choice_and_is_still_a_hit() -> None:
    place = Place()
    place.store(0, 10, "cpu")
    match = place.cycle(asked()).match
    assert match.tokens(0) == pytest.approx(0.8 * 10 * BLOCK)
    assert match.cached_tokens(0) == 10 * BLOCK


@pytest.mark.parametrize("preset", ["least-cost", "llm-d-blend", "llm-d-affinity"])
def test_a_request_goes_to_who_holds_its_prefix_by_events(preset: str) -> None:
    place = Place()
    place.store(1, 31)
    scheduler = place.scheduler(preset)
    decision = scheduler.schedule(asked(), place.endpoints)
    assert (decision.chosen.name, decision.matched_tokens) == ("e1", 31 * BLOCK)
    assert render(decision)["matched_by"] == "events"


def test_what_was_just_sent_counts_before_the_engine_tells_and_no_longer_than_two_seconds() -> None:
    place = Place()
    place.store(0, 1)
    scheduler = place.scheduler("least-cost")
    chosen = scheduler.schedule(asked(), place.endpoints).chosen
    assert chosen.slot == 0
    assert place.cycle(asked()).match.tokens(0) == (len(TOKENS) // BLOCK - 1) * BLOCK
    place.now_s = 3.0
    assert place.cycle(asked()).match.tokens(0) == BLOCK
