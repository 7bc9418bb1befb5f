"""Which endpoint probably holds which prefix: an index of what we sent where.

A radix tree without links. Prompts are cut into segments (``segments.Segment``) where they turn off from
each other, and one table finds a segment by the hash of everything up to the end of its first block; so
what follows a segment is found by hashing one block more. Each endpoint has segments up to the size of its
KV cache, the least recently used forgotten first.

Two laws hold. An endpoint's blocks are closed under prefix: with a block all blocks before it are there.
And memory is bounded by count: every (block, endpoint) pair costs at most ``pair_bytes``, and each endpoint
gets an equal share of ``max_bytes``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import compress, count
from operator import attrgetter
from sys import getsizeof

from xxhash import xxh3_64

from pointsman.prefix.blocks_match import BlockMatch
from pointsman.prefix.hashing import FIRST_BLOCKS, Chain, block_ends, chains_of
from pointsman.prefix.segments import DIGEST_BYTES, Generation, Held, Segment
from pointsman.types import BYTES_PER_TOKEN, InferenceRequest

MIN_BLOCK_TOKENS = 64
"""llm-d's floor (facts 5.1): smaller blocks cost hashing time and tell little more."""
DEFAULT_BLOCK_TOKENS = 64
DEFAULT_CAPACITY_TOKENS = 31250 * 64
"""Where the engine does not publish its KV size: llm-d's lruCapacityPerServer (facts 5.1) in tokens."""
DEFAULT_MAX_BYTES = 512 * 1024 * 1024
DEFAULT_MAX_PREFIX_TOKENS = 131072

_PAIR_BYTES = 512
"""Upper bound on the memory of one (block, endpoint) pair without its holder bits: that of a segment of a
single block, in whatever state the tables are: just grown, full of holes, shrunk. tests/prefix measures it.
"""
_SPARSE_BYTES = 140
"""A table that takes more than this for an entry has shrunk: growing alone never leaves it so sparse."""

SLACK = 64
"""What is full makes room for a 64th of itself at once."""

_LONGEST = 1 << 40

_depth = attrgetter("start", "digests")
"""What is deepest, and a tie ends the same way in every run."""


