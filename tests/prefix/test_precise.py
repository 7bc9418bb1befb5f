"""What the precise index promises besides being right: what it forgets and when, and what memory it takes."""

from __future__ import annotations

import gc
import random
import tracemalloc
from array import array

import pytest

from pointsman.prefix.blocks import SLACK
from pointsman.prefix.blocks_expected import ENTRY_BYTES, SPECULATIVE_S, Expected
from pointsman.prefix.keys import MASK
from pointsman.prefix.kv_wire import Cleared, Removed, Stored
from pointsman.prefix.precise import MAX_ADAPTERS, PreciseIndex
from pointsman.testing import request
from pointsman.types import InferenceRequest, Tokenized

SIZE = 4


def ids(*numbers: int) -> bytes:
    """A block for each number."""
    return array("I", [n for number in numbers for n in (number, 1, 2, 3)]).tobytes()


def ask(*numbers: int, model: str = "m") -> InferenceRequest:
    """A prompt of these blocks and one token."""
    return request(model=model, tokenized=(Tokenized(ids(*numbers) + b"last"),))


def stored(
    *numbers: int, parent: int | None = None, lora: str = "", medium: str = "gpu", plus: int = 0
) -> Stored:
    """The engine's hash of a block is its number (and ``plus``)."""
    return Stored([n + plus for n in numbers], parent, ids(*numbers), SIZE, lora, medium)


def index_of(*slots: int, max_bytes: int = 1 << 30) -> PreciseIndex:
    index = PreciseIndex(max_bytes=max_bytes)
    for slot in slots:
        index.add(slot)
    return index


def held(index: PreciseIndex, *numbers: int, slot: int = 0, now_s: float = 0.0) -> int:
    """Of these blocks, how many in front."""
    return index.match(ask(*numbers), now_s).tokens(slot) // SIZE


def test_speaks_for_an_endpoint_from_its_first_event_until_it_leaves() -> None:
    index = index_of(0, 1, 2)
    assert not index.match(ask(1), 0.0).slots
    index.apply(0, [Cleared()], 0.0)
    index.apply(2, [stored(1)], 0.0)
    index.apply(7, [stored(1)], 0.0)  # nobody we know
    assert index.match(ask(1), 0.0).slots == {0, 2}
    assert index.match(ask(1), 0.0).tokens_by_slot == {2: SIZE}
    assert not index.match(request("text"), 0.0).slots
    index.clear(2)
    assert index.match(ask(1), 0.0).slots == {0, 2}
    index.remove(2)
    assert index.match(ask(1), 0.0).slots == {0}


def test_who_has_not_told_all_may_hold_more_until_nearly_all_its_blocks_are_known() -> None:
    index = index_of(0, 1)
    for slot in (0, 1):
        index.set_capacity(slot, 10)
        index.apply(slot, [stored(1, 2)], 0.0)
    index.missed(0)
    match = index.match(ask(1, 2), 0.0)
    assert (match.slots, match.partial, match.tokens_by_slot) == ({0, 1}, {0}, {1: 2 * SIZE})
    index.apply(0, [stored(*range(10, 18))], 0.0)
    assert index.match(ask(1), 0.0).partial == {0}
    index.apply(0, [stored(18)], 0.0)
    assert not index.match(ask(1), 0.0).partial
    assert held(index, 10, 11) == 2


def test_an_engine_that_says_its_cache_is_empty_has_told_all() -> None:
    index = index_of(0)
    index.apply(0, [stored(1)], 0.0)
    index.missed(0)
    index.apply(0, [Cleared(), stored(2)], 0.0)
    assert not index.match(ask(2), 0.0).partial


def test_the_last_token_is_always_computed() -> None:
    index = index_of(0)
    index.apply(0, [stored(1, 2, 3)], 0.0)
    assert index.match(request(tokenized=(Tokenized(ids(1, 2, 3)),)), 0.0).tokens(0) == 2 * SIZE
    match = index.match(ask(1, 2, 3), 0.0)
    assert match.tokens(0) == 3 * SIZE
    assert match.prompt_tokens == 13
    assert match.ratio(0) == 12 / 13
    assert index.match(request(tokenized=(Tokenized(b""),)), 0.0).ratio(0) == 0.0


def test_a_hole_ends_the_run() -> None:
    index = index_of(0)
    index.apply(0, [stored(1, 2, 3, 4), Removed([2])], 0.0)
    assert held(index, 1, 2, 3, 4) == 1
    index.apply(0, [stored(2, parent=1)], 0.0)
    assert held(index, 1, 2, 3, 4) == 4


def test_blocks_whose_parent_is_not_known_are_left_out_and_counted() -> None:
    index = index_of(0)
    index.apply(0, [stored(2, 3, parent=1)], 0.0)
    assert index.blocks(0) == 0
    assert index.unknown == 1
    index.apply(0, [stored(1), stored(2, 3, parent=1)], 0.0)
    assert held(index, 1, 2, 3) == 3


