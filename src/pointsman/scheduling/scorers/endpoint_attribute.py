"""endpoint-attribute-scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import msgspec

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle

DEFAULT_PRODUCER = "core-metrics-extractor"


class FixedRange(msgspec.Struct, forbid_unknown_fields=True):
    min: float
    max: float

    def __post_init__(self) -> None:
        if self.min >= self.max:
            raise ValueError("fixedRange: min must be less than max")


class AdaptiveRange(msgspec.Struct, forbid_unknown_fields=True):
    """The least and the greatest value among the endpoints in the race."""


class Normalization(msgspec.Struct, rename="camel", forbid_unknown_fields=True, frozen=True):
    fixed_range: FixedRange | None = None
    adaptive_range: AdaptiveRange | None = None

    def __post_init__(self) -> None:
        if self.fixed_range and self.adaptive_range:
            raise ValueError("normalization: give fixedRange or adaptiveRange, not both")


class Algorithm(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["linear_lower_is_better", "linear_higher_is_better"]
    normalization: Normalization = Normalization()


@register("endpoint-attribute-scorer")
class EndpointAttributeScorer(Plugin):
    """Score by the custom metric ``attributeKey``: its place in the range, from either end; 0 without it."""

    attribute_key: str
    algorithm: Algorithm
    producer: str = DEFAULT_PRODUCER

    producers: ClassVar[Mapping[str, str]] = {"producer": DEFAULT_PRODUCER}

    def __post_init__(self) -> None:
        if not self.attribute_key:
            raise ValueError("attributeKey: must not be empty")

    def score(self, cycle: Cycle) -> Sequence[float]:
        values = [e.metrics.attributes.get(self.attribute_key) for e in cycle.endpoints]
        known = [v for v in values if v is not None]
        fixed = self.algorithm.normalization.fixed_range
        if not known:
            return [0.0] * len(values)
        low, high = (fixed.min, fixed.max) if fixed else (min(known), max(known))
        if low == high:
            return [0.0 if v is None else 1.0 for v in values]
        lower_is_better = self.algorithm.type == "linear_lower_is_better"
        scores = []
        for value in values:
            if value is None:
                scores.append(0.0)
                continue
            place = min(1.0, max(0.0, (value - low) / (high - low)))
            scores.append(1.0 - place if lower_is_better else place)
        return scores
