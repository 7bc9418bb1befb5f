"""Each scorer's formula, value by value (facts 3.2)."""

from __future__ import annotations

from typing import Any

import pytest

from pointsman.errors import SettingsError
from pointsman.registry import build
from pointsman.scheduling.cycle import Cycle, Services
from pointsman.testing import cycle, fleet, request, services
from pointsman.types import Decision, Endpoint

BLOCK = 4 * 64 * 4
"""The index's first block, in bytes; multiples of it end on later blocks, too."""
RANGE = "llm-d.ai/context-length-range"
HOST = "kubernetes.io/hostname"
ZONE = "topology.kubernetes.io/zone"


def score(name: str, asked: Cycle, **parameters: Any) -> list[float]:
    return list(build(name, parameters, "test").score(asked))  # type: ignore[attr-defined]


def holding(blocks: list[int], text: str, given: Services | None = None, **columns: Any) -> Cycle:
    """A cycle for ``text`` in which endpoint i holds its first ``blocks[i]`` blocks of 64 tokens."""
    given = given or services(block_tokens=64)
    made = cycle(fleet(len(blocks), **columns), text, given=given)
    for slot, n in enumerate(blocks):
        given.prefix.insert(slot, given.prefix.match(request(text[: n * BLOCK])).chains)
    made.match = given.prefix.match(made.request)
    return made


def dispatched(plugin: Any, asked: Cycle, chosen: Endpoint) -> None:
    plugin.on_dispatch(
        asked,
        Decision(
            request_id="r", model="m", at_s=0, profile="default", candidates=asked.candidates, chosen=chosen
        ),
    )


@pytest.mark.parametrize(
    ("name", "column"), [("queue-scorer", "waiting"), ("running-requests-size-scorer", "running")]
)
def test_min_max_scorers(name: str, column: str) -> None:
    assert score(name, cycle(fleet(**{column: [1, 5, 3]}))) == [1.0, 0.0, 0.5]
    assert score(name, cycle(fleet(**{column: [4, 4]}))) == [1.0, 1.0]


def test_kv_cache_utilization_scorer() -> None:
    assert score("kv-cache-utilization-scorer", cycle(fleet(kv_usage=[0.25, 0.0, 1.0]))) == [0.75, 1.0, 0.0]


def test_prefix_cache_scorer_is_the_matched_share_of_blocks() -> None:
    asked = holding([4, 1, 0], "x" * BLOCK * 4)
    assert score("prefix-cache-scorer", asked) == [1.0, 0.25, 0.0]


def test_prefix_cache_scorer_weighs_match_length() -> None:
    asked = holding([4, 1, 0], "x" * BLOCK * 4)  # 1024 and 256 tokens of 1024
    got = score("prefix-cache-scorer", asked, matchLengthWeight=0.4, matchLengthScaleTokens=512)
    assert got == pytest.approx([0.4 * 1.0 + 0.6 * 1.0, 0.4 * 0.5**2 + 0.6 * 0.25, 0.0])


def test_lora_affinity_scorer() -> None:
    a, b, none = frozenset({"a"}), frozenset({"b"}), frozenset()
    pool = fleet(
        loras_active=[a, b, b, b, none],
        loras_waiting=[none, none, a, none, none],
        max_loras=[1, 2, 2, 1, 0],
    )
    assert score("lora-affinity-scorer", cycle(pool, model="a")) == [1.0, 0.8, 0.6, 0.0, 0.0]


def test_load_aware_scorer() -> None:
    asked = cycle(fleet(waiting=[0, 32, 128, 500]))
    assert score("load-aware-scorer", asked) == [0.5, 0.375, 0.0, 0.0]
    assert score("load-aware-scorer", asked, threshold=64) == [0.5, 0.25, 0.0, 0.0]
    assert score("load-aware-scorer", asked, threshold=0) == [0.5, 0.375, 0.0, 0.0]


def test_active_request_scorer() -> None:
    asked = cycle(fleet(requests=[0, 2, 8, 10]))
    assert score("active-request-scorer", asked) == [1.0, 0.8, 0.2, 0.0]
    assert score("active-request-scorer", asked, idleThreshold=2, maxBusyScore=0.5) == [1.0, 1.0, 0.1, 0.0]


