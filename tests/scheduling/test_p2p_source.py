"""Who is named to an endpoint that lacks a prompt's prefix."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from typing import Any

import pytest

from pointsman.errors import SettingsError
from pointsman.prefix.approximate import PrefixIndex
from pointsman.prefix.kv_wire import Stored
from pointsman.prefix.precise import PreciseIndex
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.picker_config import LoadedConfig, load_tree
from pointsman.scheduling.presets import build_scheduler
from pointsman.scheduling.producers.p2p_source import HEADER
from pointsman.testing import fleet, request
from pointsman.types import Decision, Tokenized

BLOCK = 16
IDS = array("I", range(1000, 2024))
TEXT = "x" * 4 * len(IDS)
SENT = "approx-prefix-cache-producer"


def policy(**parameters: Any) -> LoadedConfig:
    """Requests go where the label says, whatever is cached there."""
    return load_tree(
        {
            "apiVersion": "llm-d.ai/v1alpha1",
            "kind": "EndpointPickerConfig",
            "plugins": [
                {"type": "p2p-source-producer", "parameters": parameters},
                {"type": "label-selector-filter", "parameters": {"matchLabels": {"computes": "yes"}}},
            ],
        },
        "picker config",
    )


class Place:
    """Endpoints e0 to e3, of which e0 gets the request."""

    def __init__(self, waiting: tuple[float, ...] = (0, 0, 0, 0), seed: int = 0, **parameters: Any) -> None:
        self.precise = PreciseIndex()
        services = Services(PrefixIndex(), lambda: 0.0, random.Random(seed), self.precise)
        self.index = services.prefix
        self.endpoints = fleet(
            4, waiting=list(waiting), labels=[{"computes": "yes"}, *({"computes": "no"},) * 3]
        )
        self.scheduler = build_scheduler(policy(**parameters), services)
        for endpoint in self.endpoints:
            self.index.add(endpoint.slot)
            self.precise.add(endpoint.slot)

    def sent(self, slot: int, tokens: int = len(IDS)) -> None:
        """So much of the prompt was sent there."""
        self.index.insert(slot, self.index.match(request(TEXT[: 4 * tokens])).chains)

    def told(self, slot: int, tokens: int, medium: str = "gpu") -> None:
        """The engine there tells that it holds so much of the prompt."""
        blocks = tokens // BLOCK
        event = Stored(list(range(blocks)), None, IDS[:tokens].tobytes(), BLOCK, medium=medium)
        self.precise.apply(slot, [event], 0.0)

    def decide(self) -> Decision:
        ids = (Tokenized(IDS.tobytes()),)
        asked = request(TEXT, tokenized=ids, prompt_tokens=len(IDS))
        decision = self.scheduler.schedule(asked, self.endpoints)
        assert decision.chosen.name == "e0"
        return decision

    def source(self) -> str | None:
        headers = dict(self.decide().request_headers)
        assert set(headers) <= {HEADER}
        address = headers.get(HEADER)
        return next((e.name for e in self.endpoints if e.address == address), address)


def test_who_holds_the_prefix_is_named() -> None:
    place = Place()
    place.sent(2)
    assert place.source() == "e2"


def test_nobody_is_named_where_nobody_holds_any() -> None:
    assert Place().source() is None


def test_the_chosen_endpoint_is_never_named_and_needs_nobody_when_it_holds_as_much() -> None:
    """Having got the request once, it holds all of it."""
    place = Place()
    place.sent(1)
    assert [place.source() for _ in range(20)] == ["e1", *[None] * 19]


@pytest.mark.parametrize(("delta", "named"), [(1, "e1"), (512, "e1"), (513, None)])
def test_it_must_lack_as_much_as_is_asked(delta: int, named: str | None) -> None:
    place = Place(minCachedTokenDelta=delta)
    place.sent(0, 512)
    place.sent(1)
    assert place.source() == named


def test_a_block_less_is_as_good_and_more_than_one_is_not() -> None:
    seen = set()
    for seed in range(20):
        place = Place(seed=seed)
        place.sent(1)
        place.sent(2, len(IDS) - 64)
        place.sent(3, len(IDS) - 128)
        seen.add(place.source())
    assert seen == {"e1", "e2"}


def test_the_shorter_queue_is_drawn_more_often() -> None:
    drawn: Counter[str | None] = Counter()
    for seed in range(200):
        place = Place((0, 0, 3, 0), seed)
        place.sent(1)
        place.sent(2)
        drawn[place.source()] += 1
    assert set(drawn) == {"e1", "e2"}
    assert 0.7 < drawn["e1"] / 200 < 0.9  # 4 of 5


def test_of_engines_that_tell_only_what_is_in_cpu_memory_can_be_had() -> None:
    place = Place()
    place.told(1, len(IDS))
    assert place.source() is None
    place = Place()
    place.told(1, len(IDS))
    place.told(2, len(IDS) // 2)
    place.told(2, len(IDS) // 2, "cpu")
    assert place.source() == "e2"


def test_what_the_chosen_one_has_in_its_gpu_it_does_not_need() -> None:
    place = Place()
    place.told(0, len(IDS) // 2)
    place.told(2, len(IDS) // 2, "cpu")
    assert place.source() is None
    place = Place()
    place.told(0, len(IDS) // 4)
    place.told(2, len(IDS) // 2, "cpu")
    assert place.source() == "e2"


def test_a_hole_in_cpu_memory_ends_what_can_be_had() -> None:
    place = Place(minCachedTokenDelta=4 * BLOCK)
    for start in (0, 4 * BLOCK):  # of the second part the first three blocks have not been offloaded
        ids = IDS[start : start + 3 * BLOCK].tobytes()
        parent = None if not start else 103
        if start:
            whole = Stored(list(range(100, 104)), None, IDS[: 4 * BLOCK].tobytes(), BLOCK)
            place.precise.apply(1, [whole], 0.0)
        stored = Stored([start + i for i in range(3)], parent, ids, BLOCK, medium="cpu")
        place.precise.apply(1, [stored], 0.0)
    assert place.source() is None


def test_by_what_was_sent_where_that_is_the_producer_named() -> None:
    place = Place(prefixMatchInfoProducerName=SENT)
    place.told(1, len(IDS), "cpu")
    place.sent(3, 512)
    assert place.source() == "e3"


def test_a_delta_of_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"Expected `int` >= 1 - at `\$.minCachedTokenDelta`"):
        policy(minCachedTokenDelta=0)
