"""power-of-two-picker."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.types import Endpoint


@register("power-of-two-picker")
class PowerOfTwo(Plugin):
    """Of two endpoints chosen at random, the one with fewer of our requests in flight for its weight."""

    def pick(self, cycle: Cycle, scores: Sequence[float]) -> Sequence[Endpoint]:
        endpoints = cycle.endpoints
        if len(endpoints) == 1:
            return (endpoints[0],)
        one, other = cycle.services.rng.sample(endpoints, 2)
        first = (one.load.requests + 1) / one.weight <= (other.load.requests + 1) / other.weight
        return (one,) if first else (other,)
