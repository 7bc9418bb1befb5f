"""prefix-cache-affinity-filter: stay where the prompt is cached until that costs too much waiting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.signals import SENT, predicted_latency, prefix_match
from pointsman.types import Endpoint

PREDICTOR = "predicted-latency-producer"


@register("prefix-cache-affinity-filter")
class PrefixCacheAffinity(Plugin):
    """Keep the endpoints that hold at least ``affinityThreshold`` of the prompt, if there are any.

    All stay in the race when the least loaded of the warm ones would need more than ``maxTTFTPenaltyMs``
    longer to its first token than the least loaded other one (0: never); its time is the uncached prompt
    tokens in flight there divided by ``peakPrefillThroughput`` (tokens/s) or, with ``ttftSource``
    ``latencyPredictor``, what predicted-latency-producer predicts; without predictions all stay. A share
    ``explorationProbability`` of the requests skips the filter.
    """

    affinity_threshold: Annotated[float, Meta(ge=0, le=1)] = 0.80
    exploration_probability: Annotated[float, Meta(ge=0, le=1)] = 0.0
    max_ttft_penalty_ms: Annotated[float, Meta(ge=0)] = msgspec.field(
        default=18000.0, name="maxTTFTPenaltyMs"
    )
    ttft_source: Literal["prefillThroughput", "latencyPredictor"] = "prefillThroughput"
    peak_prefill_throughput: Annotated[float, Meta(ge=0)] = 15928.0
    prefix_match_info_producer_name: str = ""
    in_flight_load_producer_name: str = ""
    latency_prediction_info_producer_name: str = ""

    producers: ClassVar[Mapping[str, str]] = {
        "prefix_match_info_producer_name": SENT,
        "in_flight_load_producer_name": "inflight-load-producer",
        "latency_prediction_info_producer_name": PREDICTOR,
    }

    def __post_init__(self) -> None:
        if self.ttft_source == "latencyPredictor":
            self.needs = (PREDICTOR,)  # type: ignore[misc]  # the parameter decides, not the class
        elif self.max_ttft_penalty_ms and not self.peak_prefill_throughput:
            raise ValueError("peakPrefillThroughput: must be greater than 0")
        self._penalty_tokens = self.max_ttft_penalty_ms / 1000 * self.peak_prefill_throughput

    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        endpoints, threshold = cycle.endpoints, self.affinity_threshold
        match = prefix_match(cycle, self.prefix_match_info_producer_name)
        if not match.held_by_slot or threshold <= 0 or len(endpoints) == 1:
            return endpoints
        if self.exploration_probability and cycle.services.rng.random() < self.exploration_probability:
            return endpoints
        total, held = match.total, match.held_by_slot
        enough = {blocks for blocks in set(held.values()) if blocks / total >= threshold}
        warm = {slot for slot, blocks in held.items() if blocks in enough} if enough else set()
        kept = [e for e in endpoints if e.slot in warm] if warm else ()
        if not kept or self._waits_too_long(kept, cycle, warm):
            return endpoints
        return kept

    def _waits_too_long(self, kept: Sequence[Endpoint], cycle: Cycle, warm: set[int]) -> bool:
        endpoints = cycle.endpoints
        # Load is never negative, so a warm load within the penalty needs no look at the others.
        penalty = self._penalty_tokens
        if not self.max_ttft_penalty_ms or len(kept) == len(endpoints):
            return False
        if self.ttft_source == "latencyPredictor":
            return self._is_predicted_to_wait(kept, cycle, warm)
        warm_tokens = min([e.load.tokens for e in kept])
        if warm_tokens <= penalty:
            return False
        return warm_tokens - min(e.load.tokens for e in endpoints if e.slot not in warm) > penalty

    def _is_predicted_to_wait(self, kept: Sequence[Endpoint], cycle: Cycle, warm: set[int]) -> bool:
        known = cycle.get(predicted_latency)
        if not known:
            return True
        warm_s = min([known[e.slot].ttft_s for e in kept])
        other_s = min([known[e.slot].ttft_s for e in cycle.endpoints if e.slot not in warm])
        return (warm_s - other_s) * 1000 > self.max_ttft_penalty_ms
