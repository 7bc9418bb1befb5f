"""predicted-latency-producer: TTFT and TPOT of a request at each endpoint, by the learned model of the
default policy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from pointsman.predictor.costs import Costs
from pointsman.predictor.latency import Latencies, Latency
from pointsman.predictor.learned import Learned
from pointsman.predictor.lengths import Lengths
from pointsman.predictor.speed import Speeds
from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle, Services
from pointsman.scheduling.durations import seconds
from pointsman.scheduling.signals import SENT, prefix_match
from pointsman.scheduling.slo import promised
from pointsman.scheduling.underway import UnderWay
from pointsman.types import Decision, Endpoint, InferenceRequest, Outcome, Prediction

NOT_SAMPLED = "has no effect: the model learns from the progress of all streams, not from samples"
PREFILL = "prefill"


@register("predicted-latency-producer")
class PredictedLatency(Plugin):
    """Predict each endpoint's TTFT and TPOT for a request, from what is learned of its speed: no sidecar, and
    no training to wait for.

    With ``streamingMode`` TTFT is the time to the first token. Without it (the default, as in llm-d) it is
    the whole time to the last one, the usual length of an answer taken, and TPOT does not count; nor does it
    for endpoints whose label ``endpointRoleLabel`` is ``prefill``. The TPOT to keep is the request's or, if
    that is less, the least of those in flight at the endpoint, times ``sloBufferFactor``. With
    ``predictInProduce: false`` it only learns. Accepted, without effect: ``samplingMean``,
    ``maxDecodeTokenSamplesForPrediction``, ``contextTTL``, ``useEncoderCacheFeatures``,
    ``encoderCacheMatchInfoProducerName``.
    """

    slo_buffer_factor: Annotated[float, Meta(gt=0)] = 1.0
    streaming_mode: bool = False
    endpoint_role_label: str = ""
    predict_in_produce: bool = True
    prefix_match_info_producer_name: str = ""
    sampling_mean: Annotated[float, Meta(gt=0)] = 1000.0
    max_decode_token_samples_for_prediction: Annotated[int, Meta(ge=0)] = 0
    context_ttl: str | int = msgspec.field(default="5m", name="contextTTL")
    use_encoder_cache_features: bool = False
    encoder_cache_match_info_producer_name: str = ""

    producers: ClassVar[Mapping[str, str]] = {"prefix_match_info_producer_name": SENT}
    outdated: ClassVar[Mapping[str, str]] = {
        "sampling_mean": NOT_SAMPLED,
        "max_decode_token_samples_for_prediction": NOT_SAMPLED,
        "context_ttl": "has no effect: what is kept of a request goes when the request ends",
        "use_encoder_cache_features": "has no effect: media count by their estimated tokens",
        "encoder_cache_match_info_producer_name": "has no effect: media count by their estimated tokens",
    }

    def __post_init__(self) -> None:
        if isinstance(self.context_ttl, str):
            seconds(self.context_ttl)
        self._costs = Costs(Speeds(), Lengths())
        self._latencies = Latencies(self._costs)
        self._promises: UnderWay[tuple[int, float]] = UnderWay()
        self._least_tpot: dict[int, Counter[float]] = {}
        """TPOTs promised to the requests in flight, by slot."""

    def prepare(self, services: Services) -> None:
        if self.predict_in_produce:
            services.latency = self.predict

    def predict(self, cycle: Cycle) -> Mapping[int, Latency]:
        """What each candidate would do with this request, by slot."""
        slo, buffer, label = promised(cycle.request), self.slo_buffer_factor, self.endpoint_role_label
        ttft_s = slo.ttft_s
        output = self._costs.lengths.of(cycle.request).mean
        predictions = self._expected(cycle, cycle.candidates)
        found = {}
        for endpoint, of_it in zip(cycle.candidates, predictions, strict=True):
            slot = endpoint.slot
            first_s = of_it.queue_s + of_it.prefill_s
            if not self.streaming_mode:
                first_s += output * of_it.step_s
            after_s = headroom_s = 0.0
            if self.streaming_mode and not (label and endpoint.labels.get(label) == PREFILL):
                after_s = of_it.step_s
                headroom_s = self._tpot_to_keep(slot, slo.tpot_s) * buffer - after_s
            kept = bool(slo) and (not ttft_s or first_s <= ttft_s) and (not slo.tpot_s or headroom_s >= 0)
            found[slot] = Latency(first_s, after_s, ttft_s - first_s, headroom_s, kept)
        return found

    def on_dispatch(self, cycle: Cycle, decision: Decision) -> None:
        chosen, request = decision.chosen, cycle.request
        decision.predicted = self._expected(cycle, (chosen,))[0]
        prompt = decision.prompt_tokens
        self._costs.sent(chosen, prompt, prompt - decision.matched_tokens)
        self._costs.lengths.sent(request, decision.at_s)
        self._forget(request)
        tpot_s = promised(request).tpot_s
        if tpot_s:
            self._promises.note(request, (chosen.slot, tpot_s))
            self._least_tpot.setdefault(chosen.slot, Counter())[tpot_s] += 1

    def on_outcome(self, request: InferenceRequest, decision: Decision, outcome: Outcome) -> None:
        self._costs.lengths.observe(request, outcome, decision.predicted)
        self._forget(request)

    def learned(self, endpoints: Sequence[Endpoint], now: float) -> Mapping[str, Learned]:
        known = ((e.name, self._costs.learned(e, now)) for e in endpoints)
        return {name: learned for name, learned in known if learned}

    def _expected(self, cycle: Cycle, endpoints: Sequence[Endpoint]) -> Sequence[Prediction]:
        now_s = cycle.services.clock()
        self._costs.update(cycle.candidates, now_s)
        request, match = cycle.request, prefix_match(cycle, self.prefix_match_info_producer_name)
        cached = {slot: match.tokens(slot) for slot in match.held_by_slot}
        length = self._costs.lengths.of(request).mean
        return self._latencies.expected(endpoints, now_s, request.prompt_tokens, cached, length)

    def _tpot_to_keep(self, slot: int, own_s: float) -> float:
        others = self._least_tpot.get(slot)
        return min(own_s, *others) if others else own_s

    def _forget(self, request: InferenceRequest) -> None:
        noted = self._promises.take(request)
        if noted is None:
            return
        slot, tpot_s = noted
        here = self._least_tpot[slot]
        here[tpot_s] -= 1
        if not here[tpot_s]:
            del here[tpot_s]
        if not here:
            del self._least_tpot[slot]