def test_token_load_scorer_counts_this_requests_uncached_tokens_too() -> None:
    asked = holding([4, 1, 0], "x" * BLOCK * 4, tokens=[1000, 0, 0])
    got = score("token-load-scorer", asked, queueThresholdTokens=2000)
    assert got == pytest.approx([1 - 1000 / 2000, 1 - 768 / 2000, 1 - 1024 / 2000])


def test_token_load_scorer_threshold() -> None:
    asked = cycle(fleet(tokens=[0, 4194304, 9999999, 1048576]))
    assert score("token-load-scorer", asked) == [1.0, 0.0, 0.0, 0.75]
    assert score("token-load-scorer", asked, queueThresholdTokens=-1) == [1.0, 0.0, 0.0, 0.75]


def test_context_length_aware_scorer() -> None:
    labels = [{RANGE: r} for r in ("0-10000", "0-1000", "100-100", "200-300", "0-50", "50", "9-1")] + [{}]
    got = score("context-length-aware", cycle(fleet(labels=labels), "x" * 400))  # 100 tokens
    assert got == pytest.approx(
        [
            0.3 + 0.7 * (0.7 / 2 + 0.3 * 0.99),
            0.3 + 0.7 * (0.7 / 1.1 + 0.3 * 0.9),
            1.0,
            0.3 / 1.1,
            0.3 / 1.05,
            0.0,
            0.0,
            0.5,
        ]
    )


def test_no_hit_lru_scorer_ranks_cold_endpoints_by_age() -> None:
    plugin: Any = build("no-hit-lru-scorer", {}, "test")
    asked = cycle(fleet(4))
    assert plugin.score(asked) == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])
    dispatched(plugin, asked, asked.endpoints[0])
    dispatched(plugin, asked, asked.endpoints[2])
    # Never used come first, then the oldest: e1, e3, e0, e2.
    assert plugin.score(asked) == pytest.approx([1 / 3, 1.0, 0.0, 2 / 3])
    dispatched(plugin, asked, asked.endpoints[0])
    assert plugin.score(asked) == pytest.approx([0.0, 1.0, 1 / 3, 2 / 3])


def test_no_hit_lru_scorer_is_neutral_for_warm_requests_and_forgets_them() -> None:
    plugin: Any = build("no-hit-lru-scorer", {}, "test")
    warm = holding([0, 1], "x" * BLOCK)
    assert plugin.score(warm) == [0.5, 0.5]
    dispatched(plugin, warm, warm.endpoints[0])
    assert plugin.score(cycle(fleet(2))) == [1.0, 0.0]
    assert plugin.score(cycle(fleet(1))) == [1.0]


def test_no_hit_lru_scorer_remembers_so_many_endpoints() -> None:
    plugin: Any = build("no-hit-lru-scorer", {"lruSize": 1}, "test")
    asked = cycle(fleet(3))
    dispatched(plugin, asked, asked.endpoints[0])
    dispatched(plugin, asked, asked.endpoints[1])
    assert plugin.score(asked) == [1.0, 0.0, 0.5]


def test_mm_embeddings_cache_scorer_is_the_matched_share_of_media_tokens() -> None:
    producer: Any = build("mm-embeddings-cache-producer", {"cacheSizeInMBPerServer": 4}, "test")
    given = services()
    producer.prepare(given)
    pool = fleet(2)
    asked = cycle(pool, given=given, media=(("cat", 30), ("dog", 10), ("cat", 30)))
    assert score("mm-embeddings-cache-scorer", asked) == [0.0, 0.0]
    dispatched(producer, cycle(pool, given=given, media=(("cat", 30),)), pool[0])
    assert score("mm-embeddings-cache-scorer", asked) == [0.75, 0.0]
    # Two entries fit in 4 MB: the cat goes.
    dispatched(producer, cycle(pool, given=given, media=(("owl", 1), ("dog", 10))), pool[0])
    assert score("mm-embeddings-cache-scorer", asked) == [0.25, 0.0]
    assert score("mm-embeddings-cache-scorer", cycle(pool, "no media", given=given)) == [0.0, 0.0]


def test_media_of_endpoints_that_left_are_forgotten() -> None:
    producer: Any = build("mm-embeddings-cache-producer", {}, "test")
    given = services()
    for i in range(1000):
        gone = fleet(name=[f"pod-{i}"])
        dispatched(producer, cycle(gone, given=given, media=(("cat", 1),)), gone[0])
    assert given.media.matched("pod-999", (("cat", 1),)) == 1
    assert sum(given.media.matched(f"pod-{i}", (("cat", 1),)) for i in range(1000)) < 100


