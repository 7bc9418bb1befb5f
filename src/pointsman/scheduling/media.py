"""Which endpoint has lately encoded which image, video or audio part: an index of what we sent where."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pointsman.scheduling.departed import forget_departed
from pointsman.types import Decision

DEFAULT_CAPACITY = 2048
"""Items remembered per endpoint: llm-d's 4096 MiB encoder cache at 2 MiB an item (facts 3.5)."""

Media = Sequence[tuple[str, int]]


class MediaIndex:
    """Per endpoint an LRU of content hashes, as long as its encoder cache is believed to be."""

    __slots__ = ("_held", "capacity")

    def __init__(self) -> None:
        self.capacity = DEFAULT_CAPACITY
        self._held: dict[str, OrderedDict[str, None]] = {}

    def matched(self, endpoint: str, items: Media) -> int:
        """Summed sizes of the ``items`` that ``endpoint`` is believed to hold."""
        held = self._held.get(endpoint)
        return sum(size for content, size in items if content in held) if held else 0

    def insert(self, decision: Decision, items: Media) -> None:
        """``decision.chosen`` is about to encode ``items``."""
        held = self._held.setdefault(decision.chosen.name, OrderedDict())
        for content, _size in items:
            held[content] = None
            held.move_to_end(content)
        while len(held) > self.capacity:
            held.popitem(last=False)
        forget_departed(self._held, decision.candidates)
