"""Power draw from a page of metrics: an exporter's, or the engine's own."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.endpoints.metrics.mapping import EngineMetrics, PageReader

KNOWN = ("DCGM_FI_DEV_POWER_USAGE", "gpu_package_power", "gpu_average_package_power", "habanalabs_power_mW")
"""Power of a card in watts, as NVIDIA's dcgm-exporter (default-counters.csv), AMD's device-metrics-exporter
(MI3xx, MI2xx; some versions write ``amd_`` before the name) and Intel's Gaudi metric exporter (in
milliwatts) call it.
"""
MILLIWATTS = "_mW"


class PowerReader:
    """Reads one endpoint's pages. Several metrics, and all their lines, are added up: an endpoint may have
    several cards.
    """

    def __init__(self, metrics: Sequence[str]) -> None:
        """``metrics`` in llm-d's notation; empty: the first of those we know that the page has."""
        self._any = not metrics
        names = metrics or [name for known in KNOWN for name in (known, f"amd_{known}")]
        empty = EngineMetrics(
            engine="", recognise="", waiting="", running="", attributes={name: name for name in names}
        )
        self._reader = PageReader(empty)

    def read(self, page: bytes) -> float | None:
        """Watts; None where the page does not tell."""
        values, _ = self._reader.read(page, 0.0)
        found = [
            watts * (1e-3 if name.partition("{")[0].endswith(MILLIWATTS) else 1.0)
            for name, watts in values.attributes.items()
        ]
        if not found:
            return None
        return found[0] if self._any else sum(found)
