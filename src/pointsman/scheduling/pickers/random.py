"""random-picker and weighted-random-picker."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.types import Endpoint


@register("random-picker")
class Random(Plugin):
    """Any endpoints, whatever their scores."""

    max_num_of_endpoints: int = 1

    def pick(self, cycle: Cycle, scores: Sequence[float]) -> Sequence[Endpoint]:
        return _sample(cycle, self.max_num_of_endpoints)


@register("weighted-random-picker")
class WeightedRandom(Plugin):
    """Endpoints at random, each as likely as its score; any when no score is above 0."""

    max_num_of_endpoints: int = 1

    def pick(self, cycle: Cycle, scores: Sequence[float]) -> Sequence[Endpoint]:
        endpoints, rng = cycle.endpoints, cycle.services.rng
        weights = [max(s, 0.0) for s in scores]
        if not any(weights):
            return _sample(cycle, self.max_num_of_endpoints)
        if self.max_num_of_endpoints <= 1:
            return rng.choices(endpoints, weights)
        # A-Res: the largest keys U^(1/w) are a weighted sample without replacement.
        keys = [rng.random() ** (1 / w) if w else -1.0 for w in weights]
        order = sorted(range(len(keys)), key=keys.__getitem__, reverse=True)
        return [endpoints[i] for i in order[: self.max_num_of_endpoints]]


def _sample(cycle: Cycle, k: int) -> Sequence[Endpoint]:
    endpoints = cycle.endpoints
    return cycle.services.rng.sample(endpoints, min(max(k, 1), len(endpoints)))
