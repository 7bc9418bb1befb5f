"""Health as gRPC clients ask for it; the messages are written out in bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from pointsman.extproc.grpc import GrpcServer
from pointsman.extproc.health import Health

SERVING, NOT_SERVING, SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"


def asks_for(name: str) -> bytes:
    return b"\x0a%c%b" % (len(name), name.encode()) if name else b""


@pytest.fixture
def health() -> Health:
    return Health(("", "readiness"), serving=True)


@pytest.fixture
async def channel(health: Health) -> AsyncIterator[grpc.aio.Channel]:
    server = GrpcServer(health.services())
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    server.close()


async def test_check_tells_who_serves(health: Health, channel: grpc.aio.Channel) -> None:
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    assert await check(asks_for("")) == SERVING
    health.set("readiness", False)
    assert await check(asks_for("readiness")) == NOT_SERVING
    assert await check(asks_for("")) == SERVING


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (asks_for("nobody"), grpc.StatusCode.NOT_FOUND),
        (b"\x0a\x05abc", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x0a", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x0a\x01\xff", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_check_refuses(channel: grpc.aio.Channel, request_bytes: bytes, code: grpc.StatusCode) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/grpc.health.v1.Health/Check")(request_bytes)
    assert caught.value.code() is code


async def test_watch_tells_each_change_once(health: Health, channel: grpc.aio.Channel) -> None:
    watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(asks_for("readiness"))
    assert await watch.read() == SERVING
    health.set("readiness", True)  # no change
    health.set("", False)  # another's
    health.set("readiness", False)
    assert await watch.read() == NOT_SERVING
    health.set("readiness", True)
    assert await watch.read() == SERVING
    watch.cancel()


async def test_watch_of_an_unknown_service_waits_for_it(health: Health, channel: grpc.aio.Channel) -> None:
    watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(asks_for("later"))
    assert await watch.read() == SERVICE_UNKNOWN
    health.set("later", True)
    assert await watch.read() == SERVING
    watch.cancel()


async def test_a_watcher_that_left_is_forgotten(health: Health, channel: grpc.aio.Channel) -> None:
    watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(asks_for(""))
    assert await watch.read() == SERVING
    assert len(health._watches) == 1
    watch.cancel()
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    assert await check(asks_for("")) == SERVING  # sent after the cancel on the same connection
    assert not health._watches
