"""The precise prefix index: what each endpoint's KV cache holds, as its engine tells in KV events.

Events give engine hashes and tokens, requests give tokens; ``keys`` makes the same keys of both and
``blocks`` remembers who holds what. Blocks of the prompts that we have just sent count before the engine
tells of them, for two seconds: events come a moment after the answer.

The index speaks only for endpoints that events have come from. For the others ask the approximate one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from math import inf

from pointsman.prefix.blocks import GPU, Blocks, Table
from pointsman.prefix.blocks_expected import SPECULATIVE_S, Expected
from pointsman.prefix.blocks_match import BlockMatch, Keys, Tiers, find
from pointsman.prefix.keys import TOKEN_BYTES, Scheme, Xxh3
from pointsman.prefix.kv_wire import Cleared, Event, Removed, Stored
from pointsman.types import InferenceRequest

DEFAULT_MAX_BYTES = 2 * 1024**3
"""llm-d's for its index that is bounded by memory (facts 5.2)."""
CPU = "cpu"
TIER_WEIGHTS: Mapping[str, float] = {GPU: 1.0, CPU: 0.8, "disk": 0.5}
"""What a block is worth by where it is: llm-d's, and the disk. In other tiers it counts fully, as there."""
FULL_ATTENTION = frozenset({"", "full_attention", "mla_attention", "sink_full_attention"})
"""Kinds of KV cache groups whose blocks, when held, are a prefix to begin from. Of sliding windows and Mamba
states only the last blocks are kept, which says nothing of the prefix.
"""
MAX_ADAPTERS = 4096
MAX_GROUPS = 256
"""Adapters, and an endpoint's KV cache groups, that are told apart: names from outside must not pile up."""

NEARLY_ALL = 0.9
"""Of an endpoint's blocks, so many are known when it is taken to have told of all."""

_EXPECTED_SHARE = 16
"""Of ``max_bytes`` a 16th is for blocks of what was just sent."""


class _Source:
    """An endpoint that events may come from."""

    __slots__ = ("block_tokens", "emptied", "fed", "groups", "whole")

    def __init__(self) -> None:
        self.fed = False
        self.whole = True
        """All that it holds has been told."""
        self.block_tokens = 0
        """As the last event says."""
        self.groups: set[int] = set()
        """KV cache groups that count."""
        self.emptied = 0
        """Times that what was known of it was thrown away."""


