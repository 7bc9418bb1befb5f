"""Blocks that an endpoint is going to hold because a prompt was just sent there.

Engines tell of a block some milliseconds after they have it, after the answer even; the next request of the
conversation or burst does not wait for that. What is expected counts until the engine tells of it, or for two
seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

SPECULATIVE_S = 2.0
"""llm-d's speculativeTTL (facts 5.2)."""
ENTRY_BYTES = 256
"""Each takes less than this, whatever state the tables are in; tests/prefix measures it."""


class Expected:
    """By slot the keys that are expected, with the moment until which they are."""

    __slots__ = ("_count", "_max", "_sent", "_while_s", "by_slot")

    def __init__(self, max_bytes: int, while_s: float = SPECULATIVE_S) -> None:
        """For ``while_s`` seconds each."""
        self.by_slot: dict[int, dict[int, float]] = {}
        """Endpoints of which nothing is expected are not in it."""
        self._max = max_bytes // ENTRY_BYTES
        self._while_s = while_s
        self._count = 0
        self._sent: deque[tuple[float, int, Sequence[int]]] = deque()

    @property
    def used_bytes(self) -> int:
        return self._count * ENTRY_BYTES

    def add(self, slot: int, keys: Sequence[int], now_s: float) -> None:
        """A prompt with these blocks has gone to ``slot``."""
        room = self._max - self._count
        keys = keys[:room]
        if keys:
            until_s = now_s + self._while_s
            entries = self.by_slot.setdefault(slot, {})
            before = len(entries)
            entries.update(dict.fromkeys(keys, until_s))
            self._count += len(entries) - before
            self._sent.append((until_s, slot, keys))

    def confirm(self, slot: int, keys: Iterable[int]) -> None:
        """The engine has told of these blocks."""
        entries = self.by_slot.get(slot)
        if entries:
            before = len(entries)
            for key in keys:
                entries.pop(key, None)
            self._take(slot, before - len(entries))

    def forget(self, slot: int) -> None:
        """Nothing is expected of ``slot`` any more."""
        self._count -= len(self.by_slot.pop(slot, ()))

    def expire(self, now_s: float) -> None:
        """Forget what has not come."""
        sent = self._sent
        while sent and sent[0][0] <= now_s:
            _, slot, keys = sent.popleft()
            entries = self.by_slot.get(slot)
            if entries:
                before = len(entries)
                for key in keys:
                    if entries.get(key, now_s + 1.0) <= now_s:
                        del entries[key]
                self._take(slot, before - len(entries))

    def _take(self, slot: int, count: int) -> None:
        self._count -= count
        if not self.by_slot[slot]:
            del self.by_slot[slot]
