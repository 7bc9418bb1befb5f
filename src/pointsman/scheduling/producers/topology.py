"""topology-extractor."""

from __future__ import annotations

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.topology import TopologyLabels


@register("topology-extractor")
class TopologyExtractor(Plugin):
    """Which labels tell an endpoint's host, rack, zone and region; empty ones are Kubernetes' own."""

    hostname: str = ""
    rack: str = ""
    zone: str = ""
    region: str = ""

    def prepare(self, services: Services) -> None:
        default = TopologyLabels()
        services.topology = TopologyLabels(
            self.hostname or default.host,
            self.rack or default.rack,
            self.zone or default.zone,
            self.region or default.region,
        )
