"""no-hit-lru-scorer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from msgspec import Meta

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.signals import SENT, prefix_match
from pointsman.types import Decision

NEUTRAL = 0.5


@register("no-hit-lru-scorer")
class NoHitLRU(Plugin):
    """Spread cold requests: the endpoint that got one longest ago (or never) scores 1, the latest 0.

    A request that some endpoint holds a prefix of scores 0.5 everywhere.
    """

    lru_size: Annotated[int, Meta(gt=0)] = 1024
    prefix_match_info_producer_name: str = ""
    prefix_plugin_type: str = ""
    prefix_plugin_name: str = ""

    producers: ClassVar[Mapping[str, str]] = {"prefix_match_info_producer_name": SENT}
    outdated: ClassVar[Mapping[str, str]] = {
        "prefix_plugin_type": "it never had an effect; leave it out",
        "prefix_plugin_name": "it never had an effect; leave it out",
    }

    def __post_init__(self) -> None:
        self._used: OrderedDict[str, None] = OrderedDict()

    def score(self, cycle: Cycle) -> Sequence[float]:
        endpoints = cycle.endpoints
        if not self._cold(cycle):
            return [NEUTRAL] * len(endpoints)
        if len(endpoints) == 1:
            return [1.0]
        age = {name: i for i, name in enumerate(self._used)}
        fresh = sum(e.name not in age for e in endpoints)
        last = len(endpoints) - 1
        scores, seen = [], 0
        for endpoint in endpoints:
            rank = age.get(endpoint.name)
            if rank is None:
                scores.append(1.0 - seen / last)
                seen += 1
            else:
                scores.append(max(0.0, 1.0 - (fresh + rank) / last))
        return scores

    def on_dispatch(self, cycle: Cycle, decision: Decision) -> None:
        if self._cold(cycle):
            self._used[decision.chosen.name] = None
            self._used.move_to_end(decision.chosen.name)
            if len(self._used) > self.lru_size:
                self._used.popitem(last=False)

    def _cold(self, cycle: Cycle) -> bool:
        found = prefix_match(cycle, self.prefix_match_info_producer_name).held_by_slot
        return not found or not any(e.slot in found for e in cycle.endpoints)
