"""grpcio, which is not ours, calls the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from pointsman.extproc.grpc import GrpcServer, RpcError, Service, unary
from pointsman.testing.http2 import ECHO, Calls, Echo

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@asynccontextmanager
async def serving(services: Mapping[str, Service], **more: int) -> AsyncIterator[grpc.aio.Channel]:
    server = GrpcServer(services, **more)
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
            yield channel
    finally:
        server.close()


async def some(*messages: bytes) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


async def test_a_unary_call_is_answered() -> None:
    async with serving({"/t.T/Reverse": unary(lambda data: data[::-1])}) as channel:
        assert await channel.unary_unary("/t.T/Reverse")(b"abc") == b"cba"


async def test_an_unknown_path_is_unimplemented() -> None:
    async with serving({}) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/t.T/Missing")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_messages_of_any_size_go_both_ways() -> None:
    sizes = [0, 1, 16_379, 16_380, 70_000, 8 << 20]
    async with serving({ECHO: Echo}) as channel:
        call = channel.stream_stream(ECHO)(some(*(bytes([i]) * n for i, n in enumerate(sizes))))
        assert [data async for data in call] == [bytes([i]) * n for i, n in enumerate(sizes)]
        assert await call.code() is grpc.StatusCode.OK


def teapot(data: bytes) -> bytes:
    raise RpcError(9, "I'm a teapot: 100 % \u00fc\n")


async def test_a_status_and_its_message_arrive() -> None:
    async with serving({"/t.T/Teapot": unary(teapot)}) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/t.T/Teapot")(b"")
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.details() == "I'm a teapot: 100 % \u00fc\n"


async def test_metadata_arrives() -> None:
    calls = Calls()
    async with serving({ECHO: calls}) as channel:
        metadata = (("x-one", "1"), ("x-two", "a"), ("x-two", "b"), ("x-bytes-bin", b"\0\xff"))
        call = channel.stream_stream(ECHO)(some(), metadata=metadata)
        assert [data async for data in call] == []
    headers = calls[0].headers
    assert headers["x-one"] == "1"
    assert headers["x-two"].split(",") == ["a", "b"]
    assert headers["x-bytes-bin"].rstrip("=") == "AP8"
    assert headers[":authority"].startswith("127.0.0.1:")


async def test_a_deadline_ends_the_call_on_both_sides() -> None:
    calls = Calls()
    async with serving({ECHO: calls}) as channel:
        call = channel.stream_stream(ECHO)(timeout=0.2)
        await call.write(b"x")
        assert await call.read() == b"x"
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await calls[0].over.wait()
    assert calls[0].told == ["cancelled"]


async def test_a_cancel_reaches_the_call() -> None:
    calls = Calls()
    async with serving({ECHO: calls}) as channel:
        call = channel.stream_stream(ECHO)()
        await call.write(b"x")
        assert await call.read() == b"x"
        call.cancel()
        await calls[0].over.wait()
    assert calls[0].told == ["cancelled"]


async def test_a_thousand_streams_at_once_each_get_their_own() -> None:
    async with serving({ECHO: Echo}) as channel:
        start = asyncio.Barrier(1001)

        async def one(number: int) -> bytes:
            call = channel.stream_stream(ECHO)()
            await call.write(b"%d" % number)
            first = await call.read()
            await start.wait()  # all are open
            await call.write(b"again")
            await call.done_writing()
            return first + await call.read()

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one(i)) for i in range(1000)]
            await start.wait()
        assert [task.result() for task in running] == [b"%dagain" % i for i in range(1000)]


class Breaking(Echo):
    """Breaks on a message, but not on all."""

    def message(self, data: bytes) -> None:
        if data == b"break":
            raise ValueError(data)
        super().message(data)


async def test_a_bug_in_one_call_ends_that_call_only(caplog: pytest.LogCaptureFixture) -> None:
    calls = Calls(Breaking)
    async with serving({ECHO: calls}) as channel:
        good, bad = channel.stream_stream(ECHO)(), channel.stream_stream(ECHO)()
        for call in good, bad:
            await call.write(b"x")
            assert await call.read() == b"x"
        await bad.write(b"break")
        assert await bad.code() is grpc.StatusCode.INTERNAL
        await good.write(b"y")
        assert await good.read() == b"y"
        await good.done_writing()
        assert await good.code() is grpc.StatusCode.OK
    assert sorted(call.told for call in calls) == [["cancelled"], ["half closed"]]
    assert "ValueError: b'break'" in caplog.text


async def test_compressed_messages_are_refused() -> None:
    async with serving({"/t.T/Reverse": unary(lambda data: data[::-1])}) as channel:
        call = channel.unary_unary("/t.T/Reverse")(b"z" * 1000, compression=grpc.Compression.Gzip)
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_too_large_a_message_is_refused() -> None:
    async with serving({ECHO: Echo}, max_message_bytes=1000) as channel:
        call = channel.stream_stream(ECHO)(some(bytes(1000)))
        assert [data async for data in call] == [bytes(1000)]
        call = channel.stream_stream(ECHO)(some(bytes(1001)))
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


class Download(Echo):
    """Sends 20 MB while the client takes it."""

    def message(self, data: bytes) -> None:
        self.left = 20
        self.resumed()

    def resumed(self) -> None:
        self.told.append("resumed")
        while self.left and not self.stream.paused:
            self.left -= 1
            self.stream.send(bytes(1 << 20))
        if not self.left:
            self.stream.finish()


async def test_an_answer_larger_than_the_windows_comes_as_it_is_taken() -> None:
    calls = Calls(Download)
    async with serving({ECHO: calls}) as channel:
        call = channel.stream_stream(ECHO)()
        await call.write(b"go")
        assert sum([len(data) async for data in call]) == 20 << 20
    assert len(calls[0].told) > 5


async def test_a_finish_before_the_client_ends_is_the_clients_end_too() -> None:
    class Once(Echo):
        def message(self, data: bytes) -> None:
            self.stream.send(data)
            self.stream.finish()

    calls = Calls(Once)
    async with serving({ECHO: calls}) as channel:
        call = channel.stream_stream(ECHO)()
        await call.write(b"x")
        assert await call.read() == b"x"
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
    assert calls[0].told == []


async def test_a_drained_servers_client_ends_its_calls_well() -> None:
    server = GrpcServer({ECHO: Echo})
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream(ECHO)()
        await call.write(b"x")
        assert await call.read() == b"x"
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.drain(10))
            await asyncio.sleep(0)
            await call.write(b"y")
            assert await call.read() == b"y"
            await call.done_writing()
            assert await call.code() is grpc.StatusCode.OK
    assert not server.connections


async def test_a_unix_socket_serves(tmp_path: Path) -> None:
    server = GrpcServer({ECHO: Echo})
    await server.start(path=str(tmp_path / "socket"))
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/socket") as channel:
        assert [data async for data in channel.stream_stream(ECHO)(some(b"x"))] == [b"x"]
    server.close()
