"""An engine's messages of KV events: numbered, and kept for who missed some.

A message has three parts: topic, number (8 bytes, big-endian, from 0 at each start) and payload. Who asks
for all from a number on gets those that are kept and an end marker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from pointsman.sim.kv_journal import Event
from pointsman.sim.kv_layouts import Writer

Parts: TypeAlias = Sequence[bytes]
END = b"\xff" * 8


class Messages:
    """Those of one engine; ``keep`` of them can be had again."""

    def __init__(self, writer: Writer, keep: int) -> None:
        self.topic = b""
        self._writer = writer
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=keep)
        self._next = 0

    def add(self, events: Sequence[Event], unix_s: float) -> Parts:
        """The next message."""
        number, payload = self._next, self._writer.payload(unix_s, events)
        self._next += 1
        self._kept.append((number, payload))
        return self.topic, number.to_bytes(8, "big"), payload

    def since(self, start: int) -> Iterator[Parts]:
        """The answer to who asks for all from number ``start`` on."""
        topic = (self.topic,) if self._writer.replays_topic else ()
        for number, payload in tuple(self._kept):
            if number >= start:
                yield (*topic, number.to_bytes(8, "big"), payload)
        yield (*(b"" for _ in topic), END, b"")

    def renumber(self) -> None:
        """Begin at 0 again, with nothing to be had again."""
        self._next = 0
        self._kept.clear()
