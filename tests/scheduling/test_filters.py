"""What each filter keeps (facts 3.1)."""

from __future__ import annotations

from typing import Any

import pytest

from pointsman.errors import SettingsError
from pointsman.registry import build
from pointsman.scheduling.cycle import Cycle
from pointsman.testing import cycle, fleet, request, services
from pointsman.types import ROLE_LABEL

BLOCK = 4 * 64 * 4
"""The index's first block, in bytes; multiples of it end on later blocks, too."""
PEAK = 15928


def keep(name: str, asked: Cycle, **parameters: Any) -> list[str]:
    return [e.name for e in build(name, parameters, "test").filter(asked)]  # type: ignore[attr-defined]


LABELS = [{"gpu": "h100", "zone": "a"}, {"gpu": "l4"}, {}]


@pytest.mark.parametrize(
    ("expression", "want"),
    [
        ({"operator": "In", "values": ["h100", "h200"]}, ["e0"]),
        ({"operator": "NotIn", "values": ["h100"]}, ["e1", "e2"]),
        ({"operator": "Exists"}, ["e0", "e1"]),
        ({"operator": "DoesNotExist"}, ["e2"]),
    ],
)
def test_label_selector_expressions(expression: dict[str, Any], want: list[str]) -> None:
    asked = cycle(fleet(labels=LABELS))
    assert keep("label-selector-filter", asked, matchExpressions=[{"key": "gpu", **expression}]) == want


def test_label_selector_wants_everything_to_match() -> None:
    asked = cycle(fleet(labels=LABELS))
    exists = [{"key": "zone", "operator": "Exists"}]
    assert keep("label-selector-filter", asked) == ["e0", "e1", "e2"]
    assert keep("label-selector-filter", asked, matchLabels={"gpu": "h100"}, matchExpressions=exists) == [
        "e0"
    ]
    assert keep("label-selector-filter", asked, matchLabels={"gpu": "l4"}, matchExpressions=exists) == []


@pytest.mark.parametrize(
    "expression", [{"operator": "In"}, {"operator": "Exists", "values": ["a"]}, {"operator": "Is"}]
)
def test_label_selector_refuses(expression: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="label-selector-filter"):
        build("label-selector-filter", {"matchExpressions": [{"key": "gpu", **expression}]}, "test")


def test_by_label() -> None:
    asked = cycle(fleet(labels=LABELS))
    assert keep("by-label", asked, label="gpu", validValues=["l4"]) == ["e1"]
    assert keep("by-label", asked, label="gpu", validValues=["l4"], allowsNoLabel=True) == ["e1", "e2"]


def test_role_filters() -> None:
    roles = [
        "encode",
        "prefill",
        "decode",
        "encode-prefill",
        "prefill-decode",
        "encode-prefill-decode",
        "both",
    ]
    pool = fleet(name=[*roles, "none"], labels=[*({ROLE_LABEL: r} for r in roles), {}])
    asked = cycle(pool)
    assert keep("encode-filter", asked) == ["encode", "encode-prefill", "encode-prefill-decode"]
    assert keep("prefill-filter", asked) == [
        "prefill",
        "encode-prefill",
        "prefill-decode",
        "encode-prefill-decode",
        "both",
    ]
    assert keep("decode-filter", asked) == [
        "decode",
        "prefill-decode",
        "encode-prefill-decode",
        "both",
        "none",
    ]


def holding(blocks: list[int], total: int = 10, **columns: Any) -> Cycle:
    """Endpoint i holds the first ``blocks[i]`` of the request's ``total`` blocks."""
    given, text = services(block_tokens=64), "x" * BLOCK * total
    made = cycle(fleet(len(blocks), **columns), text, given=given)
    for slot, n in enumerate(blocks):
        given.prefix.insert(slot, given.prefix.match(request(text[: n * BLOCK])).chains)
    made.match = given.prefix.match(made.request)
    return made


AFFINITY = "prefix-cache-affinity-filter"


def test_affinity_keeps_the_endpoints_that_hold_enough() -> None:
    assert keep(AFFINITY, holding([8, 7, 10, 0])) == ["e0", "e2"]
    assert keep(AFFINITY, holding([8, 7, 10, 0]), affinityThreshold=0.7) == ["e0", "e1", "e2"]


def test_affinity_keeps_all_when_none_holds_enough() -> None:
    assert keep(AFFINITY, holding([7, 0, 3])) == ["e0", "e1", "e2"]
    assert keep(AFFINITY, holding([0, 0])) == ["e0", "e1"]
    assert keep(AFFINITY, holding([10, 0]), affinityThreshold=0) == ["e0", "e1"]


def test_affinity_breaks_when_waiting_for_the_warm_costs_more_than_the_penalty() -> None:
    most = PEAK * 18  # tokens in flight that take 18 s
    assert keep(AFFINITY, holding([10, 0, 0], tokens=[most, 0, 5])) == ["e0"]
    assert keep(AFFINITY, holding([10, 0, 0], tokens=[most + 1, 0, 5])) == ["e0", "e1", "e2"]
    # The best of each side count.
    assert keep(AFFINITY, holding([10, 10, 0], tokens=[10**9, most, 0])) == ["e0", "e1"]
    assert keep(AFFINITY, holding([10, 0, 0], tokens=[10**7, 10**7, 10**7])) == ["e0"]


