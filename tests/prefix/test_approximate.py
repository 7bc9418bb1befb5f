"""What the prefix index promises besides being right: sizes, and memory that never passes its bound."""

from __future__ import annotations

import gc
import random
import tracemalloc

import pytest

from pointsman.prefix.approximate import DEFAULT_CAPACITY_TOKENS, SLACK, PrefixIndex
from pointsman.testing import request
from pointsman.types import Prompt

CHAIN = 32


def fill(index: PrefixIndex, slot: int, blocks: int, rng: random.Random, chain: int = CHAIN) -> None:
    """Insert at least ``blocks`` blocks that nobody has seen, ``chain`` in a prompt."""
    for _ in range(0, blocks, chain):
        data = rng.randbytes((chain + 3) * index.block_bytes)  # the first block is four times as large
        fresh = request(prompts=(Prompt(data, (chain + 3) * index.block_tokens),))
        index.insert(slot, index.match(fresh).chains)


def nearly(index: PrefixIndex, slot: int, blocks: int) -> bool:
    """The slot holds that many blocks' worth of tokens, or less by no more than a first block and the
    slack.
    """
    return (
        (blocks - 4 - blocks // SLACK) * index.block_tokens
        < index.tokens(slot)
        <= blocks * index.block_tokens
    )


def live_a_full_life(index: PrefixIndex, pairs: int, chain: int) -> None:
    """Fill up, churn, share with 19 newcomers, lose half of them, refill: every state of its tables."""
    rng = random.Random(pairs)
    index.add(0)
    fill(index, 0, 3 * pairs, rng, chain)
    for slot in range(1, 20):
        index.add(slot)
        fill(index, slot, 2 * pairs // (slot + 1), rng, chain)
    for slot in range(5, 15):
        index.remove(slot)
    index.clear(16)
    for slot in (0, 1, 2, 3, 4, 15):
        fill(index, slot, pairs // 3, rng, chain)


@pytest.mark.parametrize(
    ("pairs", "chain"),
    [(1_000, 1), (5_462, 1), (1_000, CHAIN), (20_000, CHAIN), (43_691, CHAIN), (100_000, CHAIN)],
)
def test_memory_never_passes_the_bound(pairs: int, chain: int) -> None:
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    index = PrefixIndex(max_bytes=pairs * 516, block_tokens=64)
    index.set_default_capacity(1 << 40)
    live_a_full_life(index, pairs, chain)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert index.used_bytes > 0.5 * index.max_bytes, "the test must fill it"
    assert index.used_bytes <= index.max_bytes
    assert peak <= index.max_bytes


@pytest.mark.parametrize(("pairs", "chain"), [(1_000, 1), (20_000, 1), (20_000, CHAIN), (100_000, CHAIN)])
@pytest.mark.parametrize("slots", [1, 20, 900])
def test_what_is_charged_for_a_block_is_more_than_it_takes(pairs: int, slots: int, chain: int) -> None:
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    index = PrefixIndex(max_bytes=1 << 40, block_tokens=64)
    index.add(slots - 1, 1 << 40)
    fill(index, slots - 1, pairs, random.Random(1), chain)
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert index.blocks(slots - 1) >= pairs
    assert taken < index.used_bytes


def test_an_equal_share_of_the_bound_for_each_endpoint() -> None:
    index = PrefixIndex(max_bytes=516 * 1000)
    for slot in (0, 1):
        index.add(slot, 1 << 40)
        fill(index, slot, 2000, random.Random(slot))
    for slot in (0, 1):
        assert 500 - 500 // SLACK <= index.blocks(slot) <= 500


def test_an_endpoint_remembers_as_much_as_its_engine_can_hold() -> None:
    index = PrefixIndex(block_tokens=64)
    index.add(0, 64 * 100)
    index.add(1)
    for slot in (0, 1):
        fill(index, slot, 40_000, random.Random(slot))
    assert nearly(index, 0, 100)
    assert nearly(index, 1, DEFAULT_CAPACITY_TOKENS // 64)


def test_changing_the_block_size_keeps_the_capacity_in_tokens() -> None:
    index = PrefixIndex(block_tokens=64)
    index.add(0, 64 * 100)
    index.set_block_tokens(128)
    fill(index, 0, 1000, random.Random(0))
    assert nearly(index, 0, 50)


def test_engines_sizes_are_ignored_without_auto_tune() -> None:
    index = PrefixIndex(block_tokens=64)
    index.auto_tune = False
    index.set_default_capacity(64 * 100)
    index.learn_block_tokens(256)
    index.add(0, 1 << 20)
    fill(index, 0, 1000, random.Random(0))
    assert index.block_tokens == 64
    assert nearly(index, 0, 100)


def test_learns_an_engines_block_size_but_no_smaller_one_than_llm_d() -> None:
    index = PrefixIndex(block_tokens=64)
    index.learn_block_tokens(256)
    assert index.block_tokens == 256
    index.learn_block_tokens(16)
    assert index.block_tokens == 64


def test_only_so_much_of_a_prompt_counts() -> None:
    index = PrefixIndex(block_tokens=64, max_prefix_tokens=384)
    assert index.match(request("x" * 4 * 64 * 9)).total == 6
    index.set_max_prefix_tokens(0)
    assert index.match(request("x" * 4 * 64 * 9)).total == 9


def test_requests_share_a_prefix_only_with_the_same_model_and_root() -> None:
    index = PrefixIndex()
    index.add(0)
    text = "x" * 2000
    index.insert(0, index.match(request(text, model="a", root=b"salt")).chains)
    assert index.match(request(text, model="a", root=b"salt")).ratio(0) == 1.0
    assert index.match(request(text, model="b", root=b"salt")).ratio(0) == 0.0
    assert index.match(request(text, model="a", root=b"other")).ratio(0) == 0.0


def test_a_rest_that_does_not_fill_a_block_does_not_count() -> None:
    index = PrefixIndex(block_tokens=64)
    index.add(0)
    index.insert(0, index.match(request("x" * 1300)).chains)
    assert index.match(request("x" * 1310)).held_by_slot == {0: 5}
    assert index.match(request("x" * 1023)).total == 0


def test_a_prompt_in_use_stays_while_others_come_and_go() -> None:
    index = PrefixIndex(block_tokens=64)
    index.add(0, 64 * 400)
    rng, kept = random.Random(5), request("x" * 256 * 20)
    index.insert(0, index.match(kept).chains)
    for _ in range(50):
        fill(index, 0, 128, rng)
        match = index.match(kept)
        assert match.ratio(0) == 1.0
        index.insert(0, match.chains)
    fill(index, 0, 800, rng)
    assert index.match(kept).ratio(0) == 0.0


def test_notes_of_blocks_in_steady_use_do_not_pile_up() -> None:
    index = PrefixIndex(block_tokens=64)
    index.add(0, 64 * 100)
    prompts = [request(str(i) * 256 * 20) for i in range(4)]
    tracemalloc.start()
    for turn in range(2000):
        match = index.match(prompts[turn % 4])
        index.insert(0, match.chains)
        if turn == 200:
            before = tracemalloc.get_traced_memory()[0]
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 64_000


def test_finds_any_number_of_holders_at_any_depth() -> None:
    index, text = PrefixIndex(block_tokens=64), "x" * 256 * 7
    for slot in range(0, 300, 3):
        index.add(slot)
        index.insert(slot, index.match(request(text[: 256 * (slot % 4 + 4)])).chains)
    assert index.match(request(text)).held_by_slot == {slot: slot % 4 + 4 for slot in range(0, 300, 3)}


def test_the_shared_part_of_prompts_is_found_block_by_block() -> None:
    index, rng = PrefixIndex(block_tokens=64), random.Random(3)
    index.add(0)
    text = rng.randbytes(256 * 24)
    index.insert(0, index.match(request(prompts=(Prompt(text, 0),))).chains)
    for shared in (20, 5, 12, 13, 23, 4):
        branch = text[: 256 * shared] + rng.randbytes(256 * 8)
        match = index.match(request(prompts=(Prompt(branch, 0),)))
        assert match.held_by_slot == {0: shared}
        index.insert(0, match.chains)
        assert index.match(request(prompts=(Prompt(branch, 0),))).ratio(0) == 1.0
        assert index.match(request(prompts=(Prompt(text, 0),))).ratio(0) == 1.0


def test_a_conversation_that_changes_endpoints_is_found_whole_at_the_last_one() -> None:
    index, rng = PrefixIndex(block_tokens=64), random.Random(4)
    index.add(0)
    index.add(1)
    text = rng.randbytes(256 * 4)
    for turn in range(40):
        text += rng.randbytes(256 * 3)
        asked = request(prompts=(Prompt(text, 0),))
        index.insert(turn // 3 % 2, index.match(asked).chains)
        assert index.match(asked).ratio(turn // 3 % 2) == 1.0
    assert 0.8 < index.match(asked).ratio(0) < 1.0


def test_a_long_prompt_is_forgotten_from_its_end() -> None:
    index, rng = PrefixIndex(block_tokens=64), random.Random(6)
    index.add(0, 64 * 200)
    long = request(prompts=(Prompt(rng.randbytes(256 * 150), 0),))
    index.insert(0, index.match(long).chains)
    fill(index, 0, 64, rng)
    assert 0.5 < index.match(long).ratio(0) < 1.0


def test_chains_matched_before_the_index_changed_are_inserted_as_they_are_now() -> None:
    index, text = PrefixIndex(block_tokens=64), "x" * 256 * 12
    for slot in (0, 1):
        index.add(slot)
    early = index.match(request(text)).chains
    index.insert(0, index.match(request(text[: 256 * 8] + "y" * 256 * 4)).chains)
    index.insert(0, early)
    index.insert(1, early)
    assert index.match(request(text)).held_by_slot == {0: 12, 1: 12}
    assert index.blocks(0) == 9 + 4


def test_a_large_prompt_in_steady_use_ages_nothing_away() -> None:
    index, rng = PrefixIndex(block_tokens=64), random.Random(7)
    index.add(0, 64 * 800)
    large = request(prompts=(Prompt(rng.randbytes(256 * 120), 0),))
    small = [request(prompts=(Prompt(rng.randbytes(256 * 4), 0),)) for _ in range(60)]
    for one in small:  # each use of the large prompt begins a generation
        index.insert(0, index.match(one).chains)
        index.insert(0, index.match(large).chains)
    assert index.tokens(0) == 64 * (4 * 60 + index.match(large).total)
    assert all(index.match(one).ratio(0) == 1.0 for one in (*small, large))
    fill(index, 0, 64 * 12, rng)
    assert not any(index.match(one).ratio(0) for one in small[:30])
    index.clear(0)
    assert index.blocks(0) == index.tokens(0) == 0
