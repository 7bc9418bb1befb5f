"""An engine's KV blocks: who holds them, what can be found again, what is evicted first.

Blocks that share one history are kept as one segment, so that taking or giving back a prompt of hundreds of
blocks costs a few steps. It behaves as vLLM's block pool does: a block nobody holds stays findable until it
is needed; the longest unheld goes first, and of those released together the last of the chain.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence


class Segment:
    """Consecutive blocks of one chain. ``hashes`` is None where nobody can ask for them: an output."""

    __slots__ = ("blocks", "hashes", "holders", "parent")

    def __init__(self, blocks: int, hashes: list[int] | None, parent: Segment | None, holders: int) -> None:
        self.blocks = blocks
        self.hashes = hashes
        self.parent = parent
        self.holders = holders

    @property
    def last_hash(self) -> int:
        assert self.hashes is not None
        return self.hashes[-1]


class KVCache:
    """``blocks`` KV blocks. Hashes are chained: equal hashes mean equal blocks and equal history.

    ``on_evicted`` is told of blocks that cannot be found any more, the end of a chain first.
    """

    def __init__(self, blocks: int, on_evicted: Callable[[Sequence[int]], None] | None = None) -> None:
        self.blocks = blocks
        self._on_evicted = on_evicted
        self.cached_blocks = 0
        """Blocks that can be found by their hash, held or not."""
        self._untouched = blocks
        self._unheld_blocks = 0
        self._by_first_hash: dict[int, Segment] = {}
        self._unheld: OrderedDict[Segment, None] = OrderedDict()

    @property
    def untouched_blocks(self) -> int:
        """Blocks that can be taken without evicting anything."""
        return self._untouched

    @property
    def available_blocks(self) -> int:
        """Blocks that nobody holds."""
        return self._untouched + self._unheld_blocks

    @property
    def used_blocks(self) -> int:
        return self.blocks - self._untouched - self._unheld_blocks

    def match(self, hashes: Sequence[int], limit: int) -> int:
        """How many of the first ``limit`` blocks are cached."""
        return sum(taken for _, taken in self._walk(hashes, limit))

    def admit(self, hashes: Sequence[int], limit: int, blocks: int) -> tuple[Segment | None, int] | None:
        """Hold ``blocks`` blocks, of which as many of the first ``limit`` as are cached are shared: the last
        shared segment and the number of shared blocks. None, and nothing held, when they do not fit.
        """
        path = self._walk(hashes, limit)
        shared = revived = 0
        for segment, taken in path:
            shared += taken
            if not segment.holders:
                revived += taken
        if blocks - shared + revived > self._untouched + self._unheld_blocks:
            return None
        last = None
        for segment, taken in path:
            last = segment if taken == segment.blocks else self._split(segment, taken)
            if not last.holders:
                self._unheld_blocks -= last.blocks
                self._unheld.pop(last, None)
            last.holders += 1
        self.take(blocks - shared)
        return last, shared

    def take(self, blocks: int) -> None:
        """Hold ``blocks`` more, evicting what was unheld longest."""
        fresh = min(blocks, self._untouched)
        self._untouched -= fresh
        need = blocks - fresh
        if not need:
            return
        self._unheld_blocks -= need
        assert self._unheld_blocks >= 0, "more KV blocks held than there are"
        while need:
            segment = next(iter(self._unheld))
            need -= self._cut(segment, min(need, segment.blocks))

    def publish(self, after: Segment | None, hashes: Sequence[int]) -> Segment | None:
        """Make blocks already held, which follow ``after``, findable: the segment that now ends the chain.

        ``after`` itself when another chain holds the same blocks already: ours stay a private copy.
        """
        if not hashes or hashes[0] in self._by_first_hash:
            return after
        segment = Segment(len(hashes), list(hashes), after, 1)
        self._by_first_hash[hashes[0]] = segment
        self.cached_blocks += len(hashes)
        return segment

    def release(self, last: Segment | None, private: int) -> None:
        """Give back a chain that ends in ``last`` and ``private`` unpublished blocks behind it."""
        if private:
            self._unheld[Segment(private, None, None, 0)] = None
            self._unheld_blocks += private
        while last is not None:
            last.holders -= 1
            if not last.holders:
                self._unheld[last] = None
                self._unheld_blocks += last.blocks
            last = last.parent

    def clear(self) -> bool:
        """Forget every block. As in vLLM that cannot be while somebody holds one: then False."""
        if self.used_blocks:
            return False
        self._by_first_hash.clear()
        self._unheld.clear()
        self._untouched = self.blocks
        self._unheld_blocks = self.cached_blocks = 0
        return True

    def _walk(self, hashes: Sequence[int], limit: int) -> list[tuple[Segment, int]]:
        """The cached segments the chain runs through, and how many blocks of each it shares."""
        path: list[tuple[Segment, int]] = []
        at = 0
        limit = min(limit, len(hashes))
        while at < limit:
            segment = self._by_first_hash.get(hashes[at])
            if segment is None:
                break
            taken = _common(segment.hashes, hashes, at, limit)
            path.append((segment, taken))
            at += taken
            if taken < segment.blocks:
                break
        return path

    def _split(self, segment: Segment, blocks: int) -> Segment:
        """Part ``segment`` after ``blocks``; the front half, which is new. The rear keeps its place."""
        hashes = segment.hashes
        assert hashes is not None
        front = Segment(blocks, hashes[:blocks], segment.parent, segment.holders)
        del hashes[:blocks]
        segment.blocks -= blocks
        segment.parent = front
        assert front.hashes is not None
        self._by_first_hash[front.hashes[0]] = front
        self._by_first_hash[hashes[0]] = segment
        return front

    def _cut(self, segment: Segment, blocks: int) -> int:
        """Evict the last ``blocks`` of an unheld segment."""
        segment.blocks -= blocks
        hashes = segment.hashes
        if hashes is not None:
            self.cached_blocks -= blocks
            if not segment.blocks:
                del self._by_first_hash[hashes[0]]
            if self._on_evicted is not None:
                self._on_evicted(hashes[segment.blocks :][::-1])
            del hashes[segment.blocks :]
        if not segment.blocks:
            del self._unheld[segment]
        return blocks


def _common(known: list[int] | None, hashes: Sequence[int], at: int, limit: int) -> int:
    """Leading hashes of ``known`` that ``hashes`` has from ``at`` on; at least one, as the first is equal."""
    assert known is not None
    high = min(len(known), limit - at)
    if known[high - 1] == hashes[at + high - 1]:
        return high
    low = 1
    while low < high - 1:
        middle = (low + high) >> 1
        if known[middle - 1] == hashes[at + middle - 1]:
            low = middle
        else:
            high = middle
    return low
