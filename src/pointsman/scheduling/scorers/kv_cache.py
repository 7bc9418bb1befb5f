"""kv-cache-utilization-scorer."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle


@register("kv-cache-utilization-scorer")
class KVCacheUtilization(Plugin):
    """Prefer endpoints with free KV blocks: 1 - usage."""

    def score(self, cycle: Cycle) -> Sequence[float]:
        # A comparison is cheaper than min(max()); usage outside [0, 1] is rare.
        return [
            1.0 - usage if 0.0 <= usage <= 1.0 else float(usage < 0.0)
            for usage in [e.metrics.kv_usage for e in cycle.endpoints]
        ]
