"""Which endpoint probably holds which prefix: an index of what we sent where.

Per endpoint an LRU of block hashes as large as its KV cache; across endpoints one map from a hash to the
set of holders (a bit per slot). Two laws make it cheap. An endpoint's blocks are closed under prefix: a
block is touched before the blocks it extends, so the oldest entry is always the end of a chain and eviction
never leaves a hole. So the longest match is found by bisection, not by a walk. And memory is bounded by
count: every (block, endpoint) pair costs at most ``pair_bytes``, and each endpoint gets an equal share of
``max_bytes``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import compress, count
from sys import getsizeof
from typing import Any

from pointsman.prefix.hashing import block_hashes
from pointsman.types import BYTES_PER_TOKEN, InferenceRequest

MIN_BLOCK_TOKENS = 64
"""llm-d's floor (facts 5.1): smaller blocks cost hashing time and tell little more."""
DEFAULT_BLOCK_TOKENS = 128
"""Two of llm-d's blocks, and Gaudi's KV block: hashing a 32 KB prompt takes 9 us instead of 16 us at 64
tokens.
"""
DEFAULT_CAPACITY_TOKENS = 31250 * 64
"""Where the engine does not publish its KV size: llm-d's lruCapacityPerServer (facts 5.1) in tokens."""
DEFAULT_MAX_BYTES = 512 * 1024 * 1024
DEFAULT_MAX_PREFIX_TOKENS = 131072

_PAIR_BYTES = 512
"""Upper bound on the memory of one (block, endpoint) pair without its holder bits, in whatever state the
tables are: just grown, full of holes, shrunk. 140 bytes is usual; tests/prefix measures it.
"""
_SPARSE_MAP_BYTES = 140
_SPARSE_LRU_BYTES = 240
"""A table that takes more than this for an entry has shrunk: growing alone never leaves it so sparse."""


