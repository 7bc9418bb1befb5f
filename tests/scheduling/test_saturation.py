"""How full a pool is, and which endpoints a detector keeps as a filter (facts 3.7 and 7)."""

from __future__ import annotations

from typing import Any

import pytest

from pointsman.errors import SettingsError
from pointsman.registry import build
from pointsman.testing import cycle, fleet, services

NOW = 100.0
FRESH = 99.9


def detector(name: str, **parameters: Any) -> Any:
    return build(name, parameters, "test")


def keep(plugin: Any, pool: Any) -> list[str]:
    return [e.name for e in plugin.filter(cycle(pool, given=services(clock=lambda: NOW)))]


def test_utilization_is_the_mean_of_the_fuller_resource() -> None:
    pool = fleet(waiting=[5, 0, 1], kv_usage=[0.1, 0.4, 0.8], at_s=[FRESH] * 3)
    plugin = detector("utilization-detector")
    assert plugin.saturation(pool, NOW) == pytest.approx((1.0 + 0.5 + 1.0) / 3)
    wider = detector("utilization-detector", queueDepthThreshold=10, kvCacheUtilThreshold=0.4)
    assert wider.saturation(pool, NOW) == pytest.approx((0.5 + 1.0 + 2.0) / 3)


def test_missing_and_stale_metrics_count_as_full_or_not_at_all() -> None:
    pool = fleet(waiting=[0, 0, 1], at_s=[0.0, 99.0, FRESH], requests=[0, 3, 0])
    assert detector("utilization-detector").saturation(pool, NOW) == pytest.approx((1 + 1 + 0.2) / 3)
    ignoring = detector("utilization-detector", stalenessPolicy="ignore")
    assert ignoring.saturation(pool, NOW) == pytest.approx(0.2)
    assert ignoring.saturation(pool[:2], NOW) == 0.0
    patient = detector("utilization-detector", metricsStalenessThreshold="2s")
    assert patient.saturation(pool[1:], NOW) == pytest.approx(0.1)


def test_old_metrics_of_an_endpoint_that_is_left_alone_are_believed() -> None:
    pool = fleet(waiting=[0, 0], at_s=[10.0, 10.0], requests=[0, 0])
    assert detector("utilization-detector").saturation(pool, NOW) == 0.0


def test_utilization_filter_role() -> None:
    pool = fleet(
        waiting=[4, 5, 0, 0, 0],
        kv_usage=[0.7, 0.1, 0.8, 0.1, 0.1],
        at_s=[FRESH, FRESH, FRESH, 0.0, 99.0],
        requests=[0, 0, 0, 0, 1],
    )
    assert keep(detector("utilization-detector"), pool) == ["e0"]
    assert keep(detector("utilization-detector", headroom=0.2), pool) == ["e0", "e1", "e2"]
    assert keep(detector("utilization-detector"), pool[1:]) == ["e1", "e2", "e3", "e4"]


@pytest.mark.parametrize(
    ("mode", "want", "kept"),
    [
        ("requests", (10 + 2) / 20, ["e1"]),
        ("tokens", (100 + 900) / 2000, ["e0", "e1"]),
        ("hybrid", 0.6, ["e1"]),
    ],
)
def test_concurrency(mode: str, want: float, kept: list[str]) -> None:
    pool = fleet(requests=[10, 2], tokens=[100, 900])
    plugin = detector(
        "concurrency-detector", concurrencyMode=mode, maxConcurrency=10, maxTokenConcurrency=1000
    )
    assert plugin.saturation(pool, NOW) == pytest.approx(want)
    assert keep(plugin, pool) == kept


def test_concurrency_headroom_lets_single_endpoints_burst() -> None:
    pool = fleet(requests=[11, 12])
    assert keep(detector("concurrency-detector", maxConcurrency=10, headroom=0.2), pool) == ["e0"]
    assert keep(detector("concurrency-detector", maxConcurrency=10), pool) == []


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("utilization-detector", {"queueDepthThreshold": 0}),
        ("utilization-detector", {"kvCacheUtilThreshold": 1.1}),
        ("utilization-detector", {"metricsStalenessThreshold": "0s"}),
        ("utilization-detector", {"metricsStalenessThreshold": "soon"}),
        ("concurrency-detector", {"maxConcurrency": 0}),
        ("concurrency-detector", {"concurrencyMode": "both"}),
    ],
)
def test_refuses(name: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=f"test: {name}: "):
        build(name, parameters, "test")
