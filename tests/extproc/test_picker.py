"""The whole picker over gRPC: a client that is not ours, our server and grpc.aio's under the same core."""

from __future__ import annotations

import asyncio
import io
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from pointsman.config import Settings, convert
from pointsman.extproc.picker import Picker
from pointsman.extproc.port import HEALTH_NAMES, PROCESS
from pointsman.testing import aio_peer
from pointsman.testing.picking import CHAT, bodies, destination, headers_set
from pointsman.testing.serving import admin, until
from pointsman.testing.upstream import FakeUpstream

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello"}]}).encode()
HEALTH = "/grpc.health.v1.Health/Check"


def settings(*upstreams: FakeUpstream, **picker: Any) -> Settings:
    given = {"host": "127.0.0.1", "port": 0, "health_port": 0, "tls": False, "responses": "seen", **picker}
    tree = {
        "endpoints": [{"url": upstream.url} for upstream in upstreams],
        "server": {"drain_s": 0.5},
        "admin": {"port": 0},
        "kv_events": {"mode": "none"},
        "picker": given,
        "scheduling": {"preset": "round-robin", "seed": 1},
    }
    return convert(tree, Settings, "test")


@asynccontextmanager
async def picking(
    *upstreams: FakeUpstream, out: io.StringIO | None = None, **picker: Any
) -> AsyncIterator[Picker]:
    async with Picker(settings(*upstreams, **picker), out=out or io.StringIO()).running() as running:
        yield running


