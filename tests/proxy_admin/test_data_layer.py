"""What an EndpointPickerConfig says about metrics pages and discovery is what happens."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pointsman.config import Discovery, MetricsSettings
from pointsman.config import Endpoint as Settings
from pointsman.endpoints.metrics.source import PageSource
from pointsman.endpoints.target import targets_of
from pointsman.errors import SettingsError
from pointsman.proxy.application import Application
from pointsman.proxy.data_layer import discovery_settings, metrics_settings, page_source
from pointsman.scheduling.picker_config import LoadedConfig, load_picker_config
from pointsman.testing.client import RawClient
from pointsman.testing.serving import endpoints, serving, settings, until
from pointsman.testing.upstream import FakeUpstream

VLLM = b"# a page\nvllm:num_requests_running 2\nvllm:num_requests_waiting 1\n"


def picker(*plugins: Mapping[str, Any], **layer: Any) -> str:
    """A configuration with these plugins, those of the data layer used by name, and a blend's scorer."""
    tree: dict[str, Any] = {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [{"type": "queue-scorer"}, *plugins],
    }
    return json.dumps(tree | ({"dataLayer": layer} if layer else {}))


def load(*plugins: Mapping[str, Any], **layer: Any) -> LoadedConfig:
    return load_picker_config(picker(*plugins, **layer))


def source(**parameters: Any) -> dict[str, Any]:
    return {"type": "metrics-data-source", "parameters": parameters}


def extractor(**parameters: Any) -> dict[str, Any]:
    return {"type": "core-metrics-extractor", "parameters": parameters}


def pages(*plugins: Mapping[str, Any]) -> PageSource:
    found = page_source(load(*plugins))
    assert found
    return found


def target(url: str, **fields: Any) -> Any:
    return targets_of(Settings(url=url, **fields))[0]


@asynccontextmanager
async def routed(folder: Path, config: str, *listed: Any, **sections: Any) -> AsyncIterator[Application]:
    path = folder / "epp.yaml"
    path.write_text(config)
    async with serving(*listed, scheduling={"picker_config": str(path)}, **sections) as app:
        yield app


class TestPages:
    def test_without_a_word_ours_are_read_as_always(self) -> None:
        found = page_source(load())
        assert found
        assert found.engines[0].engine == "vllm", "llm-d's default comes first"
        assert found.url(target("http://a:1/base")).prefix == "/base/metrics"
        assert metrics_settings(load(), MetricsSettings()) == MetricsSettings()

    def test_path_and_scheme(self) -> None:
        found = pages(source(path="/stats/", scheme="https"))
        url = found.url(target("http://a:1/base"))
        assert (url.tls, url.host, url.port, url.prefix) == (True, "a", 1, "/base/stats")

    def test_http_is_no_way_around_an_endpoints_tls(self) -> None:
        assert pages(source(scheme="http")).url(target("https://a")).tls

    def test_an_endpoints_own_page_comes_first(self) -> None:
        url = pages(source(path="/stats", scheme="https")).url(target("http://a", metrics_url="http://b:2/m"))
        assert (url.tls, url.authority, url.prefix) == (False, "b:2", "/m")

    def test_interval(self) -> None:
        assert metrics_settings(load(source(interval="200ms")), MetricsSettings()).interval_s == 0.2
        assert metrics_settings(load(source(interval="1ms")), MetricsSettings()).interval_s == 0.05

    @pytest.mark.parametrize(
        ("parameters", "fields", "verifies"),
        [
            ({}, {}, False),
            ({"insecureSkipVerify": False}, {}, True),
            ({}, {"api_key": "secret"}, True),
            ({}, {"headers": {"x": "y"}}, True),
            ({"insecureSkipVerify": False}, {"tls_verify": False}, False),
        ],
    )
    def test_certificates_go_unchecked_as_in_llm_d_but_not_where_credentials_are_sent(
        self, parameters: dict[str, Any], fields: dict[str, Any], verifies: bool
    ) -> None:
        access = pages(source(**parameters)).access(target("https://a", **fields))
        assert access.tls_verify is verifies

    def test_ca(self) -> None:
        found = pages(source(caCertPath="/ca.pem", insecureSkipVerify=False))
        assert found.access(target("https://a")).tls_ca == "/ca.pem"

    async def test_it_is_read_there(self, tmp_path: Path) -> None:
        async with FakeUpstream() as engine:
            engine.page = VLLM
            config = picker(source(path="/deep/metrics"))
            async with routed(tmp_path, config, engine) as app:
                assert (await endpoints(app))[engine.name]["metrics"]["running"] == 2.0
            assert {p.target for p in engine.probes} == {"/deep/metrics", "/v1/models"}