def test_a_block_that_two_hashes_stand_for_goes_with_the_last_of_them() -> None:
    index = index_of(0)
    index.apply(0, [stored(1, 2), stored(1, 2, plus=100), stored(1, 2, plus=200)], 0.0)
    for gone in (2, 202, 2):
        index.apply(0, [Removed([gone])], 0.0)
        assert held(index, 1, 2) == 2
    index.apply(0, [Removed([102])], 0.0)
    assert held(index, 1, 2) == 1


def test_groups_that_are_no_prefix_do_not_count() -> None:
    index = index_of(0)
    window = Stored([1, 2], None, ids(1, 2), SIZE, group=1, kind="sliding_window")
    index.apply(0, [window], 0.0)
    assert held(index, 1, 2) == 0
    assert index.skipped == 1
    index.apply(0, [stored(1, 2), Removed([2], group=1)], 0.0)
    assert held(index, 1, 2) == 2
    index.apply(0, [Removed([2], group=0)], 0.0)
    assert held(index, 1, 2) == 1


def test_a_block_counts_as_much_as_the_best_tier_it_is_in() -> None:
    index = index_of(0, 1)
    index.apply(0, [stored(1, 2, 3), Stored([2, 3], None, b"", 0, medium="cpu"), Removed([3])], 0.0)
    match = index.match(ask(1, 2, 3), 0.0)
    assert match.tokens(0) == 12
    assert match.weighted(0) == pytest.approx(4 * (1.0 + 1.0 + 0.8))
    index.apply(1, [stored(1, medium="disk"), stored(2, parent=1, medium="tape")], 0.0)
    assert index.match(ask(1, 2), 0.0).weighted(1) == pytest.approx(4 * (0.5 + 1.0))


def test_tokens_that_do_not_fit_the_blocks_are_skipped() -> None:
    index = index_of(0)
    index.apply(0, [Stored([1, 2], None, ids(1), SIZE), Stored([1], None, ids(1), 0)], 0.0)
    assert index.skipped == 2
    assert index.blocks(0) == 0


def test_an_adapter_is_known_from_its_first_event_or_when_it_is_named() -> None:
    index = index_of(0)
    index.apply(0, [stored(1), stored(1, lora="a", plus=50)], 0.0)
    index.apply(0, [Removed([1])], 0.0)
    assert held(index, 1) == 0
    assert index.match(ask(1, model="a"), 0.0).tokens(0) == SIZE
    index.apply(0, [stored(1)], 0.0)
    assert index.match(ask(1, model="b"), 0.0).tokens(0) == SIZE
    index.name_adapters(["b"])
    assert index.match(ask(1, model="b"), 0.0).tokens(0) == 0


def test_names_from_outside_do_not_pile_up() -> None:
    index = index_of(0)
    for number in range(MAX_ADAPTERS + 10):
        index.apply(0, [stored(1, lora=f"adapter {number}", plus=number)], 0.0)
    assert index.blocks(0) == MAX_ADAPTERS
    assert index.skipped == 10
    for number in range(20):
        index.apply(0, [stored(1, medium=f"medium {number}")], 0.0)
    assert index.blocks(0) < MAX_ADAPTERS + 10


def test_what_was_sent_counts_until_it_is_told_or_two_seconds_have_passed() -> None:
    index = index_of(0, 1)
    index.apply(0, [stored(9)], 0.0)
    index.sent(1, ask(1, 2), 0.0)  # its block size is not known yet
    index.sent(0, ask(1, 2), 0.0)
    assert index.match(ask(1, 2), 0.1).tokens_by_slot == {0: 2 * SIZE}
    index.sent(0, ask(1, 2, 3), 1.5)
    assert held(index, 1, 2, 3, now_s=3.4) == 3
    assert held(index, 1, 2, 3, now_s=1.5 + SPECULATIVE_S) == 0
    index.sent(0, ask(1, 2), 5.0)
    index.apply(0, [stored(1, 2)], 5.1)
    assert held(index, 1, 2, now_s=9.0) == 2


def test_what_the_engine_has_told_of_and_taken_back_is_gone() -> None:
    index = index_of(0)
    index.apply(0, [stored(9)], 0.0)
    index.sent(0, ask(1, 2), 0.0)
    index.apply(0, [stored(1, 2), Removed([2])], 0.1)
    assert held(index, 1, 2, now_s=0.2) == 1
    index.sent(0, ask(1, 2, 3), 0.2)
    index.apply(0, [Cleared()], 0.3)
    assert held(index, 1, 2, 3, now_s=0.4) == 0


def chain(rng: random.Random, blocks: int) -> tuple[Stored, InferenceRequest]:
    """Blocks that nobody has seen."""
    data = rng.randbytes(blocks * SIZE * 4)
    names = [rng.getrandbits(64) for _ in range(blocks)]
    return Stored(names, None, data, SIZE), request(tokenized=(Tokenized(data + b"last"),))


