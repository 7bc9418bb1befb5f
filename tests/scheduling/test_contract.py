"""What every plugin of the registry owes, whatever it is for: laws over arbitrary fleets."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from pointsman.registry import Plugin, build, own_name, plugins
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.interfaces import Filter, Picker, Preparing, SaturationDetector, Scorer
from pointsman.testing import request, services
from pointsman.types import ROLE_LABEL, Decision, Endpoint, Load, Metrics

MODELS = ("m", "lora-a", "lora-b")
LABELS = {
    ROLE_LABEL: ("decode", "prefill", "both", "encode", "other"),
    "zone": ("a", "b"),
    "kubernetes.io/hostname": ("h1", "h2", ""),
    "topology.kubernetes.io/zone": ("z1", "z2"),
    "llm-d.ai/context-length-range": ("0-100", "50-4000", "4000-8000", "7-7", "9-1", "nonsense", ""),
}
HEADERS = {
    "x-session-id": ("s1", "s2"),
    "x-session-token": ("ZGVmYXVsdC9lMQ==", "e1", "%%%", ""),
    "x-zone": ("a", "c"),
    "x-llm-d-slo-ttft-ms": ("1", "200", "1e9", "soon"),
    "x-llm-d-slo-tpot-ms": ("11", "1e9"),
}
COUNTS = (0, 0, 1, 3, 4.5, 5, 100, 10**6, 1e9)
SHARES = (-0.5, 0.0, 1e-9, 0.3, 0.799, 0.8, 1.0, 1.5)
BLOCK = "x" * 1024


def any_of(rng: random.Random, options: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Some of the keys, each with one of its values."""
    return {key: rng.choice(values) for key, values in options.items() if rng.random() < 0.6}


def any_metrics(rng: random.Random) -> Metrics:
    return Metrics(
        at_s=rng.choice((0.0, 10.0, 99.9, 100.0)),
        waiting=rng.choice(COUNTS),
        running=rng.choice(COUNTS),
        kv_usage=rng.choice((*SHARES, rng.random())),
        loras_active=frozenset(rng.sample(MODELS, rng.randrange(4))),
        loras_waiting=frozenset(rng.sample(MODELS, rng.randrange(4))),
        max_loras=rng.randrange(6),
        attributes={"depth": rng.choice((-1e9, -3.5, 0.0, 4.9, 5.0, 1e9))} if rng.random() < 0.7 else {},
    )


def any_endpoint(rng: random.Random, slot: int) -> Endpoint:
    load = Load()
    load.requests, load.tokens = rng.choice((0, 0, 1, 7, 99, 300)), rng.choice((0, 0, 512, 10**5, 10**7))
    return Endpoint(
        name=f"e{slot}",
        slot=slot,
        address="10.0.0.1:8000",
        load=load,
        labels=any_of(rng, LABELS),
        weight=rng.choice((0.01, 1.0, 1.0, 2.5, 100.0)),
        metrics=any_metrics(rng),
    )


def any_cycle(seed: int, n: int) -> Cycle:
    """A cycle over a fleet whose endpoints differ in everything a plugin may look at, with an index that
    remembers some of the prompt. Seeded, since drawing each field from Hypothesis is ten times slower."""
    rng = random.Random(seed)
    given_services = services(seed=seed, clock=lambda: 100.0)
    asked = request(
        rng.choice(("", "short", BLOCK, BLOCK * 4)),
        model=rng.choice(MODELS),
        headers=any_of(rng, HEADERS),
        media=tuple((rng.choice("ij"), rng.randrange(10)) for _ in range(rng.randrange(4))),
    )
    fleet = [any_endpoint(rng, slot) for slot in range(n)]
    for endpoint in fleet:
        given_services.prefix.add(endpoint.slot)
        held = request(BLOCK * rng.randrange(6), model=asked.model)
        given_services.prefix.insert(endpoint.slot, given_services.prefix.match(held).chains)
    cycle = Cycle(asked, fleet, given_services)
    cycle.peer = rng.choice((None, *fleet))
    return cycle


def cycles(least: int = 1) -> st.SearchStrategy[Cycle]:
    return st.builds(any_cycle, st.integers(0, 10**9), st.integers(least, 8))


LESS_THAN = {"type": "threshold", "threshold": {"operator": "LessThan", "value": 5}}
LOWER = {"type": "linear_lower_is_better"}
FIXED = {"type": "linear_higher_is_better", "normalization": {"fixedRange": {"min": -10, "max": 10}}}
BY_ID = {"strategy": "session_id"}

PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "by-label": [{"label": "zone", "validValues": ["a"]}, {"label": "zone", "allowsNoLabel": True}],
    "label-selector-filter": [{"matchLabels": {"zone": "a"}}],
    "endpoint-attribute-filter": [
        {"attribute": "depth", "algorithm": LESS_THAN},
        {"attribute": "depth", "algorithm": LESS_THAN, "onMissing": "Fail", "fallbackOnEmpty": True},
    ],
    "endpoint-attribute-scorer": [
        {"attributeKey": "depth", "algorithm": LOWER},
        {"attributeKey": "depth", "algorithm": FIXED},
    ],
    "header-label-affinity-scorer": [{"headerName": "X-Zone", "labelKey": "zone"}],
    "utilization-filter": [
        {"conditions": [{"metric": "waiting-queue", "maxValue": 5}]},
        {"conditions": [{"metric": "active-requests", "maxValue": 9}], "fallbackOnEmpty": True},
    ],
    "session-affinity-filter": [{}, BY_ID],
    "session-affinity-scorer": [{}, BY_ID],
    "prefix-cache-affinity-filter": [
        {},
        {"explorationProbability": 0.5, "affinityThreshold": 0.3},
        {"ttftSource": "latencyPredictor"},
    ],
    "latency-scorer": [{}, {"headroomSelectionStrategy": "most", "ttftWeight": 0, "tpotWeight": 0}],
    "slo-headroom-tier-filter": [{}, {"epsilonExploreNeg": 1}],
    "prefix-cache-scorer": [{}, {"matchLengthWeight": 0.4, "matchLengthScaleTokens": 100}],
    "context-length-aware": [{}, {"enableFiltering": True}],
    "concurrency-detector": [{}, {"concurrencyMode": "hybrid", "headroom": 0.5}],
    "utilization-detector": [{}, {"stalenessPolicy": "ignore"}],
    "token-load-scorer": [{}, {"queueThresholdTokens": 1000}],
    "active-request-scorer": [{}, {"idleThreshold": 3, "maxBusyScore": 0.5}],
    "max-score-picker": [{}, {"maxNumOfEndpoints": 3}],
    "random-picker": [{}, {"maxNumOfEndpoints": 3}],
    "weighted-random-picker": [{}, {"maxNumOfEndpoints": 3}],
    "consistent-hash-picker": [{}, {"loadFactor": 1}],
    "cache-aware-picker": [
        {},
        {"balanceAbsThreshold": 1000},
        {"balanceAbsThreshold": 1000, "cacheThreshold": 0},
    ],
    "dynamo-cost-scorer": [{}, {"overlapScoreWeight": 4}, {"overlapScoreWeight": 0}],
    "capacity-share-scorer": [{}, {"capacity": "learned"}],
    "pool-latency-scorer": [{}, {"tpotWeight": 0}],
    "endpoint-ttft-scorer": [{}, {"exploreRequests": 0}],
    "file-discovery": [{"path": "/endpoints.yaml"}],
    "session-id-producer": [{"headerName": "x-session-id"}],
}
"""Parameter sets each type is tried with; one without parameters unless it is listed."""

ALL = [
    pytest.param(name, parameters, id=f"{name}-{i}")
    for name, cls in sorted(plugins().items())
    if own_name(cls) == name
    for i, parameters in enumerate(PARAMETERS.get(name, [{}]))
]


def those(kind: type) -> list[Any]:
    """The parameter sets of every plugin of a kind."""
    found = [p for p in ALL if issubclass(plugins()[str(p.values[0])], kind)]
    assert found
    return found


def make(name: str, parameters: dict[str, Any], cycle: Cycle) -> Any:
    plugin = build(name, parameters, "test")
    for needed in (*(build(name, {}, "test") for name in plugin.needs), plugin):
        if isinstance(needed, Preparing):
            needed.prepare(cycle.services)
    return plugin


many = settings(max_examples=30, deadline=None)


def decision(cycle: Cycle, chosen: Endpoint) -> Decision:
    return Decision(
        request_id="r", model="m", at_s=0, profile="default", candidates=cycle.candidates, chosen=chosen
    )


def warm_up(plugin: Plugin, cycle: Cycle) -> None:
    """Let a plugin that remembers see a dispatch to the last endpoint."""
    if hasattr(plugin, "on_dispatch"):
        plugin.on_dispatch(cycle, decision(cycle, cycle.endpoints[-1]))


@pytest.mark.parametrize(("name", "parameters"), those(Filter))
@many
@given(cycle=cycles(), seen=st.booleans())
def test_a_filter_keeps_a_subset_in_order(
    name: str, parameters: dict[str, Any], cycle: Cycle, seen: bool
) -> None:
    plugin = make(name, parameters, cycle)
    if seen:
        warm_up(plugin, cycle)
    kept = [e.slot for e in plugin.filter(cycle)]
    everyone = [e.slot for e in cycle.endpoints]
    assert kept == [slot for slot in everyone if slot in set(kept)]


