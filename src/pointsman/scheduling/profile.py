"""Filters, weighted scorers and a picker, run in that order over one cycle. Recording happens here, once,
for all.
"""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.errors import Saturated
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.interfaces import Filter, Picker, Scorer
from pointsman.types import Decision


class Profile:
    """``filters`` and ``scorers`` carry the name they were configured under; scorers their weight, too."""

    def __init__(
        self,
        name: str,
        filters: Sequence[tuple[str, Filter]],
        scorers: Sequence[tuple[str, float, Scorer]],
        picker: Picker,
    ) -> None:
        self.name = name
        self.filters = tuple(filters)
        self.scorers = tuple(scorers)
        self.picker = picker
        self.weights = {name: weight for name, weight, _ in scorers}

    def run(self, cycle: Cycle) -> Decision:
        """Choose an endpoint. ``Saturated`` when the filters leave none (429, as llm-d answers)."""
        kept = {}
        for name, filter_ in self.filters:
            before = cycle.endpoints
            after = filter_.filter(cycle)
            if after is not before and len(after) != len(before):
                cycle.endpoints = kept[name] = after
                if not after:
                    raise Saturated(f"no endpoint may take this request now: {name} removed the last one")
        endpoints = cycle.endpoints
        scores = {}
        total: Sequence[float] = ()
        for name, weight, scorer in self.scorers:
            scores[name] = row = scorer.score(cycle)
            if not total:
                total = row if weight == 1.0 else [weight * s for s in row]
            else:
                total = [t + weight * s for t, s in zip(total, row, strict=True)]
        picked = self.picker.pick(cycle, total or [0.0] * len(endpoints))
        match = cycle.match
        request = cycle.request
        chosen = picked[0]
        slot, by_events = chosen.slot, False
        matched = sent = match.tokens(slot)
        if match.told is not None:
            matched, sent, by_events = (
                match.cached_tokens(slot),
                match.sent_tokens(slot),
                match.by_events(slot),
            )
        return Decision(
            request.id,
            request.model,
            cycle.services.clock(),
            self.name,
            cycle.candidates,
            chosen,
            tuple(picked[1:]) if len(picked) > 1 else (),
            kept,
            scores,
            self.weights,
            endpoints,
            matched,
            request.prompt_tokens,
            by_events,
            request.untokenized,
            sent,
        )
