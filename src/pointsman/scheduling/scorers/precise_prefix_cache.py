"""precise-prefix-cache-scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pointsman.registry import register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.producers.precise_prefix import PrecisePrefixCache


@register("precise-prefix-cache-scorer")
class PrecisePrefixScorer(PrecisePrefixCache):
    """Producer and scorer in one: matched blocks / all blocks, by what engines tell."""

    replaced_by: ClassVar[str] = "precise-prefix-cache-producer and prefix-cache-scorer"

    def score(self, cycle: Cycle) -> Sequence[float]:
        match = cycle.match
        return [match.ratio(e.slot) for e in cycle.endpoints]
