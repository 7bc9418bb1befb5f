"""Facts about a cycle that several plugins need. Each is computed at most once, by ``cycle.get(signal)``."""

from __future__ import annotations

from collections.abc import Mapping

from pointsman.predictor.latency import Latency
from pointsman.prefix.approximate import PrefixMatch
from pointsman.scheduling.cycle import Cycle

SENT = "approx-prefix-cache-producer"
"""The producer whose matches go by what was sent alone."""


def prefix_match(cycle: Cycle, producer: str) -> PrefixMatch:
    """What each candidate holds of the prompts, by the producer that a plugin names."""
    match = cycle.match
    return match.sent or match if producer == SENT else match


def predicted_latency(cycle: Cycle) -> Mapping[int, Latency]:
    """What each candidate is expected to do with this request, by slot; empty where nobody predicts."""
    return cycle.services.latency(cycle)


def media_items(cycle: Cycle) -> tuple[tuple[str, int], ...]:
    """The request's media parts, each content once, with its size in tokens (1 where that is unknown)."""
    return tuple({content: tokens or 1 for content, tokens in cycle.request.media}.items())
