"""An endpoint whose events are not gone by."""

from __future__ import annotations

import random
from array import array

from pointsman.prefix.approximate import PrefixIndex
from pointsman.prefix.kv_wire import Cleared, Removed, Stored
from pointsman.prefix.precise import PreciseIndex
from pointsman.scheduling.cycle import Services
from pointsman.testing import request
from pointsman.types import Tokenized

BLOCK = 16
TOKENS = array("I", range(1000, 1512))
ASKED = request("x" * 4 * len(TOKENS), tokenized=(Tokenized(TOKENS.tobytes()),), prompt_tokens=len(TOKENS))


def store(index: PreciseIndex, slot: int, blocks: int) -> None:
    ids = TOKENS[: blocks * BLOCK].tobytes()
    index.apply(slot, [Stored(list(range(1, blocks + 1)), None, ids, BLOCK)], 0.0)


def two() -> PreciseIndex:
    index = PreciseIndex()
    for slot in (0, 1):
        index.add(slot)
        store(index, slot, 4)
    return index


def test_nothing_is_said_of_it_and_the_others_are_as_before() -> None:
    index = two()
    index.suspend(0)
    assert (index.slots, index.suspended) == ({1}, {0})
    told = index.match(ASKED, 0.0)
    assert (told.slots, told.tokens_by_slot) == ({1}, {1: 64})
    index.sent(0, ASKED, 0.0, told)  # it goes there anyway
    index.resume(0)
    assert index.match(ASKED, 0.0).tokens_by_slot == {0: 64, 1: 64}


def test_what_it_tells_meanwhile_is_known_afterwards() -> None:
    index = two()
    index.suspend(0)
    store(index, 0, 8)
    index.apply(0, [Removed([8])], 0.0)
    assert index.slots == {1}
    index.resume(0)
    assert index.match(ASKED, 0.0).tokens(0) == 7 * BLOCK


def test_what_was_sent_answers_in_its_place() -> None:
    index = two()
    services = Services(PrefixIndex(), lambda: 0.0, random.Random(0), index)
    services.prefix.add(0)
    services.prefix.insert(0, services.prefix.match(ASKED).chains)
    by_events = services.match(ASKED)
    assert by_events.by_events(0)
    assert (by_events.tokens(0), by_events.sent_tokens(0)) == (64, 512)
    index.suspend(0)
    by_sent = services.match(ASKED)
    assert not by_sent.by_events(0)
    assert (by_sent.tokens(0), by_sent.sent_tokens(0)) == (512, 512)
    assert by_sent.by_events(1)


def test_times_that_it_was_emptied_are_counted() -> None:
    index = two()
    assert (index.emptied(0), index.emptied(1), index.emptied(2)) == (0, 0, 0)
    index.clear(0)
    index.apply(0, [Cleared()], 0.0)
    index.missed(0)
    assert (index.emptied(0), index.emptied(1)) == (3, 0)


def test_blocks_outside_of_the_gpu_are_noticed() -> None:
    index = two()
    assert not index.offloads
    index.apply(1, [Stored([1], None, b"", 0, medium="cpu")], 0.0)
    assert index.offloads
    index.apply(1, [Removed([1], medium="cpu")], 0.0)
    assert not index.offloads
