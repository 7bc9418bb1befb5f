"""EndpointPickerConfig files: what loads, what llm-d adds by itself, what stops start-up and how it is
named.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pointsman.api
from pointsman.errors import SettingsError
from pointsman.registry import own_name, plugins
from pointsman.scheduling.coming import COMING
from pointsman.scheduling.parsers import Parser
from pointsman.scheduling.picker_config import LoadedConfig, load_picker_config
from pointsman.scheduling.presets import build_scheduler
from pointsman.scheduling.scheduler import Scheduler
from pointsman.testing import fleet, request, services
from pointsman.types import Endpoint

CONFIGS = Path(__file__).parent / "configs"

FACTS = (CONFIGS / "llm-d-types.txt").read_text().split()
"""Every plugin type of llm-d v0.10."""


def config(**sections: Any) -> str:
    """A configuration with the head it needs."""
    return json.dumps({"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig", **sections})


def load(*types: str | dict[str, Any], **sections: Any) -> LoadedConfig:
    """The configuration with plugins of these types and other sections."""
    specs = [{"type": t} if isinstance(t, str) else t for t in types]
    return load_picker_config(config(plugins=specs, **sections))


def example(name: str) -> LoadedConfig:
    return load_picker_config((CONFIGS / name).read_text(), name)


def scheduler(loaded: LoadedConfig, pool: list[Endpoint]) -> Scheduler:
    given = services(clock=lambda: 100.0)
    for endpoint in pool:
        given.prefix.add(endpoint.slot)
    return build_scheduler(loaded, given)


def outline(loaded: LoadedConfig) -> dict[str, Any]:
    """Profile to filters, weighted scorers and picker type."""
    return {
        p.name: (
            [name for name, _ in p.filters],
            {name: weight for name, weight, _ in p.scorers},
            own_name(type(p.picker)),  # type: ignore[arg-type]
        )
        for p in loaded.profiles
    }


def test_the_list_of_llm_ds_types_is_read() -> None:
    assert len(set(FACTS)) == len(FACTS) > 90


@pytest.mark.parametrize("name", FACTS)
def test_every_type_of_llm_d_is_either_here_or_known_to_come(name: str) -> None:
    assert (name in plugins()) != (name in COMING)


@pytest.mark.parametrize("name", sorted(COMING))
def test_a_type_that_is_not_here_yet_says_so(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"plugins\[1\]: {name} .*is not available in this version"):
        load("queue-scorer", {"type": name, "parameters": {"anything": 1}})


def test_the_optimized_baseline() -> None:
    loaded = example("optimized-baseline.yaml")
    assert outline(loaded) == {
        "default": (["prefix-cache-affinity-filter"], {"token-load-scorer": 1.0}, "max-score-picker")
    }
    pool = fleet(3, tokens=[0, 10_000, 10_000])
    made, long = scheduler(loaded, pool), "x" * 8000
    assert made.schedule(request(long), pool).chosen.name == "e0"
    pool[0].load.tokens = 200_000  # 9.8 s at 20480 tokens/s: worth waiting for
    assert made.schedule(request(long), pool).chosen.name == "e0"
    pool[0].load.tokens = 400_000
    assert made.schedule(request(long), pool).chosen.name != "e0"


def test_the_blend(caplog: pytest.LogCaptureFixture) -> None:
    loaded = example("blend.yaml")
    weights = {"queue-scorer": 2.0, "kv-cache-utilization-scorer": 2.0, "prefix": 3.0}
    assert outline(loaded) == {"default": ([], weights, "max-score-picker")}
    for deprecated in ("x-k8s.io/v1alpha1", "plugin type tokenizer", "saturationDetector"):
        assert f"{deprecated} is deprecated" in caplog.text
    pool = fleet(2, waiting=[10, 10], kv_usage=[0.9, 0.9], at_s=[99.5, 99.5])
    made = scheduler(loaded, pool)
    assert made.saturation(pool) == pytest.approx(1.0)
    index = made.services.prefix
    assert (index.block_tokens, index.max_prefix_tokens, index.auto_tune) == (64, 256 * 64, False)


def test_no_configuration_is_the_compiled_in_blend() -> None:
    weights = {"queue-scorer": 2.0, "kv-cache-utilization-scorer": 2.0, "prefix-cache-scorer": 3.0}
    for text in ("", "# nothing\n"):
        loaded = load_picker_config(text)
        assert outline(loaded) == {"default": ([], weights, "max-score-picker")}
        assert loaded.handler is None
        assert loaded.parsers is None
        assert loaded.reads_metrics
        assert own_name(type(loaded.detector)) == "utilization-detector"  # type: ignore[arg-type]


def test_lora_and_what_is_carried_for_the_scraper() -> None:
    loaded = example("lora.yaml")
    assert outline(loaded) == {
        "default": ([], {"lora-affinity-scorer": 10.0, "queue-scorer": 1.0}, "max-score-picker")
    }
    assert loaded.metrics_interval_s == 0.25
    assert loaded.metrics is not None
    assert (loaded.metrics.scheme, loaded.metrics.path) == ("https", "/stats/metrics")
    assert (loaded.metrics.insecure_skip_verify, loaded.metrics.ca_cert_path) == (False, "/etc/ca.pem")
    (engine,) = loaded.engine_configs
    assert (engine.name, engine.kv_usage_spec) == ("acme", "acme_cache_usage")
    assert [(m.attribute_key, m.metric_spec) for m in engine.custom_metrics] == [("acme.depth", "acme_depth")]
    pool = fleet(
        loras_active=[frozenset(), frozenset({"sql"})], max_loras=[1, 1], waiting=[0, 5], at_s=[99.9, 99.9]
    )
    assert scheduler(loaded, pool).schedule(request(model="sql"), pool).chosen.name == "e1"


def test_session_affinity_in_the_profile_that_nobody_wrote(caplog: pytest.LogCaptureFixture) -> None:
    loaded = example("session-affinity.yaml")
    scorers = {"soft": 1.0, "active-request-scorer": 1.0}
    assert outline(loaded) == {"default": (["hard"], scorers, "weighted-random-picker")}
    assert "requestTimeout" in caplog.text
    pool = fleet(8)
    made = scheduler(loaded, pool)
    first = made.schedule(request(headers={"cookie": "sid=1"}), pool)
    assert [name for name, _ in first.response_headers] == ["x-session-token"]
    for _ in range(20):
        assert made.schedule(request(headers={"cookie": "sid=1"}), pool).chosen is first.chosen


def test_label_filters_in_two_profiles(caplog: pytest.LogCaptureFixture) -> None:
    loaded = example("label-filters.json")
    assert outline(loaded) == {
        "fast": (["new", "context-length-aware"], {"context-length-aware": 2.5}, "random-picker"),
        "cheap": (["old"], {}, "random-picker"),
    }
    assert "by-label is deprecated, use label-selector-filter" in caplog.text
    assert "haPopulateNonLeaderDatastore has no effect" in caplog.text
    assert loaded.discovery_path == "/etc/epp/endpoints.yaml"
    assert loaded.discovery is not None
    assert loaded.discovery.watch_file
    assert loaded.parsers == ("openai", "passthrough")
    assert not loaded.reads_metrics
    pool = fleet(labels=[{"gpu": "l4"}, {"gpu": "h100"}])
    made = scheduler(loaded, pool)
    assert made.schedule(request(), pool).chosen.name == "e1"
    assert made.schedule(request(headers={"epp-profile": "cheap"}), pool).chosen.name == "e0"


def test_a_profile_without_a_picker_gets_the_configured_one() -> None:
    use = [{"pluginRef": "queue-scorer"}]
    loaded = load("queue-scorer", "random-picker", schedulingProfiles=[{"name": "a", "plugins": use}])
    assert outline(loaded) == {"a": ([], {"queue-scorer": 1.0}, "random-picker")}


def test_no_plugins_at_all_pick_at_random_among_equals() -> None:
    assert outline(load()) == {"default": ([], {}, "max-score-picker")}


def test_missing_producers_are_added() -> None:
    loaded = load("mm-embeddings-cache-scorer", "queue-scorer")
    types = [own_name(type(plugin)) for plugin in loaded.plugins]
    assert types.count("mm-embeddings-cache-producer") == 1
    assert types.index("mm-embeddings-cache-producer") < types.index("mm-embeddings-cache-scorer")


def test_a_detector_in_plugins_is_also_a_filter_of_the_profile_that_nobody_wrote() -> None:
    loaded = load("utilization-detector", "queue-scorer")
    assert outline(loaded)["default"][0] == ["utilization-detector"]
    assert outline(load("queue-scorer"))["default"][0] == []


def test_the_saturation_detector_is_chosen_by_reference() -> None:
    spec = {"type": "concurrency-detector", "name": "mine", "parameters": {"maxConcurrency": 3}}
    use = [{"name": "p", "plugins": []}]
    sections = {"schedulingProfiles": use, "flowControl": {"saturationDetector": {"pluginRef": "mine"}}}
    assert load(spec, **sections).detector.saturation(fleet(requests=[3]), 0.0) == 1.0
    unreferenced = load(spec, schedulingProfiles=use)
    assert own_name(type(unreferenced.detector)) == "utilization-detector"  # type: ignore[arg-type]
    old = load(spec, schedulingProfiles=use, saturationDetector={"pluginRef": "mine"})
    assert own_name(type(old.detector)) == "concurrency-detector"  # type: ignore[arg-type]


def test_the_deprecated_parser_section(caplog: pytest.LogCaptureFixture) -> None:
    assert load("anthropic-parser", parser={"pluginRef": "anthropic-parser"}).parsers == ("anthropic",)
    assert "parser is deprecated" in caplog.text


def test_parsers_name_formats_that_exist() -> None:
    known = {f.name for f in pointsman.api.formats()} | {pointsman.api.PASSTHROUGH.name}
    parsers = [cls for cls in plugins().values() if issubclass(cls, Parser)]
    assert parsers
    assert {name for cls in parsers for name in cls.formats} <= known


def test_metrics_plugins_by_their_default_names_need_no_data_layer() -> None:
    spec = {"type": "core-metrics-extractor", "parameters": {"engineConfigs": [{"name": "acme"}]}}
    assert [e.name for e in load(spec).engine_configs] == ["acme"]


def test_empty_sections_are_as_good_as_none() -> None:
    sections: dict[str, None] = dict.fromkeys(
        ("featureGates", "plugins", "schedulingProfiles", "dataLayer", "flowControl", "requestHandler")
    )
    assert outline(load_picker_config(config(**sections))) == {"default": ([], {}, "max-score-picker")}


def test_a_weight_that_does_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    use = [{"pluginRef": "decode-filter", "weight": 3}]
    load("decode-filter", schedulingProfiles=[{"name": "a", "plugins": use}])
    assert "the weight of decode-filter has no effect" in caplog.text


def test_a_plugin_that_nobody_uses_is_said(caplog: pytest.LogCaptureFixture) -> None:
    load("decode-filter", schedulingProfiles=[{"name": "a"}])
    assert "decode-filter is in no scheduling profile" in caplog.text


PROFILE = {"schedulingProfiles": [{"name": "a", "plugins": [{"pluginRef": "queue-scorer"}]}]}
TWO = {"schedulingProfiles": [{"name": "a"}, {"name": "b"}]}
SOURCE = {"dataLayer": {"sources": [{"pluginRef": "queue-scorer"}]}}
DEAF = {"dataLayer": {"sources": [{"pluginRef": "metrics-data-source"}]}}
CROSSED = {
    "dataLayer": {
        "sources": [
            {"pluginRef": "metrics-data-source", "extractors": [{"pluginRef": "models-data-extractor"}]}
        ]
    }
}


@pytest.mark.parametrize(
    ("types", "sections", "named"),
    [
        (
            ["queue-scorre"],
            {},
            r"plugins\[0\]: unknown plugin type 'queue-scorre'; did you mean queue-scorer",
        ),
        (["latency-scorre"], {}, r"did you mean latency-scorer"),
        ([], {"schedulingProfile": []}, "schedulingProfile`"),
        ([{"type": "queue-scorer", "params": {}}], {}, r"unknown field `params` - at `\$.plugins"),
        ([{"type": "load-aware-scorer", "parameters": {"treshold": 1}}], {}, r"plugins\[0\]: .*`treshold`"),
        ([{"type": "queue-scorer", "parameters": {"threshold": 1}}], {}, r"plugins\[0\]: .*`threshold`"),
        (["queue-scorer", "queue-scorer"], {}, r"plugins\[1\]: a second plugin called 'queue-scorer'"),
        ([], PROFILE, "schedulingProfiles 'a': no plugin is called 'queue-scorer'"),
        (["queue-scorer"], TWO, "several schedulingProfiles need a handler"),
        (["single-profile-handler"], TWO, "several schedulingProfiles need a handler"),
        (["single-profile-handler", "header-profile-handler"], {}, "more than one profile handler"),
        ([], {"schedulingProfiles": [{"name": "a"}, {"name": "a"}]}, r"schedulingProfiles\[1\]"),
        ([], {"schedulingProfiles": [{"name": ""}]}, r"schedulingProfiles\[0\]: has no name"),
        (["max-score-picker", "random-picker"], {}, "more than one picker"),
        (
            ["token-producer"],
            {"schedulingProfiles": [{"name": "a", "plugins": [{"pluginRef": "token-producer"}]}]},
            "token-producer is no filter, scorer or picker",
        ),
        ([], {"featureGates": ["flowControl"]}, "featureGates: flowControl is not available"),
        ([], {"featureGates": ["flowControl=TRUE"]}, "featureGates: flowControl is not available"),
        ([], {"featureGates": ["flowControl=maybe"]}, "featureGates: flowControl=maybe"),
        ([], {"featureGates": ["flowcontrol"]}, "unknown gate 'flowcontrol'; did you mean flowControl"),
        ([], {"flowControl": {"maxBytes": "1G"}}, "flowControl.maxBytes: .*not available"),
        ([], {"flowControl": {"saturationDetector": {"pluginRef": "x"}}}, "no plugin is called 'x'"),
        (
            ["queue-scorer"],
            {"saturationDetector": {"pluginRef": "queue-scorer"}},
            "is no saturation detector",
        ),
        (
            [],
            {"dataLayer": {"peerDiscovery": {"pluginRef": "x"}}},
            "dataLayer.peerDiscovery is not available",
        ),
        ([], {"dataLayer": {"crossReplicaSyncInterval": "1s"}}, "dataLayer.crossReplicaSyncInterval"),
        ([], {"dataLayer": {"discovery": {"pluginRef": "x"}}}, "dataLayer.discovery: no plugin"),
        (
            ["queue-scorer"],
            {"dataLayer": {"discovery": {"pluginRef": "queue-scorer"}}},
            "discovers no endpoints",
        ),
        (["queue-scorer"], SOURCE, "is no data source"),
        (["metrics-data-source"], DEAF, "has no extractors"),
        (["metrics-data-source", "models-data-extractor"], CROSSED, "cannot read"),
        ([{"type": "metrics-data-source", "name": "m"}], {}, "plugins: m is not in dataLayer.sources"),
        ([{"type": "file-discovery", "parameters": {"path": "/e"}}], {}, "is not dataLayer.discovery"),
        (["openai-parser"], {}, "openai-parser is not in requestHandler.parsers"),
        (
            ["passthrough-parser", "openai-parser"],
            {
                "requestHandler": {
                    "parsers": [{"pluginRef": "passthrough-parser"}, {"pluginRef": "openai-parser"}]
                }
            },
            "put it last",
        ),
        (["queue-scorer"], {"requestHandler": {"parsers": [{"pluginRef": "queue-scorer"}]}}, "is no parser"),
        (
            [{"type": "token-load-scorer", "parameters": {"inFlightLoadProducerName": "x"}}],
            {},
            "plugin token-load-scorer: no inflight-load-producer is called 'x'",
        ),
        (
            [
                "prefix-cache-scorer",
                {"type": "approx-prefix-cache-producer", "name": "a"},
                {"type": "approx-prefix-cache-producer", "name": "b"},
            ],
            {},
            "more than one approx-prefix-cache-producer is not available",
        ),
        (
            [{"type": "inflight-load-producer", "parameters": {"addEstimatedOutputTokens": True}}],
            {},
            "addEstimatedOutputTokens",
        ),
        (
            [{"type": "token-producer", "parameters": {"estimate": {"image": {"mode": "static"}}}}],
            {},
            "estimate.image.mode: .*not available",
        ),
        (
            [{"type": "token-producer", "parameters": {"estimate": {"picture": {}}}}],
            {},
            "estimate.picture: there is no such parameter",
        ),
        (
            [{"type": "metrics-data-source", "parameters": {"clientCertPath": "/c"}}],
            {},
            "clientCertPath, clientKeyPath: not available",
        ),
        ([{"type": "models-data-source", "parameters": {"path": "/models"}}], {}, "path: only /v1/models"),
        ([{"type": "session-id-producer"}], {}, "headerName, cookieName: give exactly one"),
    ],
)
def test_stops_and_names(types: list[Any], sections: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=f"^picker config: .*{named}"):
        load(*types, **sections)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("kind: EndpointPickerConfig", "apiVersion"),
        ("apiVersion: llm-d.ai/v1alpha1\nkind: InferencePool", "kind: 'InferencePool'"),
        ("apiVersion: llm-d.ai/v2\nkind: EndpointPickerConfig", "apiVersion: 'llm-d.ai/v2'"),
        ("a: [", "not YAML"),
        ("[]", "Expected `object`"),
    ],
)
def test_other_files_are_refused(text: str, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        load_picker_config(text)


def test_estimates_that_repeat_the_defaults_are_fine() -> None:
    estimate = {
        "image": {"mode": "dynamic", "defaultResolution": {"width": 640}},
        "video": {"defaultDuration": 10},
    }
    assert load({"type": "token-producer", "parameters": {"estimate": estimate}})
