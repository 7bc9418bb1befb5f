"""A real Envoy as gateways set it up, the picker it asks, and fake engines behind: what clients meet."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import gateway_envoy as envoy
import pytest

from pointsman.config import Settings, convert
from pointsman.extproc.picker import Picker
from pointsman.testing.client import ASK, RawClient, Response, message
from pointsman.testing.upstream import LAST_CHUNK, SSE_HEAD, FakeUpstream, Step, event, reply

PATIENCE_S = 10.0
USAGE = {"prompt_tokens": 7, "completion_tokens": 10, "total_tokens": 17}
STREAM = {"model": "m", "prompt": "Hello", "stream": True}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Site:
    """The module's Envoy: a port for each way of asking, and the picker's socket."""

    def __init__(self, folder: Path, ports: dict[str, int], listed: list[int]) -> None:
        self.socket = folder / "picker.sock"
        self.ports = ports
        self.listed = listed
        """Ports of 127.0.0.1 that the cluster of ``fallback`` knows."""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    listed = free_ports(2)
    listeners = [
        envoy.listener("full"),
        envoy.listener("buffered", request="BUFFERED"),
        envoy.listener("streamed", request="STREAMED", response="STREAMED", trailers="SKIP"),
        envoy.listener("headers", response="NONE"),
        envoy.listener("headers-only", response="NONE", trailers="SKIP"),
        envoy.listener("buffered-both", request="BUFFERED", response="BUFFERED", trailers="SKIP"),
        envoy.listener("subset", subset=["127.0.0.2:1"]),
        envoy.listener("no-subset", subset=[]),
        envoy.listener("fallback", "listed", retries=True),
    ]
    with tempfile.TemporaryDirectory(prefix="pointsman-") as name:
        folder = Path(name)
        with envoy.running(folder, folder / "picker.sock", listeners, listed) as ports:
            yield Site(folder, ports, listed)


class Behind:
    """A picker that runs, as a test asks of it."""

    def __init__(self, site: Site, picker: Picker) -> None:
        self._site = site
        self.picker = picker

    def client(self, listener: str = "full") -> RawClient:
        return RawClient(self._site.ports[listener])

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():  # noqa: ASYNC110 - others' numbers
                await asyncio.sleep(0.005)

    def in_flight(self) -> int:
        loads = [m.endpoint.load for m in self.picker.core.pool.members.values()]
        assert all(load.requests >= 0 and load.tokens >= 0 for load in loads)
        return sum(load.requests + load.tokens for load in loads)

    @property
    def outcomes(self) -> list[dict[str, Any]]:
        """Of decisions whose requests are over, the newest first."""
        return [found["outcome"] for found in self.picker.core.decisions.recent(1000)]

    async def over(self, count: int = 1) -> list[dict[str, Any]]:
        """So many requests have ended, and nothing is in flight."""
        await self.until(lambda: len(self.outcomes) >= count)
        assert self.in_flight() == 0
        assert len(self.outcomes) == count
        return self.outcomes


@asynccontextmanager
async def behind(
    site: Site, *upstreams: FakeUpstream, responses: str = "seen", **sections: Any
) -> AsyncIterator[Behind]:
    tree = {
        "endpoints": [{"url": upstream.url} for upstream in upstreams],
        "server": {"drain_s": 0.1, **sections.pop("server", {})},
        "admin": {"port": 0},
        "kv_events": {"mode": "none"},  # so that nothing but the test's requests comes to an engine
        "picker": {"socket": str(site.socket), "health_port": None, "responses": responses},
        "scheduling": {"preset": "round-robin", "seed": 1, **sections.pop("scheduling", {})},
        **sections,
    }
    picker = Picker(convert(tree, Settings, "test"), out=io.StringIO())
    async with picker.running():
        yield Behind(site, picker)


def sse(*events: object) -> list[Step]:
    return [
        SSE_HEAD,
        *map(event, events),
        event({"choices": [], "usage": USAGE}),
        event("[DONE]"),
        LAST_CHUNK,
    ]


WAYS = ["full", "buffered", "streamed", "headers", "buffered-both"]


@pytest.mark.parametrize("listener", WAYS)
async def test_requests_go_where_the_picker_says_and_end(site: Site, listener: str) -> None:
    async with FakeUpstream() as a, FakeUpstream() as b, behind(site, a, b) as gateway:
        async with gateway.client(listener) as client:
            for _ in range(4):
                response = await client.ask(ASK)
                assert response.status == 200
                assert response.headers["x-went-into-resp-headers"] == "true"
                assert json.loads(response.body)["object"] == "text_completion"
        assert (len(a.requests), len(b.requests)) == (2, 2)
        outcomes = await gateway.over(4)
        assert {(o["ending"], o["status"]) for o in outcomes} == {("ok", 200)}
        if listener != "headers":
            assert {o["usage"]["prompt_tokens"] for o in outcomes} == {8}
        head = a.requests[0].headers
        assert head["x-gateway-destination-endpoint"] == a.name
        assert json.loads(a.requests[0].body)["prompt"] == "Hello"


async def test_a_stream_comes_piece_by_piece_and_its_usage_is_known(site: Site) -> None:
    gate = asyncio.Event()
    async with (
        FakeUpstream([SSE_HEAD, event("one"), gate, *sse()[1:]]) as engine,
        behind(site, engine) as gateway,
    ):
        async with gateway.client() as client:
            client.send(message(body=STREAM))
            assert (await client.head()).status == 200
            assert b"one" in await client.line(b"one")
            assert gateway.in_flight() == 1
            gate.set()
            assert b"[DONE]" in await client.line(b"[DONE]")
        (outcome,) = await gateway.over()
        assert (outcome["ending"], outcome["usage"]["output_tokens"]) == ("ok", 10)
        assert 0 < outcome["ttft_s"] <= outcome["duration_s"]


@pytest.mark.parametrize("responses", ["seen", "unseen"])
@pytest.mark.parametrize("listener", ["full", "buffered"])
@pytest.mark.parametrize("size", [64 << 10, 8 << 20])
async def test_large_bodies_arrive_whole(site: Site, listener: str, size: int, responses: str) -> None:
    body = json.dumps({"model": "m", "prompt": "x" * size}).encode()
    async with FakeUpstream() as engine, behind(site, engine, responses=responses) as gateway:
        engine.script = lambda request: [reply(b"y" * size)]
        async with gateway.client(listener) as client:
            response = await client.ask(message("POST", "/v1/completions", body))
        assert (response.status, len(response.body)) == (200, size)
        (request,) = engine.requests
        assert request.body == body
        assert ("content-length" in request.headers) == (listener == "buffered")
        (outcome,) = await gateway.over()
        assert outcome["request_bytes"] == len(body)


async def test_a_request_without_a_body_goes_anywhere(site: Site) -> None:
    async with FakeUpstream() as engine, behind(site, engine) as gateway:
        async with gateway.client() as client:
            response = await client.ask(message("GET", "/v1/models"))
            assert (response.status, json.loads(response.body)["data"][0]["id"]) == (200, "m")
        assert gateway.in_flight() == 0


@pytest.mark.parametrize(
    ("listener", "responses"), [("full", "seen"), ("headers", "seen"), ("full", "unseen")]
)
async def test_a_client_that_leaves_frees_engine_and_picker(
    site: Site, listener: str, responses: str
) -> None:
    never = asyncio.Event()
    async with (
        FakeUpstream([SSE_HEAD, event("one"), never]) as engine,
        behind(site, engine, responses=responses) as gateway,
    ):
        async with gateway.client(listener) as client:
            client.send(message(body=STREAM))
            await client.line(b"one")
            assert gateway.in_flight() > 0
            client.leave()
        await asyncio.wait_for(engine.requests[0].gone.wait(), PATIENCE_S)
        (outcome,) = await gateway.over()
        if listener == "full":
            assert outcome["ending"] == "cancelled"


async def test_what_cannot_be_served_is_said_at_once(site: Site) -> None:
    async with FakeUpstream() as engine, behind(site, engine) as gateway:

        async def ask(data: bytes) -> Response:
            async with gateway.client() as client:
                return await client.ask(data)

        response = await ask(message("POST", "/v1/completions", b"{"))
        assert (response.status, engine.requests) == (400, [])
        assert response.body.startswith(b"inference error: BadRequest - Invalid JSON")
        gateway.picker.core.pool.drain(engine.name)
        response = await ask(ASK)
        assert (response.status, engine.requests) == (503, [])
        assert response.headers["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
        response = await ask(message("GET", "/v1/models"))
        assert (response.status, response.body) == (
            500,
            b"inference error: Internal - no pods available in datastore",
        )
        gateway.picker.core.pool.drain(engine.name, False)
        engine.script = [reply(b'{"error": {}}', 404)]
        assert (await ask(ASK)).status == 404
        (outcome,) = await gateway.over()
        assert (outcome["ending"], outcome["status"]) == ("error", 404)


FULL = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: utilization-filter
  parameters: {conditions: [{metric: active-requests, maxValue: 0}]}
- type: random-picker
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: utilization-filter}
  - {pluginRef: random-picker}
"""