@pytest.mark.parametrize(("name", "parameters"), those(Scorer))
@many
@given(cycle=cycles(), seen=st.booleans())
def test_a_scorer_gives_each_endpoint_a_score_from_0_to_1(
    name: str, parameters: dict[str, Any], cycle: Cycle, seen: bool
) -> None:
    plugin = make(name, parameters, cycle)
    if seen:
        warm_up(plugin, cycle)
    scores = plugin.score(cycle)
    assert len(scores) == len(cycle.endpoints)
    assert all(isinstance(score, float) and 0.0 <= score <= 1.0 for score in scores), scores


@pytest.mark.parametrize(("name", "parameters"), those(Scorer))
@many
@given(cycle=cycles(), more=st.integers(1, 10**6), at=st.integers(0, 7))
def test_a_longer_queue_never_scores_higher(
    name: str, parameters: dict[str, Any], cycle: Cycle, more: int, at: int
) -> None:
    twin = cycle.endpoints[at % len(cycle.endpoints)]
    load = Load()
    load.requests, load.tokens = twin.load.requests + more, twin.load.tokens + more
    metrics = replace(twin.metrics, waiting=twin.metrics.waiting + more, running=twin.metrics.running + more)
    busier = replace(twin, name="busier", load=load, metrics=metrics)
    fleet = [*cycle.endpoints, busier]
    crowded = Cycle(cycle.request, fleet, cycle.services)
    crowded.peer = cycle.peer
    scores = make(name, parameters, crowded).score(crowded)
    assert scores[-1] <= scores[fleet.index(twin)]


@pytest.mark.parametrize(("name", "parameters"), those(Picker))
@many
@given(cycle=cycles(), data=st.data())
def test_a_picker_picks_candidates_each_once(
    name: str, parameters: dict[str, Any], cycle: Cycle, data: st.DataObject
) -> None:
    plugin = make(name, parameters, cycle)
    n = len(cycle.endpoints)
    scores = data.draw(st.lists(st.floats(0, 10), min_size=n, max_size=n))
    picked = plugin.pick(cycle, scores)
    names = [e.name for e in picked]
    assert 1 <= len(names) <= parameters.get("maxNumOfEndpoints", 1)
    assert len(set(names)) == len(names)
    assert set(names) <= {e.name for e in cycle.endpoints}


@pytest.mark.parametrize(("name", "parameters"), those(Picker))
@many
@given(cycle=cycles(least=2), seed=st.integers(0, 9))
def test_one_seed_gives_one_choice(name: str, parameters: dict[str, Any], cycle: Cycle, seed: int) -> None:
    def choose() -> list[str]:
        plugin = make(name, parameters, cycle)
        cycle.services.rng.seed(seed)
        return [plugin.pick(cycle, [0.5] * len(cycle.endpoints))[0].name for _ in range(5)]

    assert choose() == choose()


@pytest.mark.parametrize(("name", "parameters"), those(SaturationDetector))
@many
@given(cycle=cycles())
def test_a_detector_says_how_full_a_pool_is(name: str, parameters: dict[str, Any], cycle: Cycle) -> None:
    detector = make(name, parameters, cycle)
    assert detector.saturation(cycle.endpoints, 100.0) >= 0.0
    assert detector.saturation([], 100.0) == 1.0


@pytest.mark.parametrize(("name", "parameters"), those(SaturationDetector))
@many
@given(cycle=cycles(), more=st.integers(1, 1000))
def test_more_requests_never_make_a_pool_emptier(
    name: str, parameters: dict[str, Any], cycle: Cycle, more: int
) -> None:
    detector = make(name, parameters, cycle)
    pool = [replace(e, metrics=replace(e.metrics, at_s=100.0)) for e in cycle.endpoints]
    before = detector.saturation(pool, 100.0)
    fuller = []
    for e in pool:
        load = Load()
        load.requests, load.tokens = e.load.requests + more, e.load.tokens + more
        fuller.append(replace(e, load=load, metrics=replace(e.metrics, waiting=e.metrics.waiting + more)))
    assert detector.saturation(fuller, 100.0) >= before


def test_every_type_says_what_it_does() -> None:
    for name, cls in plugins().items():
        assert cls.__doc__, name
        assert "Struct" not in cls.__doc__, name


def test_every_scheduling_type_is_tried_with_parameters_that_it_has() -> None:
    assert set(PARAMETERS) <= set(plugins())
