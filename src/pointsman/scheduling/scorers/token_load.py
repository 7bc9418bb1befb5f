"""token-load-scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle

DEFAULT_THRESHOLD_TOKENS = 4_194_304


@register("token-load-scorer")
class TokenLoad(Plugin):
    """Prefer endpoints with few uncached prompt tokens before them, those of this request included: 1 -
    tokens / ``queueThresholdTokens``, at least 0.
    """

    queue_threshold_tokens: int = DEFAULT_THRESHOLD_TOKENS
    in_flight_load_producer_name: str = ""

    producers: ClassVar[Mapping[str, str]] = {"in_flight_load_producer_name": "inflight-load-producer"}

    def __post_init__(self) -> None:
        if self.queue_threshold_tokens <= 0:
            self.queue_threshold_tokens = DEFAULT_THRESHOLD_TOKENS

    def score(self, cycle: Cycle) -> Sequence[float]:
        endpoints, limit = cycle.endpoints, self.queue_threshold_tokens
        match = cycle.match
        own = cycle.request.prompt_tokens
        if match.held_by_slot:
            blocks, total = match.held_by_slot.get, match.total
            tokens = [e.load.tokens + own - own * blocks(e.slot, 0) // total for e in endpoints]
        else:
            tokens = [e.load.tokens + own for e in endpoints]
        return [1.0 - t / limit if t < limit else 0.0 for t in tokens]