class PrefixMatch:
    """How much of a request each endpoint is believed to hold, and the hash chains to insert once it is
    sent.
    """

    __slots__ = ("blocks_by_slot", "chains", "prompt_tokens", "total_blocks")

    def __init__(self, chains: list[list[int]], blocks_by_slot: dict[int, int], prompt_tokens: int) -> None:
        self.chains = chains
        self.blocks_by_slot = blocks_by_slot
        self.total_blocks = sum(map(len, chains))
        self.prompt_tokens = prompt_tokens

    def ratio(self, slot: int) -> float:
        """Matched share of the request's blocks at ``slot``, 0 to 1."""
        matched = self.blocks_by_slot.get(slot)
        return matched / self.total_blocks if matched else 0.0

    def tokens(self, slot: int) -> int:
        """Prompt tokens believed to be in the cache of ``slot``."""
        matched = self.blocks_by_slot.get(slot)
        return self.prompt_tokens * matched // self.total_blocks if matched else 0


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
        self._lru: dict[int, OrderedDict[int, None]] = {}
        self._wanted: dict[int, int | None] = {}
        self._capacity: dict[int, int] = {}
        self.set_block_tokens(block_tokens)

    def set_block_tokens(self, block_tokens: int) -> None:
        """One block size for the whole pool. Changing it empties the index: old hashes mean nothing any
        more.
        """
        self.block_tokens = max(MIN_BLOCK_TOKENS, block_tokens)
        self.block_bytes = self.block_tokens * BYTES_PER_TOKEN
        self.set_max_prefix_tokens(self.max_prefix_tokens)
        self._holders.clear()
        for lru in self._lru.values():
            lru.clear()
        self._share()

    def learn_block_tokens(self, block_tokens: int) -> None:
        """An engine publishes this KV block size: use it, unless the sizes are not to be tuned."""
        if self.auto_tune and max(MIN_BLOCK_TOKENS, block_tokens) != self.block_tokens:
            self.set_block_tokens(block_tokens)

    def set_max_prefix_tokens(self, max_prefix_tokens: int) -> None:
        """How much of a prompt counts; 0: all of it."""
        self.max_prefix_tokens = max_prefix_tokens
        self.max_blocks = max(1, max_prefix_tokens // self.block_tokens) if max_prefix_tokens else 1 << 40

    def set_default_capacity(self, tokens: int) -> None:
        """Size of an endpoint's LRU where its engine does not publish its KV size, or it is not to be
        tuned.
        """
        self._default_capacity = tokens
        self._share()

    @property
    def pair_bytes(self) -> int:
        """Memory charged for one (block, endpoint) pair: the map entries and one bit per slot."""
        return _PAIR_BYTES + (max(self._lru, default=0) // 30 + 1) * 4

    @property
    def used_bytes(self) -> int:
        return self.pair_bytes * sum(map(len, self._lru.values()))

    def blocks(self, slot: int) -> int:
        """Blocks indexed for ``slot``."""
        return len(self._lru.get(slot, ()))

    def add(self, slot: int, capacity_tokens: int | None = None) -> None:
        """Make ``slot`` known, or change the KV size it publishes (tokens; None where unknown)."""
        self._wanted[slot] = capacity_tokens
        self._lru.setdefault(slot, OrderedDict())
        self._share()

    def remove(self, slot: int) -> None:
        """Forget everything about ``slot``."""
        if slot in self._lru:
            self._evict(slot, 0)
            del self._lru[slot], self._wanted[slot], self._capacity[slot]
            self._share()

    def clear(self, slot: int) -> None:
        """The endpoint lost its cache (a restart): forget its blocks, keep its place."""
        if slot in self._lru:
            self._evict(slot, 0)
            self._compact()

    def _share(self) -> None:
        fair = self.max_bytes // (self.pair_bytes * max(1, len(self._lru)))
        for slot, tokens in self._wanted.items():
            known = tokens if tokens and self.auto_tune else self._default_capacity
            self._capacity[slot] = min(fair, known // self.block_tokens)
            self._evict(slot, self._capacity[slot])
        self._compact()

    def _compact(self) -> None:
        """Rebuild tables that many entries have left: a dict keeps its size until it is filled again."""
        _rebuild(self._holders, _SPARSE_MAP_BYTES)
        for lru in self._lru.values():
            _rebuild(lru, _SPARSE_LRU_BYTES)

    def _evict(self, slot: int, keep: int) -> None:
        lru, holders, mask = self._lru[slot], self._holders, ~(1 << slot)
        for _ in range(len(lru) - keep):
            block, _none = lru.popitem(last=False)
            left = holders[block] & mask
            if left:
                holders[block] = left
            else:
                del holders[block]

    def match(self, request: InferenceRequest) -> PrefixMatch:
        """Longest indexed prefix of the request at every endpoint that holds any of it."""
        chains = block_hashes(request, self.block_bytes, self.max_blocks)
        found: dict[int, int] = {}
        for chain in chains:
            self._match(chain, found)
        return PrefixMatch(chains, found, request.prompt_tokens)

    def _match(self, chain: Sequence[int], found: dict[int, int]) -> None:
        """Add each holder's match length in blocks to ``found``."""
        get = self._holders.get
        rest = get(chain[0], 0)
        high = len(chain)
        while rest:
            low = 1  # block 0 is held by all of ``rest``
            while low < high:
                middle = (low + high + 1) >> 1
                if get(chain[middle - 1], 0) & rest:
                    low = middle
                else:
                    high = middle - 1
            deepest = get(chain[low - 1], 0) & rest
            rest &= ~deepest
            for slot in _slots(deepest):
                found[slot] = found.get(slot, 0) + low
            high = low - 1

    def insert(self, slot: int, chains: Sequence[Sequence[int]]) -> None:
        """``slot`` is about to compute these chains: they become its most recent blocks, older ones make
        room.
        """
        lru = self._lru.get(slot)
        if lru is None:
            return
        holders, bit, capacity = self._holders, 1 << slot, self._capacity[slot]
        touch = lru.move_to_end
        for chain in chains:
            for block in reversed(chain[:capacity]):
                if block in lru:
                    touch(block)
                else:
                    lru[block] = None
                    holders[block] = holders.get(block, 0) | bit
            if len(lru) > capacity:
                self._evict(slot, capacity)


def _rebuild(table: dict[int, Any], sparse_bytes: int) -> None:
    # In place and by way of plain lists, so that at no time there are two tables.
    if getsizeof(table) > sparse_bytes * len(table) + 4096:
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
