"""concurrency-detector: full by what we have in flight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.types import Endpoint


@register("concurrency-detector")
class ConcurrencyDetector(Plugin):
    """The pool is as full as its requests in flight / (endpoints x ``maxConcurrency``), or the same of
    uncached prompt tokens and ``maxTokenConcurrency``, or (``hybrid``) the larger of both; an empty one is
    full.

    As a filter it drops endpoints that have reached their limit times (1 + ``headroom``).
    """

    concurrency_mode: Literal["requests", "tokens", "hybrid"] = "requests"
    max_concurrency: Annotated[int, Meta(gt=0)] = 100
    max_token_concurrency: Annotated[int, Meta(gt=0)] = 1_000_000
    headroom: Annotated[float, Meta(ge=0)] = 0.0
    in_flight_load_producer_name: str = ""

    producers: ClassVar[Mapping[str, str]] = {"in_flight_load_producer_name": "inflight-load-producer"}

    def __post_init__(self) -> None:
        self._requests = self.concurrency_mode != "tokens"
        self._tokens = self.concurrency_mode != "requests"
        self._max_requests = int(self.max_concurrency * (1 + self.headroom))
        self._max_tokens = int(self.max_token_concurrency * (1 + self.headroom))

    def saturation(self, endpoints: Sequence[Endpoint], now: float) -> float:
        if not endpoints:
            return 1.0
        requests = sum(e.load.requests for e in endpoints) / (len(endpoints) * self.max_concurrency)
        tokens = sum(e.load.tokens for e in endpoints) / (len(endpoints) * self.max_token_concurrency)
        return max(requests if self._requests else 0.0, tokens if self._tokens else 0.0)

    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        kept = cycle.endpoints
        if self._requests:
            kept = [e for e in kept if e.load.requests < self._max_requests]
        if self._tokens:
            kept = [e for e in kept if e.load.tokens < self._max_tokens]
        return kept
