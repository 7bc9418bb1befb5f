"""header-label-affinity-scorer."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle


@register("header-label-affinity-scorer")
class HeaderLabelAffinity(Plugin):
    """1 for endpoints whose label ``labelKey`` equals the request's header ``headerName``, else 0."""

    header_name: str
    label_key: str

    def __post_init__(self) -> None:
        if not self.header_name or not self.label_key:
            raise ValueError("headerName and labelKey: must not be empty")

    def score(self, cycle: Cycle) -> Sequence[float]:
        wanted = cycle.request.headers.get(self.header_name.lower())
        if not wanted:
            return [0.0] * len(cycle.endpoints)
        key = self.label_key
        return [1.0 if e.labels.get(key) == wanted else 0.0 for e in cycle.endpoints]
