"""cache-aware-picker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta

from pointsman.registry import Plugin, register
from pointsman.scheduling.costs import cheapest
from pointsman.scheduling.cycle import Cycle
from pointsman.types import Endpoint


@register("cache-aware-picker")
class CacheAware(Plugin):
    """``cache_aware`` of the SGLang router, SMG and vllm-router: the endpoint with the longest match, if
    that is more than ``cacheThreshold`` of the prompt, else the one with the fewest tokens in the prefix
    index.

    While loads differ by more than ``balanceAbsThreshold`` and the greatest is more than
    ``balanceRelThreshold`` times the least, the endpoint with the fewest of our requests in flight.
    """

    cache_threshold: Annotated[float, Meta(ge=0, le=1)] = 0.5
    balance_abs_threshold: Annotated[int, Meta(ge=0)] = 32
    balance_rel_threshold: Annotated[float, Meta(ge=0)] = 1.0001

    def pick(self, cycle: Cycle, scores: Sequence[float]) -> Sequence[Endpoint]:
        endpoints = cycle.endpoints
        loads = [e.load.requests for e in endpoints]
        least, most = min(loads), max(loads)
        if most - least > self.balance_abs_threshold and most > self.balance_rel_threshold * least:
            return (cheapest(cycle, loads),)
        match = cycle.match
        if match.held_by_slot:
            held = match.held_by_slot.get
            missing = [match.total - held(e.slot, 0) for e in endpoints]
            if min(missing) < (1.0 - self.cache_threshold) * match.total:
                return (cheapest(cycle, missing),)
        indexed = cycle.services.prefix.tokens
        return (cheapest(cycle, [indexed(e.slot) for e in endpoints]),)
