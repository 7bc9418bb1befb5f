"""Hashes of a prompt's prefixes, each computed when somebody asks.

The hash of a block is the xxh3-64 of everything up to its end, seeded with the model and the request's
root. So equal hashes mean equal model, root and prompt so far, as with hashes that are chained from block
to block; but any one of them can be had without those before it, at 40 GB/s, and a search by bisection
needs only a few.

Blocks are bytes as the client wrote them. They grow with their distance from the start, so that a long
prompt costs little more than a short one: of the first 32 each has the pool's block size, then every 16
blocks it doubles. A prefix is thus known to within a 16th of its length. A rest that does not fill a block
does not count.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

from xxhash import xxh3_64, xxh3_64_intdigest

from pointsman.types import InferenceRequest

FIRST = 32
THEN = 16
_DOUBLINGS = 15


_DOUBLED = (2,) + (0,) * (FIRST - 1) + tuple(i // THEN + 1 for i in range(THEN * _DOUBLINGS))
"""How often the pool's block size is doubled to give that of each block."""


class Chain:
    """The blocks of one prompt."""

    __slots__ = ("_data", "_known", "_seed", "block_bytes", "ends", "held", "length")

    def __init__(
        self, data: bytes | memoryview, seed: int, block_bytes: int, ends: Sequence[int], length: int
    ) -> None:
        self._data = memoryview(data)
        self._seed = seed
        self._known: dict[int, int] = {}
        self.block_bytes = block_bytes
        """The pool's block size."""
        self.ends = ends
        """Where each block ends, bytes."""
        self.length = length
        """Whole blocks."""
        self.held: dict[int, int] = {}
        """Slot to the number of leading blocks it holds; filled by the index."""

    def hash(self, i: int) -> int:
        """Stands for blocks 0 to ``i``; how often the size of block ``i`` has doubled is in its last 4
        bits.
        """
        found = self._known.get(i)
        if found is None:
            digest = xxh3_64_intdigest(self._data[: self.ends[i]], self._seed)
            found = self._known[i] = digest & ~15 | _DOUBLED[i]
        return found

    def hashes(self, start: int, stop: int) -> list[int]:
        """``hash(i)`` for each i from ``start`` up to ``stop``."""
        ends, data = self.ends, self._data
        at = ends[start - 1] if start else 0
        state = xxh3_64(data[:at], self._seed)
        update, digest = state.update, state.intdigest
        found = []
        for i in range(start, stop):
            end = ends[i]
            update(data[at:end])
            found.append(digest() & ~15 | _DOUBLED[i])
            at = end
        return found


@lru_cache(maxsize=64)
def block_ends(block_bytes: int, max_bytes: int) -> Sequence[int]:
    """Where blocks end, up to ``max_bytes``."""
    ends: list[int] = []
    end = 0
    for doubled in _DOUBLED:
        end += block_bytes << doubled
        if ends and end > max_bytes:
            break
        ends.append(end)
    return tuple(ends)


def chains_of(request: InferenceRequest, block_bytes: int, max_bytes: int) -> list[Chain]:
    """A chain for each prompt of the request that fills a block; of a prompt ``max_bytes`` count."""
    chains = []
    seed = -1
    for prompt in request.prompts:
        ends = block_ends(block_bytes, max_bytes)
        if len(prompt.data) >= ends[0]:
            if seed < 0:
                seed = xxh3_64_intdigest(request.root, xxh3_64_intdigest(request.model.encode()))
            chains.append(Chain(prompt.data, seed, block_bytes, ends, bisect_right(ends, len(prompt.data))))
    return chains
