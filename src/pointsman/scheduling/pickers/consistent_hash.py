"""consistent-hash-picker."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from xxhash import xxh64_intdigest

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle, Services
from pointsman.scheduling.sessions import Source, check_attributes, session_id
from pointsman.scheduling.signals import prefix_match
from pointsman.types import Endpoint

_RANGE = float((1 << 64) + (1 << 12))  # so that no digest becomes 1.0, whose log is 0


@register("consistent-hash-picker")
class ConsistentHash(Plugin):
    """The same endpoint for the same session or, without one, the same first prefix block.

    Weighted rendezvous hashing: an endpoint that joins or leaves moves only its own share of the keys, and
    each has as many as its weight. A request with neither goes to the endpoint with the fewest of our
    requests in flight for its weight.
    """

    sources: tuple[Source, ...] = (Source(header="x-session-id"),)

    def prepare(self, services: Services) -> None:
        check_attributes(self.sources, services)

    def pick(self, cycle: Cycle, scores: Sequence[float]) -> Sequence[Endpoint]:
        key = self._key(cycle)
        if key is None:
            return (_least_loaded(cycle),)
        # -w / ln(u) with u uniform in (0, 1) is largest for each with the chance of its weight.
        digests = [xxh64_intdigest(e.name.encode(), key) for e in cycle.endpoints]
        rank = [
            e.weight / -log((digest + 1) / _RANGE) for e, digest in zip(cycle.endpoints, digests, strict=True)
        ]
        return (cycle.endpoints[rank.index(max(rank))],)

    def _key(self, cycle: Cycle) -> int | None:
        session = session_id(self.sources, cycle)
        if session:
            return xxh64_intdigest(session.encode())
        chains = cycle.get(prefix_match).chains
        if chains:
            return chains[0].hash(0)
        prompts = cycle.request.prompts
        return xxh64_intdigest(prompts[0].data) if prompts else None


def _least_loaded(cycle: Cycle) -> Endpoint:
    loads = [(e.load.requests + 1) / e.weight for e in cycle.endpoints]
    least = min(loads)
    return cycle.services.rng.choice([e for e, n in zip(cycle.endpoints, loads, strict=True) if n == least])
