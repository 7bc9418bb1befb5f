"""A client that leaves takes its request with it: no engine works for nobody, and no counter stays up."""

from __future__ import annotations

import asyncio

import pytest

from pointsman.proxy.application import Application
from pointsman.testing.client import ASK, ASK_STREAM, RawClient, message
from pointsman.testing.serving import endings, endpoints, in_flight, serving, until
from pointsman.testing.upstream import SSE_HEAD, FakeUpstream, Step, event

WAITING: dict[str, tuple[bytes, list[Step]]] = {
    "a stream before its first byte": (ASK_STREAM, []),
    "a stream after its head": (ASK_STREAM, [SSE_HEAD]),
    "a stream in the middle": (ASK_STREAM, [SSE_HEAD, event({"n": 1})]),
    "no stream, before the first byte": (ASK, []),
    "no stream, in the middle": (ASK, [b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", b"half"]),
    "until the close, in the middle": (ASK, [b"HTTP/1.1 200 OK\r\n\r\n", b"half"]),
    "a refusal that is held back": (ASK, [b"HTTP/1.1 503 Busy\r\ncontent-length: 9\r\n\r\n", b"half"]),
}


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("case", WAITING)
async def test_the_endpoint_hears_at_once_that_the_client_has_left(case: str, how: str) -> None:
    ask, steps = WAITING[case]
    async with FakeUpstream([*steps, asyncio.Event()]) as engine, serving(engine) as app:
        async with RawClient(app.port) as client:
            client.send(ask)
            request = await engine.request()
            if steps and "held" not in case and case != "a stream after its head":
                await client.head()
            assert await in_flight(app) > 0
            {"close": client.leave, "reset": client.reset, "half-close": client.transport.write_eof}[how]()
            await asyncio.wait_for(request.gone.wait(), 1)
        assert await in_flight(app) == 0
        assert await endings(app) == {"cancelled": 1}
        assert (await endpoints(app))[engine.name]["breaker"] == "closed"


async def test_a_client_that_leaves_while_we_connect_is_counted_once() -> None:
    async with FakeUpstream() as engine, serving(engine) as app:
        for _ in range(20):
            async with RawClient(app.port) as client:
                client.send(ASK)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        await until(lambda: _counted(app, 20))
        assert await in_flight(app) == 0
        assert set(await endings(app)) <= {"cancelled", "ok"}


async def _counted(app: Application, number: int) -> bool:
    return sum((await endings(app)).values()) == number


async def test_a_client_that_leaves_while_models_are_looked_up_is_counted_once() -> None:
    async with FakeUpstream() as engine, serving(engine) as app:
        engine.probe_gate.clear()
        probes = len(engine.probes)
        async with RawClient(app.port) as client:
            client.send(message(body={"model": "new", "prompt": "x"}))
            await until(lambda: _probed(engine, probes))
        engine.probe_gate.set()
        await until(lambda: _counted(app, 1))
        assert await endings(app) == {"cancelled": 1}
        assert await in_flight(app) == 0


async def _probed(engine: FakeUpstream, before: int) -> bool:
    await asyncio.sleep(0)
    return len(engine.probes) > before


async def test_a_client_that_leaves_with_requests_sent_ahead_frees_the_engine() -> None:
    async with FakeUpstream([asyncio.Event()]) as engine, serving(engine) as app:
        async with RawClient(app.port) as client:
            client.send(ASK, ASK, ASK)
            request = await engine.request()
            client.leave()
            await asyncio.wait_for(request.gone.wait(), 1)
        assert await in_flight(app) == 0
        assert await endings(app) == {"cancelled": 1}  # the others were never read as requests
        assert len(engine.requests) == 1


async def test_a_client_with_very_much_sent_ahead_is_noticed_leaving() -> None:
    """Reading from it has been paused by then, so that nothing tells of its end but the socket itself."""
    async with FakeUpstream([asyncio.Event()]) as engine, serving(engine) as app:
        async with RawClient(app.port) as client:
            client.send(ASK, message(body=b'{"model": "m", "prompt": "' + b"x" * 400_000 + b'"}'))
            request = await engine.request()
            client.reset()
            await asyncio.wait_for(request.gone.wait(), 3)
        assert await in_flight(app) == 0


async def test_a_client_that_leaves_after_its_answer_was_complete_is_no_cancellation() -> None:
    async with FakeUpstream() as engine, serving(engine) as app:
        async with RawClient(app.port) as client:
            await client.ask()
        assert await endings(app) == {"ok": 1}


async def test_many_clients_leaving_at_once_leave_no_load_behind() -> None:
    async with (
        FakeUpstream([SSE_HEAD, event({"n": 1}), asyncio.Event()]) as a,
        FakeUpstream([asyncio.Event()]) as b,
        serving(a, b) as app,
    ):
        clients = [RawClient(app.port) for _ in range(40)]
        for client in clients:
            await client.__aenter__()
            client.send(ASK_STREAM)
        await asyncio.gather(a.request(20), b.request(20))
        for client in clients:
            client.leave()
        await asyncio.gather(*(r.gone.wait() for r in (*a.requests, *b.requests)))
        assert await in_flight(app) == 0
        assert await endings(app) == {"cancelled": 40}
