"""KV cache events off the wire: the payload of one message becomes a batch of events.

Engines write msgpack. The batch is an array or a map; so is each event, an array in older vLLM and
SGLang, a map with its name under "type" in newer vLLM. Arrays may end early and may go on
with fields that nobody knows yet. docs/reference/kv-events.md has every layout.

Nothing here allocates by a length that a message merely claims, and nesting is bounded by the parser.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Sequence
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Raw

from pointsman.errors import PointsmanError

GPU = "gpu"
"""The medium of an event that names none."""
_UINT64 = (1 << 64) - 1
_NIL = b"\xc0"
_NOTHING_BUT_NIL = re.compile(rb"(?:[\x90-\x9f]|\xdc..)?\xc0*", re.DOTALL)
"""Nil, or an array of it."""

_Scalar: TypeAlias = str | int | float | bytes | None
ExtraKey: TypeAlias = _Scalar | tuple[_Scalar, ...]
ExtraKeys: TypeAlias = tuple[tuple[ExtraKey, ...] | None, ...]
"""For each block, what its hash depends on besides tokens: names, salts, hashes, or pairs of these."""


class Stored(msgspec.Struct, frozen=True, gc=False):
    """Blocks that are in the cache from now on, each the continuation of the one before it."""

    hashes: list[int]
    """The engine's, 64 bits; of those in bytes the last eight, big-endian."""
    parent: int | None
    """The block before the first; None where a sequence begins."""
    token_ids: bytes
    """Of all blocks, four bytes each, little-endian. Empty: blocks known by hash are now in this medium,
    too.
    """
    block_size: int
    """Tokens in a block; may be 0 where ``token_ids`` is empty."""
    lora: str = ""
    medium: str = GPU
    """Lower case."""
    extra_keys: ExtraKeys = ()
    """For each block, as they came; empty where no block has any."""
    group: int = 0
    kind: str = ""
    """Attention of the KV cache group, such as full_attention or sliding_window; "" where not told: full."""


class Removed(msgspec.Struct, frozen=True, gc=False):
    """Blocks that are no longer in this medium."""

    hashes: list[int]
    medium: str = GPU
    group: int | None = None


class Cleared(msgspec.Struct, frozen=True, gc=False):
    """The cache is empty, in all media."""


Event: TypeAlias = Stored | Removed | Cleared


class Batch(msgspec.Struct, frozen=True, gc=False):
    """What one message says, in the engine's order."""

    ts: float
    """The engine's wall clock, seconds."""
    events: list[Event]
    rank: int | None
    """Of the data-parallel engine that sent it."""
    skipped: int
    """Events left out because they are malformed or of a kind we do not know."""


class MalformedFrame(PointsmanError):
    """These bytes are no batch of KV events."""

    reason = "malformed_kv_events"


# -- what is on the wire

_Hash: TypeAlias = int | Annotated[bytes, Meta(min_length=1)]
_Lora: TypeAlias = int | str | None


class _StoredFields(msgspec.Struct, gc=False):
    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None
    token_ids: list[int]
    block_size: Annotated[int, Meta(ge=0)] | None = None
    lora_id: _Lora = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: Raw = Raw(_NIL)
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _RemovedFields(msgspec.Struct, gc=False):
    block_hashes: list[_Hash]
    medium: str | None = None
    group_idx: int | None = None


class _ClearedFields(msgspec.Struct, gc=False):
    pass


class _StoredMap(_StoredFields, tag_field="type", tag="BlockStored"):
    pass


class _RemovedMap(_RemovedFields, tag_field="type", tag="BlockRemoved"):
    pass


class _ClearedMap(_ClearedFields, tag_field="type", tag="AllBlocksCleared"):
    pass


class _StoredArray(_StoredFields, array_like=True, tag="BlockStored"):
    pass


class _RemovedArray(_RemovedFields, array_like=True, tag="BlockRemoved"):
    pass


class _ClearedArray(_ClearedFields, array_like=True, tag="AllBlocksCleared"):
    pass


_Maps: TypeAlias = _StoredMap | _RemovedMap | _ClearedMap
_Arrays: TypeAlias = _StoredArray | _RemovedArray | _ClearedArray
_Wire: TypeAlias = _StoredFields | _RemovedFields | _ClearedFields


