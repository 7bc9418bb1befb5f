"""grpcio, which is not ours, calls the server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import grpc
import pytest

from pointsman.extproc.grpc import GrpcServer, RpcError, Service, unary
from pointsman.testing.http2 import Echo

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@asynccontextmanager
async def serving(services: Mapping[str, Service]) -> AsyncIterator[grpc.aio.Channel]:
    server = GrpcServer(services)
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
    async with serving({"/t.T/Echo": Echo}) as channel:
        call = channel.stream_stream("/t.T/Echo")(some(*(bytes([i]) * n for i, n in enumerate(sizes))))
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
