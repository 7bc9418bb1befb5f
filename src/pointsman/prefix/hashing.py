"""Hashes of a prompt's prefixes, each computed when somebody asks.

The hash of a block is the xxh3-64 of everything up to its end, seeded with the model and the request's
root. So equal hashes mean equal model, root and prompt so far, as with hashes that are chained from block
to block; but any one of them can be had without those before it, at 40 GB/s, and whoever goes through a
prompt from its start hashes every byte once.

Blocks are bytes as the client wrote them. They grow with their distance from the start, so that a long
prompt costs little more than a short one: the first is four times the pool's block size, the next 31 have
that size, then it doubles every 16 blocks. A prefix is thus known to within a 16th of its length. A rest
that does not fill a block does not count.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

from xxhash import xxh3_64, xxh3_64_digest, xxh3_64_intdigest

from pointsman.prefix.segments import DIGEST_BYTES, Segment
from pointsman.types import InferenceRequest

FIRST = 32
THEN = 16
FIRST_BLOCKS = 4
"""Size of the first block in blocks of the pool."""
_DOUBLINGS = 15


_DOUBLED = (2,) + (0,) * (FIRST - 1) + tuple(i // THEN + 1 for i in range(THEN * _DOUBLINGS))
"""How often the pool's block size is doubled to give that of each block."""
MAX_BLOCKS = len(_DOUBLED)
SCHEME = f"xxh3-64 {FIRST_BLOCKS}x1 {FIRST - 1}x1 {_DOUBLINGS}x{THEN}"
"""What one process and another must agree on, with the pool's block size, to mean the same by a hash."""


class Chain:
    """The blocks of one prompt, and how far the index knows them."""

    __slots__ = ("data", "depth", "digests", "ends", "length", "path", "seed", "state", "version")

    def __init__(
        self, data: bytes | memoryview, seed: int, ends: Sequence[int], length: int, digests: bytes = b""
    ) -> None:
        self.data = memoryview(data)
        self.digests = digests
        """Of all blocks, where another process has made them; then nothing is hashed here."""
        self.seed = seed
        self.ends = ends
        """Where each block ends, bytes."""
        self.length = length
        """Whole blocks."""
        self.version = -1
        """Version of the index that what follows is of; the index fills it in."""
        self.path: list[Segment] = []
        """Indexed segments that the prompt goes through, the last of them perhaps not to its end."""
        self.depth = 0
        """Leading blocks that are on the path."""
        self.state: xxh3_64 | None = None
        """The hash of one block more than ``depth``, to be updated."""

    def hash(self, i: int) -> int:
        """Stands for blocks 0 to ``i``."""
        if self.digests:
            return int.from_bytes(self.digest(i))
        return xxh3_64_intdigest(self.data[: self.ends[i]], self.seed)

    def digest(self, i: int) -> bytes:
        """``hash(i)`` as it stands in a segment."""
        if self.digests:
            return self.digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES]
        return xxh3_64_digest(self.data[: self.ends[i]], self.seed)

    def rest(self, length: int) -> bytes:
        """The digests of the blocks from ``depth`` up to ``length``, one after the other."""
        data, ends, depth = self.data, self.ends, self.depth
        if self.digests:
            return self.digests[depth * DIGEST_BYTES : length * DIGEST_BYTES]
        at = ends[depth]
        state, self.state = self.state, None
        if state is None:
            state = xxh3_64(data[:at], self.seed)
        found = [state.digest()]
        for end in ends[depth + 1 : length]:
            state.update(data[at:end])
            found.append(state.digest())
            at = end
        return b"".join(found)


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


@lru_cache(maxsize=64)
def _seed(model: str) -> int:
    return xxh3_64_intdigest(model.encode())


def chains_of(request: InferenceRequest, ends: Sequence[int]) -> list[Chain]:
    """A chain for each prompt of the request that fills a block; blocks end at ``ends``."""
    first = ends[0]
    chains = []
    for prompt in request.prompts:
        size = len(prompt.data)
        if prompt.digests:
            chains.append(Chain(b"", 0, ends, len(prompt.digests) // DIGEST_BYTES, prompt.digests))
        elif size >= first:
            seed = xxh3_64_intdigest(request.root, _seed(request.model))
            chains.append(Chain(prompt.data, seed, ends, bisect_right(ends, size)))
    return chains
