"""What engines told this router, and what they told others with whom it shares an index.

What an engine tells us is known at once and counts; it is written to the shared index as well. That is
asked for the endpoints that do not tell us, or have not told us all: their engines' events go to another
router, or went to us before a restart. While the server is away everything goes on without it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeVar

from prometheus_client.metrics_core import Metric

from pointsman.endpoints.pool import Pool
from pointsman.observability.telemetry import counter, gauge
from pointsman.prefix.blocks_match import BlockMatch, Keys
from pointsman.prefix.kv_wire import Event
from pointsman.prefix.precise import PreciseIndex
from pointsman.prefix.shared import SharedIndex
from pointsman.prefix.shared_reading import MOST_AT_ONCE, OK, Reading
from pointsman.types import Clock, Endpoint, InferenceRequest, Tokenized

N = TypeVar("N", int, float)


class SharedMatch(BlockMatch):
    """What both know, the better of the two where both do."""

    __slots__ = ("_others", "_own", "shared")

    def __init__(
        self, request: InferenceRequest, own: BlockMatch, shared: BlockMatch, others: Collection[int]
    ) -> None:
        """``others``: those of whom it counts what ``shared`` knows."""
        super().__init__(request, own.keys, frozenset(own.slots).union(others), own.partial)
        self.runs = own.runs
        self._own, self.shared, self._others = own, shared, others
        self.tokens_by_slot = _better(own.tokens_by_slot, shared.tokens_by_slot, others)
        self.weighted_by_slot = _better(own.weighted_by_slot, shared.weighted_by_slot, others)

    def tokens_in(self, tier: str) -> Mapping[int, int]:
        """As of ``BlockMatch``, of what both know."""
        return _better(self._own.tokens_in(tier), self.shared.tokens_in(tier), self._others)

    def block_tokens(self, slot: int) -> int:
        """The engine's where it tells us, else the shared index's."""
        return self._own.block_tokens(slot) or self.shared.block_tokens(slot)


def _better(own: Mapping[int, N], shared: Mapping[int, N], others: Collection[int]) -> dict[int, N]:
    found = dict(own)
    for slot in others:
        if slot in shared and shared[slot] > found.get(slot, 0):
            found[slot] = shared[slot]
    return found


class SharedBlocks:
    """``kv_feed.Sink`` and ``block_index.BlockIndex``. ``own`` remains the part that needs no server."""

    def __init__(self, own: PreciseIndex, shared: SharedIndex, pool: Pool, clock: Clock) -> None:
        self._own = own
        self._shared = shared
        self._reading = Reading(shared, clock)
        self._pool = pool
        self._asked: OrderedDict[int, tuple[tuple[Tokenized, ...], Keys]] = OrderedDict()
        """The prompts that were read last and their keys, by the id of the former."""
        pool.listen(self._on_pool)

    async def run(self) -> None:
        """Write what engines tell, until cancelled."""
        try:
            await self._shared.run()
        finally:
            self._reading.close()
            await self._shared.close()

    # -- what the pool tells

    def _on_pool(self, event: str, endpoint: Endpoint) -> None:
        if event == "left":
            self._shared.remove(endpoint.slot)
        elif event == "models":
            cards = self._pool.members[endpoint.name].models_detail
            bases = [str(card["id"]) for card in cards if "id" in card and not card.get("parent")]
            if bases:
                self._shared.add(endpoint.slot, endpoint.address, bases[0], bases[1:])

    # -- what engines tell

    def add(self, slot: int) -> None:
        """Events of this endpoint come from now on."""
        self._own.add(slot)

    def remove(self, slot: int) -> None:
        """They do not any more."""
        self._own.remove(slot)

    def clear(self, slot: int) -> None:
        """It holds nothing any more."""
        self._own.clear(slot)
        self._shared.clear(slot)

    def missed(self, slot: int) -> None:
        """Where we have just begun to listen others may know it all; else what we wrote may be wrong."""
        if self._own.blocks(slot):
            self._shared.clear(slot)
        self._own.missed(slot)

    def apply(self, slot: int, events: Sequence[Event], now_s: float) -> None:
        """This happened there, in this order."""
        self._own.apply(slot, events, now_s)
        self._shared.apply(slot, events, now_s)

    # -- what requests ask

    @property
    def slots(self) -> frozenset[int]:
        """Endpoints that we or others may know something of."""
        return self._own.slots | self._shared.joined

    def read(
        self, request: InferenceRequest, endpoints: Sequence[Endpoint], left_s: float
    ) -> asyncio.Future[str] | str:
        """Have the request's blocks read, where one of ``endpoints`` has not told us all. A word tells why it
        was not done in ``left_s`` seconds, else it is empty.
        """
        own, shared = self._own, self._shared
        if all(e.slot in own.slots and e.slot not in own.partial for e in endpoints):
            return OK
        keys = shared.keys(request)
        self._asked[id(request.tokenized)] = request.tokenized, keys
        if len(self._asked) > 2 * MOST_AT_ONCE:
            self._asked.popitem(last=False)
        return self._reading.read(keys, left_s)

    def match(self, request: InferenceRequest, now_s: float) -> BlockMatch:
        """What each endpoint holds of the request's prompts, as far as it is known in time."""
        own = self._own.match(request, now_s)
        prompts, keys = self._asked.get(id(request.tokenized), ((), {}))
        if prompts is not request.tokenized or request.untokenized:  # not read, or not in time
            return own
        shared = self._shared.match(request, now_s, keys)
        others = frozenset(shared.slots) - self._own.suspended - (self._own.slots - self._own.partial)
        return SharedMatch(request, own, shared, others)

    def sent(self, slot: int, request: InferenceRequest, now_s: float, match: BlockMatch) -> None:
        """The request goes to ``slot``; ``match`` is what was found for it."""
        if self._own.block_tokens(slot) or not isinstance(match, SharedMatch):
            self._own.sent(slot, request, now_s, match)
        else:
            self._shared.sent(slot, request, now_s, match.shared)

    # -- counts

    def metrics(self) -> Iterator[Metric]:
        """For the metrics page."""
        shared = self._shared
        yield counter(
            "pointsman_shared_index_events",
            "Engines' events for the shared index: written; lost, as too many waited or the server refused; "
            "or unknown, as what they build on is not known.",
            ("result",),
            {("written",): shared.written, ("lost",): shared.lost, ("unknown",): shared.unknown},
        )
        yield counter(
            "pointsman_shared_index_reads",
            "Requests whose blocks were read from the shared index, or were not, by reason.",
            ("result",),
            {(result or "read",): count for result, count in self._reading.results.items()},
        )
        yield counter(
            "pointsman_shared_index_failures",
            "Times that the server of the shared index did not do as asked.",
            ("doing",),
            {(doing,): count for doing, count in shared.failures.items()},
        )
        yield gauge(
            "pointsman_shared_index_waiting_events",
            "Events that wait to be written.",
            (),
            [((), shared.waiting)],
        )
