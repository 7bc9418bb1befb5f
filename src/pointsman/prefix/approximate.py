"""Which endpoint probably holds which prefix: an index of what we sent where.

Per endpoint the blocks it was sent, as many as its KV cache has room for, the least recently used forgotten
first; across endpoints one map from a block's hash to the set of holders (a bit per slot). Two laws make it
cheap. An endpoint's blocks are closed under prefix: with a block all blocks before it are there. So the
longest match is found by bisection, not by a walk. And memory is bounded by count: every (block, endpoint)
pair costs at most ``pair_bytes``, and each endpoint gets an equal share of ``max_bytes``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import compress, count
from sys import getsizeof

from pointsman.prefix.hashing import Chain, chains_of
from pointsman.types import BYTES_PER_TOKEN, InferenceRequest

MIN_BLOCK_TOKENS = 64
"""llm-d's floor (facts 5.1): smaller blocks cost hashing time and tell little more."""
DEFAULT_BLOCK_TOKENS = 64
DEFAULT_CAPACITY_TOKENS = 31250 * 64
"""Where the engine does not publish its KV size: llm-d's lruCapacityPerServer (facts 5.1) in tokens."""
DEFAULT_MAX_BYTES = 512 * 1024 * 1024
DEFAULT_MAX_PREFIX_TOKENS = 131072

_PAIR_BYTES = 512
"""Upper bound on the memory of one (block, endpoint) pair without its holder bits, in whatever state the
tables are: just grown, full of holes, shrunk. 140 bytes is usual; tests/prefix measures it.
"""
_SPARSE_BYTES = 140
"""A table that takes more than this for an entry has shrunk: growing alone never leaves it so sparse."""

SLACK = 64
"""What is full makes room for a 64th of itself at once."""
MAX_DEPTHS = 4096
GENERATIONS = 8
"""Steps in which an endpoint's blocks age. A prompt whose deepest known block is young needs no touch at
all.
"""


class PrefixMatch:
    """How much of a request each endpoint is believed to hold, and the hash chains to insert once it is
    sent.
    """

    __slots__ = ("blocks_by_slot", "chains", "prompt_tokens", "total_blocks")

    def __init__(self, chains: Sequence[Chain], prompt_tokens: int) -> None:
        self.chains = chains
        self.blocks_by_slot: dict[int, int] = {}
        """Matched length in the pool's block size."""
        self.total_blocks = 0
        self.prompt_tokens = prompt_tokens
        found = self.blocks_by_slot
        for chain in chains:
            ends, size = chain.ends, chain.block_bytes
            self.total_blocks += ends[chain.length - 1] // size
            for slot, held in chain.held.items():
                found[slot] = found.get(slot, 0) + ends[held - 1] // size

    def ratio(self, slot: int) -> float:
        """Matched share of the request's blocks at ``slot``, 0 to 1."""
        matched = self.blocks_by_slot.get(slot)
        return matched / self.total_blocks if matched else 0.0

    def tokens(self, slot: int) -> int:
        """Prompt tokens believed to be in the cache of ``slot``."""
        matched = self.blocks_by_slot.get(slot)
        return self.prompt_tokens * matched // self.total_blocks if matched else 0


NO_MATCH = PrefixMatch((), 0)
"""Of a request without a whole block of prompt."""


