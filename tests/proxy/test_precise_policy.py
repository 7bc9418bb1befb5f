"""A picker configuration's word on KV events, index and tokens takes the place of the settings'."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pointsman.config import Settings
from pointsman.errors import SettingsError
from pointsman.prefix.kv_wire import Stored
from pointsman.proxy.precise_policy import precise_index, with_policy
from pointsman.scheduling.picker_config import LoadedConfig, load_picker_config, load_tree
from pointsman.scheduling.presets import load_policy
from pointsman.testing import request
from pointsman.types import Tokenized

CONFIGS = Path(__file__).parents[1] / "scheduling" / "configs"
PRECISE, SENT = "precise-prefix-cache-producer", "approx-prefix-cache-producer"


def policy(parameters: dict[str, Any], type_: str = PRECISE) -> LoadedConfig:
    head = {"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig"}
    return load_tree({**head, "plugins": [{"type": type_, "parameters": parameters}]}, "picker config")


def example(name: str) -> LoadedConfig:
    return load_picker_config((CONFIGS / name).read_text(), name)


def settings(**sections: Any) -> Settings:
    return msgspec.convert(sections, Settings)


def test_each_pod_is_listened_to_where_the_configuration_says() -> None:
    told = with_policy(settings(), example("precise-prefix.yaml"))
    events = told.kv_events
    assert (events.mode, events.port, events.replay_port, events.topic) == ("all", 5556, 5559, "kv@")
    assert (events.bind, events.index_bytes) == ("", 1024**3)
    assert (told.tokens.url, told.tokens.budget_s) == ("http://localhost:8000", 0.5)
    assert told.shared_index.redis == ""


def test_engines_connect_to_us_and_the_index_is_shared() -> None:
    told = with_policy(settings(), example("precise-prefix-scorer.yaml"))
    assert (told.kv_events.mode, told.kv_events.bind) == ("auto", "tcp://*:5557")
    shared = told.shared_index
    assert (shared.redis, shared.hash, shared.hash_seed) == ("redis://10.0.0.9:6379", "xxh64", "42")
    assert shared.block_tokens == 64
    assert told.tokens == Settings().tokens


@pytest.mark.parametrize(
    ("index", "redis", "size"),
    [
        ({}, "", 2 * 1024**3),
        ({"redisConfig": {}}, "redis://127.0.0.1:6379", 2 * 1024**3),
        ({"valkeyConfig": {"address": "valkeys://v:1"}}, "rediss://v:1", 2 * 1024**3),
        ({"redisConfig": {"address": "r:1"}}, "redis://r:1", 2 * 1024**3),
        ({"redisConfig": {}, "costAwareMemoryConfig": {"size": "500MB"}}, "", 500_000_000),
        ({"inMemoryConfig": {"size": 1000, "podCacheSize": 10}}, "", 2 * 1024**3),
    ],
)
def test_the_first_index_that_is_given_counts(index: dict[str, Any], redis: str, size: int) -> None:
    told = with_policy(settings(), policy({"indexerConfig": {"kvBlockIndexConfig": index}}))
    assert (told.shared_index.redis, told.kv_events.index_bytes) == (redis, size)


def test_a_shared_index_names_blocks_as_llm_d_does_unless_told() -> None:
    shared = {"indexerConfig": {"kvBlockIndexConfig": {"redisConfig": {}}}}
    told = with_policy(settings(), policy(shared)).shared_index
    assert (told.hash, told.hash_seed, told.block_tokens) == ("cbor-fnv", "", 16)


def test_nobody_to_listen_to_means_no_events() -> None:
    told = with_policy(settings(), policy({"kvEventsConfig": {"discoverPods": False}}))
    assert told.kv_events.mode == "none"


def test_only_the_approximate_producer_means_no_events() -> None:
    assert with_policy(settings(), policy({}, SENT)).kv_events.mode == "none"


@pytest.mark.parametrize("preset", ["least-cost", "llm-d-blend"])
def test_presets_leave_the_settings_as_they_are(preset: str) -> None:
    given = settings(kv_events={"mode": "all", "port": 6000})
    assert with_policy(given, load_policy(preset)) is given


def test_what_the_configuration_does_not_give_remains_the_settings() -> None:
    given = settings(kv_events={"port": 6000, "replay_port": 6001}, tokens={"budget_s": 1})
    told = with_policy(given, policy({}))
    assert (told.kv_events.port, told.kv_events.replay_port) == (6000, 6001)
    assert told.tokens.budget_s == 1


@pytest.mark.parametrize(
    ("given", "config", "type_", "keys"),
    [
        (
            {"kv_events": {"port": 6000}},
            {"kvEventsConfig": {"podDiscoveryConfig": {"socketPort": 5557}}},
            PRECISE,
            ("kv_events.port", "kvEventsConfig.podDiscoveryConfig.socketPort"),
        ),
        ({"kv_events": {"mode": "none"}}, {}, PRECISE, ("kv_events.mode", "kvEventsConfig.discoverPods")),
        ({"kv_events": {"mode": "all"}}, {}, SENT, ("kv_events.mode", SENT)),
        (
            {"kv_events": {"topic": "mine@"}},
            {"kvEventsConfig": {"topicFilter": "kv@"}},
            PRECISE,
            ("kv_events.topic", "kvEventsConfig.topicFilter"),
        ),
        (
            {"shared_index": {"redis": "redis://a:secret@b:1"}},
            {"indexerConfig": {"kvBlockIndexConfig": {"redisConfig": {"address": "redis://a:secret@c:1"}}}},
            PRECISE,
            ("shared_index.redis", "redisConfig.address"),
        ),
        (
            {"tokens": {"url": "http://a:1"}},
            {"vllm": {"url": "http://b:1"}},
            "token-producer",
            ("tokens.url", "vllm.url"),
        ),
    ],
)
def test_a_contradiction_names_both_keys(
    given: dict[str, Any], config: dict[str, Any], type_: str, keys: tuple[str, str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        with_policy(settings(**given), policy(config, type_))
    assert all(key in str(caught.value) for key in keys)
    assert "secret" not in str(caught.value)


def test_saying_the_same_twice_is_no_contradiction() -> None:
    given = settings(kv_events={"mode": "all", "port": 5556}, tokens={"url": "http://localhost:8000"})
    assert with_policy(given, example("precise-prefix.yaml")).kv_events.port == 5556


def test_the_index_weighs_tiers_and_forgets_what_was_sent_as_told() -> None:
    prompt = random.Random(1).randbytes(4 * 64)
    asked = request("x", tokenized=(Tokenized(prompt),))
    backends = [{"name": "GPU", "weight": 1.0}, {"name": "cpu", "weight": 0.25}]
    told = policy({"indexerConfig": {"kvCacheBackendConfigs": backends}, "speculativeTTL": "1s"})
    index = precise_index(1 << 24, told)
    for slot, medium in ((0, "cpu"), (1, "disk")):
        index.add(slot)
        index.apply(slot, [Stored([1, 2], None, prompt[: 4 * 32], 16, medium=medium)], 0.0)
    match = index.match(asked, 0.0)
    assert (match.weighted(0), match.weighted(1)) == (8.0, 32.0)
    index.sent(0, asked, 0.0, match)
    assert [index.match(asked, now_s).tokens(0) for now_s in (0.9, 1.1)] == [48, 32]


def test_without_speculation_only_engines_are_believed() -> None:
    prompt = random.Random(1).randbytes(4 * 64)
    asked = request("x", tokenized=(Tokenized(prompt),))
    index = precise_index(1 << 24, policy({"speculativeIndexing": False}))
    index.add(0)
    index.apply(0, [Stored([1], None, prompt[: 4 * 16], 16)], 0.0)
    index.sent(0, asked, 0.0, index.match(asked, 0.0))
    assert index.match(asked, 0.0).tokens(0) == 16
