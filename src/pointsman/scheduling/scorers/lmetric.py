"""lmetric-scorer."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.costs import scores_of
from pointsman.scheduling.cycle import Cycle

TIE = 1e-9
"""Requests counted where there are none, so that of idle endpoints the one with less to prefill is better."""


@register("lmetric-scorer")
class LMetric(Plugin):
    """LMetric (arXiv 2603.15202): least prefill tokens * batch size, that is (uncached prompt tokens in
    flight there + this request's) * requests in flight there. Nothing to tune: a factor on either changes
    no order.
    """

    def score(self, cycle: Cycle) -> Sequence[float]:
        own = cycle.request.prompt_tokens
        match = cycle.match
        held, total = match.held_by_slot.get, match.total or 1
        return scores_of(
            [
                (load.tokens + own - own * held(slot, 0) // total) * (load.requests + TIE)
                for slot, load in [(e.slot, e.load) for e in cycle.endpoints]
            ]
        )
