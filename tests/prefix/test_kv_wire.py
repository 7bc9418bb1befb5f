"""Payloads of KV events: every layout in use, and everything that is none."""

from __future__ import annotations

import base64
import gzip
import json
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.prefix.kv_wire import Batch, Cleared, MalformedFrame, Removed, Stored, decode, rank_of
from pointsman.testing.kv_publisher import CLEARED, removed, stored

CAPTURE = Path(__file__).parent / "capture"
UINT64 = (1 << 64) - 1


def frame(tree: Any) -> bytes:
    return msgspec.msgpack.encode(tree)


def one(event: object) -> Any:
    """The event alone in a batch."""
    result = decode(frame([1.5, [event], 0]))
    assert result.skipped == 0
    [found] = result.events
    return found


def ids(*tokens: int) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


MAP = stored([11, 12], parent=10, block=2, lora_name="lora-a", extra_keys=[["salt"], None])
ARRAY = ["BlockStored", [11, 12], 10, [11, 11, 12, 12], 2, None, "GPU", "lora-a", [["salt"], None], 0,
         "full_attention", None, "a field nobody knows yet"]  # fmt: skip
WHOLE = Stored([11, 12], 10, ids(11, 11, 12, 12), 2, "lora-a", "gpu", (("salt",), None), 0, "full_attention")


@pytest.mark.parametrize(
    "tree",
    [
        [1.5, [MAP], 3],
        [1.5, [ARRAY], 3],
        {"ts": 1.5, "events": [MAP], "data_parallel_rank": 3},
        {"ts": 1.5, "events": [ARRAY], "data_parallel_rank": 3},
        [1.5, [MAP], 3, "more"],
        {"events": [MAP], "new": [1], "data_parallel_rank": 3, "ts": 1.5},
        [1.5, [{**MAP, "session_id": "s", "locality": 1}], 3],
    ],
)
def test_a_batch_reads_the_same_in_every_layout(tree: Any) -> None:
    assert decode(frame(tree)) == Batch(1.5, [WHOLE], 3, 0)
    assert rank_of(frame(tree)) == 3


def test_a_batch_may_come_without_a_rank() -> None:
    assert decode(frame([1, []])) == Batch(1.0, [], None, 0)
    assert rank_of(frame([1, []])) == 0


def test_maps_and_arrays_may_be_mixed() -> None:
    assert decode(frame([0.0, [MAP, ARRAY, CLEARED, ["AllBlocksCleared"]]])).events == [
        WHOLE,
        WHOLE,
        Cleared(),
        Cleared(),
    ]


@pytest.mark.parametrize("length", range(5, len(ARRAY) + 1))
def test_an_array_may_end_after_any_optional_field(length: int) -> None:
    event = one(ARRAY[:length])
    assert (event.hashes, event.parent, event.block_size) == ([11, 12], 10, 2)
    assert event.lora == ("lora-a" if length > 7 else "")
    assert event.extra_keys == ((("salt",), None) if length > 8 else ())
    assert event.medium == "gpu"


def test_an_sglang_array_and_its_signed_hashes() -> None:
    event = one(["BlockStored", [-1, 5], -2, [7, 8], 1, None])
    assert (event.hashes, event.parent, event.token_ids) == ([UINT64, 5], UINT64 - 1, ids(7, 8))


def test_hashes_in_bytes_are_their_last_eight() -> None:
    long = bytes(24) + (77).to_bytes(8, "big")
    assert one(stored([1], parent=None) | {"block_hashes": [long], "parent_block_hash": long}).hashes == [77]
    assert one(stored([1]) | {"block_hashes": [long], "parent_block_hash": long}).parent == 77
    assert one(["BlockRemoved", [long, b"\x05", 9]]).hashes == [77, 5, 9]


def test_removals_name_medium_and_group() -> None:
    assert one(removed(1, 2)) == Removed([1, 2], "gpu", 0)
    assert one(["BlockRemoved", [1], "CPU"]) == Removed([1], "cpu", None)
    assert one(["BlockRemoved", [1], None, 2, "more"]) == Removed([1], "gpu", 2)


def test_blocks_in_another_medium_come_without_tokens() -> None:
    event = one(stored([1, 2, 3]) | {"token_ids": [], "medium": "CPU", "block_size": 0, "extra_keys": None})
    assert (event.token_ids, event.medium, event.hashes) == (b"", "cpu", [1, 2, 3])


def test_an_adapter_without_a_name_is_not_the_base_model() -> None:
    assert one(["BlockStored", [1], None, [5], 1, 3, "GPU"]).lora == "3"
    assert one(["BlockStored", [1], None, [5], 1, None, "GPU"]).lora == ""


@pytest.mark.parametrize(
    ("wire", "read"),
    [
        (None, ()),
        ([], ()),
        ([None, None], ()),
        ([[], None], ()),
        ([[1], None], ((1,), None)),
        ([["lora", "salt"], ["lora"]], (("lora", "salt"), ("lora",))),
        ([None, [["image-hash", 12]]], (None, (("image-hash", 12),))),
        ([[b"\x01\x02"], None], ((b"\x01\x02",), None)),
    ],
)
def test_extra_keys_come_as_they_are(wire: Any, read: Any) -> None:
    assert one(stored([1, 2]) | {"extra_keys": wire}).extra_keys == read
    assert one([*ARRAY[:8], wire]).extra_keys == read


