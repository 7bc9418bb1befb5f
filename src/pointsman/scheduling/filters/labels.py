"""label-selector-filter: the Kubernetes label selector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.types import Endpoint


class MatchExpression(msgspec.Struct, forbid_unknown_fields=True):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: Sequence[str] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        if self.operator == "In":
            return value is not None and value in self.values
        if self.operator == "NotIn":
            return value not in self.values
        return (value is not None) == (self.operator == "Exists")


@register("label-selector-filter", "by-label-selector")
class LabelSelector(Plugin):
    """Keep endpoints whose labels match every pair of ``matchLabels`` and every expression."""

    match_labels: Mapping[str, str] = {}
    match_expressions: Sequence[MatchExpression] = ()

    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        return [e for e in cycle.endpoints if self._matches(e.labels)]

    def _matches(self, labels: Mapping[str, str]) -> bool:
        return all(labels.get(k) == v for k, v in self.match_labels.items()) and all(
            expression.matches(labels) for expression in self.match_expressions
        )
