"""pool-latency-scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta

from pointsman.registry import Plugin, register
from pointsman.scheduling.costs import scores_of
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.learned import RunningMean
from pointsman.scheduling.regression import Regression
from pointsman.scheduling.underway import UnderWay
from pointsman.types import Decision, Ending, Endpoint, InferenceRequest, Outcome

Features = tuple[float, ...]
"""1, KV usage, waiting and running (tens), uncached tokens in flight there, of this request (thousands),
its uncached share.
"""
FEATURES = 7


@register("pool-latency-scorer")
class PoolLatency(Plugin):
    """In the manner of llm-d's latency predictor: one model for all endpoints of TTFT and TPOT, learned
    from streamed requests that have ended, of which about ``memoryRequests`` count; the least predicted
    time is best.

    The time is ``ttftWeight`` * TTFT + ``tpotWeight`` * TPOT * the usual output tokens. The models are
    linear in KV usage, waiting and running requests as the engine tells them, uncached prompt tokens in
    flight there, the request's own uncached tokens and their share.
    """

    ttft_weight: Annotated[float, Meta(ge=0)] = 1.0
    tpot_weight: Annotated[float, Meta(ge=0)] = 1.0
    memory_requests: Annotated[int, Meta(gt=1)] = 1000

    def __post_init__(self) -> None:
        self._ttft = Regression(FEATURES, self.memory_requests)
        self._tpot = Regression(FEATURES, self.memory_requests)
        self._output_tokens = RunningMean(1 / self.memory_requests)
        self._sent: UnderWay[Features] = UnderWay()

    def score(self, cycle: Cycle) -> Sequence[float]:
        decode = self.tpot_weight * self._output_tokens.value
        pairs = zip(self._ttft.coefficients, self._tpot.coefficients, strict=True)
        of_all, of_kv, of_waiting, of_running, of_queued, of_own, of_share = (
            self.ttft_weight * ttft + decode * tpot for ttft, tpot in pairs
        )
        own = cycle.request.prompt_tokens / 1000
        match = cycle.match
        held, total = match.held_by_slot.get, match.total or 1
        return scores_of(
            [
                of_all
                + of_kv * metrics.kv_usage
                + (of_waiting * metrics.waiting + of_running * metrics.running) / 10
                + of_queued * tokens / 1000
                + (of_own * own + of_share) * (1.0 - held(slot, 0) / total)
                for slot, metrics, tokens in [(e.slot, e.metrics, e.load.tokens) for e in cycle.endpoints]
            ]
        )

    def on_dispatch(self, cycle: Cycle, decision: Decision) -> None:
        if cycle.request.stream:
            self._sent.note(cycle.request, _features(cycle, decision.chosen))

    def on_outcome(self, request: InferenceRequest, decision: Decision, outcome: Outcome) -> None:
        features = self._sent.take(request)
        if features is None or outcome.ttft_s is None or outcome.ending is not Ending.OK:
            return
        self._ttft.learn(features, outcome.ttft_s)
        tokens = outcome.usage.output_tokens
        if tokens and tokens > 1:
            self._output_tokens.add(tokens)
            self._tpot.learn(features, (outcome.duration_s - outcome.ttft_s) / (tokens - 1))


def _features(cycle: Cycle, endpoint: Endpoint) -> Features:
    metrics = endpoint.metrics
    uncached = 1.0 - cycle.match.ratio(endpoint.slot)
    return (
        1.0,
        metrics.kv_usage,
        metrics.waiting / 10,
        metrics.running / 10,
        endpoint.load.tokens / 1000,
        uncached * cycle.request.prompt_tokens / 1000,
        uncached,
    )
