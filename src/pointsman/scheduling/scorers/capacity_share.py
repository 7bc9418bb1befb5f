"""capacity-share-scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.learned import Learned, RunningMean
from pointsman.scheduling.underway import UnderWay
from pointsman.types import Decision, Ending, InferenceRequest, Outcome

LEAST_S = 1e-4
"""What is left of a token's time counts as no less: nothing is learned from noise around zero."""


@register("capacity-share-scorer")
class CapacityShare(Plugin):
    """Prefer endpoints with few of our requests in flight for their capacity: 1 - (n / capacity) / the
    greatest such.

    ``capacity`` is the endpoint's ``weight``, or ``learned`` from requests that have ended and whose output
    tokens are known: a running mean, in which each counts ``smoothing``, of n / (seconds / output tokens -
    ``baseStepMs``); n is the mean of those in flight when it was sent and when it ended, ``baseStepMs`` the
    time of a token however few they are. An endpoint of which nothing is known yet has the mean of the
    others.
    """

    capacity: Literal["weight", "learned"] = "weight"
    base_step_ms: Annotated[float, Meta(ge=0)] = 6.0
    smoothing: Annotated[float, Meta(gt=0, le=1)] = 0.05

    def __post_init__(self) -> None:
        self._learned = Learned(lambda: RunningMean(self.smoothing))
        self._sent: UnderWay[int] = UnderWay()

    def score(self, cycle: Cycle) -> Sequence[float]:
        used = [e.load.requests / c for e, c in zip(cycle.endpoints, self._capacities(cycle), strict=True)]
        most = max(used)
        return [1.0 - u / most for u in used] if most else [1.0] * len(used)

    def _capacities(self, cycle: Cycle) -> Sequence[float]:
        if self.capacity == "weight":
            return [e.weight for e in cycle.endpoints]
        learned = [self._learned.get(e) for e in cycle.endpoints]
        found = [one.value if one else 0.0 for one in learned]
        known = [value for value in found if value]
        mean = sum(known) / len(known) if known else 1.0
        return [value or mean for value in found]

    def on_dispatch(self, cycle: Cycle, decision: Decision) -> None:
        if self.capacity == "learned":
            self._learned.of(decision.chosen)
            self._sent.note(cycle.request, decision.chosen.load.requests + 1)

    def on_outcome(self, request: InferenceRequest, decision: Decision, outcome: Outcome) -> None:
        before, learned = self._sent.take(request), self._learned.get(decision.chosen)
        tokens = outcome.usage.output_tokens
        if before is None or learned is None or not tokens or outcome.ending is not Ending.OK:
            return
        after = decision.chosen.load.requests + 1  # this one has just been taken off
        token_s = outcome.duration_s / tokens - self.base_step_ms / 1000
        learned.add((before + after) / 2 / max(token_s, LEAST_S))