class Client:
    """A gateway that speaks to the picker by grpc.aio."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def tell(self, message: pb.ProcessingRequest) -> None:
        await self.call.write(message.SerializeToString())

    async def hear(self) -> pb.ProcessingResponse:
        """The next answer."""
        read = await self.call.read()
        assert read is not grpc.aio.EOF, "the picker has ended the stream"
        return pb.ProcessingResponse.FromString(read)

    async def end(self) -> grpc.StatusCode:
        """The picker says no more, and ends the stream with this."""
        assert await self.call.read() is grpc.aio.EOF
        return await self.call.code()

    async def head(self, path: str = CHAT, *, end: bool = False, **headers: str) -> None:
        message = pb.ProcessingRequest()
        for name, value in {":path": path, ":method": "POST", **headers}.items():
            header = message.request_headers.headers.headers.add()
            header.key, header.raw_value = name.replace("_", "-"), value.encode()
        message.request_headers.end_of_stream = end
        message.protocol_config.request_body_mode = message.protocol_config.response_body_mode = 4
        await self.tell(message)

    async def body(self, data: bytes, end: bool = True) -> None:
        await self.tell(pb.ProcessingRequest(request_body=pb.HttpBody(body=data, end_of_stream=end)))

    async def reply_head(self, **headers: str) -> None:
        message = pb.ProcessingRequest()
        for name, value in {":status": "200", **headers}.items():
            header = message.response_headers.headers.headers.add()
            header.key, header.raw_value = name.replace("_", "-"), value.encode()
        await self.tell(message)

    async def reply(self, data: bytes, end: bool = True) -> None:
        await self.tell(pb.ProcessingRequest(response_body=pb.HttpBody(body=data, end_of_stream=end)))


@asynccontextmanager
async def channel(port: int, **secure: Any) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=aio_peer.OPTIONS) as opened:
        yield opened


def stream(opened: grpc.aio.Channel) -> Client:
    return Client(opened.stream_stream(PROCESS)())


async def in_flight(picker: Picker) -> int:
    answer = json.loads((await admin(picker, "/endpoints")).body)  # type: ignore[arg-type]  # it has the port
    return sum(e["in_flight"]["requests"] for e in answer["endpoints"])


@pytest.fixture(params=["ours", "grpc.aio"])
async def served(
    request: pytest.FixtureRequest,
) -> AsyncIterator[tuple[Picker, grpc.aio.Channel, FakeUpstream]]:
    """A picker, and a channel to its processor on either server."""
    async with FakeUpstream() as upstream, picking(upstream) as picker:
        if request.param == "ours":
            async with channel(picker.port) as opened:
                yield picker, opened, upstream
        else:
            services = {PROCESS: picker.front.processor}
            async with aio_peer.serving(services) as port, channel(port) as opened:
                yield picker, opened, upstream


Served = tuple[Picker, grpc.aio.Channel, FakeUpstream]


async def test_a_request_and_its_streamed_response_pass(served: Served) -> None:
    picker, opened, upstream = served
    client = stream(opened)
    await client.head(x_request_id="r1")
    await client.body(BODY[:10], end=False)
    await client.body(BODY[10:])
    answers = [await client.hear() for _ in range(2)]
    assert destination(answers[0]) == upstream.name
    assert bodies(answers) == [(BODY, True)]
    assert await in_flight(picker) == 1
    await client.reply_head(content_type="text/event-stream")
    head = await client.hear()
    assert headers_set(head)["x-went-into-resp-headers"] == "true"
    for i in range(5):
        piece = b"data: %d\n\n" % i
        await client.reply(piece, end=i == 4)
        answer = await client.hear()
        assert bodies([answer], "response_body") == [(piece, i == 4)]
    await client.call.done_writing()
    assert await client.end() == grpc.StatusCode.OK
    assert await in_flight(picker) == 0


async def test_a_client_that_leaves_frees_its_place(served: Served) -> None:
    picker, opened, _ = served
    client = stream(opened)
    await client.head()
    await client.body(BODY)
    await client.hear()
    assert await in_flight(picker) == 1
    client.call.cancel()

    async def gone() -> bool:
        return await in_flight(picker) == 0

    await until(gone)


async def test_8_mb_pass_in_pieces(served: Served) -> None:
    _, opened, upstream = served
    body = json.dumps({"model": "m", "prompt": "x" * (8 << 20)}).encode()
    client = stream(opened)
    await client.head("/v1/completions")
    size = 64 * 1024
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    for piece in pieces:
        await client.body(piece, end=piece is pieces[-1])
    answer = await client.hear()
    assert destination(answer) == upstream.name
    came, end = [], False
    while not end:
        answer = await client.hear()
        ((data, end),) = bodies([answer])
        assert len(data) <= 62_000
        came.append(data)
    assert b"".join(came) == body
    client.call.cancel()


async def test_a_refusal_ends_the_stream(served: Served) -> None:
    _, opened, _ = served
    client = stream(opened)
    await client.head()
    await client.body(b"{")
    answer = await client.hear()
    assert answer.immediate_response.status.code == 400
    assert await client.end() == grpc.StatusCode.OK


async def test_a_broken_message_costs_only_its_own_stream(served: Served) -> None:
    _, opened, upstream = served
    good, bad = stream(opened), stream(opened)
    await good.head()
    await bad.call.write(b"\xff\xff")
    assert await bad.call.code() == grpc.StatusCode.INVALID_ARGUMENT
    await good.body(BODY)
    answer = await good.hear()
    assert destination(answer) == upstream.name
    good.call.cancel()


async def test_where_responses_are_not_seen_the_picker_ends_the_stream() -> None:
    async with FakeUpstream() as upstream, picking(upstream, responses="unseen") as picker:  # noqa: SIM117
        async with channel(picker.port) as opened:
            client = stream(opened)
            await client.head()
            await client.body(BODY)
            assert destination(await client.hear()) == upstream.name
            assert bodies([await client.hear()]) == [(BODY, True)]
            assert await client.end() == grpc.StatusCode.OK
            assert await in_flight(picker) == 1


SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"
"""HealthCheckResponse."""


async def check(opened: grpc.aio.Channel, name: str) -> bytes:
    asked = b"\x0a%c%b" % (len(name), name.encode())
    return bytes(await opened.unary_unary(HEALTH)(asked))


async def test_health_is_told_on_both_ports_under_llm_d_s_names() -> None:
    async with FakeUpstream() as upstream, picking(upstream) as picker:
        for port in (picker.port, picker.front.health_port):
            async with channel(port) as opened:
                for name in HEALTH_NAMES:
                    assert await check(opened, name) == SERVING
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await check(opened, "something else")
                assert error.value.code() == grpc.StatusCode.NOT_FOUND


async def test_without_an_endpoint_that_answers_it_is_alive_and_not_ready() -> None:
    upstream = FakeUpstream()
    await upstream.start()
    await upstream.stop()
    async with picking(upstream) as picker, channel(picker.front.health_port) as opened:
        assert await check(opened, "liveness") == SERVING
        assert await check(opened, "readiness") == NOT_SERVING


async def test_it_speaks_tls_with_a_certificate_of_its_own() -> None:
    async with FakeUpstream() as upstream, picking(upstream, tls=True) as picker:
        pem = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", picker.port))
        credentials = grpc.ssl_channel_credentials(pem.encode())
        options = [("grpc.ssl_target_name_override", "localhost")]
        async with grpc.aio.secure_channel(f"127.0.0.1:{picker.port}", credentials, options) as opened:
            client = stream(opened)
            await client.head(end=True)
            answer = await client.hear()
            assert destination(answer) == upstream.name
            client.call.cancel()


async def test_it_listens_on_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "picker.sock"
    async with FakeUpstream() as upstream, picking(upstream, socket=str(path)) as picker:
        assert picker.port == 0
        async with grpc.aio.insecure_channel(f"unix:{path}") as opened:
            client = stream(opened)
            await client.head(end=True)
            answer = await client.hear()
            assert destination(answer) == upstream.name
            client.call.cancel()
    assert not path.exists()


async def test_a_host_name_is_told_as_its_address() -> None:
    async with FakeUpstream() as upstream:
        given = settings(upstream)
        given.endpoints[0].url = f"http://localhost:{upstream.port}"
        async with Picker(given, out=io.StringIO()).running() as picker, channel(picker.port) as opened:
            client = stream(opened)
            await client.head(end=True)
            answer = await client.hear()
            assert destination(answer) == f"127.0.0.1:{upstream.port}"
            client.call.cancel()
