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
        if self.max_num_of_endpoints == 1:
            best = max(scores)
            first = scores.index(best)
            ties = [first] if scores.count(best) == 1 else [i for i, s in enumerate(scores) if s == best]
            return [endpoints[ties[0] if len(ties) == 1 else cycle.services.rng.choice(ties)]]
        order = list(range(len(endpoints)))
        cycle.services.rng.shuffle(order)
        order.sort(key=scores.__getitem__, reverse=True)
        return [endpoints[i] for i in order[: self.max_num_of_endpoints]]
