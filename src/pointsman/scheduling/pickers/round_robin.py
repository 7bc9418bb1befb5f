"""round-robin-picker."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.departed import forget_departed
from pointsman.types import Endpoint


@register("round-robin-picker")
class RoundRobin(Plugin):
    """Endpoints in turn, as often as their weight and as evenly spread as that allows.

    Smooth weighted round robin: each turn everyone gains its weight in credit, the richest is chosen and
    pays what all gained.
    """

    def __post_init__(self) -> None:
        self._credit: dict[str, float] = {}

    def pick(self, cycle: Cycle, scores: Sequence[float]) -> Sequence[Endpoint]:
        credit, gained = self._credit, 0.0
        chosen, richest = cycle.endpoints[0], float("-inf")
        for endpoint in cycle.endpoints:
            gained += endpoint.weight
            mine = credit[endpoint.name] = credit.get(endpoint.name, 0.0) + endpoint.weight
            if mine > richest:
                chosen, richest = endpoint, mine
        credit[chosen.name] -= gained
        forget_departed(credit, cycle.candidates)
        return (chosen,)
