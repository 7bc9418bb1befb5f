"""running-requests-size-scorer."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle


@register("running-requests-size-scorer")
class RunningRequestsSize(Plugin):
    """Prefer engines that run few requests: (max - running) / (max - min), 1 when all are equal."""

    def score(self, cycle: Cycle) -> Sequence[float]:
        running = [e.metrics.running for e in cycle.endpoints]
        most = max(running)
        span = most - min(running)
        return [(most - r) / span for r in running] if span else [1.0] * len(running)
