"""latency-slo-admitter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pointsman.errors import Saturated
from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.signals import predicted_latency
from pointsman.scheduling.slo import promised

PRODUCER = "predicted-latency-producer"
COLD = 0.02
"""KV usage below which an endpoint has too little to do for its predictions to count against it."""


@register("latency-slo-admitter")
class LatencySloAdmitter(Plugin):
    """Refuse a request of negative priority with an SLO (429) when no endpoint is expected to keep it. It is
    let in where one has none of our requests in flight or less than 2% of its KV cache in use, and where
    there are no predictions.
    """

    latency_prediction_info_producer_name: str = ""

    producers: ClassVar[Mapping[str, str]] = {"latency_prediction_info_producer_name": PRODUCER}
    needs: ClassVar[tuple[str, ...]] = (PRODUCER,)

    def admit(self, cycle: Cycle) -> None:
        if cycle.request.priority >= 0 or not promised(cycle.request):
            return
        known = cycle.get(predicted_latency)
        if not known:
            return
        for endpoint in cycle.endpoints:
            if known[endpoint.slot].kept or not endpoint.load.requests or endpoint.metrics.kv_usage < COLD:
                return
        raise Saturated("no endpoint is expected to keep this request's SLO, and its priority is negative")