class TestNoPages:
    def test_none_are_read(self) -> None:
        assert page_source(load(injectDefaults=False)) is None

    async def test_requests_are_served_all_the_same(self, tmp_path: Path) -> None:
        async with FakeUpstream() as engine:
            engine.page = VLLM
            config = picker(injectDefaults=False)
            async with routed(tmp_path, config, engine) as app, RawClient(app.port) as client:
                assert (await client.ask()).status == 200
                assert (await endpoints(app))[engine.name]["models"] == ["m"]
            assert {p.target for p in engine.probes} == {"/v1/models"}


MINE = {
    "name": "mine",
    "queuedRequestsSpec": "my_queue",
    "runningRequestsSpec": "my_running{kind=all}",
    "kvUsageSpec": "my_kv",
    "loraSpec": "my_lora",
    "cacheInfoSpec": "my_cache",
    "cacheBlockSizeLabelName": "size",
    "cacheNumBlocksLabelName": "count",
    "customMetrics": [{"attributeKey": "heat", "metricSpec": "gpu_heat{gpu=0}"}],
}
MY_PAGE = (
    b'# mine\nmy_queue 3\nmy_running{kind="all"} 4\nmy_running{kind="old"} 9\nmy_kv 0.5\n'
    b'gpu_heat{gpu="0"} 71\n'
    b'my_lora{max_lora="2",running_lora_adapters="x"} 1\nmy_cache{size="16",count="10"} 1\n'
)


