"""load-aware-scorer."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle

DEFAULT_THRESHOLD = 128


@register("load-aware-scorer")
class LoadAware(Plugin):
    """0.5 with an empty engine queue, falling to 0 at ``threshold`` waiting requests."""

    threshold: int = DEFAULT_THRESHOLD

    def score(self, cycle: Cycle) -> Sequence[float]:
        threshold = self.threshold if self.threshold > 0 else DEFAULT_THRESHOLD
        waiting = [e.metrics.waiting for e in cycle.endpoints]
        return [0.5 * (1.0 - w / threshold) if w < threshold else 0.0 for w in waiting]