async def test_a_full_pool_is_429_with_its_reason(site: Site, tmp_path: Path) -> None:
    (tmp_path / "full.yaml").write_text(FULL)
    gate = asyncio.Event()
    policy = {"picker_config": str(tmp_path / "full.yaml")}
    async with FakeUpstream([gate, reply()]) as engine, behind(site, engine, scheduling=policy) as gateway:
        async with gateway.client() as first, gateway.client() as second:
            first.send(ASK)
            await gateway.until(lambda: engine.requests)
            response = await second.ask(ASK)
            assert response.status == 429
            assert response.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"
            gate.set()
            assert (await first.response()).status == 200
        await gateway.over()


async def test_only_the_endpoints_that_the_gateway_names_get_requests(site: Site) -> None:
    async with FakeUpstream() as a, FakeUpstream(host="127.0.0.2") as b, behind(site, a, b) as gateway:
        async with gateway.client("subset") as client:
            for _ in range(3):
                assert (await client.ask(ASK)).status == 200
            assert (await client.ask(message("GET", "/v1/models"))).status == 200
        assert (len(a.requests), len(b.requests)) == (0, 3)
        async with gateway.client("no-subset") as client:
            response = await client.ask(ASK)
            assert response.status == 503
            assert response.headers["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"


SEVERAL = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: running-requests-size-scorer
- type: max-score-picker
  parameters: {maxNumOfEndpoints: 2}
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: running-requests-size-scorer}
  - {pluginRef: max-score-picker}