class _Held:
    """The blocks of one endpoint, each with the generation it was last used in.

    A block is never younger than the blocks before it in its prompt, and within a generation it was noted
    after them; so forgetting the oldest generation from its end never leaves a hole.
    """

    __slots__ = (
        "block_tokens",
        "capacity_tokens",
        "generation_of",
        "generations",
        "max_blocks",
        "noted",
        "tokens",
        "wanted_tokens",
        "young",
        "young_tokens",
    )

    def __init__(self) -> None:
        self.generation_of: dict[int, int] = {}
        self.generations: deque[tuple[int, list[int]]] = deque([(0, [])])
        """Oldest first: number, blocks noted in it (also those used again since)."""
        self.young = 0
        self.young_tokens = 0
        self.noted = 0
        self.tokens = 0
        self.block_tokens = 0
        self.capacity_tokens = 0
        self.max_blocks = 0
        self.wanted_tokens: int | None = None

    def fresh(self, chain: Chain, slot: int) -> list[int]:
        """The chain's blocks, within capacity, that are not of the young generation, in order."""
        young, get = self.young, self.generation_of.get
        fitting = bisect_right(chain.ends, self.capacity_tokens * BYTES_PER_TOKEN)
        length = min(chain.length, fitting, self.max_blocks)
        low = min(chain.held.get(slot, 0), length)
        if low and get(chain.hash(low - 1)) != young:
            high = low - 1  # of the blocks it holds, those up to ``low`` are young
            low = 0
            while low < high:
                middle = (low + high + 1) >> 1
                if get(chain.hash(middle - 1)) == young:
                    low = middle
                else:
                    high = middle - 1
        # A prompt that comes twice in a batch finds its blocks young the second time.
        return [block for block in chain.hashes(low, length) if get(block) != young]

    def note(self, blocks: list[int]) -> list[int]:
        """These are in use now; returns those that are new."""
        known, size = self.generation_of, self.block_tokens
        new = [block for block in blocks if block not in known]
        known.update(dict.fromkeys(blocks, self.young))
        self.tokens += sum([size << (block & 15) for block in new])
        self.generations[-1][1].extend(blocks)
        self.noted += len(blocks)
        self.young_tokens += sum([size << (block & 15) for block in blocks])
        if self.young_tokens * GENERATIONS >= self.capacity_tokens:
            self.young += 1
            self.young_tokens = 0
            self.generations.append((self.young, []))
        if self.noted > 2 * len(known) + 1024:
            self._tidy()
        return new

    def _tidy(self) -> None:
        """Drop the notes of blocks that were used again later."""
        get = self.generation_of.get
        kept = [(g, [b for b in noted if get(b) == g]) for g, noted in self.generations]
        self.generations = deque((g, noted) for g, noted in kept if noted or g == self.young)
        self.noted = sum(len(noted) for _, noted in self.generations)

    def forget(self, keep_tokens: int, keep_blocks: int) -> list[int]:
        """Take out the oldest until no more than that is left; returns what went."""
        gone = []
        known, size = self.generation_of, self.block_tokens
        while self.tokens > keep_tokens or len(known) > keep_blocks:
            number, noted = self.generations[0]
            if not noted:
                self.generations.popleft()
                continue
            block = noted.pop()
            self.noted -= 1
            if known.get(block) == number:
                del known[block]
                self.tokens -= size << (block & 15)
                gone.append(block)
        if not self.generations:
            self.generations.append((self.young, []))
        return gone


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
        self._holders: dict[int, int] = {}
        self._depths: dict[int, int] = {}
        """First block to the depth of the last match that began with it: where to look first."""
        self._held: dict[int, _Held] = {}
        self.set_block_tokens(block_tokens)

    def set_block_tokens(self, block_tokens: int) -> None:
        """One block size for the whole pool. Changing it empties the index: old hashes mean nothing any
        more.
        """
        self.block_tokens = max(MIN_BLOCK_TOKENS, block_tokens)
        self.block_bytes = self.block_tokens * BYTES_PER_TOKEN
        self.set_max_prefix_tokens(self.max_prefix_tokens)
        self._holders.clear()
        self._depths.clear()
        for held in self._held.values():
            held.forget(0, 0)
            held.block_tokens = self.block_tokens
        self._share()

    def learn_block_tokens(self, block_tokens: int) -> None:
        """An engine publishes this KV block size: use it, unless the sizes are not to be tuned."""
        if self.auto_tune and max(MIN_BLOCK_TOKENS, block_tokens) != self.block_tokens:
            self.set_block_tokens(block_tokens)

    def set_max_prefix_tokens(self, max_prefix_tokens: int) -> None:
        """How much of a prompt counts; 0: all of it."""
        self.max_prefix_tokens = max_prefix_tokens
        most = max(max_prefix_tokens, self.block_tokens) if max_prefix_tokens else 1 << 40
        self._max_bytes_of_prompt = most * BYTES_PER_TOKEN

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
        return self.pair_bytes * sum(len(held.generation_of) for held in self._held.values())

    def blocks(self, slot: int) -> int:
        """Blocks indexed for ``slot``."""
        held = self._held.get(slot)
        return len(held.generation_of) if held else 0

    def tokens(self, slot: int) -> int:
        """Prompt tokens that those blocks stand for."""
        held = self._held.get(slot)
        return held.tokens if held else 0

    def add(self, slot: int, capacity_tokens: int | None = None) -> None:
        """Make ``slot`` known, or change the KV size it publishes (tokens; None where unknown)."""
        held = self._held.setdefault(slot, _Held())
        held.wanted_tokens = capacity_tokens
        held.block_tokens = self.block_tokens
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
        _rebuild(self._holders)
        for held in self._held.values():
            _rebuild(held.generation_of)

    def _forget(self, slot: int, keep_tokens: int, keep_blocks: int) -> None:
        holders, mask = self._holders, ~(1 << slot)
        for block in self._held[slot].forget(keep_tokens, keep_blocks):
            left = holders[block] & mask
            if left:
                holders[block] = left
            else:
                del holders[block]

    def match(self, request: InferenceRequest) -> PrefixMatch:
        """Longest indexed prefix of the request at every endpoint that holds any of it."""
        chains = chains_of(request, self.block_bytes, self._max_bytes_of_prompt)
        if not chains:
            return NO_MATCH
        for chain in chains:
            self._match(chain)
        return PrefixMatch(chains, request.prompt_tokens)

    def _match(self, chain: Chain) -> None:
        """Fill in how many blocks of the chain each holder has."""
        get, hash_of = self._holders.get, chain.hash
        first = hash_of(0)
        rest = get(first, 0)
        if not rest:
            return
        low, high = self._around_last_depth(chain, first, rest)  # block 0 is held by all of ``rest``
        noted = False
        while rest:
            while low < high:
                middle = (low + high + 1) >> 1
                if get(hash_of(middle - 1), 0) & rest:
                    low = middle
                else:
                    high = middle - 1
            deepest = get(hash_of(low - 1), 0) & rest
            rest &= ~deepest
            for slot in _slots(deepest):
                chain.held[slot] = low
            if not noted:
                noted = True
                if len(self._depths) >= MAX_DEPTHS:
                    self._depths.clear()
                self._depths[first] = low
            low, high = 1, low - 1

    def _around_last_depth(self, chain: Chain, first: int, rest: int) -> tuple[int, int]:
        """Bounds of the deepest match. Prompts that begin alike mostly match as deep as the last one did."""
        depth, length = self._depths.get(first, 0), chain.length
        if not 0 < depth <= length:
            return 1, length
        get = self._holders.get
        if not get(chain.hash(depth - 1), 0) & rest:
            return 1, depth - 1
        if depth == length or not get(chain.hash(depth), 0) & rest:
            return depth, depth
        return depth + 1, length

    def insert(self, slot: int, chains: Sequence[Chain]) -> None:
        """``slot`` is about to compute these chains, which ``match`` has just made: they become its most
        recent blocks, and older ones make room.
        """
        held = self._held.get(slot)
        if held is None:
            return
        holders, bit = self._holders, 1 << slot
        for chain in chains:
            fresh = held.fresh(chain, slot)
            if fresh:
                for block in held.note(fresh):
                    holders[block] = holders.get(block, 0) | bit
                tokens, blocks = held.capacity_tokens, held.max_blocks
                if held.tokens > tokens or len(held.generation_of) > blocks:
                    # A little more than must go, so that it need not be done for every request.
                    size = self.block_tokens
                    self._forget(slot, tokens - tokens // size // SLACK * size, blocks - blocks // SLACK)


def _rebuild(table: dict[int, int]) -> None:
    # In place and by way of plain lists, so that at no time there are two tables.
    if getsizeof(table) > _SPARSE_BYTES * len(table) + 4096:
        keys, values = list(table), list(table.values())
        table.clear()
        table.update(zip(keys, values, strict=True))


_BITS = bytes.maketrans(b"01", bytes((0, 1)))


def _slots(holders: int) -> Iterable[int]:
    """The slots whose bits are set."""
    if holders.bit_count() <= 4:
        slots = []
        while holders:
            bit = holders & -holders
            slots.append(bit.bit_length() - 1)
            holders ^= bit
        return slots
    # Arithmetic on an int as long as the pool costs more for each bit than its digits do, all at once.
    return compress(count(), bin(holders)[:1:-1].encode().translate(_BITS))
