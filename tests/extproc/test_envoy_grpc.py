"""vLLM's gRPC API through a real Envoy, as an InferencePool with appProtocol kubernetes.io/h2c sets it up: a
client and an engine of grpc.aio.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import gateway_envoy as envoy
import grpc
import pytest
from test_envoy_picker import PATIENCE_S, Behind, Site, behind

from pointsman.api.vllm_grpc import EMBED, GENERATE, SERVICE
from pointsman.testing.upstream import FakeUpstream
from pointsman.testing.vllm_grpc import message, read

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
COUNTS = {"prompt_tokens": 3, "completion_tokens": 1, "cached_tokens": 2}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    listeners = [
        envoy.listener("grpc", "original_dst_h2c"),
        envoy.listener("grpc-buffered", "original_dst_h2c", request="BUFFERED"),
    ]
    with tempfile.TemporaryDirectory(prefix="pointsman-") as name:
        folder = Path(name)
        with envoy.running(folder, folder / "picker.sock", listeners, [1]) as ports:
            yield Site(folder, ports, [])


class Engine(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers as vLLM's gRPC server does, in three tokens."""

    def __init__(self) -> None:
        self.port = 0
        self.asked: list[Any] = []
        self.gate = asyncio.Event()
        """A stream's second token waits for it."""
        self.gate.set()
        self.left = asyncio.Event()
        """A client has left in the middle."""
        self.fails: grpc.StatusCode | None = None

    def service(self, details: Any) -> Any:
        if details.method == GENERATE:
            return grpc.unary_stream_rpc_method_handler(self._generate)
        if details.method == EMBED:
            return grpc.unary_unary_rpc_method_handler(self._embed)
        if details.method == SERVICE + "HealthCheck":
            return grpc.unary_unary_rpc_method_handler(self._health)
        return None

    async def _generate(self, data: bytes, context: Any) -> AsyncIterator[bytes]:
        request = read("GenerateRequest", data)
        self.asked.append(request)
        if self.fails is not None:
            await context.abort(self.fails, "as told")
        try:
            for token in range(3) if request.stream else ():
                if token == 1:
                    await self.gate.wait()
                chunk = message("GenerateResponse", chunk={"token_ids": [token], **COUNTS})
                yield chunk.SerializeToString()
        except asyncio.CancelledError:
            self.left.set()
            raise
        said = {"finish_reason": "stop", **COUNTS, "completion_tokens": 3}
        context.set_trailing_metadata((("x-engine", "done"),))
        yield message("GenerateResponse", complete={"output_ids": range(3), **said}).SerializeToString()

    async def _embed(self, data: bytes, context: Any) -> bytes:
        self.asked.append(read("EmbedRequest", data))
        return message("EmbedResponse", embedding=[0.5] * 1024, prompt_tokens=3).SerializeToString()

    async def _health(self, data: bytes, context: Any) -> bytes:
        return message("HealthCheckResponse", healthy=True).SerializeToString()


@asynccontextmanager
async def running(
    site: Site, engine: Engine, responses: str = "seen", **sections: Any
) -> AsyncIterator[Behind]:
    """The engine, its metrics page, and the picker."""
    server = grpc.aio.server(options=UNLIMITED)
    server.add_generic_rpc_handlers((engine,))
    engine.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with FakeUpstream() as page:
            page.page = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
            endpoint = {"url": f"http://127.0.0.1:{engine.port}", "metrics_url": f"{page.url}/metrics"}
            async with behind(site, responses=responses, endpoints=[endpoint], **sections) as gateway:
                yield gateway
    finally:
        await server.stop(0)


def channel(site: Site, listener: str = "grpc") -> Any:
    return grpc.aio.insecure_channel(f"127.0.0.1:{site.ports[listener]}", options=UNLIMITED)


def request(ids: range = range(3), *, stream: bool = True) -> bytes:
    return message("GenerateRequest", tokenized={"input_ids": ids}, stream=stream).SerializeToString()


@pytest.mark.parametrize("listener", ["grpc", "grpc-buffered"])
@pytest.mark.parametrize("responses", ["seen", "unseen"])
async def test_a_stream_comes_message_by_message_and_ends_with_its_trailers(
    site: Site, listener: str, responses: str
) -> None:
    engine = Engine()
    engine.gate.clear()
    async with running(site, engine, responses) as gateway, channel(site, listener) as client:
        call = client.unary_stream(GENERATE)(request())
        first = read("GenerateResponse", await call.read())
        assert list(first.chunk.token_ids) == [0]
        assert gateway.in_flight() > 0
        engine.gate.set()
        rest = [read("GenerateResponse", await call.read()) for _ in range(3)]
        assert [list(r.chunk.token_ids) for r in rest[:2]] == [[1], [2]]
        assert rest[2].complete.finish_reason == "stop"
        assert await call.read() is grpc.aio.EOF
        assert ("x-engine", "done") in tuple(await call.trailing_metadata())
        assert await call.code() is grpc.StatusCode.OK
        (outcome,) = await gateway.over()
        assert (outcome["ending"], outcome["status"]) == ("ok", 200)
        if responses == "seen":
            usage = outcome["usage"]
            assert (usage["prompt_tokens"], usage["output_tokens"], usage["cached_tokens"]) == (3, 3, 2)
    assert list(engine.asked[0].tokenized.input_ids) == [0, 1, 2]


