"""queue-scorer."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle


@register("queue-scorer")
class Queue(Plugin):
    """Prefer short engine queues: (max - waiting) / (max - min), 1 when all are equal."""

    def score(self, cycle: Cycle) -> Sequence[float]:
        waiting = [e.metrics.waiting for e in cycle.endpoints]
        longest = max(waiting)
        span = longest - min(waiting)
        return [(longest - w) / span for w in waiting] if span else [1.0] * len(waiting)