def test_many_blocks_without_extra_keys_have_none() -> None:
    assert one(stored(range(400)) | {"extra_keys": [None] * 400}).extra_keys == ()


GOOD = removed(5)


@pytest.mark.parametrize(
    "bad",
    [
        {"type": "BlockMoved"},
        {"no": "type"},
        ["BlockStored"],
        [],
        7,
        None,
        "BlockStored",
        stored([1]) | {"token_ids": [1]},  # not as many as the blocks have
        stored([1]) | {"token_ids": [1, -1]},
        stored([1]) | {"token_ids": [1, 1 << 32]},
        stored([1]) | {"token_ids": [1, 1.5]},
        stored([1]) | {"token_ids": [1, "x"]},
        stored([1]) | {"block_hashes": [[]]},
        stored([1]) | {"block_hashes": [b""]},
        stored([1]) | {"block_hashes": 5},
        stored([1]) | {"block_size": -2},
        stored([1]) | {"block_size": None},
        stored([1]) | {"parent_block_hash": "x"},
        stored([1]) | {"medium": 5},
        stored([1]) | {"extra_keys": [None, ["x"]]},
        stored([1]) | {"extra_keys": [[{"a": 1}]]},
        stored([1]) | {"extra_keys": [[[["deeper"]]]]},
        stored([1]) | {"extra_keys": 5},
        {"type": "BlockRemoved", "block_hashes": None},
    ],
)
def test_an_event_that_makes_no_sense_is_counted_and_the_others_are_read(bad: Any) -> None:
    result = decode(frame([0.0, [GOOD, bad, GOOD], 1]))
    assert result == Batch(0.0, [Removed([5], "gpu", 0)] * 2, 1, 1)


DEEP = b"\x91" * 100_000 + b"\xc0"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\xc0",
        b"{}",
        frame(5),
        frame([]),
        frame({}),
        frame([1.0]),
        frame(["x", []]),
        frame([1.0, {}]),
        frame([1.0, [], "rank"]),
        frame([1.0, [GOOD], 0])[:-1],
        frame([1.0, [GOOD], 0]) + b"\x00",
        b"\xdd\xff\xff\xff\xff",
        b"\x92\x00\xdd\xff\xff\xff\xff" + frame(GOOD),
        b"\x92\x00\x91\xdf\xff\xff\xff\xff",
        b"\x92\x00\x91\xc6\xff\xff\xff\xff",
        b"\x92\x00\x91" + DEEP,
        DEEP,
        b"\x81" * 50_000,
    ],
)
def test_what_is_no_batch_is_said_to_be_none(payload: bytes) -> None:
    with pytest.raises(MalformedFrame, match="not a batch"):
        decode(payload)
    with pytest.raises(MalformedFrame, match="not a batch"):
        rank_of(payload)


def test_text_that_is_no_text_costs_its_event_only() -> None:
    payload = frame([0.0, [GOOD, stored([1], medium="zzzz")], 0]).replace(b"zzzz", b"\xff\xfe\xfd\xfc")
    result = decode(payload)
    assert (len(result.events), result.skipped) == (1, 1)


uint64 = st.integers(0, UINT64)


@given(
    st.lists(st.tuples(uint64, st.lists(st.integers(0, (1 << 32) - 1), min_size=4, max_size=4)), max_size=9)
)
def test_what_is_written_is_read(blocks: list[tuple[int, list[int]]]) -> None:
    tokens = [token for _, block in blocks for token in block]
    hashes = [h for h, _ in blocks]
    event = one(stored(hashes, block=4, token_ids=tokens))
    assert event.hashes == hashes
    assert list(array("I", event.token_ids)) == tokens


trees = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), UINT64) | st.floats() | st.binary(max_size=9)
    | st.text(max_size=9) | st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared", "type"]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=30,
)  # fmt: skip


@settings(max_examples=300)
@given(st.one_of(st.binary(max_size=200), trees.map(frame), st.lists(trees).map(lambda e: frame([0.0, e]))))
def test_any_bytes_are_a_batch_or_are_said_to_be_none(payload: bytes) -> None:
    try:
        result = decode(payload)
    except MalformedFrame:
        return
    assert all(isinstance(event, Stored | Removed | Cleared) for event in result.events)
    for event in result.events:
        if isinstance(event, Stored) and event.token_ids:
            assert len(event.token_ids) == 4 * event.block_size * len(event.hashes)


def test_the_frames_of_a_real_engine_are_read_whole() -> None:
    """vLLM 0.32.0: 235 messages with evictions, adapters, salts and resets."""
    lines = [
        json.loads(line) for line in gzip.decompress((CAPTURE / "frames.jsonl.gz").read_bytes()).splitlines()
    ]
    counts: Counter[str] = Counter()
    for line in lines:
        result = decode(base64.b64decode(line["frames_b64"][2]))
        assert result.skipped == 0
        for event, told in zip(result.events, line["decoded"][1], strict=True):
            counts[type(event).__name__] += 1
            if isinstance(event, Stored):
                counts["blocks"] += len(event.hashes)
                assert event.hashes == told["block_hashes"]
                assert list(array("I", event.token_ids)) == told["token_ids"]
                assert event.lora == (told["lora_name"] or "")
    assert len(lines) == 235
    assert counts == {"Stored": 233, "Removed": 1149, "Cleared": 2, "blocks": 1544}
