"""topology-affinity-filter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.topology import LEVELS, nearness
from pointsman.types import Endpoint


@register("topology-affinity-filter")
class TopologyAffinityFilter(Plugin):
    """Keep endpoints that share ``minAffinity`` (or something nearer) with the request's other stage.

    All stay when there is no other stage, when its place is unknown, or when none is near enough.
    """

    min_affinity: Literal["host", "rack", "zone", "region"] = "host"
    topology_producer_name: str = ""

    producers: ClassVar[Mapping[str, str]] = {"topology_producer_name": "topology-extractor"}

    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        if cycle.peer is None:
            return cycle.endpoints
        read = cycle.services.topology.read
        place, farthest = read(cycle.peer.labels), LEVELS.index(self.min_affinity)
        near = [e for e in cycle.endpoints if nearness(place, read(e.labels)) <= farthest]
        return near or cycle.endpoints
