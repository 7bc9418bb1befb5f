"""consistent-hash-picker."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log
from typing import Annotated

from msgspec import Meta
from xxhash import xxh64_intdigest

from pointsman.registry import Plugin, register
from pointsman.scheduling.costs import cheapest
from pointsman.scheduling.cycle import Cycle, Services
from pointsman.scheduling.sessions import Source, check_attributes, session_id
from pointsman.types import Endpoint

_RANGE = float((1 << 64) + (1 << 12))  # so that no digest becomes 1.0, whose log is 0


@register("consistent-hash-picker")
class ConsistentHash(Plugin):
    """The same endpoint for the same session or, without one, the same first prefix block.

    Weighted rendezvous hashing: an endpoint that joins or leaves moves only its own share of the keys, and
    each has as many as its weight. A request with neither goes to the endpoint with the fewest of our
    requests in flight for its weight.

    With a ``loadFactor`` c (bounded loads; 0: none) an endpoint with n requests in flight takes another one
    only while n + 1 <= ceil(c * (N + 1) * its share of the weights), N being those in flight at all; the key
    goes on to its next endpoint.
    """

    sources: tuple[Source, ...] = (Source(header="x-session-id"),)
    load_factor: Annotated[float, Meta(ge=0)] = 0.0

    def __post_init__(self) -> None:
        if 0 < self.load_factor < 1:
            raise ValueError("loadFactor: 0, or at least 1; with less there is not room for every request")

    def prepare(self, services: Services) -> None:
        check_attributes(self.sources, services)

    def pick(self, cycle: Cycle, scores: Sequence[float]) -> Sequence[Endpoint]:
        key = self._key(cycle)
        if key is None:
            return (cheapest(cycle, [(e.load.requests + 1) / e.weight for e in cycle.endpoints]),)
        endpoints = self._with_room(cycle.endpoints) if self.load_factor else cycle.endpoints
        # -w / ln(u) with u uniform in (0, 1) is largest for each with the chance of its weight.
        digests = [xxh64_intdigest(e.name.encode(), key) for e in endpoints]
        rank = [e.weight / -log((digest + 1) / _RANGE) for e, digest in zip(endpoints, digests, strict=True)]
        return (endpoints[rank.index(max(rank))],)

    def _with_room(self, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        """Never empty: the limits add up to more than is in flight."""
        loads = [e.load.requests for e in endpoints]
        each = self.load_factor * (sum(loads) + 1) / sum([e.weight for e in endpoints])
        return [e for e, n in zip(endpoints, loads, strict=True) if n + 1 <= ceil(each * e.weight)]

    def _key(self, cycle: Cycle) -> int | None:
        session = session_id(self.sources, cycle)
        if session:
            return xxh64_intdigest(session.encode())
        chains = cycle.match.chains
        if chains:
            return chains[0].hash(0)
        prompts = cycle.request.prompts
        return xxh64_intdigest(prompts[0].data) if prompts else None
