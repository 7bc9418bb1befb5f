"""llm-d's plugins for precise prefix routing: what loads, and by whose word endpoints are scored."""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from typing import Any

import pytest

from pointsman.errors import SettingsError
from pointsman.prefix.approximate import PrefixIndex
from pointsman.prefix.kv_wire import Stored
from pointsman.prefix.precise import PreciseIndex
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.picker_config import LoadedConfig, load_picker_config, load_tree
from pointsman.scheduling.presets import build_scheduler
from pointsman.testing import fleet, request
from pointsman.types import Decision, Tokenized

CONFIGS = Path(__file__).parent / "configs"
PRECISE, SENT = "precise-prefix-cache-producer", "approx-prefix-cache-producer"
BLOCK = 16
IDS = array("I", range(1000, 1512))


def load(*plugins: str | dict[str, Any], **sections: Any) -> LoadedConfig:
    head = {"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig"}
    specs = [{"type": p} if isinstance(p, str) else p for p in plugins]
    return load_tree({**head, "plugins": specs, **sections}, "picker config")


def example(name: str) -> LoadedConfig:
    return load_picker_config((CONFIGS / name).read_text(), name)


def reading(type_: str, producer: str) -> dict[str, Any]:
    return {"type": type_, "parameters": {"prefixMatchInfoProducerName": producer}}


def scheduled(loaded: LoadedConfig, *, sent: bool = True) -> Decision:
    """The prompt was ``sent`` to e0; of e1 its engine tells that it holds half, and e2 holds nothing."""
    precise = PreciseIndex()
    services = Services(PrefixIndex(), lambda: 0.0, random.Random(0), precise)
    endpoints = fleet(3)
    for endpoint in endpoints:
        services.prefix.add(endpoint.slot)
        precise.add(endpoint.slot)
    blocks = len(IDS) // BLOCK // 2
    stored = Stored(list(range(blocks)), None, IDS[: blocks * BLOCK].tobytes(), BLOCK)
    for slot, event in ((0, Stored([999], None, bytes(4 * BLOCK), BLOCK)), (1, stored)):
        precise.apply(slot, [event], 0.0)
    scheduler = build_scheduler(loaded, services)
    prompt = request("x" * 4 * len(IDS), tokenized=(Tokenized(IDS.tobytes()),), prompt_tokens=len(IDS))
    if sent:
        services.prefix.insert(0, services.prefix.match(prompt).chains)
    return scheduler.schedule(prompt, endpoints)


def test_llm_ds_guide_loads_and_says_what_has_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    loaded = example("precise-prefix.yaml")
    assert loaded.profiles[0].weights["prefix-cache-scorer"] == 3.0
    assert loaded.precise is not None
    assert loaded.precise.tier_weights == {"gpu": 1.0, "cpu": 0.5}
    assert loaded.precise.expected_s == 5.0
    assert not loaded.only_sent
    for key in ("modelName", "vllm.mmTimeout", "concurrency", "podLabelSelector"):
        assert f"{key} has no effect" in caplog.text
    assert "socketPort" not in caplog.text
    assert scheduled(loaded).chosen.name == "e1"


def test_the_deprecated_scorer_is_producer_and_scorer(caplog: pytest.LogCaptureFixture) -> None:
    loaded = example("precise-prefix-scorer.yaml")
    decision = scheduled(loaded)
    assert decision.chosen.name == "e1"
    assert list(decision.scores["precise-prefix-cache-scorer"]) == [0.0, 0.5, 0.0]
    for said in (
        "plugin type precise-prefix-cache-scorer is deprecated",
        "udsTokenizerConfig: has no effect",
        "indexerConfig.tokenizersPoolConfig has no effect",
        "prefixPluginName: it never had an effect",
    ):
        assert said in caplog.text


