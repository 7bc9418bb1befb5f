"""The prefix index as it is kept over a restart: the bytes of a file, and whose part can still be believed.

The file is a line that says what it is, with a hash that tells a whole file from a damaged one; then records
of msgpack, each after its length in eight bytes: one about all of it and one for each endpoint. It has
names of endpoints and hashes of prompts, no text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from typing import TypeVar

import msgspec
from xxhash import xxh3_64

from pointsman.errors import PointsmanError
from pointsman.prefix.approximate import PrefixIndex
from pointsman.prefix.hashing import MAX_BLOCKS, SCHEME
from pointsman.prefix.segments import Generation
from pointsman.types import Endpoint

T = TypeVar("T")

FORMAT = "pointsman prefixes"
VERSION = 1
"""Another one when the file is another, or when parsers take other bytes of a request for its prompt."""
MAX_BLOCK_BYTES = 32 * 1024 * 1024
"""For blocks: two to four million of them. Each endpoint has an equal share, its oldest are left out."""
MAX_FILE_BYTES = MAX_BLOCK_BYTES + 8 * 1024 * 1024
"""With names and numbers of thousands of endpoints. A file that is larger is none of ours."""
TRUST_S = 300.0
"""Where nothing tells whether an engine went on, it is taken to have gone on for so long."""
_LENGTH_BYTES = 8
_SCHEME = f"{SCHEME} {sys.byteorder}"


class Life(msgspec.Struct, array_like=True, frozen=True):
    """What tells an engine that went on from one that has started anew."""

    engine: str
    block_tokens: int
    kv_blocks: int
    started_s: float
    generation_tokens: float
    prefix_queries: float

    @classmethod
    def of(cls, endpoint: Endpoint) -> Life:
        m = endpoint.metrics
        return cls(
            endpoint.engine, m.block_tokens, m.kv_blocks, m.started_s, m.generation_tokens, m.prefix_queries
        )

    def goes_on(self, now: Life, passed_s: float) -> bool:
        """Whether an engine of which this was seen ``passed_s`` ago, and ``now`` is, still has its cache."""
        if not now.engine:
            return passed_s <= TRUST_S  # its page has not been read
        if (self.engine, self.block_tokens, self.kv_blocks) != (now.engine, now.block_tokens, now.kv_blocks):
            return False
        if self.started_s and now.started_s:
            return self.started_s == now.started_s
        before, after = ((x.generation_tokens, x.prefix_queries) for x in (self, now))
        if any(a < b for b, a in zip(before, after, strict=True)):
            return False
        return any(before) or passed_s <= TRUST_S


class Holder(msgspec.Struct, array_like=True, frozen=True):
    """What one endpoint held, and which life of its engine that was in."""

    name: str
    life: Life
    generations: tuple[Generation, ...]
    """The youngest first."""

    @classmethod
    def of(cls, index: PrefixIndex, endpoint: Endpoint, max_bytes: int) -> Holder:
        return cls(endpoint.name, Life.of(endpoint), tuple(index.dump(endpoint.slot, max_bytes)))


class Snapshot(msgspec.Struct, frozen=True):
    saved_at_s: float
    """On the wall's clock, seconds since 1970."""
    block_tokens: int
    holders: Sequence[Holder]

    def load(self, index: PrefixIndex, endpoints: Sequence[Endpoint], passed_s: float) -> list[str]:
        """Take up in ``index``, which knows nothing yet, what ``endpoints`` still hold after ``passed_s``;
        returns their names. ``SnapshotError`` when no hash means what it meant.
        """
        if self.block_tokens != index.block_tokens:
            raise SnapshotError(f"is for blocks of {self.block_tokens} tokens, not {index.block_tokens}")
        by_name = {endpoint.name: endpoint for endpoint in endpoints}
        loaded = []
        for holder in self.holders:
            endpoint = by_name.get(holder.name)
            if endpoint is not None and holder.life.goes_on(Life.of(endpoint), passed_s):
                index.load(endpoint.slot, holder.generations)
                loaded.append(holder.name)
        return loaded


class SnapshotError(PointsmanError):
    """These bytes are no snapshot that can be taken up."""

    reason = "bad_snapshot"


class _Head(msgspec.Struct):
    format: str
    version: int
    xxh3: str


class _About(msgspec.Struct, array_like=True):
    scheme: str
    saved_at_s: float
    block_tokens: int


def encode(snapshot: Snapshot) -> list[bytes]:
    """The file in parts, so that nobody has to wait until megabytes have been copied."""
    about = _About(_SCHEME, snapshot.saved_at_s, snapshot.block_tokens)
    parts, state = [], xxh3_64()
    for record in chain((about,), snapshot.holders):
        data = msgspec.msgpack.encode(record)
        for part in (len(data).to_bytes(_LENGTH_BYTES, "little"), data):
            state.update(part)
            parts.append(part)
    head = msgspec.json.encode(_Head(FORMAT, VERSION, state.hexdigest()))
    return [head + b"\n", *parts]


def decode(data: bytes) -> Snapshot:
    """``SnapshotError`` says why not."""
    line, _, body = data.partition(b"\n")
    try:
        head = msgspec.json.decode(line, type=_Head)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise SnapshotError("is not a file of prefixes") from exc
    if head.format != FORMAT:
        raise SnapshotError("is not a file of prefixes")
    if head.version != VERSION:
        raise SnapshotError(f"is of version {head.version}; this program reads version {VERSION}")
    if xxh3_64(body).hexdigest() != head.xxh3:
        raise SnapshotError("is damaged")
    first, *others = _records(body)
    about = _read(first, _About)
    if about.scheme != _SCHEME:
        raise SnapshotError(f"has hashes of another kind: {about.scheme}, not {_SCHEME}")
    holders = [_read(record, Holder) for record in others]
    if not all(g.whole(MAX_BLOCKS) for holder in holders for g in holder.generations):
        raise SnapshotError("is damaged")
    return Snapshot(about.saved_at_s, about.block_tokens, holders)


def _records(body: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(body):
        begin = at + _LENGTH_BYTES
        at = begin + int.from_bytes(body[at:begin], "little")
        found.append(body[begin:at])
    if at != len(body) or not found:
        raise SnapshotError("is damaged")
    return found


def _read(record: bytes, type: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(record, type=type)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise SnapshotError(f"is damaged: {exc}") from exc