class PrefixMatch:
    """How much of a request each endpoint is believed to hold, and the hash chains to insert once it is
    sent.
    """

    __slots__ = ("chains", "held_by_slot", "prompt_tokens", "sent", "told", "total")

    def __init__(self, chains: Sequence[Chain], prompt_tokens: int) -> None:
        self.chains = chains
        self.held_by_slot: dict[int, int] = {}
        """Matched length in blocks of the pool's size; in tokens where engines have told of any."""
        self.total = 0
        """Length of the prompts in the same unit."""
        self.prompt_tokens = prompt_tokens
        self.told: BlockMatch | None = None
        """What engines have told of."""
        self.sent: PrefixMatch | None = None
        """What it was before that was looked at."""
        for chain in chains:
            ends = chain.ends
            size = ends[0] // FIRST_BLOCKS
            self.total += ends[chain.length - 1] // size
            found: dict[int, int] = {}
            below, depth = 0, chain.depth
            for segment in reversed(chain.path):
                holders = segment.holders
                if holders != below:
                    found.update(dict.fromkeys(_slots(holders & ~below), ends[depth - 1] // size))
                    below = holders
                depth = segment.start
            if self.held_by_slot:
                for slot, blocks in self.held_by_slot.items():
                    found[slot] = found.get(slot, 0) + blocks
            self.held_by_slot = found

    def ratio(self, slot: int) -> float:
        """Matched share of the request's blocks at ``slot``, 0 to 1."""
        matched = self.held_by_slot.get(slot)
        return matched / self.total if matched else 0.0

    def tokens(self, slot: int) -> int:
        """Prompt tokens believed to be in the cache of ``slot``; those in a slower tier of it count less."""
        matched = self.held_by_slot.get(slot)
        return self.prompt_tokens * matched // self.total if matched else 0

    def cached_tokens(self, slot: int) -> int:
        """The same, but all tiers count: what the engine will say it had."""
        told = self.told
        return told.tokens(slot) if told is not None and self.by_events(slot) else self.tokens(slot)

    def sent_tokens(self, slot: int) -> int:
        """The same by what was sent there alone."""
        return (self.sent or self).tokens(slot)

    def by_events(self, slot: int) -> bool:
        """What is said of ``slot`` is what its engine told."""
        told = self.told
        if told is None or slot not in told.slots:
            return False
        return slot not in told.partial or self.held_by_slot.get(slot, 0) <= told.weighted(slot)

    def corrected(self, told: BlockMatch) -> PrefixMatch:
        """The same, but for the endpoints whose engines tell what they hold: that as they tell it, or at
        least that where they have not told all.
        """
        found = PrefixMatch((), told.prompt_tokens)
        found.chains = self.chains
        found.told = told
        found.sent = self
        total = found.total = told.prompt_tokens
        held = found.held_by_slot
        for slot, blocks in self.held_by_slot.items():
            if slot not in told.slots or slot in told.partial:
                held[slot] = total * blocks // self.total
        for slot, tokens in told.weighted_by_slot.items():
            held[slot] = max(int(tokens), held.get(slot, 0))
        return found


NO_MATCH = PrefixMatch((), 0)
"""Of a request without a whole block of prompt."""


class PrefixIndex:
    """Holders of prompt prefixes by endpoint slot. Owns its memory; ``max_bytes`` is never passed."""

    def __init__(
        self,
        *,
        block_tokens: int = DEFAULT_BLOCK_TOKENS,
        max_bytes: int = DEFAULT_MAX_BYTES,
        max_prefix_tokens: int = DEFAULT_MAX_PREFIX_TOKENS,
    ) -> None:
        self.max_bytes = max_bytes
        self.max_prefix_tokens = max_prefix_tokens
        self.auto_tune = True
        """Block and cache sizes that engines publish are used; without it they are as configured."""
        self._default_capacity = DEFAULT_CAPACITY_TOKENS
        self._segments: dict[bytes, Segment] = {}
        """Every segment by its key."""
        self._held: dict[int, Held] = {}
        self._version = 0
        """Changes when a chain may have another path than it had."""
        self.set_block_tokens(block_tokens)

    def set_block_tokens(self, block_tokens: int) -> None:
        """One block size for the whole pool. Changing it empties the index: old hashes mean nothing any
        more.
        """
        self.block_tokens = max(MIN_BLOCK_TOKENS, block_tokens)
        self.block_bytes = self.block_tokens * BYTES_PER_TOKEN
        self.set_max_prefix_tokens(self.max_prefix_tokens)
        self._tokens_at = (0, *(end // BYTES_PER_TOKEN for end in block_ends(self.block_bytes, _LONGEST)))
        """Tokens in that many leading blocks."""
        self._segments.clear()
        self._version += 1
        for held in self._held.values():
            held.empty()
        self._share()

    @property
    def ends(self) -> Sequence[int]:
        """Where the blocks of a prompt end, bytes."""
        return self._ends

    def learn_block_tokens(self, block_tokens: int) -> None:
        """An engine publishes this KV block size: use it, unless the sizes are not to be tuned."""
        if self.auto_tune and max(MIN_BLOCK_TOKENS, block_tokens) != self.block_tokens:
            self.set_block_tokens(block_tokens)

    def set_max_prefix_tokens(self, max_prefix_tokens: int) -> None:
        """How much of a prompt counts; 0: all of it."""
        self.max_prefix_tokens = max_prefix_tokens
        most = max(max_prefix_tokens, self.block_tokens) * BYTES_PER_TOKEN if max_prefix_tokens else _LONGEST
        self._ends = block_ends(self.block_bytes, most)

    def set_default_capacity(self, tokens: int) -> None:
        """Size of an endpoint's LRU where its engine does not publish its KV size, or it is not to be
        tuned.
        """
        self._default_capacity = tokens
        self._share()

    @property
    def pair_bytes(self) -> int:
        """Memory charged for one (block, endpoint) pair: the map entries and one bit per slot."""
        return _PAIR_BYTES + (max(self._held, default=0) // 30 + 1) * 4

    @property
    def used_bytes(self) -> int:
        return self.pair_bytes * sum(held.blocks for held in self._held.values())

    def blocks(self, slot: int) -> int:
        """Blocks indexed for ``slot``."""
        held = self._held.get(slot)
        return held.blocks if held else 0

    def tokens(self, slot: int) -> int:
        """Prompt tokens that those blocks stand for."""
        held = self._held.get(slot)
        return held.tokens if held else 0

    def add(self, slot: int, capacity_tokens: int | None = None) -> None:
        """Make ``slot`` known, or change the KV size it publishes (tokens; None where unknown)."""
        self._held.setdefault(slot, Held()).wanted_tokens = capacity_tokens
        self._share()

    def remove(self, slot: int) -> None:
        """Forget everything about ``slot``."""
        if slot in self._held:
            self._forget(slot, 0, 0)
            del self._held[slot]
            self._share()

    def clear(self, slot: int) -> None:
        """The endpoint lost its cache (a restart): forget its blocks, keep its place."""
        if slot in self._held:
            self._forget(slot, 0, 0)
            self._compact()

    def _share(self) -> None:
        fair = self.max_bytes // (self.pair_bytes * max(1, len(self._held)))
        for slot, held in self._held.items():
            tokens = held.wanted_tokens
            known = tokens if tokens and self.auto_tune else self._default_capacity
            held.capacity_tokens, held.max_blocks = known, fair
            self._forget(slot, known, fair)
        self._compact()

    def _compact(self) -> None:
        """Rebuild tables that many entries have left: a dict keeps its size until it is filled again."""
        table = self._segments
        if getsizeof(table) > _SPARSE_BYTES * len(table) + 4096:
            # In place and by way of a plain list, so that at no time there are two tables.
            segments = list(table.values())
            table.clear()
            table.update((segment.key, segment) for segment in segments)
        for held in self._held.values():
            held.compact()

    def match(self, request: InferenceRequest) -> PrefixMatch:
        """Longest indexed prefix of the request at every endpoint that holds any of it."""
        chains = chains_of(request, self._ends)
        if not chains:
            return NO_MATCH
        for chain in chains:
            self._walk(chain)
        return PrefixMatch(chains, request.prompt_tokens)

    def _walk(self, chain: Chain) -> None:
        """Find the chain's path: from segment to segment, and where it turns off by bisection."""
        get, data, ends, length = self._segments.get, chain.data, chain.ends, chain.length
        chain.version = self._version
        chain.path = path = []
        if chain.digests:
            self._walk_hashed(chain)
            return
        chain.state = None
        depth, end = 0, ends[0]
        state = xxh3_64(data[:end], chain.seed)
        while (segment := get(state.digest())) is not None:
            path.append(segment)
            known = depth + 1
            depth = min(segment.stop, length)
            if depth > known:
                begin, end = end, ends[depth - 1]
                state.update(data[begin:end])
                if not segment.matches(depth, state.digest()):
                    depth = _common(chain, segment, known, depth - 1)
                    break
            if depth == length:
                break
            begin, end = end, ends[depth]
            state.update(data[begin:end])
        else:
            chain.state = state
        chain.depth = depth

    def _walk_hashed(self, chain: Chain) -> None:
        """The same for a chain whose digests are known."""
        get, digest, path, length = self._segments.get, chain.digest, chain.path, chain.length
        depth = 0
        while (segment := get(digest(depth))) is not None:
            path.append(segment)
            known = depth + 1
            depth = min(segment.stop, length)
            if depth > known and not segment.matches(depth, digest(depth - 1)):
                depth = _common(chain, segment, known, depth - 1)
                break
            if depth == length:
                break
        chain.depth = depth

    def insert(self, slot: int, chains: Sequence[Chain]) -> None:
        """``slot`` is about to compute these chains, which ``match`` has just made: they become its most
        recent blocks, and older ones make room.
        """
        held = self._held.get(slot)
        if held is None:
            return
        for chain in chains:
            if chain.version != self._version:
                self._walk(chain)
            length = chain.length
            if self._tokens_at[length] > held.capacity_tokens or length > held.max_blocks:
                length = min(bisect_right(self._tokens_at, held.capacity_tokens) - 1, held.max_blocks)
            if length > 0:
                self._use(slot, held, chain, length)
                tokens, blocks = held.capacity_tokens, held.max_blocks
                if held.tokens > tokens or held.blocks > blocks:
                    # A little more than must go, so that it need not be done for every request.
                    size = self.block_tokens
                    self._forget(slot, tokens - tokens // size // SLACK * size, blocks - blocks // SLACK)

    def _use(self, slot: int, held: Held, chain: Chain, length: int) -> None:
        """The first ``length`` blocks of the chain are in use at ``slot`` now, whether it had them or
        not.
        """
        tokens_at, bit = self._tokens_at, 1 << slot
        young = held.generation(tokens_at[length])
        depth = min(chain.depth, length)
        last = None
        for segment in chain.path:
            if segment.stop > depth:
                if segment.start >= depth:
                    break
                self._cut(segment, depth)
            last = segment
            if segment not in young:
                size = segment.stop - segment.start
                tokens = tokens_at[segment.stop] - tokens_at[segment.start]
                if segment.holders & bit:
                    held.take(segment, size, tokens)
                segment.holders |= bit
                young.add(segment)
                held.grow(size, tokens)
        if depth < length:
            digests = chain.rest(length)
            if last is not None and last.holders == bit and not last.forks:
                last.digests += digests
                last.stop = length
            else:
                if last is not None:
                    last.forks = True
                added = Segment(digests, bit, depth, length)
                self._segments[added.key] = added
                young.add(added)
            held.grow(length - depth, tokens_at[length] - tokens_at[depth])
            self._version += 1

    def _cut(self, segment: Segment, at: int) -> Segment:
        """Make two of a segment; returns the second."""
        rest = segment.cut(at)
        self._segments[rest.key] = rest
        for slot in _slots(rest.holders):
            self._held[slot].age_alike(rest, segment)
        self._version += 1
        return rest

    def _forget(self, slot: int, keep_tokens: int, keep_blocks: int) -> None:
        """Take out the oldest until no more than that is left, the last segment only as far as must be."""
        held, tokens_at, bit = self._held[slot], self._tokens_at, 1 << slot
        while held.tokens > keep_tokens or held.blocks > keep_blocks:
            oldest = held.generations[0]
            for segment in sorted(oldest, key=_depth, reverse=True):
                tokens, blocks = held.tokens - keep_tokens, held.blocks - keep_blocks
                if tokens <= 0 and blocks <= 0:
                    break
                stop = segment.stop
                at = min(bisect_right(tokens_at, tokens_at[stop] - tokens) - 1, stop - blocks)
                if at > segment.start:
                    segment = self._cut(segment, at)
                oldest.remove(segment)
                held.tokens -= tokens_at[stop] - tokens_at[segment.start]
                held.blocks -= stop - segment.start
                segment.holders ^= bit
                if not segment.holders:
                    del self._segments[segment.key]
            if not oldest and len(held.generations) > 1:
                held.generations.pop(0)
        self._version += 1

    def dump(self, slot: int, max_bytes: int) -> list[Generation]:
        """What ``slot`` holds, the youngest first; of the oldest only what does not take more bytes."""
        held, found = self._held.get(slot), list[Generation]()
        for segments in reversed(held.generations if held else ()):
            if segments:
                generation = Generation.of(segments)
                max_bytes -= generation.size_bytes
                if max_bytes < 0:
                    break
                found.append(generation)
        return found

    def load(self, slot: int, generations: Iterable[Generation]) -> None:
        """``slot``, of which nothing is known yet, holds what one of an index with this block size held; the
        youngest, as much as it has room for. Slots need not have been dumped at one moment.
        """
        held, tokens_at = self._held[slot], self._tokens_at
        assert not held.blocks, f"slot {slot} holds something already"
        self._version += 1
        for generation in generations:
            young: set[Segment] = set()
            held.generations.insert(0, young)
            for start, digests, forks in generation.segments():
                stop = start + len(digests) // DIGEST_BYTES
                tokens, blocks = tokens_at[stop] - tokens_at[start], stop - start
                if held.tokens + tokens > held.capacity_tokens or held.blocks + blocks > held.max_blocks:
                    held.compact()
                    return
                held.tokens += tokens
                held.blocks += blocks
                self._lay(1 << slot, young, start, digests, forks)
        held.compact()

    def _lay(self, bit: int, young: set[Segment], start: int, digests: bytes, forks: bool) -> None:
        """Put one that ``bit`` held into the tables, in the pieces that others have made of it."""
        while (segment := self._segments.get(digests[:DIGEST_BYTES])) is not None:
            size = _alike(segment.digests, digests)
            start += size
            if start < segment.stop:
                self._cut(segment, start)
            segment.holders |= bit
            young.add(segment)
            digests = digests[size * DIGEST_BYTES :]
            if not digests:
                segment.forks |= forks
                return
            segment.forks = True
        added = Segment(digests, bit, start, start + len(digests) // DIGEST_BYTES, forks)
        self._segments[added.key] = added
        young.add(added)


def _alike(one: bytes, other: bytes) -> int:
    """How many leading digests they have in common."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most // DIGEST_BYTES
    blocks = range(0, most, DIGEST_BYTES)
    return next(i for i in blocks if one[i : i + DIGEST_BYTES] != other[i : i + DIGEST_BYTES]) // DIGEST_BYTES


def _common(chain: Chain, segment: Segment, low: int, high: int) -> int:
    """How many leading blocks the chain has in common with a segment; from ``low`` to ``high``."""
    while low < high:
        middle = (low + high + 1) >> 1
        if segment.matches(middle, chain.digest(middle - 1)):
            low = middle
        else:
            high = middle - 1
    return low


_BITS = bytes.maketrans(b"01", bytes((0, 1)))


@lru_cache(maxsize=128)
def _slots(holders: int) -> Sequence[int]:
    """The slots whose bits are set."""
    # Arithmetic on an int as long as the pool costs more for each bit than its digits do, all at once.
    return tuple(compress(count(), bin(holders)[:1:-1].encode().translate(_BITS)))
