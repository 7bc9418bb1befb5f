"""prefix-cache-scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from msgspec import Meta

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.signals import prefix_match


@register("prefix-cache-scorer")
class PrefixCache(Plugin):
    """Prefer endpoints that hold the prompt's prefix: w * min(1, matched tokens / scale)^2 + (1 - w) *
    matched blocks / all blocks, with w ``matchLengthWeight`` and scale ``matchLengthScaleTokens``.
    """

    prefix_match_info_producer_name: str = ""
    match_length_weight: Annotated[float, Meta(ge=0, le=1)] = 0.0
    match_length_scale_tokens: Annotated[int, Meta(gt=0)] = 8192

    producers: ClassVar[Mapping[str, str]] = {
        "prefix_match_info_producer_name": "approx-prefix-cache-producer"
    }

    def score(self, cycle: Cycle) -> Sequence[float]:
        match = cycle.get(prefix_match)
        if not match.blocks_by_slot:
            return [0.0] * len(cycle.endpoints)
        weight, scale = self.match_length_weight, self.match_length_scale_tokens
        value = {
            slot: weight * min(1.0, match.tokens(slot) / scale) ** 2 + (1.0 - weight) * match.ratio(slot)
            for slot in match.blocks_by_slot
        }
        get = value.get
        return [get(e.slot, 0.0) for e in cycle.endpoints]
