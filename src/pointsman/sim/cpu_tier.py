"""An engine's second home for KV blocks, in the CPU's memory: what the GPU evicts stays there for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pointsman.sim.kv_journal import Journal

LOAD_SPEED = 10
"""A block is fetched so many times faster than it is computed: an 8B model's tokens of 160 KB come over
PCIe at 25 GB/s, some 150,000 a second, and are computed at 15,000.
"""


class CpuTier:
    """At most ``blocks`` of them; those used longest ago go, of those used together the end of the chain
    first.
    """

    def __init__(self, blocks: int, journal: Journal | None) -> None:
        self.blocks = blocks
        self._journal = journal
        self._kept: OrderedDict[int, None] = OrderedDict()

    def keep(self, hashes: Sequence[int]) -> None:
        """The GPU is about to evict these, the end of a chain first."""
        kept, journal = self._kept, self._journal
        for h in hashes:
            if h not in kept and journal is not None:
                journal.offloaded(h)
            kept[h] = None
            kept.move_to_end(h)
        while len(kept) > self.blocks:
            dropped, _ = kept.popitem(last=False)
            if journal is not None:
                journal.dropped(dropped)

    def fetch(self, hashes: Sequence[int]) -> int:
        """How many of these, from the first on, are there; they count as used."""
        kept = self._kept
        found = 0
        for h in hashes:
            if h not in kept:
                break
            found += 1
        for h in reversed(hashes[:found]):
            kept.move_to_end(h)
        return found

    def clear(self) -> None:
        self._kept.clear()
