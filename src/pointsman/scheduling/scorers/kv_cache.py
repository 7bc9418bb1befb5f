"""kv-cache-utilization-scorer."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle


@register("kv-cache-utilization-scorer")
class KVCacheUtilization(Plugin):
    """Prefer endpoints with free KV blocks: 1 - usage."""

    def score(self, cycle: Cycle) -> Sequence[float]:
        return [1.0 - min(max(e.metrics.kv_usage, 0.0), 1.0) for e in cycle.endpoints]
