"""endpoint-ttft-scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta

from pointsman.registry import Plugin, register
from pointsman.scheduling.costs import scores_of
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.learned import Learned
from pointsman.scheduling.regression import Regression
from pointsman.scheduling.underway import UnderWay
from pointsman.types import Decision, Ending, Endpoint, InferenceRequest, Outcome

FEATURES = 4
AT_ONCE = (0.0,) * FEATURES
Features = tuple[float, float, float, float]
"""1, uncached tokens in flight there and of this request (thousands), requests in flight there (tens)."""


class Known:
    """What is known of an endpoint: how many requests it was sent, and what its TTFTs tell."""

    __slots__ = ("sent", "ttft")

    def __init__(self, memory: float) -> None:
        self.sent = 0
        self.ttft = Regression(FEATURES, memory)


@register("endpoint-ttft-scorer")
class EndpointTTFT(Plugin):
    """In the manner of Lodestar (arXiv 2606.00946): a model of TTFT for each endpoint, learned from its
    streamed requests, of which about ``memoryRequests`` count; the least predicted TTFT is best.

    The models are linear in uncached prompt tokens in flight, the request's own, and requests in flight, as
    we count them. An endpoint that was sent fewer than ``exploreRequests`` is predicted to answer at once;
    until as many have told their TTFT, the prediction is that of a model of all endpoints.
    """

    explore_requests: Annotated[int, Meta(ge=0)] = 8
    memory_requests: Annotated[int, Meta(gt=1)] = 200

    def __post_init__(self) -> None:
        self._known = Learned(lambda: Known(self.memory_requests))
        self._all = Regression(FEATURES, self.memory_requests)
        self._sent: UnderWay[Features] = UnderWay()

    def score(self, cycle: Cycle) -> Sequence[float]:
        own = cycle.request.prompt_tokens
        match = cycle.match
        held, total = match.held_by_slot.get, match.total or 1
        costs = []
        for endpoint in cycle.endpoints:
            base, queued, uncached, running = self._law(endpoint)
            load, own_tokens = endpoint.load, own - own * held(endpoint.slot, 0) // total
            costs.append(
                base + (queued * load.tokens + uncached * own_tokens) / 1000 + running * load.requests / 10
            )
        return scores_of(costs)

    def _law(self, endpoint: Endpoint) -> Sequence[float]:
        """The coefficients that its TTFT is predicted with."""
        known, explore = self._known.get(endpoint), self.explore_requests
        if (known.sent if known else 0) < explore:
            return AT_ONCE
        return known.ttft.coefficients if known and known.ttft.samples >= explore else self._all.coefficients

    def on_dispatch(self, cycle: Cycle, decision: Decision) -> None:
        self._known.of(decision.chosen).sent += 1
        if cycle.request.stream:
            load, uncached = decision.chosen.load, decision.prompt_tokens - decision.matched_tokens
            self._sent.note(cycle.request, (1.0, load.tokens / 1000, uncached / 1000, load.requests / 10))

    def on_outcome(self, request: InferenceRequest, decision: Decision, outcome: Outcome) -> None:
        features, known = self._sent.take(request), self._known.get(decision.chosen)
        if features is None or outcome.ttft_s is None or outcome.ending is not Ending.OK:
            return
        self._all.learn(features, outcome.ttft_s)
        if known is not None:
            known.ttft.learn(features, outcome.ttft_s)
