"""active-request-scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from msgspec import Meta

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle


@register("active-request-scorer")
class ActiveRequest(Plugin):
    """1 with at most ``idleThreshold`` of our requests in flight, else (max - n) / max * ``maxBusyScore``."""

    idle_threshold: Annotated[int, Meta(ge=0)] = 0
    max_busy_score: Annotated[float, Meta(ge=0, le=1)] = 1.0
    request_timeout: str = ""
    in_flight_load_producer_name: str = ""

    producers: ClassVar[Mapping[str, str]] = {"in_flight_load_producer_name": "inflight-load-producer"}
    outdated: ClassVar[Mapping[str, str]] = {"request_timeout": "requests end by themselves; leave it out"}

    def score(self, cycle: Cycle) -> Sequence[float]:
        active = [e.load.requests for e in cycle.endpoints]
        most, idle, busy = max(active), self.idle_threshold, self.max_busy_score
        return [1.0 if n <= idle else (most - n) / most * busy for n in active]
