"""Hashes of a prompt's prefixes, each computed when somebody asks.

The hash of a block is the xxh3-64 of everything up to its end, seeded with the model and the request's
root. So equal hashes mean equal model, root and prompt so far, as with hashes that are chained from block
to block; but any one of them can be had without those before it, at 40 GB/s, and a search by bisection
needs only a few. Blocks are bytes as the client wrote them; a rest that does not fill a block does not
count.
"""

from __future__ import annotations

from xxhash import xxh3_64, xxh3_64_intdigest

from pointsman.types import InferenceRequest


class Chain:
    """The blocks of one prompt."""

    __slots__ = ("_block_bytes", "_data", "_known", "_seed", "held", "length")

    def __init__(self, data: bytes | memoryview, seed: int, block_bytes: int, length: int) -> None:
        self._data = memoryview(data)
        self._seed = seed
        self._block_bytes = block_bytes
        self._known: dict[int, int] = {}
        self.length = length
        """Whole blocks."""
        self.held: dict[int, int] = {}
        """Slot to the number of leading blocks it holds; filled by the index."""

    def hash(self, i: int) -> int:
        """Stands for blocks 0 to ``i``."""
        found = self._known.get(i)
        if found is None:
            end = (i + 1) * self._block_bytes
            found = self._known[i] = xxh3_64_intdigest(self._data[:end], self._seed)
        return found

    def hashes(self, start: int, stop: int) -> list[int]:
        """``hash(i)`` for each i from ``start`` up to ``stop``."""
        size, data = self._block_bytes, self._data
        state = xxh3_64(data[: start * size], self._seed)
        update, digest = state.update, state.intdigest
        found = []
        for at in range(start * size, stop * size, size):
            update(data[at : at + size])
            found.append(digest())
        return found


def chains_of(request: InferenceRequest, block_bytes: int, max_blocks: int) -> list[Chain]:
    """A chain for each prompt of the request that fills a block, at most ``max_blocks`` long."""
    chains = []
    seed = -1
    for prompt in request.prompts:
        length = len(prompt.data) // block_bytes
        if length:
            if seed < 0:
                seed = xxh3_64_intdigest(request.root, xxh3_64_intdigest(request.model.encode()))
            chains.append(Chain(prompt.data, seed, block_bytes, min(length, max_blocks)))
    return chains