class PreciseIndex:
    """Holders of KV blocks by endpoint slot. Owns its memory; ``max_bytes`` is never passed."""

    def __init__(
        self,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        scheme: Scheme | None = None,
        tier_weights: Mapping[str, float] = TIER_WEIGHTS,
        expected_s: float = SPECULATIVE_S,
    ) -> None:
        """``expected_s``: how long what was just sent counts without a word of the engine."""
        self.max_bytes = max_bytes
        self.unknown = 0
        """Events dropped because what they build on is not known: some before them were lost."""
        self.skipped = 0
        """Events of KV cache groups that are no prefix, and those that make no sense."""
        self._scheme: Scheme = scheme or Xxh3()
        self._weights = tier_weights
        self._expected = Expected(max_bytes // _EXPECTED_SHARE, expected_s)
        self._blocks = Blocks(max_bytes - max_bytes // _EXPECTED_SHARE)
        self._sources: dict[int, _Source] = {}
        self.partial: frozenset[int] = frozenset()
        """Those of them that may hold more than they have told."""
        self.slots: frozenset[int] = frozenset()
        """Endpoints that events have come from."""
        self.suspended: frozenset[int] = frozenset()
        """Those that are not spoken for, whatever is known."""
        self._capacities: dict[int, int] = {}
        """Blocks that endpoints can hold."""
        self._by_size: dict[int, int] = {}
        """Block size to the bits of the endpoints that have it."""
        self._adapters: set[str] = set()

    @property
    def used_bytes(self) -> int:
        """Memory charged."""
        return self._blocks.used_bytes + self._expected.used_bytes

    @property
    def evicted(self) -> int:
        """Blocks forgotten for want of room."""
        return self._blocks.evicted

    def blocks(self, slot: int) -> int:
        """Blocks indexed for ``slot``; one in two tiers counts twice."""
        return self._blocks.pairs(slot)

    def block_tokens(self, slot: int) -> int:
        """Tokens in a block at ``slot``; 0 where it is not known yet."""
        source = self._sources.get(slot)
        return source.block_tokens if source else 0

    def emptied(self, slot: int) -> int:
        """Times that what was known of ``slot`` was thrown away, to be built anew."""
        source = self._sources.get(slot)
        return source.emptied if source else 0

    @property
    def offloads(self) -> bool:
        """Some endpoint has told of blocks outside of its GPU."""
        return any(table for tier, table in self._blocks.holders.items() if tier != GPU)

    # -- whether it is believed

    def suspend(self, slot: int) -> None:
        """Do not speak for this endpoint until ``resume``. What it tells is taken note of all the same."""
        self.suspended |= {slot}
        self._regroup()

    def resume(self, slot: int) -> None:
        self.suspended -= {slot}
        self._regroup()

    # -- what the pool tells

    def add(self, slot: int) -> None:
        """An endpoint has joined. The index speaks for it from its first event."""
        if slot not in self._sources:
            self._sources[slot] = _Source()
            self._blocks.add(slot)

    def remove(self, slot: int) -> None:
        """The endpoint has left, or events no longer come from it."""
        if self._sources.pop(slot, None) is not None:
            self._blocks.remove(slot)
            self._expected.forget(slot)
            self._regroup()

    def clear(self, slot: int) -> None:
        """The endpoint's cache is empty: a restart, or it says so."""
        source = self._sources.get(slot)
        if source is not None:
            self._forget(slot)
            if not source.whole:
                source.whole = True
                self._regroup()

    def _forget(self, slot: int) -> None:
        self._sources[slot].emptied += 1
        self._blocks.clear(slot)
        self._expected.forget(slot)

    def missed(self, slot: int) -> None:
        """Some of what the endpoint told was missed, or was told before we listened. What is known of it is
        forgotten; it holds at least what it tells from now on.
        """
        source = self._sources.get(slot)
        if source is not None:
            self._forget(slot)
            source.whole = False
            self._regroup()

    def set_capacity(self, slot: int, blocks: int) -> None:
        """The endpoint's KV cache has so many blocks, 0 where that is not known (any more). When nearly all
        of them are known, all is.
        """
        if blocks:
            self._capacities[slot] = blocks
        else:
            self._capacities.pop(slot, None)

    def name_adapters(self, names: Iterable[str]) -> None:
        """These are LoRA adapters. Without that the index knows them from the first event that names them,
        and takes any other name for the base model's.
        """
        self._adapters.update(islice(names, MAX_ADAPTERS - len(self._adapters)))

    # -- what engines tell

    def apply(self, slot: int, events: Sequence[Event], now_s: float) -> None:
        """What one message of the endpoint says, in its order."""
        source = self._sources.get(slot)
        if source is None:
            return
        if not source.fed:
            source.fed = True
            self._regroup()
        self._expected.expire(now_s)
        for event in events:
            if isinstance(event, Stored):
                self._store(slot, source, event)
            elif isinstance(event, Removed):
                if event.group is None or event.group in source.groups:
                    self._blocks.discard(slot, event.medium, event.hashes)
            elif isinstance(event, Cleared):
                self.clear(slot)
        if not source.whole and self._blocks.pairs(slot) >= NEARLY_ALL * self._capacities.get(slot, inf):
            source.whole = True
            self._regroup()

    def _store(self, slot: int, source: _Source, event: Stored) -> None:
        if event.kind not in FULL_ATTENTION or not self._groups(source, event):
            self.skipped += 1
        elif not event.token_ids:
            self._move(slot, event)
        elif len(event.token_ids) != len(event.hashes) * event.block_size * TOKEN_BYTES:
            self.skipped += 1
        else:
            parent = None
            if event.parent is not None:
                parent = self._blocks.key(slot, event.parent)
                if parent is None and self._scheme.chained:
                    self.unknown += 1
                    return
            if event.block_size != source.block_tokens:
                source.block_tokens = event.block_size
                self._regroup()
            keys = self._scheme.of_event(event, parent, event.lora)
            self._blocks.store(slot, event.medium, event.hashes, keys)
            self._expected.confirm(slot, keys)

    def _groups(self, source: _Source, event: Stored) -> bool:
        """Take note of the event's group and adapter; False where there is no room for more."""
        groups, adapters = source.groups, self._adapters
        if event.group not in groups:
            if len(groups) == MAX_GROUPS:
                return False
            groups.add(event.group)
        if event.lora and event.lora not in adapters:
            if len(adapters) == MAX_ADAPTERS:
                return False
            adapters.add(event.lora)
        return True

    def _move(self, slot: int, event: Stored) -> None:
        """Blocks that are known by their hashes are in this tier, too."""
        found = [(h, key) for h in event.hashes if (key := self._blocks.key(slot, h)) is not None]
        self.unknown += len(found) < len(event.hashes)
        self._blocks.store(slot, event.medium, [h for h, _ in found], [key for _, key in found])

    def _regroup(self) -> None:
        fed = {slot: s for slot, s in self._sources.items() if s.fed and slot not in self.suspended}
        self.slots = frozenset(fed)
        self.partial = frozenset(slot for slot, source in fed.items() if not source.whole)
        self._by_size = {}
        for slot in self.slots:
            size = self._sources[slot].block_tokens
            if size:
                self._by_size[size] = self._by_size.get(size, 0) | 1 << slot

    # -- what requests ask

    def keys(self, request: InferenceRequest) -> Keys:
        """The request's keys for each block size in use: what takes time in a match, 0.2 us a block."""
        model = request.model if request.model in self._adapters else ""
        salt, of_prompt = request.cache_salt, self._scheme.of_prompt
        return {
            size: [of_prompt(prompt, model, salt, size) for prompt in request.tokenized]
            for size in self._by_size
        }

    def match(self, request: InferenceRequest, now_s: float, keys: Keys | None = None) -> BlockMatch:
        """What each endpoint holds of the request's prompts; ``keys`` if they are known already. It speaks
        for no endpoint where the prompts' tokens are not known.
        """
        self._expected.expire(now_s)
        if keys is None:
            keys = self.keys(request)
        tiers, tables = self._tiers(), self._blocks.holders
        return find(request, keys, self.slots, self._by_size, tiers, self._expected, self.partial, tables)

    def sent(
        self, slot: int, request: InferenceRequest, now_s: float, match: BlockMatch | None = None
    ) -> None:
        """The request goes to ``slot``, which will hold its prompts' blocks. ``match`` is what was found for
        it, if that is known.
        """
        size = self.block_tokens(slot)
        if size and request.tokenized and slot in self.slots:
            for chain, told in (match or self.match(request, now_s)).chains(slot, size):
                self._blocks.use(slot, chain[:told])
                self._expected.add(slot, chain[told:], now_s)

    def _tiers(self) -> Tiers:
        weights = self._weights
        tiers = [(weights.get(tier, 1.0), table) for tier, table in self._blocks.holders.items() if table]
        return sorted(tiers, key=_weight, reverse=True) if len(tiers) > 1 else tiers


def _weight(tier: tuple[float, Table]) -> float:
    return tier[0]
