"""utilization-detector: full by what the engines' metrics say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.durations import seconds
from pointsman.types import Endpoint, Metrics


@register("utilization-detector")
class UtilizationDetector(Plugin):
    """An endpoint is as full as the fuller of waiting / ``queueDepthThreshold`` and KV usage /
    ``kvCacheUtilThreshold``; the pool is as full as its mean, an empty one is full.

    An endpoint whose metrics are missing or older than ``metricsStalenessThreshold`` counts as full, or not
    at all with ``stalenessPolicy`` ``ignore``. Age counts only while we have requests there: others are read
    rarely on purpose. As a filter it drops what passes the thresholds times (1 + ``headroom``), unless that
    is all of them.
    """

    queue_depth_threshold: Annotated[int, Meta(gt=0)] = 5
    kv_cache_util_threshold: Annotated[float, Meta(gt=0, le=1)] = 0.8
    metrics_staleness_threshold: str = "200ms"
    staleness_policy: Literal["saturated", "ignore"] = "saturated"
    headroom: Annotated[float, Meta(ge=0)] = 0.0

    def __post_init__(self) -> None:
        self._stale_s = seconds(self.metrics_staleness_threshold)
        if not self._stale_s:
            raise ValueError("metricsStalenessThreshold: must be greater than 0")
        self._max_queue = self.queue_depth_threshold * (1 + self.headroom)
        self._max_kv = min(1.0, self.kv_cache_util_threshold * (1 + self.headroom))

    def _stale(self, endpoint: Endpoint, now: float) -> bool:
        at_s = endpoint.metrics.at_s
        return not at_s or (now - at_s > self._stale_s and endpoint.load.requests > 0)

    def _fullness(self, metrics: Metrics) -> float:
        queue = metrics.waiting / self.queue_depth_threshold
        return max(queue, metrics.kv_usage / self.kv_cache_util_threshold)

    def saturation(self, endpoints: Sequence[Endpoint], now: float) -> float:
        if not endpoints:
            return 1.0
        known = [self._fullness(e.metrics) for e in endpoints if not self._stale(e, now)]
        stale = 0 if self.staleness_policy == "ignore" else len(endpoints) - len(known)
        counted = len(known) + stale
        return (sum(known) + stale) / counted if counted else 0.0

    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        now = cycle.services.clock()
        kept = [
            e
            for e in cycle.endpoints
            if e.metrics.waiting < self._max_queue
            and e.metrics.kv_usage < self._max_kv
            and not self._stale(e, now)
        ]
        return kept or cycle.endpoints
