"""slo-headroom-tier-filter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from msgspec import Meta

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.signals import predicted_latency
from pointsman.scheduling.slo import promised
from pointsman.types import Endpoint

PRODUCER = "predicted-latency-producer"


@register("slo-headroom-tier-filter")
class SloHeadroomTier(Plugin):
    """Keep the endpoints that are expected to keep the request's SLO; with probability ``epsilonExploreNeg``
    only the others, so that those which recover are seen to. All stay without SLO headers, without
    predictions, and when none or all keep it.
    """

    epsilon_explore_neg: Annotated[float, Meta(ge=0, le=1)] = 0.01
    latency_prediction_info_producer_name: str = ""

    producers: ClassVar[Mapping[str, str]] = {"latency_prediction_info_producer_name": PRODUCER}
    needs: ClassVar[tuple[str, ...]] = (PRODUCER,)

    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        endpoints = cycle.endpoints
        if len(endpoints) == 1 or not promised(cycle.request):
            return endpoints
        known = cycle.get(predicted_latency)
        if not known:
            return endpoints
        keeping = [e for e in endpoints if known[e.slot].kept]
        if not keeping or len(keeping) == len(endpoints):
            return endpoints
        if cycle.services.rng.random() < self.epsilon_explore_neg:
            return [e for e in endpoints if not known[e.slot].kept]
        return keeping