@pytest.mark.parametrize("type_", ["prefix-cache-scorer", "prefix-cache-affinity-filter"])
def test_a_plugin_goes_by_the_producer_that_it_names(type_: str) -> None:
    parameters = {"affinityThreshold": 0.4} if "affinity" in type_ else {}
    for producer, chosen in ((PRECISE, "e1"), ("events", "e1"), (SENT, "e0"), ("mine", "e0")):
        loaded = load(
            {"type": PRECISE, "name": "events" if producer == "events" else PRECISE},
            {"type": SENT, "name": "mine"},
            {"type": type_, "parameters": {"prefixMatchInfoProducerName": producer, **parameters}},
        )
        assert scheduled(loaded).chosen.name == chosen, producer


def test_who_is_cold_is_told_by_the_producer_that_is_named() -> None:
    """Nothing was sent anywhere, and an engine tells that it holds half."""
    for producer, scores in ((PRECISE, [0.5, 0.5, 0.5]), (SENT, [1.0, 0.5, 0.0])):
        decision = scheduled(load(PRECISE, reading("no-hit-lru-scorer", producer)), sent=False)
        assert list(decision.scores["no-hit-lru-scorer"]) == scores


def test_who_names_no_producer_reads_what_was_sent_as_in_llm_d(caplog: pytest.LogCaptureFixture) -> None:
    assert scheduled(load(PRECISE, "prefix-cache-scorer")).chosen.name == "e0"
    assert "prefix-cache-scorer names no producer" in caplog.text


def test_the_precise_producer_may_go_by_the_name_of_the_other(caplog: pytest.LogCaptureFixture) -> None:
    loaded = load({"type": PRECISE, "name": SENT}, "prefix-cache-scorer")
    assert scheduled(loaded).chosen.name == "e1"
    assert "names no producer" not in caplog.text


def test_without_any_producer_engines_are_believed_where_they_tell() -> None:
    loaded = load("prefix-cache-scorer")
    assert (loaded.precise, loaded.only_sent) == (None, False)
    assert scheduled(loaded).chosen.name == "e1"


def test_only_the_approximate_producer_wants_no_events() -> None:
    only = load(SENT, "prefix-cache-scorer")
    assert only.only_sent
    assert scheduled(only).chosen.name == "e0"
    assert not load(SENT, PRECISE, "prefix-cache-scorer").only_sent


def test_speculation_is_on_unless_it_is_turned_off() -> None:
    for parameters, expected_s in (
        ({}, None),
        ({"speculativeIndexing": True}, None),
        ({"speculativeTTL": "500ms"}, 0.5),
        ({"speculativeIndexing": False}, 0.0),
    ):
        precise = load({"type": PRECISE, "parameters": parameters}).precise
        assert precise is not None
        assert precise.expected_s == expected_s


@pytest.mark.parametrize(
    ("plugins", "named"),
    [
        ([PRECISE, {"type": PRECISE, "name": "b"}], "more than one precise-prefix-cache-producer"),
        ([PRECISE, "precise-prefix-cache-scorer"], "more than one precise-prefix-cache-producer"),
        ([reading("prefix-cache-scorer", PRECISE)], "no approx-prefix-cache-producer is called"),
        ([{"type": PRECISE, "parameters": {"kvEventConfig": {}}}], "unknown field `kvEventConfig`"),
        (
            [{"type": PRECISE, "parameters": {"kvEventsConfig": {"engineType": "tgi"}}}],
            r"Invalid enum value 'tgi' - at `\$.kvEventsConfig.engineType`",
        ),
        (
            [{"type": PRECISE, "parameters": {"tokenProcessorConfig": {"hashAlgorithm": "sha256"}}}],
            "Invalid enum value 'sha256'",
        ),
        ([{"type": PRECISE, "parameters": {"speculativeTTL": "soon"}}], "'soon' is not a duration"),
        (
            [
                {
                    "type": PRECISE,
                    "parameters": {
                        "indexerConfig": {"kvBlockIndexConfig": {"costAwareMemoryConfig": {"size": "big"}}}
                    },
                }
            ],
            "'big' is not a size",
        ),
        ([{"type": "token-producer", "parameters": {"vllm": {"timeout": "5"}}}], "'5' is not a duration"),
        ([{"type": "token-producer", "parameters": {"vllm": {"uri": "x"}}}], "unknown field `uri`"),
    ],
)
def test_stops_and_names(plugins: list[Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        load(*plugins)
