"""max-score-picker."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.types import Endpoint


@register("max-score-picker")
class MaxScore(Plugin):
    """The endpoints with the highest scores, ties in random order."""

    max_num_of_endpoints: int = 1

    def pick(self, cycle: Cycle, scores: Sequence[float]) -> Sequence[Endpoint]:
        endpoints = cycle.endpoints
        if self.max_num_of_endpoints > 1:
            order = list(range(len(endpoints)))
            cycle.services.rng.shuffle(order)
            order.sort(key=scores.__getitem__, reverse=True)
            return [endpoints[i] for i in order[: self.max_num_of_endpoints]]
        best = max(scores)
        ties = scores.count(best)
        at = scores.index(best)
        if ties > 1:
            for _ in range(int(cycle.services.rng.random() * ties)):
                at = scores.index(best, at + 1)
        return (endpoints[at],)
