"""utilization-filter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import msgspec

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.types import Endpoint

METRICS: Mapping[str, Callable[[Endpoint], float]] = {
    "active-requests": lambda e: e.load.requests,
    "running-requests": lambda e: e.metrics.running,
    "waiting-queue": lambda e: e.metrics.waiting,
    "kv-cache-utilization": lambda e: e.metrics.kv_usage,
}


class Condition(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    metric: Literal["active-requests", "running-requests", "waiting-queue", "kv-cache-utilization"]
    max_value: float


@register("utilization-filter")
class UtilizationFilter(Plugin):
    """Drop endpoints that exceed any of the caps; with ``fallbackOnEmpty`` all stay when none would."""

    conditions: tuple[Condition, ...]
    fallback_on_empty: bool = False
    in_flight_load_producer_name: str = ""

    producers: ClassVar[Mapping[str, str]] = {"in_flight_load_producer_name": "inflight-load-producer"}

    def __post_init__(self) -> None:
        if not self.conditions:
            raise ValueError("conditions: must not be empty")
        self._caps = [(METRICS[c.metric], c.max_value) for c in self.conditions]

    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        kept = cycle.endpoints
        for read, cap in self._caps:
            kept = [e for e in kept if read(e) <= cap]
        return kept or (cycle.endpoints if self.fallback_on_empty else kept)
