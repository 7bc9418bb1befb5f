"""label-selector-filter, the Kubernetes label selector; and by-label, an older form of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import msgspec

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.types import Endpoint


class MatchExpression(msgspec.Struct, forbid_unknown_fields=True):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: Sequence[str] = ()

    def __post_init__(self) -> None:
        if (self.operator in ("In", "NotIn")) != bool(self.values):
            raise ValueError(f"values: {self.operator} takes {'none' if self.values else 'at least one'}")

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


@register("by-label")
class ByLabel(Plugin):
    """Keep endpoints whose ``label`` has one of ``validValues``; use label-selector-filter instead."""

    label: str
    valid_values: Sequence[str] = ()
    allows_no_label: bool = False

    replaced_by: ClassVar[str] = "label-selector-filter"

    def __post_init__(self) -> None:
        if not self.label:
            raise ValueError("label: must not be empty")
        if not self.valid_values and not self.allows_no_label:
            raise ValueError("validValues: must not be empty unless allowsNoLabel is true")

    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        label, valid, bare = self.label, self.valid_values, self.allows_no_label
        return [e for e in cycle.endpoints if (e.labels[label] in valid if label in e.labels else bare)]
