"""latency-scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from pointsman.predictor.latency import Latency
from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.signals import SENT, predicted_latency, prefix_match

PRODUCER = "predicted-latency-producer"
LEAST_SCORE = 0.01
"""Of those that are scored at all: the worst may be drawn, too."""
EPSILON_S = 1e-12

Weight = Annotated[float, Meta(ge=0)]


@register("latency-scorer")
class LatencyScorer(Plugin):
    """Prefer endpoints by predicted TTFT and TPOT, each brought to 0..1 over those that are scored and
    weighted by ``ttftWeight`` and ``tpotWeight``.

    Headroom is what the SLO headers promise less what is predicted. Endpoints with headroom in both are
    scored, the others get 0: ``headroomSelectionStrategy`` ``least`` fills those up that are nearest to the
    promise, ``most`` prefers those farthest from it. When there are none, idle endpoints are scored, else
    those that miss only the TPOT, else only the TTFT, else all, and the least miss is best. So without an
    SLO the shortest times are. Without predictions (``predictInProduce: false``) the score is a mean of
    free KV cache, short queue and cached prefix, weighted by ``compositeKVWeight``,
    ``compositeQueueWeight`` and ``compositePrefixWeight``.
    """

    ttft_weight: Weight = 0.8
    tpot_weight: Weight = 0.2
    headroom_selection_strategy: Literal["least", "most"] = "least"
    composite_kv_weight: Weight = msgspec.field(default=1.0, name="compositeKVWeight")
    composite_queue_weight: Weight = 1.0
    composite_prefix_weight: Weight = 1.0
    latency_prediction_info_producer_name: str = ""
    prefix_match_info_producer_name: str = ""

    producers: ClassVar[Mapping[str, str]] = {
        "latency_prediction_info_producer_name": PRODUCER,
        "prefix_match_info_producer_name": SENT,
    }
    needs: ClassVar[tuple[str, ...]] = (PRODUCER,)

    def score(self, cycle: Cycle) -> Sequence[float]:
        known = cycle.get(predicted_latency)
        if not known:
            return self._composite(cycle)
        endpoints = cycle.endpoints
        rows = [known[e.slot] for e in endpoints]
        scores = [0.0] * len(rows)
        best = [i for i, row in enumerate(rows) if row.ttft_headroom_s >= 0 and row.tpot_headroom_s >= 0]
        if best:
            self._rate(rows, best, scores, self.headroom_selection_strategy == "most")
        else:
            idle = [i for i, e in enumerate(endpoints) if not e.load.requests]
            self._rate(rows, idle or _mildest(rows), scores, False)
        return scores

    def _rate(self, rows: Sequence[Latency], which: Sequence[int], scores: list[float], most: bool) -> None:
        """Fill in the scores of ``which``."""
        ttft = _spread([abs(rows[i].ttft_headroom_s) for i in which])
        tpot = _spread([abs(rows[i].tpot_headroom_s) for i in which])
        ttft_weight, tpot_weight = self._weights(ttft is not None, tpot is not None)
        middle = [0.5] * len(which)
        for i, first, after in zip(which, ttft or middle, tpot or middle, strict=True):
            far = ttft_weight * first + tpot_weight * after
            scores[i] = LEAST_SCORE + (1 - LEAST_SCORE) * (far if most else 1 - far)

    def _weights(self, by_ttft: bool, by_tpot: bool) -> tuple[float, float]:
        """That add up to 1. What is equal everywhere does not count where the other differs."""
        if by_ttft != by_tpot:
            return float(by_ttft), float(by_tpot)
        total = self.ttft_weight + self.tpot_weight
        return (self.ttft_weight / total, self.tpot_weight / total) if total else (1.0, 0.0)

    def _composite(self, cycle: Cycle) -> Sequence[float]:
        kv, queue, prefix = (
            self.composite_kv_weight,
            self.composite_queue_weight,
            self.composite_prefix_weight,
        )
        total = kv + queue + prefix
        if not total:
            kv = total = 1.0
        longest = max(e.metrics.waiting for e in cycle.endpoints)
        match = prefix_match(cycle, self.prefix_match_info_producer_name)
        scores = []
        for endpoint in cycle.endpoints:
            metrics = endpoint.metrics
            short = 1.0 - metrics.waiting / longest if longest else 1.0
            free = min(1.0, max(0.0, 1.0 - metrics.kv_usage))
            scores.append((kv * free + queue * short + prefix * match.ratio(endpoint.slot)) / total)
        return scores


def _mildest(rows: Sequence[Latency]) -> Sequence[int]:
    """Those that break the least of the promise: only the TPOT, else only the TTFT, else both."""
    only_tpot = [i for i, row in enumerate(rows) if row.ttft_headroom_s >= 0]
    only_ttft = [i for i, row in enumerate(rows) if row.tpot_headroom_s >= 0]
    return only_tpot or only_ttft or range(len(rows))


def _spread(values: Sequence[float]) -> Sequence[float] | None:
    """0 for the least, 1 for the greatest; None when all are the same."""
    least = min(values)
    span = max(values) - least
    return [(value - least) / span for value in values] if span > EPSILON_S else None