def test_affinity_penalty_and_throughput_are_parameters() -> None:
    asked = holding([10, 0], tokens=[3001, 1000])
    assert keep(AFFINITY, asked, maxTTFTPenaltyMs=2000, peakPrefillThroughput=1000) == ["e0", "e1"]
    assert keep(AFFINITY, asked, maxTTFTPenaltyMs=2001, peakPrefillThroughput=1000) == ["e0"]
    assert keep(AFFINITY, asked, maxTTFTPenaltyMs=0, peakPrefillThroughput=0) == ["e0"]


def test_affinity_explores_as_often_as_asked() -> None:
    plugin: Any = build(AFFINITY, {"explorationProbability": 0.25}, "test")
    asked = holding([10, 0])
    explored = sum(len(plugin.filter(asked)) == 2 for _ in range(2000))
    assert 400 < explored < 600


@pytest.mark.parametrize(
    ("operator", "want"),
    [
        ("LessThan", ["e0", "e3"]),
        ("LessThanOrEqual", ["e0", "e1", "e3"]),
        ("GreaterThan", ["e2", "e3"]),
        ("GreaterThanOrEqual", ["e1", "e2", "e3"]),
        ("Equal", ["e1", "e3"]),
        ("NotEqual", ["e0", "e2", "e3"]),
    ],
)
def test_endpoint_attribute_filter(operator: str, want: list[str]) -> None:
    asked = cycle(fleet(attributes=[{"q": 1.0}, {"q": 5.0}, {"q": 9.0}, {}]))
    algorithm = {"type": "threshold", "threshold": {"operator": operator, "value": 5}}
    assert keep("endpoint-attribute-filter", asked, attribute="q", algorithm=algorithm) == want
    failing = keep("endpoint-attribute-filter", asked, attribute="q", algorithm=algorithm, onMissing="Fail")
    assert failing == [name for name in want if name != "e3"]


def test_endpoint_attribute_filter_may_fall_back_on_all() -> None:
    asked = cycle(fleet(attributes=[{"q": 9.0}, {"q": 9.0}]))
    algorithm = {"type": "threshold", "threshold": {"operator": "LessThan", "value": 5}}
    parameters = {"attribute": "q", "algorithm": algorithm}
    assert keep("endpoint-attribute-filter", asked, **parameters) == []
    assert keep("endpoint-attribute-filter", asked, **parameters, fallbackOnEmpty=True) == ["e0", "e1"]


HOST, ZONE = "kubernetes.io/hostname", "topology.kubernetes.io/zone"


def test_topology_affinity_filter() -> None:
    asked = cycle(fleet(labels=[{HOST: "h", ZONE: "z"}, {HOST: "i", ZONE: "z"}, {HOST: "j", ZONE: "y"}, {}]))
    assert keep("topology-affinity-filter", asked) == ["e0", "e1", "e2", "e3"]
    asked.peer = fleet(labels=[{HOST: "h", ZONE: "z"}])[0]
    assert keep("topology-affinity-filter", asked) == ["e0"]
    assert keep("topology-affinity-filter", asked, minAffinity="zone") == ["e0", "e1"]
    asked.peer = fleet(labels=[{HOST: "far"}])[0]
    assert keep("topology-affinity-filter", asked) == ["e0", "e1", "e2", "e3"]
    asked.peer = fleet(labels=[{}])[0]
    assert keep("topology-affinity-filter", asked, minAffinity="region") == ["e0", "e1", "e2", "e3"]


@pytest.mark.parametrize(
    ("metric", "cap", "want"),
    [
        ("active-requests", 2, ["e0", "e1"]),
        ("running-requests", 30, ["e0", "e1", "e2"]),
        ("waiting-queue", 1, ["e0"]),
        ("kv-cache-utilization", 0.5, ["e0", "e1"]),
    ],
)
def test_utilization_filter(metric: str, cap: float, want: list[str]) -> None:
    pool = fleet(requests=[1, 2, 3], running=[10, 20, 30], waiting=[1, 2, 3], kv_usage=[0.1, 0.5, 0.9])
    assert keep("utilization-filter", cycle(pool), conditions=[{"metric": metric, "maxValue": cap}]) == want


def test_utilization_filter_drops_what_exceeds_any_cap() -> None:
    pool = fleet(waiting=[1, 9, 1], kv_usage=[0.1, 0.1, 0.9])
    caps = [
        {"metric": "waiting-queue", "maxValue": 5},
        {"metric": "kv-cache-utilization", "maxValue": 0.8},
    ]
    assert keep("utilization-filter", cycle(pool), conditions=caps) == ["e0"]
    tight = [{"metric": "waiting-queue", "maxValue": 0}]
    assert keep("utilization-filter", cycle(pool), conditions=tight) == []
    assert keep("utilization-filter", cycle(pool), conditions=tight, fallbackOnEmpty=True) == [
        "e0",
        "e1",
        "e2",
    ]


def test_context_length_aware_filters_only_when_asked() -> None:
    labels = [{"tokens": r} for r in ("0-99", "100-200", "?")] + [{}]
    asked = cycle(fleet(labels=labels), "x" * 400)
    assert keep("context-length-aware", asked, label="tokens") == ["e0", "e1", "e2", "e3"]
    assert keep("context-length-aware", asked, label="tokens", enableFiltering=True) == ["e1", "e3"]
