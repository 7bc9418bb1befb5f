"""weight-scorer and least-request-scorer: what the weighted presets score by."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle


@register("weight-scorer")
class Weight(Plugin):
    """The endpoint's configured weight / the greatest one."""

    def score(self, cycle: Cycle) -> Sequence[float]:
        weights = [e.weight for e in cycle.endpoints]
        most = max(weights)
        return [w / most for w in weights]


@register("least-request-scorer")
class LeastRequest(Plugin):
    """Prefer endpoints with few of our requests in flight for their weight: w / (w + n + 1), which falls as
    (n + 1) / w grows; the 1 is the request at hand.
    """

    def score(self, cycle: Cycle) -> Sequence[float]:
        return [w / (w + n + 1) for w, n in [(e.weight, e.load.requests) for e in cycle.endpoints]]
