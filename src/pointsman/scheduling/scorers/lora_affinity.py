"""lora-affinity-scorer."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.types import Metrics


@register("lora-affinity-scorer")
class LoraAffinity(Plugin):
    """Prefer endpoints with the request's adapter: 1 when active, 0.8 when there is room for one more, 0.6
    when it waits to be loaded, else 0.
    """

    def score(self, cycle: Cycle) -> Sequence[float]:
        model = cycle.request.model
        return [_score(e.metrics, model) for e in cycle.endpoints]


def _score(metrics: Metrics, model: str) -> float:
    if model in metrics.loras_active:
        return 1.0
    if len(metrics.loras_active) + len(metrics.loras_waiting) < metrics.max_loras:
        return 0.8
    return 0.6 if model in metrics.loras_waiting else 0.0