class TestEngines:
    async def test_one_of_its_own_is_recognised_and_its_custom_metrics_are_attributes(
        self, tmp_path: Path
    ) -> None:
        async with FakeUpstream() as engine:
            engine.page = MY_PAGE
            async with routed(tmp_path, picker(extractor(engineConfigs=[MINE])), engine) as app:
                (found,) = app.pool.candidates("m")
                metrics = found.metrics
        assert found.engine == "mine"
        assert (metrics.waiting, metrics.running, metrics.kv_usage) == (3.0, 4.0, 0.5)
        assert (metrics.block_tokens, metrics.kv_blocks) == (16, 10)
        assert metrics.loras_active == {"x"}
        assert metrics.attributes == {"heat": 71.0}

    async def test_a_custom_metric_decides_where_a_request_goes(self, tmp_path: Path) -> None:
        filter_ = {
            "type": "endpoint-attribute-filter",
            "parameters": {
                "attribute": "heat",
                "algorithm": {"type": "threshold", "threshold": {"operator": "LessThan", "value": 80}},
            },
        }
        async with FakeUpstream() as hot, FakeUpstream() as cool:
            hot.page, cool.page = MY_PAGE.replace(b" 71", b" 99"), MY_PAGE
            config = picker(extractor(engineConfigs=[MINE]), filter_)
            async with routed(tmp_path, config, hot, cool) as app, RawClient(app.port) as client:
                for _ in range(8):
                    assert (await client.ask()).status == 200
        assert (len(hot.requests), len(cool.requests)) == (0, 8)

    def test_a_replaced_one_keeps_what_llm_d_has_no_words_for(self) -> None:
        changed = {"name": "vllm", "queuedRequestsSpec": "q", "runningRequestsSpec": "r"}
        vllm = pages(extractor(engineConfigs=[changed])).engines[0]
        assert (vllm.engine, vllm.waiting, vllm.running, vllm.kv_usage) == ("vllm", "q", "r", "")
        assert vllm.prefix_hits == "vllm:prefix_cache_hits_total"

    def test_a_page_that_fits_several_is_the_defaults(self) -> None:
        twin = {"name": "twin", "runningRequestsSpec": "vllm:num_requests_running"}
        for default in ("vllm", "twin"):
            found = pages(extractor(engineConfigs=[twin], defaultEngine=default))
            assert found.engines[0].engine == default

    @pytest.mark.parametrize(
        ("parameters", "label", "engine"),
        [
            ({}, "llm-d.ai/engine-type", "sglang"),
            ({}, "inference.networking.k8s.io/engine-type", "sglang"),
            ({"engineLabelKey": "engine"}, "engine", "sglang"),
            ({"engineLabelKey": "engine"}, "llm-d.ai/engine-type", "vllm"),
        ],
    )
    async def test_an_endpoints_label_names_it(
        self, parameters: dict[str, Any], label: str, engine: str, tmp_path: Path
    ) -> None:
        async with FakeUpstream() as upstream:
            upstream.page = VLLM + b"sglang:num_running_reqs 7\n"
            listed = {"url": upstream.url, "labels": {label: "sglang"}}
            async with routed(tmp_path, picker(extractor(**parameters)), listed) as app:
                assert (await endpoints(app))[upstream.name]["engine"] == engine

    @pytest.mark.parametrize(
        ("parameters", "says"),
        [
            ({"defaultEngine": "vlllm"}, "unknown engine 'vlllm'; did you mean vllm?"),
            ({"engineConfigs": [{"name": "x"}]}, "engineConfigs 'x': needs runningRequestsSpec"),
        ],
    )
    def test_what_cannot_be_is_named(self, parameters: dict[str, Any], says: str) -> None:
        with pytest.raises(SettingsError) as raised:
            pages(extractor(**parameters))
        assert says in raised.value.message


def discovery(path: Path | str, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    plugin = {"type": "file-discovery", "parameters": {"path": str(path), **parameters}}
    return plugin, {"discovery": {"pluginRef": "file-discovery"}}


class TestDiscovery:
    def test_without_it_the_settings_count(self) -> None:
        assert discovery_settings(load(), Discovery(file="x")) == Discovery(file="x")

    def test_two_files_are_one_too_many(self) -> None:
        plugin, layer = discovery("b.yaml")
        with pytest.raises(SettingsError, match="keep one of them"):
            discovery_settings(load(plugin, **layer), Discovery(file="a.yaml"))

    @pytest.mark.parametrize("watch", [False, True])
    async def test_its_endpoints_are_served_and_watched_only_if_it_says_so(
        self, watch: bool, tmp_path: Path
    ) -> None:
        async with FakeUpstream() as a, FakeUpstream() as b:
            path = tmp_path / "endpoints.yaml"

            def write(*upstreams: FakeUpstream) -> None:
                entries = [{"address": "127.0.0.1", "port": u.port} for u in upstreams]
                path.write_text(json.dumps({"endpoints": entries}))

            write(a)
            plugin, layer = discovery(path, **({"watchFile": True} if watch else {}))
            config = picker(plugin, **layer)
            async with routed(tmp_path, config, discovery={"file_interval_s": 0.01}) as app:
                async with RawClient(app.port) as client:
                    assert (await client.ask()).status == 200
                write(a, b)

                async def both() -> bool:
                    return set(await endpoints(app)) == {a.name, b.name}

                if watch:
                    await until(both)
                else:
                    with pytest.raises(AssertionError, match="never"):
                        await until(both, tries=50)


def test_no_endpoints_from_anywhere_stops_start_up() -> None:
    with pytest.raises(SettingsError, match="name at least one"):
        Application(settings())
