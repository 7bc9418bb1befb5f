"""What plugins that compare endpoints by a cost share: the least one, or scores from all of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from pointsman.scheduling.cycle import Cycle
from pointsman.types import Endpoint


def cheapest(cycle: Cycle, costs: Sequence[float]) -> Endpoint:
    """The endpoint with the least of ``costs``; any of them when several have it."""
    least = min(costs)
    if costs.count(least) == 1:
        return cycle.endpoints[costs.index(least)]
    equal = [e for e, cost in zip(cycle.endpoints, costs, strict=True) if cost == least]
    return cycle.services.rng.choice(equal)


def scores_of(costs: Sequence[float]) -> list[float]:
    """1 for the least cost, 0 for the greatest, the others in proportion; 1 for all when they are equal."""
    least, greatest = min(costs), max(costs)
    spread = greatest - least
    if not 0.0 < spread < inf:
        return [1.0] * len(costs)
    return [(greatest - cost) / spread for cost in costs]
