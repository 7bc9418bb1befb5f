"""Who reads slowly makes the other side wait, and costs no memory."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from pointsman.proxy.application import Application
from pointsman.testing.client import ASK, RawClient, message
from pointsman.testing.serving import endings, in_flight, serving, until
from pointsman.testing.upstream import LAST_CHUNK, FakeUpstream, Received, Step, chunk, head, reply

MB = 1 << 20
PIECE = bytes(256 * 1024)
BOUND_MB = 24
"""What may lie between an endpoint and a client that does not read: socket buffers of the kernel on four
sides (up to 4 to 6 MB each) and little of ours."""


def resident_mb() -> float:
    """Memory of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / MB


async def stalled(request: Received) -> int:
    """Bytes that the other side has taken, once it takes no more."""
    before = -1
    while request.sent_bytes > before:
        before = request.sent_bytes
        await asyncio.sleep(0.1)  # several turns of everybody's event loop
    return before


def large(request: Received) -> Iterable[Step]:
    """200 MB by its length."""
    yield b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (200 * MB)
    for _ in range(800):
        yield PIECE


async def test_a_client_that_stops_reading_stops_the_endpoint_at_no_cost_of_memory() -> None:
    async with FakeUpstream(large) as engine, serving(engine) as app:
        async with RawClient(app.port, receive_bytes=65536) as client:
            client.send(ASK)
            client.transport.pause_reading()
            before = resident_mb()
            assert await stalled(await engine.request()) < BOUND_MB * MB
            assert resident_mb() - before < 8
            client.leave()
            await asyncio.wait_for(engine.requests[0].gone.wait(), 2)
        assert await in_flight(app) == 0
        assert await endings(app) == {"cancelled": 1}


async def test_a_slow_client_gets_everything() -> None:
    body = b"".join(chunk(bytes([n]) * 200_000) for n in range(100)) + LAST_CHUNK

    def script(request: Received) -> Iterable[Step]:
        yield head("content-type: application/octet-stream")
        for start in range(0, len(body), 700_000):
            yield body[start : start + 700_000]

    async with FakeUpstream(script) as engine, serving(engine) as app:
        async with RawClient(app.port, receive_bytes=65536) as client:
            client.send(ASK)
            client.transport.pause_reading()
            await stalled(await engine.request())
            client.transport.resume_reading()
            await client.head()
            assert await client.read(len(body)) == body
            assert (await client.ask()).complete
        assert await endings(app) == {"ok": 2}


async def test_a_connection_that_was_paused_at_the_end_of_an_answer_serves_the_next_request() -> None:
    """Whatever read it was that filled the client's buffer, the last one too, the endpoint's connection is
    read again.
    """
    sizes = [n * 100_000 for n in range(1, 60)]

    def script(request: Received) -> Iterable[Step]:
        return [reply(bytes(json.loads(request.body)["size"]))]

    async with FakeUpstream(script) as engine, serving(engine) as app:
        for size in sizes:
            async with RawClient(app.port, receive_bytes=65536) as client:
                client.transport.pause_reading()
                client.send(message(body={"model": "m", "size": size}))
                for _ in range(60):  # turns in which the gateway reads what it will of the answer
                    await asyncio.sleep(0)
                client.transport.resume_reading()
                assert len((await client.response()).body) == size
            async with RawClient(app.port) as client:
                assert len((await client.ask(message(body={"model": "m", "size": 1}))).body) == 1, size


@pytest.mark.parametrize(("size", "number"), [(50_000, 1000), (500_000, 200)])
async def test_pipelined_answers_that_nobody_reads_are_not_piled_up(size: int, number: int) -> None:
    """Each answer is small; a client that sends requests and reads nothing must be stopped all the same."""
    async with FakeUpstream([reply(bytes(size))]) as engine, serving(engine) as app:
        async with RawClient(app.port, receive_bytes=65536) as client:
            client.transport.pause_reading()
            before = resident_mb()
            for _ in range(number):
                client.send(ASK)
            await engine.request(1)
            asked = 0
            while len(engine.requests) > asked:
                asked = len(engine.requests)
                await asyncio.sleep(0.1)
            assert resident_mb() - before < 24
            assert asked * size < BOUND_MB * MB
            client.transport.resume_reading()
            for _ in range(number):
                assert len((await client.response()).body) == size
        assert await endings(app) == {"ok": number}


async def test_an_endpoint_that_does_not_read_costs_one_copy_of_the_request() -> None:
    body = b'{"model": "m", "prompt": "' + bytes(48 * MB).replace(b"\0", b"x") + b'"}'
    async with FakeUpstream() as engine, serving(engine) as app:
        engine.reads = False
        await engine.drop()
        async with RawClient(app.port) as client:
            before = resident_mb()
            client.send(message(body=body))
            await until(lambda: loaded(app, True))
            assert resident_mb() - before < 4 * 48  # the client's own copies and ours
            client.leave()
            await until(lambda: loaded(app, False))
        assert await endings(app) == {"cancelled": 1}


async def loaded(app: Application, expected: bool) -> bool:
    return (await in_flight(app) > 0) is expected


async def test_a_client_that_sends_ahead_without_end_has_to_wait() -> None:
    async with (
        FakeUpstream([asyncio.Event()]) as engine,
        serving(engine) as app,
        RawClient(app.port) as client,
    ):
        client.send(ASK)
        await engine.request()
        before = resident_mb()
        sent = 0
        while client.writable.is_set() and sent < 100 * MB:
            client.send(PIECE)
            sent += len(PIECE)
            await asyncio.sleep(0.002)
        assert sent < BOUND_MB * MB
        assert resident_mb() - before < BOUND_MB


async def test_a_client_that_reads_nothing_for_too_long_does_not_keep_the_endpoint() -> None:
    async with FakeUpstream(large) as engine, serving(engine, server={"idle_timeout_s": 0.4}) as app:
        async with RawClient(app.port, receive_bytes=65536) as client:
            client.send(ASK)
            client.transport.pause_reading()
            request = await engine.request()
            await asyncio.wait_for(request.gone.wait(), 5)
        assert await in_flight(app) == 0
        assert await endings(app) == {"cancelled": 1}
