"""How near two endpoints are, told by their labels; and topology-extractor, which says which labels."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

LEVELS = ("host", "rack", "zone", "region")
"""From near to far. Equal at one level counts as that near, whatever the levels beyond it say."""


class TopologyLabels(msgspec.Struct, frozen=True):
    """The label that holds each level's value; Kubernetes' own names by default."""

    host: str = "kubernetes.io/hostname"
    rack: str = "topology.kubernetes.io/rack"
    zone: str = "topology.kubernetes.io/zone"
    region: str = "topology.kubernetes.io/region"

    def read(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        """Values by level, "" where the label is missing."""
        get = labels.get
        return (get(self.host, ""), get(self.rack, ""), get(self.zone, ""), get(self.region, ""))


def nearness(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """Index in ``LEVELS`` of the nearest level both share; ``len(LEVELS)`` when they share none.

    A missing value never matches, not even another missing one.
    """
    for level, value in enumerate(one):
        if value and value == other[level]:
            return level
    return len(LEVELS)
