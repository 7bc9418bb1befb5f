"""context-length-aware: endpoints that say by a label which prompt lengths they are for."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.types import Endpoint

NEUTRAL = 0.5
FALLBACK = 0.3
"""Scores below it are out of range, above it in range, so that a fallback never wins against a match."""


def parse_range(text: str) -> tuple[int, int] | None:
    """Bounds of ``min-max``, both included; None when the label says something else."""
    low, dash, high = text.partition("-")
    low, high = low.strip(), high.strip()
    if not (dash and low.isdecimal() and high.isdecimal()) or int(low) > int(high):
        return None
    return int(low), int(high)


def range_score(length: int, low: int, high: int) -> float:
    """How well a range suits: inside, the narrower and the more room above the better; outside, the nearer
    the better."""
    if length > high or length < low:
        distance = length - high if length > high else low - length
        return FALLBACK / (1 + distance / 1000)
    width = high - low
    if not width:
        return 1.0
    fit = 0.7 / (1 + width / 10_000) + 0.3 * (high - length) / width
    return FALLBACK + fit * (1 - FALLBACK)


@register("context-length-aware")
class ContextLengthAware(Plugin):
    """Prefer endpoints whose ``label`` ("min-max" tokens) covers the prompt: in range (0.3, 1], out of range
    below 0.3, without the label 0.5, unreadable 0. With ``enableFiltering`` only those in range and those
    without the label stay."""

    label: str = "llm-d.ai/context-length-range"
    enable_filtering: bool = False

    def __post_init__(self) -> None:
        if not self.label:
            raise ValueError("label: must not be empty")

    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        if not self.enable_filtering:
            return cycle.endpoints
        length = cycle.request.prompt_tokens
        return [e for e in cycle.endpoints if self._takes(e, length)]

    def _takes(self, endpoint: Endpoint, length: int) -> bool:
        text = endpoint.labels.get(self.label)
        if text is None:
            return True
        bounds = parse_range(text)
        return bounds is not None and bounds[0] <= length <= bounds[1]

    def score(self, cycle: Cycle) -> Sequence[float]:
        length = cycle.request.prompt_tokens
        return [self._score(e.labels.get(self.label), length) for e in cycle.endpoints]

    def _score(self, text: str | None, length: int) -> float:
        if text is None:
            return NEUTRAL
        bounds = parse_range(text)
        return range_score(length, *bounds) if bounds else 0.0
