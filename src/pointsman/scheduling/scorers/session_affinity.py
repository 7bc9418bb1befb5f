"""session-affinity-scorer."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.sessions import SessionAffinity


@register("session-affinity-scorer")
class SessionAffinityScorer(SessionAffinity):
    """1 for the endpoint the request's session is bound to, 0 for all others."""

    def score(self, cycle: Cycle) -> Sequence[float]:
        names = self.bound(cycle)
        return [1.0 if e.name in names else 0.0 for e in cycle.endpoints]