def test_at_the_bound_what_was_stored_first_goes_unless_requests_use_it() -> None:
    index, rng = index_of(0, max_bytes=1 << 20), random.Random(1)
    used, asked = chain(rng, 20)
    unused, unasked = chain(rng, 20)
    index.apply(0, [used, unused], 0.0)
    for _ in range(400):
        index.apply(0, [chain(rng, 20)[0]], 0.0)
        index.sent(0, asked, 0.0)
    assert index.evicted > 5000
    assert index.match(asked, 0.0).tokens(0) == 80
    assert index.match(unasked, 0.0).tokens(0) == 0
    assert index.used_bytes <= 1 << 20


def test_an_equal_share_of_the_bound_for_each_endpoint() -> None:
    index, rng = index_of(0, max_bytes=1 << 20), random.Random(2)
    for _ in range(300):
        index.apply(0, [chain(rng, 20)[0]], 0.0)
    alone = index.blocks(0)
    index.add(1)
    for _ in range(300):
        index.apply(1, [chain(rng, 20)[0]], 0.0)
    assert index.blocks(0) <= alone / 2 * (1 + 2 / SLACK)
    assert alone / 2 * (1 - 2 / SLACK) - 20 < index.blocks(1) <= alone / 2 * (1 + 2 / SLACK)


def test_an_event_larger_than_the_share_leaves_its_beginning() -> None:
    index = index_of(0, max_bytes=1 << 20)
    event, asked = chain(random.Random(3), 10_000)
    index.apply(0, [event], 0.0)
    assert 1000 < index.match(asked, 0.0).tokens(0) // SIZE == index.blocks(0) < 10_000
    assert index.used_bytes <= 1 << 20


def live_a_full_life(index: PreciseIndex, pairs: int, blocks: int) -> None:
    """Fill up, churn, share with 19 newcomers, lose half of them, refill, in two tiers: every state of the
    tables.
    """
    rng = random.Random(pairs)
    index.add(0)
    for round_, slots in enumerate((range(1), range(20), range(20, 40), range(20))):
        for slot in slots:
            index.add(slot)
        shared = [chain(rng, blocks) for _ in range(4)]
        for number in range(pairs // blocks):
            slot = slots[number % len(slots)]
            event, asked = chain(rng, blocks) if number % 3 else shared[number // 3 % 4]
            index.apply(slot, [event], float(round_))
            if number % 2:
                index.sent(slot, asked, number / 100)
            if number % 5 == 0:
                index.apply(slot, [Removed(event.hashes[blocks // 2 :])], 0.0)
            if number % 7 == 0:
                index.apply(slot, [Stored(event.hashes, None, b"", 0, medium="cpu")], 0.0)
        for slot in slots[: len(slots) // 2]:
            index.remove(slot)
        index.apply(slots[-1], [Cleared()], 0.0)


@pytest.mark.parametrize(("pairs", "blocks"), [(2_000, 1), (11_000, 8), (22_000, 64)])
def test_memory_never_passes_the_bound(pairs: int, blocks: int) -> None:
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    index = PreciseIndex(max_bytes=pairs * 300)
    live_a_full_life(index, pairs, blocks)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert index.evicted > pairs // 10, "the test must fill it"
    assert index.used_bytes <= index.max_bytes
    assert peak <= index.max_bytes


@pytest.mark.parametrize("pairs", [1_000, 11_000, 22_000, 43_700])
@pytest.mark.parametrize("slots", [1, 20, 900])
def test_what_is_charged_for_a_pair_is_more_than_it_takes(pairs: int, slots: int) -> None:
    rng = random.Random(1)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    index = index_of(*range(slots - 1, slots), max_bytes=1 << 40)
    for _ in range(pairs // 20):
        index.apply(slots - 1, [chain(rng, 20)[0]], 0.0)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert index.blocks(slots - 1) == pairs // 20 * 20
    assert peak < index.used_bytes


@pytest.mark.parametrize("entries", [500, 1_500, 11_000, 22_000])
def test_what_is_charged_for_an_expected_block_is_more_than_it_takes(entries: int) -> None:
    rng = random.Random(1)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    expected = Expected(1 << 40)
    for number in range(entries):
        expected.add(number % 20, [rng.getrandbits(64) & MASK], number / entries)
    taken = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert expected.used_bytes == entries * ENTRY_BYTES
    assert taken < expected.used_bytes


def test_what_is_expected_never_passes_its_bound() -> None:
    expected = Expected(100 * ENTRY_BYTES)
    for slot in range(9):
        expected.add(slot, range(30), 0.0)
    assert sum(map(len, expected.by_slot.values())) == 100
    expected.expire(SPECULATIVE_S)
    assert expected.used_bytes == 0
    assert not expected.by_slot