class _MapsInArray(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[_Maps]
    data_parallel_rank: int | None = None


class _ArraysInArray(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[_Arrays]
    data_parallel_rank: int | None = None


class _MapsInMap(msgspec.Struct, gc=False):
    ts: float
    events: list[_Maps]
    data_parallel_rank: int | None = None


class _RawInArray(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[Raw]
    data_parallel_rank: int | None = None


class _RawInMap(msgspec.Struct, gc=False):
    ts: float
    events: list[Raw]
    data_parallel_rank: int | None = None


_Common: TypeAlias = _MapsInArray | _ArraysInArray | _MapsInMap
_COMMON: tuple[msgspec.msgpack.Decoder[_Common], ...] = tuple(
    msgspec.msgpack.Decoder(type) for type in (_MapsInArray, _ArraysInArray, _MapsInMap)
)
_ANY_ARRAY, _ANY_MAP = msgspec.msgpack.Decoder(_RawInArray), msgspec.msgpack.Decoder(_RawInMap)
_EVENT: tuple[msgspec.msgpack.Decoder[_Wire], ...] = (
    msgspec.msgpack.Decoder(_Maps),
    msgspec.msgpack.Decoder(_Arrays),
)
_EXTRA = msgspec.msgpack.Decoder(tuple[tuple[object, ...] | None, ...])

_BAD = (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError)
"""What bytes from elsewhere can do to the parser: UnicodeDecodeError is a ValueError."""


def decode(payload: bytes) -> Batch:
    """The batch in ``payload``; ``MalformedFrame`` where there is none.

    Where a whole batch is of one of the layouts in use it is read in one go; else event by event, and those
    that cannot be read are counted.
    """
    for decoder in _COMMON:
        try:
            batch = decoder.decode(payload)
            return Batch(batch.ts, [_event(e) for e in batch.events], batch.data_parallel_rank, 0)
        except _BAD:
            continue
    return _event_by_event(payload)


def rank_of(payload: bytes) -> int:
    """The data-parallel rank in a batch, without reading its events; 0 where it has none."""
    return _unread(payload).data_parallel_rank or 0


def _unread(payload: bytes) -> _RawInArray | _RawInMap:
    try:
        try:
            return _ANY_ARRAY.decode(payload)
        except msgspec.ValidationError:
            return _ANY_MAP.decode(payload)
    except _BAD as exc:
        raise MalformedFrame(f"not a batch of KV events: {exc}") from exc


def _event_by_event(payload: bytes) -> Batch:
    raw = _unread(payload)
    events: list[Event] = []
    for one in raw.events:
        for decoder in _EVENT:
            try:
                events.append(_event(decoder.decode(one)))
            except _BAD:
                continue
            break
    return Batch(raw.ts, events, raw.data_parallel_rank, len(raw.events) - len(events))


def _event(wire: _Wire) -> Event:
    """``ValueError`` and its like where the fields do not fit each other."""
    if isinstance(wire, _StoredFields):
        return _stored(wire)
    if isinstance(wire, _RemovedFields):
        return Removed(_hashes(wire.block_hashes), _medium(wire.medium), wire.group_idx)
    return Cleared()


def _stored(wire: _StoredFields) -> Stored:
    count, size, ids = len(wire.block_hashes), wire.block_size or 0, wire.token_ids
    if ids and len(ids) != count * size:
        raise ValueError(f"{len(ids)} token ids in {count} blocks of {size}")
    parent = wire.parent_block_hash
    return Stored(
        _hashes(wire.block_hashes),
        None if parent is None else _hashes((parent,))[0],
        _uint32(ids),
        size,
        wire.lora_name or _lora_of(wire.lora_id),
        _medium(wire.medium),
        _extra_keys(wire.extra_keys, count),
        wire.group_idx or 0,
        wire.kv_cache_spec_kind or "",
    )


def _hashes(wire: Sequence[_Hash]) -> list[int]:
    return [h & _UINT64 if isinstance(h, int) else int.from_bytes(h[-8:], "big") for h in wire]


def _uint32(ids: list[int]) -> bytes:
    numbers = array("I", ids)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _medium(medium: str | None) -> str:
    return medium.lower() if medium else GPU


def _lora_of(lora_id: _Lora) -> str:
    """Engines that do not tell the adapter's name: at least it is not the base model."""
    return "" if lora_id is None else str(lora_id)


def _extra_keys(raw: Raw, count: int) -> ExtraKeys:
    if _NOTHING_BUT_NIL.fullmatch(raw):
        return ()
    blocks = _EXTRA.decode(raw)
    if blocks and len(blocks) != count:
        raise ValueError(f"extra keys of {len(blocks)} blocks, not {count}")
    keys = tuple(tuple(map(_extra_key, block)) if block else None for block in blocks)
    return keys if any(keys) else ()


def _extra_key(key: object) -> ExtraKey:
    return tuple(map(_scalar, key)) if isinstance(key, list) else _scalar(key)


def _scalar(key: object) -> _Scalar:
    if key is None or isinstance(key, str | int | float | bytes):
        return key
    raise ValueError(f"an extra key that is a {type(key).__name__}")
