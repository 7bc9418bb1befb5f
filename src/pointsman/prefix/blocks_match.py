"""What a request finds in a block index: the longest run of its blocks from the first one, by endpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce
from itertools import groupby, islice, repeat, takewhile
from operator import or_

from pointsman.prefix.blocks import Table, slots_in
from pointsman.prefix.blocks_expected import Expected
from pointsman.prefix.keys import TOKEN_BYTES
from pointsman.types import InferenceRequest

Keys = Mapping[int, Sequence[Sequence[int]]]
"""Of a request: by block size, the keys of each prompt's whole blocks."""
Tiers = Sequence[tuple[float, Table]]
"""Weight of a tier, and who holds which block in it; the best first."""


class BlockMatch:
    """How much of a request's prompts each endpoint holds, and the keys that were asked for."""

    __slots__ = (
        "_counts",
        "by_size",
        "keys",
        "partial",
        "prompt_tokens",
        "runs",
        "slots",
        "tables",
        "tokens_by_slot",
        "weighted_by_slot",
    )

    def __init__(
        self, request: InferenceRequest, keys: Keys, slots: Collection[int], partial: Collection[int] = ()
    ) -> None:
        prompts = request.tokenized
        self._counts = [len(prompt.ids) // TOKEN_BYTES for prompt in prompts]
        self.keys = keys
        self.prompt_tokens = sum(self._counts)
        self.slots = slots if prompts else frozenset()
        """Those it speaks for."""
        self.partial = partial
        """Those of them that may hold more."""
        self.tokens_by_slot: dict[int, int] = {}
        """Leading prompt tokens that will not be computed again; endpoints that have none are not in it."""
        self.weighted_by_slot: Mapping[int, float] = self.tokens_by_slot
        """The same, each block weighted by the best tier it is in."""
        self.runs: dict[int, list[Mapping[int, int]]] = {}
        """By block size, for each prompt: leading blocks that engines have told of, by slot."""
        self.by_size: Mapping[int, int] = {}
        """Block size to the bits of the endpoints that have it."""
        self.tables: Mapping[str, Table] = {}
        """By tier, who holds which block now."""

    def tokens(self, slot: int) -> int:
        """Leading prompt tokens that ``slot`` has in its cache."""
        return self.tokens_by_slot.get(slot, 0)

    def tokens_in(self, tier: str) -> Mapping[int, int]:
        """Leading prompt tokens whose blocks an endpoint has in this tier, by slot; only of those that have
        any.
        """
        table, found = self.tables.get(tier), dict[int, int]()
        for size, chains in self.keys.items() if table else ():
            for tokens, chain in zip(self._counts, chains, strict=True):
                runs = _runs(table or {}, chain, _reused(tokens, chain, size), self.by_size.get(size, 0))
                for slot, run in runs.items():
                    found[slot] = found.get(slot, 0) + run * size
        return found

    def block_tokens(self, slot: int) -> int:
        """Tokens in a block at ``slot``; 0 where that is not known."""
        return next((size for size, bits in self.by_size.items() if bits >> slot & 1), 0)

    def weighted(self, slot: int) -> float:
        """Tokens, those in slower tiers counting less."""
        return self.weighted_by_slot.get(slot, 0.0)

    def ratio(self, slot: int) -> float:
        """Share of the prompts that ``slot`` holds, 0 to 1."""
        found = self.tokens_by_slot.get(slot)
        return found / self.prompt_tokens if found else 0.0

    def chains(self, slot: int, size: int) -> Iterator[tuple[Sequence[int], int]]:
        """The keys of each prompt, and how many of them in front the engine of ``slot`` has told of."""
        for chain, runs in zip(self.keys.get(size, ()), self.runs.get(size, ()), strict=True):
            yield chain, runs.get(slot, 0)


def find(
    request: InferenceRequest,
    keys: Keys,
    slots: Collection[int],
    by_size: Mapping[int, int],
    tiers: Tiers,
    expected: Expected,
    partial: Collection[int] = (),
    tables: Mapping[str, Table] | None = None,
) -> BlockMatch:
    """The longest runs of the request's blocks at ``slots``, of which the ``partial`` may hold more;
    ``by_size`` has the bits of the endpoints with each block size, and ``tables`` the tiers by their names.
    """
    found = BlockMatch(request, keys, slots, partial)
    found.by_size, found.tables = by_size, tables or {}
    tokens, weighted = found.tokens_by_slot, dict[int, float]()
    only_full = len(tiers) == 1 and tiers[0][0] == 1.0
    if not only_full:
        found.weighted_by_slot = weighted
    for size, chains in keys.items():
        among = by_size.get(size, 0)
        told = found.runs[size] = []
        for prompt, chain in zip(request.tokenized, chains, strict=True):
            count = _reused(len(prompt.ids) // TOKEN_BYTES, chain, size)
            if only_full:
                runs = _runs(tiers[0][1], chain, count, among)
            else:
                runs = _tiered_runs(tiers, chain, count, among, weighted, size)
            told.append(runs)
            for slot, (more, weight) in _expected(tiers, chain, count, among, runs, expected).items():
                tokens[slot] = tokens.get(slot, 0) + more * size
                if not only_full:
                    weighted[slot] = weighted.get(slot, 0.0) + weight * size
            for slot, run in runs.items():
                tokens[slot] = tokens.get(slot, 0) + run * size
    return found


def _reused(tokens: int, chain: Sequence[int], size: int) -> int:
    """How many blocks at most: engines compute the last token anew, whatever they hold."""
    return min(len(chain), max(0, tokens - 1) // size)


def _runs(table: Table, chain: Sequence[int], count: int, alive: int) -> dict[int, int]:
    """By slot, how many of the first ``count`` blocks in a row it holds, if any."""
    runs: dict[int, int] = {}
    depth = 0
    for bits, run in groupby(map(table.get, islice(chain, count))):
        left = alive & bits if bits else 0
        if left != alive:
            if depth:
                runs.update(dict.fromkeys(slots_in(alive & ~left), depth))
            alive = left
            if not alive:
                return runs
        depth += len(list(run))
    if depth:
        runs.update(dict.fromkeys(slots_in(alive), depth))
    return runs


def _tiered_runs(
    tiers: Tiers, chain: Sequence[int], count: int, alive: int, weighted: dict[int, float], size: int
) -> dict[int, int]:
    """The same over all tiers. Adds to ``weighted``, of blocks with ``size`` tokens."""
    runs: dict[int, int] = {}
    depth = 0
    chain = chain[:count]
    for row, run in groupby(zip(*(map(table.get, chain, repeat(0)) for _, table in tiers), strict=True)):
        left = alive & reduce(or_, row)
        if left != alive:
            if depth:
                runs.update(dict.fromkeys(slots_in(alive & ~left), depth))
            alive = left
            if not alive:
                return runs
        blocks = len(list(run))
        depth += blocks
        for (weight, _), bits in zip(tiers, row, strict=True):
            for slot in slots_in(left & bits):
                weighted[slot] = weighted.get(slot, 0.0) + weight * blocks * size
            left &= ~bits
    if depth:
        runs.update(dict.fromkeys(slots_in(alive), depth))
    return runs


def _expected(
    tiers: Tiers, chain: Sequence[int], count: int, among: int, runs: Mapping[int, int], expected: Expected
) -> dict[int, tuple[int, float]]:
    """By slot, how many blocks more the run has with what was just sent, and the sum of their weights."""
    found = {}
    for slot, entries in expected.by_slot.items():
        if among >> slot & 1:
            run = told = runs.get(slot, 0)
            weights = 0.0
            keys = islice(chain, told, count)
            while run < count:
                sent = len(list(takewhile(entries.__contains__, keys)))  # takes the key after them, too
                run += sent
                weights += sent
                held = [w for w, table in tiers if run < count and table.get(chain[run], 0) >> slot & 1]
                if not held:
                    break
                run += 1
                weights += held[0]
            if run > told:
                found[slot] = run - told, weights
    return found
