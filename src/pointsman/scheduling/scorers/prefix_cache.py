"""prefix-cache-scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from msgspec import Meta

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.signals import SENT, prefix_match


@register("prefix-cache-scorer")
class PrefixCache(Plugin):
    """Prefer endpoints that hold the prompt's prefix: w * min(1, matched tokens / scale)^2 + (1 - w) *
    matched blocks / all blocks, with w ``matchLengthWeight`` and scale ``matchLengthScaleTokens``.
    """

    prefix_match_info_producer_name: str = ""
    match_length_weight: Annotated[float, Meta(ge=0, le=1)] = 0.0
    match_length_scale_tokens: Annotated[int, Meta(gt=0)] = 8192

    producers: ClassVar[Mapping[str, str]] = {"prefix_match_info_producer_name": SENT}

    def score(self, cycle: Cycle) -> Sequence[float]:
        match = prefix_match(cycle, self.prefix_match_info_producer_name)
        if not match.held_by_slot:
            return [0.0] * len(cycle.endpoints)
        blocks, total, prompt = match.held_by_slot, match.total, match.prompt_tokens
        # Endpoints hold few different lengths, however many they are.
        value = {n: self._value(n / total, prompt * n // total) for n in {0, *blocks.values()}}
        get = blocks.get
        return [value[get(e.slot, 0)] for e in cycle.endpoints]

    def _value(self, share: float, tokens: int) -> float:
        weight = self.match_length_weight
        return weight * min(1.0, tokens / self.match_length_scale_tokens) ** 2 + (1.0 - weight) * share
