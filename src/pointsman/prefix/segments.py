"""The prefix index's parts: runs of blocks that nobody has told apart yet, and what each endpoint has of
them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import accumulate
from operator import attrgetter

import msgspec

DIGEST_BYTES = 8
GENERATIONS = 8
"""Steps in which an endpoint's segments age. A prompt that was used a moment ago needs no touch at all."""


class Segment(msgspec.Struct, gc=False, eq=False):
    """Blocks that follow each other in every prompt we know: the end of one prompt, or what several share.

    One object for a prompt's new part, however many blocks it has. It is cut in two where a later prompt
    turns off.
    """

    digests: bytes
    """Of each block the hash of everything up to its end. The first is the segment's key."""
    holders: int
    """A bit for each slot that holds all of it."""
    start: int
    """Blocks before it in the prompt."""
    stop: int
    forks: bool = False
    """Other segments begin, or began, where it ends. One that does not fork grows with its conversation."""

    def matches(self, depth: int, digest: bytes) -> bool:
        """Whether a prompt with this hash of its first ``depth`` blocks, which end in here, is the same."""
        return self.digests.startswith(digest, (depth - 1 - self.start) * DIGEST_BYTES)

    @property
    def key(self) -> bytes:
        return self.digests[:DIGEST_BYTES]

    def cut(self, at: int) -> Segment:
        """Keep the blocks before ``at``; the others become a new segment."""
        kept = (at - self.start) * DIGEST_BYTES
        rest = Segment(self.digests[kept:], self.holders, at, self.stop, self.forks)
        self.digests = self.digests[:kept]
        self.stop = at
        self.forks = True
        return rest


_digests, _start, _forks = attrgetter("digests"), attrgetter("start"), attrgetter("forks")


class Generation(msgspec.Struct, array_like=True, frozen=True):
    """The segments of one generation of an endpoint, written down: a column each, in the same order."""

    starts: bytes
    """Unsigned, two bytes each, as are ``lengths`` (in blocks)."""
    lengths: bytes
    forks: bytes
    digests: bytes
    """Of all of them, one after the other."""

    @classmethod
    def of(cls, segments: Iterable[Segment]) -> Generation:
        """As quick as can be, for requests wait meanwhile: 0.2 us a segment."""
        listed = list(segments)
        digests = list(map(_digests, listed))
        return cls(
            array("H", map(_start, listed)).tobytes(),
            array("H", [len(each) // DIGEST_BYTES for each in digests]).tobytes(),
            bytes(map(_forks, listed)),
            b"".join(digests),
        )

    @property
    def size_bytes(self) -> int:
        return len(self.starts) + len(self.lengths) + len(self.forks) + len(self.digests)

    def whole(self, max_blocks: int) -> bool:
        """The columns fit each other, and no prompt would have more blocks."""
        count = len(self.forks)
        if not len(self.starts) == len(self.lengths) == 2 * count:
            return False
        lengths = array("H", self.lengths)
        return (
            sum(lengths) * DIGEST_BYTES == len(self.digests)
            and all(lengths)
            and all(a + n <= max_blocks for a, n in zip(array("H", self.starts), lengths, strict=True))
        )

    def segments(self) -> Iterator[tuple[int, bytes, bool]]:
        """Start, digests, and whether it forks; those first that others follow."""
        starts, lengths = array("H", self.starts), array("H", self.lengths)
        ends = list(accumulate(lengths, initial=0))
        for i in sorted(range(len(starts)), key=starts.__getitem__):
            begin, end = ends[i] * DIGEST_BYTES, ends[i + 1] * DIGEST_BYTES
            yield starts[i], self.digests[begin:end], bool(self.forks[i])


class Held:
    """The segments of one endpoint by the generation they were last used in, the oldest first.

    A segment is never in a younger generation than those before it in its prompts. So forgetting the oldest
    generation, what is deepest first, never leaves a hole.
    """

    __slots__ = (
        "blocks",
        "capacity_tokens",
        "generations",
        "max_blocks",
        "tokens",
        "wanted_tokens",
        "young_blocks",
        "young_tokens",
    )

    def __init__(self) -> None:
        self.capacity_tokens = 0
        self.max_blocks = 0
        self.wanted_tokens: int | None = None
        self.empty()

    def empty(self) -> None:
        """Nothing is held any more."""
        self.generations: list[set[Segment]] = [set()]
        self.tokens = self.young_tokens = 0
        self.blocks = self.young_blocks = 0

    def grow(self, blocks: int, tokens: int) -> None:
        """So much has come into the young generation."""
        self.blocks += blocks
        self.young_blocks += blocks
        self.tokens += tokens
        self.young_tokens += tokens

    def generation(self, tokens: int) -> set[Segment]:
        """The young generation, for a prompt of that size. It closes when it has an eighth of what can be
        held; a large prompt begins its own.
        """
        if (
            max(self.young_tokens, tokens) * GENERATIONS >= self.capacity_tokens
            or self.young_blocks * GENERATIONS >= self.max_blocks
        ) and self.generations[-1]:
            self.young_tokens = self.young_blocks = 0
            self.compact()
            self.generations.append(set())
        return self.generations[-1]

    def compact(self) -> None:
        """Rebuild the sets: they keep their size when segments leave. Drop the empty ones."""
        generations = self.generations
        for i, segments in enumerate(generations):
            generations[i] = set(segments)
        generations[:-1] = filter(None, generations[:-1])
        while len(generations) > 2 * GENERATIONS:
            oldest = generations.pop(0)
            generations[0] |= oldest

    def age_alike(self, rest: Segment, segment: Segment) -> None:
        """``rest`` has been cut off ``segment``."""
        for generation in reversed(self.generations):
            if segment in generation:
                generation.add(rest)
                return

    def take(self, segment: Segment, blocks: int, tokens: int) -> None:
        """Take a segment of that size out of its generation."""
        self.blocks -= blocks
        self.tokens -= tokens
        for generation in reversed(self.generations):
            if segment in generation:
                generation.remove(segment)
                return
