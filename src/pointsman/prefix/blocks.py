"""Who holds which KV block: the table behind the precise index, in this process.

For each endpoint and tier a dict from the engine's hash to our key: what it holds, and what is needed to
understand "removed". For each tier one dict from our key to a bit for each endpoint that holds it: what
matching asks. Sets, not counts: engines repeat themselves (vLLM tells of blocks again that it has told
of already).

Memory is bounded by count. Each (block, endpoint) pair is charged what it takes at worst, and each endpoint
gets an equal share of ``max_bytes``; over it, what was stored first goes first, unless a request has used it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, count
from sys import getsizeof

from pointsman.prefix.keys import MASK

GPU = "gpu"
MAX_TIERS = 8
"""Media that are told apart; engines know two or three."""
MAX_SAME = 4096
SLACK = 64
"""What is full makes room for a 64th of itself at once."""
_PAIR_BYTES = 420
"""Upper bound on the memory of one pair without its holder bits, whatever state the tables are in: two
integers, and a place in two dicts that have just doubled. Most of the time it is 150 to 180; tests/prefix
measures both.
"""
_SPARSE_BYTES = 140
"""A table that takes more than this for an entry has shrunk: growing alone never leaves it so sparse."""

Table = dict[int, int]


class Held:
    """What one endpoint holds."""

    __slots__ = ("bit", "pairs", "tables", "twice", "used")

    def __init__(self, slot: int) -> None:
        self.bit = 1 << slot
        self.empty()

    def empty(self) -> None:
        """Nothing is held any more."""
        self.pairs = 0
        self.tables: dict[str, Table] = {GPU: {}}
        """By tier: hash of the engine to our key, what was stored first in front."""
        self.twice: dict[tuple[str, int], int] = {}
        """Keys that more than one of the engine's hashes stand for: how many there are besides the first."""
        self.used: set[int] = set()
        """Keys that requests have used lately, as far as that matters."""


