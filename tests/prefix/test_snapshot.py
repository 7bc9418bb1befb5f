"""The prefix index in a file: it comes back as it was, or not at all; and only where the engine went on."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_hexdigest

from pointsman.prefix.approximate import PrefixIndex
from pointsman.prefix.segments import Generation
from pointsman.prefix.snapshot import (
    TRUST_S,
    Holder,
    Life,
    Snapshot,
    SnapshotError,
    decode,
    encode,
)
from pointsman.testing import fleet, request
from pointsman.types import Endpoint, InferenceRequest, Prompt

BLOCK = 64
MANY = 1 << 30


def ask(text: str) -> InferenceRequest:
    """A letter is a block; four of the first are the first one."""
    data = (text[0] * 3 * BLOCK * 4 + "".join(c * BLOCK * 4 for c in text)).encode()
    return request(prompts=(Prompt(data, len(data) // 4),))


def use(index: PrefixIndex, slot: int, text: str) -> None:
    index.insert(slot, index.match(ask(text)).chains)


def empty(slots: int, capacity: int | None = None, max_bytes: int = MANY) -> PrefixIndex:
    index = PrefixIndex(block_tokens=BLOCK, max_bytes=max_bytes)
    for slot in range(slots):
        index.add(slot, capacity)
    return index


def written(index: PrefixIndex, endpoints: Sequence[Endpoint], at_s: float = 0.0) -> bytes:
    holders = [Holder.of(index, endpoint, MANY) for endpoint in endpoints]
    return b"".join(encode(Snapshot(at_s, index.block_tokens, holders)))


TEXTS = st.text("ab", min_size=1, max_size=9)
USES = st.lists(st.tuples(st.integers(0, 3), TEXTS), max_size=40)


@given(USES, st.lists(TEXTS, min_size=1, max_size=10))
@settings(max_examples=100, deadline=None)
def test_what_was_written_answers_every_match_as_before(
    uses: list[tuple[int, str]], asked: list[str]
) -> None:
    index, endpoints = empty(4, capacity=30 * BLOCK), fleet(4)
    for slot, text in uses:
        use(index, slot, text)
    again = empty(4, capacity=30 * BLOCK)
    names = decode(written(index, endpoints)).load(again, endpoints, 0.0)
    assert names == ["e0", "e1", "e2", "e3"]
    for text in (*asked, *(text for _, text in uses)):
        assert again.match(ask(text)).held_by_slot == index.match(ask(text)).held_by_slot
    for slot in range(4):
        assert (again.blocks(slot), again.tokens(slot)) == (index.blocks(slot), index.tokens(slot))


@given(st.lists(USES, min_size=4, max_size=4), USES)
@settings(max_examples=100, deadline=None)
def test_endpoints_may_be_written_one_by_one_while_requests_come(
    before: list[list[tuple[int, str]]], after: list[tuple[int, str]]
) -> None:
    index, endpoints = empty(4, capacity=30 * BLOCK), fleet(4)
    asked = [text for uses in (*before, after) for _, text in uses]
    holders, held = [], []
    for endpoint, uses in zip(endpoints, before, strict=True):
        for slot, text in uses:
            use(index, slot, text)
        holders.append(Holder.of(index, endpoint, MANY))
        held.append([index.match(ask(text)).held_by_slot.get(endpoint.slot) for text in asked])
    again = empty(4, capacity=30 * BLOCK)
    Snapshot(0.0, BLOCK, holders).load(again, endpoints, 0.0)
    for slot in range(4):
        assert [again.match(ask(text)).held_by_slot.get(slot) for text in asked] == held[slot]
    for slot, text in after:
        use(again, slot, text)
        whole = ask(text)
        assert again.match(whole).held_by_slot[slot] == len(whole.prompts[0].data) // (4 * BLOCK)


def test_the_oldest_goes_first_after_a_restart_too() -> None:
    index, endpoints = empty(1, capacity=64 * BLOCK), fleet(1)
    for letter in "abcdefgh":
        use(index, 0, letter * 5)
    use(index, 0, "a" * 5)
    again = empty(1, capacity=64 * BLOCK)
    decode(written(index, endpoints)).load(again, endpoints, 0.0)
    for letter in "uv":
        use(again, 0, letter * 5)
    assert again.match(ask("a" * 5)).held_by_slot == {0: 8}
    assert again.match(ask("b" * 5)).held_by_slot.get(0, 0) < 8
    assert again.match(ask("h" * 5)).held_by_slot == {0: 8}


def filled(slots: int, prompts: int) -> PrefixIndex:
    index, rng = empty(slots, capacity=1 << 40), random.Random(7)
    for slot in range(slots):
        for _ in range(prompts):
            data = rng.randbytes(20 * 4 * BLOCK)
            index.insert(slot, index.match(request(prompts=(Prompt(data, 20 * BLOCK),))).chains)
    return index


@pytest.mark.parametrize("slots", [1, 4])
def test_the_bound_of_the_index_holds_after_loading(slots: int) -> None:
    index, endpoints = filled(slots, 2000), fleet(slots)
    snapshot = decode(written(index, endpoints))
    tracemalloc.start()
    try:
        tight = empty(slots, capacity=1 << 40, max_bytes=index.used_bytes // 3)
        snapshot.load(tight, endpoints, 0.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.95 * tight.max_bytes < tight.used_bytes <= tight.max_bytes
    assert peak < tight.max_bytes


def test_a_cache_that_has_become_smaller_gets_no_more_than_it_holds() -> None:
    index, endpoints = filled(1, 100), fleet(1)
    small = empty(1, capacity=200 * BLOCK)
    decode(written(index, endpoints)).load(small, endpoints, 0.0)
    assert 180 * BLOCK < small.tokens(0) <= 200 * BLOCK


def test_a_file_has_a_bound_and_the_oldest_is_left_out() -> None:
    index, endpoints = empty(1, capacity=640 * BLOCK), fleet(1)
    for letter in "abcdefghijklmnopqrstuvwxyz":
        use(index, 0, letter * 9)
        use(index, 0, letter.upper() * 9)
    whole = sum(generation.size_bytes for generation in index.dump(0, MANY))
    half = Holder.of(index, endpoints[0], whole // 2)
    size = sum(generation.size_bytes for generation in half.generations)
    assert whole // 4 < size <= whole // 2
    again = empty(1, capacity=640 * BLOCK)
    Snapshot(0.0, BLOCK, [half]).load(again, endpoints, 0.0)
    assert again.match(ask("Z" * 9)).held_by_slot == {0: 12}
    assert again.match(ask("a" * 9)).held_by_slot == {}


# what cannot be taken up


def some() -> bytes:
    index, endpoints = empty(2, capacity=100 * BLOCK), fleet(2)
    for text in ("aaab", "aabb", "b"):
        use(index, 0, text)
    return written(index, endpoints)


@given(st.data())
@settings(deadline=None)
def test_a_file_that_was_cut_or_changed_anywhere_is_refused(data: st.DataObject) -> None:
    whole = some()
    at = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(SnapshotError):
        decode(whole[:at])
    begin = whole.index(b"\n") + 1
    at = data.draw(st.integers(begin, len(whole) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SnapshotError, match="is damaged"):
        decode(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])


@given(st.binary(max_size=60))
def test_bytes_of_others_are_refused(body: bytes) -> None:
    head = {"format": "pointsman prefixes", "version": 1, "xxh3": xxh3_64_hexdigest(body)}
    with pytest.raises(SnapshotError):
        decode(msgspec.json.encode(head) + b"\n" + body)
    with pytest.raises(SnapshotError):
        decode(body)


@pytest.mark.parametrize(("start", "length", "digests"), [(0, 2, 1), (272, 1, 1), (0, 0, 0), (0, 1, 3)])
def test_runs_of_blocks_that_cannot_be_are_refused(start: int, length: int, digests: int) -> None:
    two = [n.to_bytes(2, "little") for n in (start, length)]
    generation = Generation(*two, b"\0", b"12345678" * digests)
    holder = Holder("e0", Life.of(fleet(1)[0]), (generation,))
    with pytest.raises(SnapshotError, match="is damaged"):
        decode(b"".join(encode(Snapshot(0.0, BLOCK, [holder]))))


def test_hashes_of_another_block_size_are_refused() -> None:
    index = PrefixIndex(block_tokens=2 * BLOCK)
    index.add(0)
    with pytest.raises(SnapshotError, match="is for blocks of 64 tokens, not 128"):
        decode(some()).load(index, fleet(2), 0.0)
    assert index.used_bytes == 0


def test_another_version_is_refused() -> None:
    line, _, body = some().partition(b"\n")
    with pytest.raises(SnapshotError, match="is of version 2; this program reads version 1"):
        decode(line.replace(b'"version":1', b'"version":2') + b"\n" + body)


# whose part is believed

TOLD = {"engine": ["vllm"], "block_tokens": [16], "kv_blocks": [1000]}
COUNTED = TOLD | {"generation_tokens": [500.0], "prefix_queries": [900.0]}
BOOTED = COUNTED | {"started_s": [1e9]}


@pytest.mark.parametrize(
    ("then", "now", "passed_s", "believed"),
    [
        pytest.param(BOOTED, BOOTED, 1e6, True, id="the same process, however long ago"),
        pytest.param(BOOTED, BOOTED | {"started_s": [1e9 + 1]}, 1.0, False, id="another process"),
        pytest.param(COUNTED, COUNTED, 1e6, True, id="counters stand still"),
        pytest.param(COUNTED, COUNTED | {"generation_tokens": [501.0]}, 1.0, True, id="counters went on"),
        pytest.param(COUNTED, COUNTED | {"generation_tokens": [499.0]}, 1.0, False, id="fewer tokens"),
        pytest.param(COUNTED, COUNTED | {"prefix_queries": [0.0]}, 1.0, False, id="fewer queries"),
        pytest.param(COUNTED, BOOTED, 1.0, True, id="its start was not known: counters"),
        pytest.param(TOLD, TOLD, TRUST_S, True, id="nothing to go by, young"),
        pytest.param(TOLD, TOLD, TRUST_S + 1, False, id="nothing to go by, old"),
        pytest.param(BOOTED, {"engine": [""]}, TRUST_S, True, id="no page now, young"),
        pytest.param(BOOTED, {"engine": [""]}, TRUST_S + 1, False, id="no page now, old"),
        pytest.param(BOOTED, BOOTED | {"kv_blocks": [900]}, 1.0, False, id="another cache"),
        pytest.param(BOOTED, BOOTED | {"engine": ["sglang"]}, 1.0, False, id="another engine"),
        pytest.param(BOOTED, BOOTED | {"name": ["e9"]}, 1.0, False, id="another name"),
    ],
)
def test_an_endpoint_holds_what_it_held_when_its_engine_went_on(
    then: dict[str, list[object]], now: dict[str, list[object]], passed_s: float, believed: bool
) -> None:
    index = empty(1)
    use(index, 0, "abc")
    data = written(index, fleet(**then))
    again = empty(1)
    names = decode(data).load(again, fleet(**now), passed_s)
    assert names == (["e0"] if believed else [])
    assert again.match(ask("abc")).held_by_slot == ({0: 6} if believed else {})


def test_endpoints_are_known_by_name_wherever_they_are_now() -> None:
    index = empty(2)
    use(index, 1, "abc")
    data = written(index, fleet(name=["a", "b"]))
    again = empty(2)
    decode(data).load(again, fleet(name=["b", "c"]), 0.0)
    assert again.match(ask("abc")).held_by_slot == {0: 6}