@pytest.mark.parametrize("responses", ["seen", "unseen"])
async def test_whole_answers_embeddings_and_health(site: Site, responses: str) -> None:
    engine = Engine()
    async with running(site, engine, responses) as gateway, channel(site) as client:
        (whole,) = [
            read("GenerateResponse", m) async for m in client.unary_stream(GENERATE)(request(stream=False))
        ]
        assert list(whole.complete.output_ids) == [0, 1, 2]
        asked = message("EmbedRequest", tokenized={"input_ids": [7, 8, 9]}).SerializeToString()
        embedding = read("EmbedResponse", await client.unary_unary(EMBED)(asked))
        assert len(embedding.embedding) == 1024
        health = await client.unary_unary(SERVICE + "HealthCheck")(b"")
        assert read("HealthCheckResponse", health).healthy
        outcomes = await gateway.over(3)
        assert {o["ending"] for o in outcomes} == {"ok"}
        if responses == "seen":
            assert [o["usage"]["prompt_tokens"] for o in outcomes] == [None, 3, 3]
    assert list(engine.asked[1].tokenized.input_ids) == [7, 8, 9]


@pytest.mark.parametrize("responses", ["seen", "unseen"])
async def test_an_engine_s_refusal_reaches_the_client_and_is_how_it_ended(site: Site, responses: str) -> None:
    engine = Engine()
    engine.fails = grpc.StatusCode.RESOURCE_EXHAUSTED
    async with running(site, engine, responses) as gateway, channel(site) as client:
        call = client.unary_stream(GENERATE)(request())
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await call.details() == "as told"
        (outcome,) = await gateway.over()
        assert (outcome["ending"], outcome["status"]) == ("error", 429)


async def test_the_picker_s_own_refusals_are_grpc_s(site: Site) -> None:
    engine = Engine()
    async with running(site, engine) as gateway, channel(site) as client:

        async def refused(data: bytes) -> tuple[grpc.StatusCode, str]:
            call = client.unary_unary(EMBED)(data)
            return await call.code(), await call.details()

        code, text = await refused(b"\xff")
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "Invalid gRPC message" in text
        gateway.picker.core.pool.drain(f"127.0.0.1:{engine.port}")
        assert (await refused(b""))[0] is grpc.StatusCode.UNAVAILABLE
    assert engine.asked == []


async def test_a_large_prompt_arrives_whole(site: Site) -> None:
    engine, ids = Engine(), range(1_000_000)
    async with running(site, engine) as gateway, channel(site) as client:
        async with asyncio.timeout(PATIENCE_S):
            answers = [m async for m in client.unary_stream(GENERATE)(request(ids))]
        assert len(answers) == 4
        await gateway.over()
        (decision,) = gateway.picker.core.decisions.recent(1)
        assert decision["prompt_tokens"] == len(ids)
    assert list(engine.asked[0].tokenized.input_ids) == list(ids)


@pytest.mark.parametrize("responses", ["seen", "unseen"])
async def test_a_client_that_leaves_frees_engine_and_picker(site: Site, responses: str) -> None:
    engine = Engine()
    engine.gate.clear()
    async with running(site, engine, responses) as gateway, channel(site) as client:
        call = client.unary_stream(GENERATE)(request())
        await call.read()
        assert gateway.in_flight() > 0
        call.cancel()
        await asyncio.wait_for(engine.left.wait(), PATIENCE_S)
        (outcome,) = await gateway.over()
        assert outcome["ending"] == "cancelled"


CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: vllmgrpc-parser
- type: random-picker
schedulingProfiles:
- name: default
  plugins: [{pluginRef: random-picker}]
requestHandler:
  parsers: [{pluginRef: vllmgrpc-parser}]
"""


async def test_llm_d_s_parser_reads_these_calls_and_no_others(site: Site, tmp_path: Path) -> None:
    (tmp_path / "epp.yaml").write_text(CONFIG)
    policy = {"picker_config": str(tmp_path / "epp.yaml")}
    async with running(site, Engine(), scheduling=policy) as gateway, channel(site) as client:
        assert len([m async for m in client.unary_stream(GENERATE)(request())]) == 4
        (outcome,) = await gateway.over()
        assert outcome["usage"]["output_tokens"] == 3
        other = client.unary_unary("/other.Service/Call")(b"")
        assert await other.code() is grpc.StatusCode.INVALID_ARGUMENT
