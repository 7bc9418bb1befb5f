"""What an HTTP/2 connection may take up, how fast, and what is remembered of its streams."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

_REMEMBERED = 2048
"""Ended streams remembered at least, to tell late frames from wrong ones."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a connection may take up."""

    streams: int = 16_384
    """Open at once. High: Envoy keeps one for each request under way, and opens another connection beyond."""
    list_bytes: int = 32 * 1024
    """Of the fields of one request."""
    block_bytes: int = 64 * 1024
    """Of one header block before it is decoded."""
    block_frames: int = 32
    """Over which one header block may be spread."""
    resets_per_s: int = 2000
    """Streams that a peer opens and takes back before any answer."""
    idle_frames_per_s: int = 1000
    """That bring nothing: PING, SETTINGS, PRIORITY, empty DATA, frames on ended streams, unknown ones."""
    unsent_bytes: int = 64 << 20
    """Answers of one connection that wait for its windows; beyond, the streams that add more are reset."""
    preface_s: float = 10.0
    """A connection must have said that it speaks HTTP/2 by then."""
    keepalive_s: float = 0.0
    """A peer that is silent this long is sent a PING, and cut when it stays silent as long; 0: never."""


class Rate:
    """Counts to a limit within about a second; asks the time only when the limit is reached."""

    __slots__ = ("_clock", "_count", "_limit", "_since")

    def __init__(self, limit_per_s: int, clock: Callable[[], float]) -> None:
        self._limit = limit_per_s
        self._clock = clock
        self._count = 0
        self._since = clock()

    def exceeded(self, more: int = 1) -> bool:
        """Count so many more."""
        self._count += more
        if self._count <= self._limit:
            return False
        now = self._clock()
        too_fast = now - self._since < 1.0
        self._since, self._count = now, 0
        return too_fast


class Ended:
    """Streams of late: enough of them to tell late frames from wrong ones."""

    __slots__ = ("_before", "_now")

    def __init__(self) -> None:
        self._now: dict[int, bool] = {}
        self._before: dict[int, bool] = {}

    def late(self, stream_id: int) -> bool | None:
        """Whether frames that the peer sent before it knew of the end may come; None: not remembered."""
        return self._now.get(stream_id, self._before.get(stream_id))

    def add(self, stream_id: int, *, late: bool) -> None:
        self._now[stream_id] = late
        if len(self._now) >= _REMEMBERED:
            self._now, self._before = {}, self._now