def test_header_label_affinity_scorer() -> None:
    pool = fleet(labels=[{"zone": "a"}, {"zone": "b"}, {}])
    parameters = {"headerName": "X-Zone", "labelKey": "zone"}
    asked = cycle(pool, headers={"x-zone": "b"})
    assert score("header-label-affinity-scorer", asked, **parameters) == [0.0, 1.0, 0.0]
    assert score("header-label-affinity-scorer", cycle(pool), **parameters) == [0.0, 0.0, 0.0]


DEPTHS = [{"depth": 2.0}, {"depth": 10.0}, {"depth": 4.0}, {}]


@pytest.mark.parametrize(
    ("algorithm", "want"),
    [
        ({"type": "linear_lower_is_better"}, [1.0, 0.0, 0.75, 0.0]),
        ({"type": "linear_higher_is_better"}, [0.0, 1.0, 0.25, 0.0]),
        (
            {"type": "linear_higher_is_better", "normalization": {"fixedRange": {"min": 0, "max": 8}}},
            [0.25, 1.0, 0.5, 0.0],
        ),
        (
            {"type": "linear_lower_is_better", "normalization": {"fixedRange": {"min": 3, "max": 5}}},
            [1.0, 0.0, 0.5, 0.0],
        ),
        ({"type": "linear_lower_is_better", "normalization": {"adaptiveRange": {}}}, [1.0, 0.0, 0.75, 0.0]),
    ],
)
def test_endpoint_attribute_scorer(algorithm: dict[str, Any], want: list[float]) -> None:
    asked = cycle(fleet(attributes=DEPTHS))
    assert score("endpoint-attribute-scorer", asked, attributeKey="depth", algorithm=algorithm) == want


def test_endpoint_attribute_scorer_is_1_where_all_are_equal() -> None:
    asked = cycle(fleet(attributes=[{"depth": 3.0}, {"depth": 3.0}, {}]))
    lower = {"type": "linear_lower_is_better"}
    assert score("endpoint-attribute-scorer", asked, attributeKey="depth", algorithm=lower) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"attributeKey": "a", "algorithm": {"type": "linear"}}, "algorithm"),
        ({"attributeKey": "", "algorithm": {"type": "linear_lower_is_better"}}, "attributeKey"),
        (
            {
                "attributeKey": "a",
                "algorithm": {
                    "type": "linear_lower_is_better",
                    "normalization": {"fixedRange": {"min": 1, "max": 1}},
                },
            },
            "fixedRange",
        ),
    ],
)
def test_endpoint_attribute_scorer_refuses(parameters: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        build("endpoint-attribute-scorer", parameters, "test")


def test_topology_affinity_scorer() -> None:
    labels = [
        {HOST: "h", ZONE: "z"},
        {HOST: "other", "topology.kubernetes.io/rack": "r", ZONE: "z"},
        {ZONE: "z"},
        {"topology.kubernetes.io/region": "eu"},
        {},
    ]
    asked = cycle(fleet(labels=labels))
    assert score("topology-affinity-scorer", asked) == [0.0] * 5
    region = "topology.kubernetes.io/region"
    place = {HOST: "h", "topology.kubernetes.io/rack": "r", ZONE: "z", region: "eu"}
    asked.peer = fleet(labels=[place])[0]
    assert score("topology-affinity-scorer", asked) == [1.0, 0.20, 0.05, 0.02, 0.0]


def test_topology_extractor_names_the_labels() -> None:
    extractor: Any = build("topology-extractor", {"zone": "where"}, "test")
    asked = cycle(fleet(labels=[{"where": "z"}, {ZONE: "z"}]))
    extractor.prepare(asked.services)
    asked.peer = fleet(labels=[{"where": "z"}])[0]
    assert score("topology-affinity-scorer", asked) == [0.05, 0.0]


def test_weight_scorer() -> None:
    assert score("weight-scorer", cycle(fleet(weight=[1.0, 4.0, 2.0]))) == [0.25, 1.0, 0.5]


def test_least_request_scorer_orders_by_requests_per_weight() -> None:
    got = score("least-request-scorer", cycle(fleet(weight=[1.0, 2.0, 1.0], requests=[0, 1, 4])))
    assert got == [1 / 2, 2 / 4, 1 / 6]