class Blocks:
    """The table. Endpoints are known by slot; hashes are the engine's, keys ours."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.evicted = 0
        """Pairs that went for want of room."""
        self._held: dict[int, Held] = {}
        self.holders: dict[str, Table] = {GPU: {}}
        """By tier: our key to the bits of those that hold the block."""
        self._same: Table = {}
        """Bits of several holders, to themselves: blocks of a run share one integer, which saves memory, and
        time when a match goes through them.
        """

    @property
    def pair_bytes(self) -> int:
        """Memory charged for one (block, endpoint) pair: table entries, integers and one bit a slot."""
        return _PAIR_BYTES + (max(self._held, default=0) // 30 + 1) * 4

    @property
    def used_bytes(self) -> int:
        return self.pair_bytes * sum(held.pairs for held in self._held.values())

    @property
    def share(self) -> int:
        """Pairs that each endpoint may have."""
        return self.max_bytes // (self.pair_bytes * max(1, len(self._held)))

    def pairs(self, slot: int) -> int:
        """(block, tier) pairs that ``slot`` holds."""
        held = self._held.get(slot)
        return held.pairs if held else 0

    def add(self, slot: int) -> None:
        """Make ``slot`` known."""
        if slot not in self._held:
            self._held[slot] = Held(slot)
            for other in self._held:
                self._shrink(other, self.share)

    def remove(self, slot: int) -> None:
        """Forget ``slot``."""
        self.clear(slot)
        self._held.pop(slot, None)

    def clear(self, slot: int) -> None:
        """``slot`` holds nothing any more."""
        held = self._held.get(slot)
        if held is None:
            return
        for tier, table in held.tables.items():
            self._let_go(tier, held.bit, table.values())
        held.empty()

    def key(self, slot: int, engine_hash: int) -> int | None:
        """Our key of a block that ``slot`` holds in whatever tier; None where it is not known."""
        engine_hash &= MASK
        for table in self._held[slot].tables.values():
            key = table.get(engine_hash)
            if key is not None:
                return key
        return None

    def store(self, slot: int, tier: str, hashes: Sequence[int], keys: Sequence[int]) -> None:
        """``slot`` holds these blocks, in their order."""
        held, share = self._held[slot], self.share
        if held.pairs + len(keys) > share:
            self._shrink(slot, max(0, share - share // SLACK - len(keys)))
            hashes, keys = hashes[: share - held.pairs], keys[: share - held.pairs]
        table, holders, bit = held.tables.get(tier), self.holders.get(tier), held.bit
        if holders is None:
            if len(self.holders) == MAX_TIERS:
                return
            holders = self.holders[tier] = {}
        if table is None:
            table = held.tables[tier] = {}
        before = len(table)
        find, same = holders.get, self._same
        if len(same) > MAX_SAME:
            same.clear()
        for engine_hash, key in zip(hashes, keys, strict=True):
            engine_hash &= MASK
            known = table.get(engine_hash)
            if known is not None:
                if known == key:
                    continue
                self.discard(slot, tier, (engine_hash,))
                before -= 1
            table[engine_hash] = key
            bits = find(key)
            if bits is None:
                holders[key] = bit
            elif bits & bit:
                held.twice[tier, key] = held.twice.get((tier, key), 0) + 1
            else:
                both = bits | bit
                holders[key] = same.setdefault(both, both)
        held.pairs += len(table) - before

    def discard(self, slot: int, tier: str, hashes: Iterable[int]) -> list[int]:
        """``slot`` no longer holds these; those it did not hold do not matter. Returns the keys of the
        others.
        """
        held = self._held[slot]
        table = held.tables.get(tier)
        if not table:
            return []
        find = table.pop
        found = [key for h in hashes if (key := find(h & MASK, None)) is not None]
        held.pairs -= len(found)
        gone = self._once(held, tier, found) if held.twice else found
        self._let_go(tier, held.bit, gone)
        return gone

    def use(self, slot: int, keys: Sequence[int]) -> None:
        """A request is using blocks with these keys: where room is short they are to stay."""
        held, share = self._held[slot], self.share
        if held.pairs > share - share // 8:
            if len(held.used) > share // 8:
                held.used.clear()
            held.used.update(keys[: share // 8])

    def _let_go(self, tier: str, bit: int, keys: Iterable[int]) -> None:
        holders = self.holders[tier]
        for key in keys:
            bits = holders.get(key, 0) & ~bit
            if bits:
                holders[key] = bits
            else:
                holders.pop(key, None)

    def _once(self, held: Held, tier: str, keys: Iterable[int]) -> list[int]:
        """Those keys that no other hash of the engine stands for."""
        last, twice = [], held.twice
        for key in keys:
            others = twice.pop((tier, key), 0)
            if not others:
                last.append(key)
            elif others > 1:
                twice[tier, key] = others - 1
        return last

    def _shrink(self, slot: int, keep: int) -> None:
        """Take out the oldest until no more is left; what was used since stays for another round."""
        held = self._held[slot]
        if held.pairs <= keep:
            return
        while held.pairs > keep:
            used, held.used = held.used, set()
            for tier, table in tuple(held.tables.items()):
                surplus, gone, again = held.pairs - keep, list[int](), list[int]()
                for engine_hash, key in table.items():
                    if len(gone) >= surplus:
                        break
                    (again if key in used else gone).append(engine_hash)
                for engine_hash in again:
                    table[engine_hash] = table.pop(engine_hash)
                self.evicted += len(gone)
                self.discard(slot, tier, gone)
                if getsizeof(table) > _SPARSE_BYTES * len(table) + 4096:
                    held.tables[tier] = dict(table)


_BITS = bytes.maketrans(b"01", bytes((0, 1)))


def slots_in(bits: int) -> Iterator[int]:
    """The slots whose bits are set."""
    return compress(count(), bin(bits)[:1:-1].encode().translate(_BITS))
