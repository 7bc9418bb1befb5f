"""endpoint-attribute-filter."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import msgspec

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.types import Endpoint

OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "LessThan": operator.lt,
    "LessThanOrEqual": operator.le,
    "GreaterThan": operator.gt,
    "GreaterThanOrEqual": operator.ge,
    "Equal": operator.eq,
    "NotEqual": operator.ne,
}
DEFAULT_PRODUCER = "core-metrics-extractor"


class Threshold(msgspec.Struct, forbid_unknown_fields=True):
    operator: Literal["LessThan", "LessThanOrEqual", "GreaterThan", "GreaterThanOrEqual", "Equal", "NotEqual"]
    value: float


class Algorithm(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["threshold"]
    threshold: Threshold


@register("endpoint-attribute-filter")
class EndpointAttributeFilter(Plugin):
    """Keep endpoints whose custom metric ``attribute`` compares with the threshold as asked.

    ``onMissing`` says what becomes of an endpoint without it; with ``fallbackOnEmpty`` all stay when none
    would.
    """

    attribute: str
    algorithm: Algorithm
    producer: str = DEFAULT_PRODUCER
    on_missing: Literal["Pass", "Fail"] = "Pass"
    fallback_on_empty: bool = False

    producers: ClassVar[Mapping[str, str]] = {"producer": DEFAULT_PRODUCER}

    def __post_init__(self) -> None:
        if not self.attribute:
            raise ValueError("attribute: must not be empty")
        self._compare = OPERATORS[self.algorithm.threshold.operator]

    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        kept = [e for e in cycle.endpoints if self._keeps(e.metrics.attributes.get(self.attribute))]
        return cycle.endpoints if self.fallback_on_empty and not kept else kept

    def _keeps(self, value: float | None) -> bool:
        if value is None:
            return self.on_missing == "Pass"
        return self._compare(value, self.algorithm.threshold.value)