"""


async def test_when_the_chosen_endpoint_is_dead_the_fallback_answers_and_counts(
    site: Site, tmp_path: Path
) -> None:
    (tmp_path / "several.yaml").write_text(SEVERAL)
    dead, alive = FakeUpstream(), FakeUpstream()
    dead.port, alive.port = site.listed
    dead.page = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0\n"
    alive.page = dead.page.replace(b"running 0", b"running 5")
    policy = {"picker_config": str(tmp_path / "several.yaml")}
    metrics = {"interval_s": 60.0, "idle_interval_s": 60.0}
    async with alive:
        await dead.start()
        async with behind(
            site, dead, alive, responses="unseen", scheduling=policy, metrics=metrics
        ) as gateway:
            await dead.stop()
            async with gateway.client("fallback") as client:
                response = await client.ask(ASK)
            assert response.status == 200
            (request,) = alive.requests
            assert request.headers["x-gateway-destination-endpoint"] == f"{dead.name},{alive.name}"
            (outcome,) = await gateway.over()
            assert (outcome["ending"], outcome["endpoint"], outcome["tries"]) == ("ok", alive.name, 2)


@pytest.mark.parametrize("listener", ["full", "buffered", "buffered-both"])
async def test_the_endpoint_sees_the_rewritten_model_and_the_client_its_own(
    site: Site, listener: str
) -> None:
    async with (
        FakeUpstream([reply(b'{"model":"target","choices":[]}')]) as engine,
        behind(site, engine) as gateway,
    ):
        async with gateway.client(listener) as client:
            response = await client.ask(
                message(*POST, {"model": "mine"}, "x-llm-d-model-name-rewrite: target")
            )
        assert (response.status, response.body) == (200, b'{"model":"mine","choices":[]}')
        (request,) = engine.requests
        assert json.loads(request.body) == {"model": "target"}
        assert "x-llm-d-model-name-rewrite" not in request.headers
        await gateway.over()


POST = ("POST", "/v1/completions")


async def test_a_client_s_own_destination_and_steering_do_not_reach_the_endpoint(site: Site) -> None:
    async with FakeUpstream() as engine, behind(site, engine) as gateway:
        lines = (
            "x-gateway-destination-endpoint: 127.0.0.1:1",
            "x-llm-d-inference-objective: vip",
            "x-slo-ttft-ms: 5",
        )
        async with gateway.client() as client:
            response = await client.ask(message(*POST, {"model": "m", "prompt": "a"}, *lines))
        assert response.status == 200
        headers = engine.requests[0].headers
        assert headers["x-gateway-destination-endpoint"] == engine.name
        assert not {"x-llm-d-inference-objective", "x-slo-ttft-ms"} & set(headers)


@pytest.mark.parametrize("listener", ["full", "buffered", "headers", "headers-only"])
async def test_unseen_streams_end_by_the_access_log(site: Site, listener: str) -> None:
    gate = asyncio.Event()
    async with (
        FakeUpstream([SSE_HEAD, event("one"), gate, *sse()[1:]]) as engine,
        behind(site, engine, responses="unseen") as gateway,
        gateway.client(listener) as client,
    ):
        client.send(message(body=STREAM))
        await client.line(b"one")
        assert gateway.in_flight() > 0
        gate.set()
        await client.line(b"[DONE]")
        (outcome,) = await gateway.over()
        assert (outcome["ending"], outcome["status"]) == ("ok", 200)
        assert 0 < outcome["duration_s"] < PATIENCE_S


async def test_headers_only_and_seen_streams_end_by_the_access_log_as_well(site: Site) -> None:
    gate = asyncio.Event()
    async with (
        FakeUpstream([SSE_HEAD, event("one"), gate, *sse()[1:]]) as engine,
        behind(site, engine) as gateway,
        gateway.client("headers-only") as client,
    ):
        client.send(message(body=STREAM))
        await client.line(b"one")
        await gateway.until(lambda: len(gateway.picker.front.completions))
        assert gateway.in_flight() > 0
        gate.set()
        await client.line(b"[DONE]")
        (outcome,) = await gateway.over()
        assert (outcome["ending"], outcome["status"]) == ("ok", 200)


async def test_an_unseen_stream_outlives_the_picker_and_the_next_one_goes_on(site: Site) -> None:
    gate = asyncio.Event()
    async with (
        FakeUpstream([SSE_HEAD, event("one"), gate, *sse()[1:]]) as engine,
        RawClient(site.ports["full"]) as client,
    ):
        async with behind(site, engine, responses="unseen", server={"drain_s": 0.0}):
            client.send(message(body=STREAM))
            await client.line(b"one")
        async with behind(site, engine, responses="unseen") as gateway:
            gate.set()
            assert b"[DONE]" in await client.line(b"[DONE]")
            await client.line(LAST_CHUNK)
            engine.script = sse()
            async with gateway.client() as other:
                other.send(message(body=STREAM))
                await other.line(b"[DONE]")
            await gateway.over()
