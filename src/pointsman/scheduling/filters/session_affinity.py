"""session-affinity-filter."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.sessions import SessionAffinity
from pointsman.types import Endpoint


@register("session-affinity-filter")
class SessionAffinityFilter(SessionAffinity):
    """Keep only the endpoint the request's session is bound to; all of them when that one is not here."""

    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        names = self.bound(cycle)
        if names:
            for endpoint in cycle.endpoints:
                if endpoint.name in names:
                    return (endpoint,)
        return cycle.endpoints
