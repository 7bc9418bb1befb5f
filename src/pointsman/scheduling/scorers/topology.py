"""topology-affinity-scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.topology import nearness

SCORES = (1.0, 0.20, 0.05, 0.02, 0.0)
"""By nearness: host, rack, zone, region, none of them. As fast as KV blocks travel, not evenly spaced."""


@register("topology-affinity-scorer")
class TopologyAffinityScorer(Plugin):
    """Prefer endpoints near the one that does the request's other stage; all 0 when there is none."""

    topology_producer_name: str = ""

    producers: ClassVar[Mapping[str, str]] = {"topology_producer_name": "topology-extractor"}

    def score(self, cycle: Cycle) -> Sequence[float]:
        if cycle.peer is None:
            return [0.0] * len(cycle.endpoints)
        read = cycle.services.topology.read
        place = read(cycle.peer.labels)
        return [SCORES[nearness(place, read(e.labels))] for e in cycle.endpoints]
