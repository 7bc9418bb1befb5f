"""``serve`` with workers behaves as without: one scheduler decides, counts and shows, whoever took a
request.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pointsman.errors import SettingsError
from pointsman.proxy.application import Application
from pointsman.testing.client import ASK_STREAM, RawClient, message
from pointsman.testing.serving import admin, endings, endpoints, in_flight, serving, until
from pointsman.testing.upstream import LAST_CHUNK, SSE_HEAD, End, FakeUpstream, event, reply

WORKERS = {"workers": 2}
CONNECTIONS = 16
"""So many go to one of two workers alone once in 30,000 times."""


def workers(parent: int) -> list[int]:
    """Process ids of the children of a process that are workers."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(p) for p in children if b"workers.worker" in Path(f"/proc/{p}/cmdline").read_bytes()]


def holder(connection: RawClient, port: int) -> int:
    """The worker that has accepted this connection."""
    ours = connection.transport.get_extra_info("sockname")[1]
    inode = next(
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if [int(end.split(":")[1], 16) for end in line.split()[1:3]] == [port, ours]
    )
    link = f"socket:[{inode}]"
    return next(p for p in workers(os.getpid()) if link in map(os.readlink, _fds(p)))


def _fds(process: int) -> list[str]:
    return [f"/proc/{process}/fd/{fd}" for fd in os.listdir(f"/proc/{process}/fd")]


@asynccontextmanager
async def clients(app: Application, number: int) -> AsyncIterator[list[RawClient]]:
    """Connected clients; which worker has each is the kernel's choice."""
    found = [RawClient(app.port) for _ in range(number)]
    for client in found:
        await client.__aenter__()
    try:
        yield found
    finally:
        for client in found:
            await client.__aexit__(None, None, None)


async def test_workers_share_one_view() -> None:
    """Round robin is exact over all workers, and every request is in one account."""
    async with (
        FakeUpstream() as a,
        FakeUpstream() as b,
        serving(a, b, server=WORKERS) as app,
        clients(app, CONNECTIONS) as connected,
    ):
        for client in connected:
            assert (await client.ask()).status == 200
        assert len({holder(client, app.port) for client in connected}) == 2
        assert len(a.requests) == len(b.requests) == CONNECTIONS // 2
        assert await endings(app) == {"ok": CONNECTIONS}
        assert await in_flight(app) == 0
        decisions = json.loads((await admin(app, "/decisions?limit=100")).body)["decisions"]
        assert len(decisions) == CONNECTIONS
        assert {d["outcome"]["ending"] for d in decisions} == {"ok"}


TEXT = "All work and no play makes a dull prompt. " * 300
PROMPTS = [f"{i % 3} {TEXT[: 500 * i * i]} and then {i} " * 2 for i in range(6)]
"""From less than a block to 40 KB; some begin alike."""


async def matched(number: int) -> tuple[list[tuple[str, int, int]], int]:
    """What was decided on a fixed sequence of requests with so many workers; how many of them had a part."""
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(FakeUpstream()) for _ in range(3)]
        listed = [{"url": engine.url, "name": f"e{i}"} for i, engine in enumerate(engines)]
        policy = {"preset": "llm-d-blend", "seed": 1}
        app = await stack.enter_async_context(serving(*listed, server={"workers": number}, scheduling=policy))
        connected = await stack.enter_async_context(clients(app, CONNECTIONS))
        for i, client in enumerate(connected):
            for text in PROMPTS:
                body = {"model": "m", "prompt": text + "more " * 40 * i}
                assert (await client.ask(message(body=body))).status == 200
                await admin(app, "/healthz")  # all is told before the next comes
        decisions = json.loads((await admin(app, "/decisions?limit=200")).body)["decisions"][::-1]
        keys = ("chosen", "matched_tokens", "prompt_tokens")
        holders = {holder(client, app.port) for client in connected} if number else set()
        return [tuple(d[key] for key in keys) for d in decisions], len(holders)


async def test_prefixes_are_found_as_in_one_process_whichever_worker_gets_them() -> None:
    alone, _ = await matched(0)
    shared, holders = await matched(2)
    assert holders == 2
    assert shared == alone
    assert len(alone) == CONNECTIONS * len(PROMPTS)
    assert sum(tokens for _, tokens, _ in alone) > 50_000


async def test_a_stream_comes_through_as_it_is_and_is_counted_while_it_lasts() -> None:
    gate = asyncio.Event()
    script = [SSE_HEAD, event("one"), gate, event("two"), LAST_CHUNK]
    async with FakeUpstream(script) as engine, serving(engine, server=WORKERS) as app:
        async with RawClient(app.port) as client:
            client.send(ASK_STREAM)
            await client.head()
            assert await client.read(len(event("one"))) == event("one")
            assert (await endpoints(app))[engine.name]["in_flight"] == {
                "requests": 1,
                "uncached_prompt_tokens": 0,
            }
            gate.set()
            rest = event("two") + LAST_CHUNK
            assert await client.read(len(rest)) == rest
        assert await in_flight(app) == 0
        assert await endings(app) == {"ok": 1}


@pytest.mark.parametrize("steps", [[], [SSE_HEAD, event("one")]], ids=["before its answer", "in its stream"])
async def test_a_client_that_leaves_frees_the_engine(steps: list[Any]) -> None:
    async with FakeUpstream([*steps, asyncio.Event()]) as engine, serving(engine, server=WORKERS) as app:
        async with RawClient(app.port) as client:
            client.send(ASK_STREAM)
            request = await engine.request()
            if steps:
                await client.head()
            assert await in_flight(app) > 0
            client.leave()
            await asyncio.wait_for(request.gone.wait(), 1)
        assert await in_flight(app) == 0
        assert await endings(app) == {"cancelled": 1}


async def test_a_broken_engine_is_left_alone_by_all_workers_and_comes_back() -> None:
    async with (
        FakeUpstream([End.RESET]) as broken,
        FakeUpstream() as good,
        serving(broken, good, server=WORKERS, breaker={"faults": 2, "open_s": 0.2}) as app,
        clients(app, CONNECTIONS) as connected,
    ):
        for client in connected:
            assert (await client.ask()).status == 200
        assert (await endpoints(app))[broken.name]["breaker"] == "open"
        assert len(broken.requests) < CONNECTIONS // 2
        assert len(good.requests) == CONNECTIONS
        broken.script = good.script

        async def recovered() -> bool:
            for client in connected:
                assert (await client.ask()).status == 200
            return bool((await endpoints(app))[broken.name]["breaker"] == "closed")

        await until(recovered)
        assert await in_flight(app) == 0


async def test_what_is_refused_is_told_as_without_workers() -> None:
    busy = reply(b'{"busy": 1}', 429, "retry-after: 7")
    async with FakeUpstream([busy]) as engine, serving(engine, server=WORKERS) as app:
        async with RawClient(app.port) as client:
            refused = await client.ask()
            assert (refused.status, refused.headers["retry-after"]) == (429, "7")
            unknown = await client.ask(message(body={"model": "nobody", "prompt": "x"}))
            assert unknown.status == 404
            assert "Models served here: m." in json.loads(unknown.body)["error"]["message"]
            models = await client.ask(message("GET", "/v1/models"))
            assert [m["id"] for m in json.loads(models.body)["data"]] == ["m"]
            assert (await client.ask(message("GET", "/health"))).status == 200
        assert await endings(app) == {"error": 1, "refused": 1}


async def test_a_worker_that_is_killed_takes_only_its_own_requests_with_it() -> None:
    """Their load is given back at once, the streams of the other go on, and a new one takes its place."""
    gate = asyncio.Event()
    script = [SSE_HEAD, event("one"), gate, event("two"), LAST_CHUNK]
    async with (
        FakeUpstream(script) as engine,
        serving(engine, server=WORKERS) as app,
        clients(app, CONNECTIONS) as connected,
    ):
        for client in connected:
            client.send(ASK_STREAM)
            await client.head()
            await client.read(len(event("one")))
        before = {client: holder(client, app.port) for client in connected}
        victim = before[connected[0]]
        lost = [client for client in connected if before[client] == victim]
        kept = [client for client in connected if before[client] != victim]
        assert kept
        os.kill(victim, signal.SIGKILL)
        for client in lost:
            await client.closed()

        async def given_back() -> bool:
            return (await endpoints(app))[engine.name]["in_flight"]["requests"] == len(kept)

        await until(given_back)
        gate.set()
        rest = event("two") + LAST_CHUNK
        for client in kept:
            assert await client.read(len(rest)) == rest
        assert await in_flight(app) == 0
        assert await endings(app) == {"ok": len(kept), "failed": len(lost)}

        async def replaced() -> bool:
            await admin(app, "/readyz")
            return len(workers(os.getpid())) == 2

        await until(replaced, 5000)
        assert victim not in workers(os.getpid())
        async with RawClient(app.port) as client:
            assert (await client.ask()).status == 200


async def test_ready_needs_a_worker() -> None:
    async with FakeUpstream() as engine, serving(engine, server=WORKERS) as app:
        assert (await admin(app, "/readyz")).status == 200
        for worker in workers(os.getpid()):
            os.kill(worker, signal.SIGKILL)

        async def ready(status: int) -> bool:
            return (await admin(app, "/readyz")).status == status

        await until(lambda: ready(503))
        await until(lambda: ready(200), 5000)
        async with RawClient(app.port) as client:
            assert (await client.ask()).status == 200


@asynccontextmanager
async def process(engine: FakeUpstream, number: int) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """``pointsman serve`` with so many workers, and its port."""
    pipe = asyncio.subprocess.PIPE
    where = ["--host", "127.0.0.1", "--port", "0", "--admin-port", "0", "--workers", str(number)]
    command = [sys.executable, "-m", "pointsman", "serve", engine.url, *where]
    started = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    try:
        assert started.stdout
        report = (await started.stdout.readuntil(b"try:")).decode()
        yield started, int(re.findall(r"base URL: http://127\.0\.0\.1:(\d+)/v1", report)[0])
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()


async def test_without_a_scheduler_new_requests_get_503_and_streams_go_on() -> None:
    """Its process is killed; the worker ends with its last stream."""
    gate = asyncio.Event()
    script = [SSE_HEAD, event("one"), gate, event("two"), LAST_CHUNK]
    async with FakeUpstream(script) as engine, process(engine, 1) as (scheduler, port):
        async with RawClient(port) as streaming, RawClient(port) as other:
            streaming.send(ASK_STREAM)
            await streaming.head()
            await streaming.read(len(event("one")))
            other.send(ASK_STREAM[:-5])  # a request that is on its way when the scheduler goes
            scheduler.kill()
            await scheduler.wait()

            async def refused() -> bool:
                try:
                    async with RawClient(port):
                        return False
                except ConnectionError:
                    return True

            await until(refused)
            other.send(ASK_STREAM[-5:])
            assert (await other.response()).status == 503
            gate.set()
            rest = event("two") + LAST_CHUNK
            assert await streaming.read(len(rest)) == rest
        assert scheduler.stderr
        await asyncio.wait_for(scheduler.stderr.read(), 10)  # the worker, which has it as well, is gone


async def test_sigterm_drains_workers() -> None:
    gate = asyncio.Event()
    script = [SSE_HEAD, event("one"), gate, event("two"), LAST_CHUNK]
    async with FakeUpstream(script) as engine, process(engine, 2) as (started, port):
        async with RawClient(port) as idle, RawClient(port) as streaming:
            streaming.send(ASK_STREAM)
            await streaming.head()
            await streaming.read(len(event("one")))
            started.send_signal(signal.SIGTERM)
            assert await idle.closed() == b""
            gate.set()
            rest = event("two") + LAST_CHUNK
            assert await streaming.read(len(rest)) == rest
        out, err = await asyncio.wait_for(started.communicate(), 10)
        assert started.returncode == 0
        assert b"unfinished" not in err
        (line,) = [line for line in out.decode().splitlines() if " id=" in line]
        assert " ending=ok" in line


async def test_an_endpoint_that_joins_is_known_to_workers_before_anything_goes_there() -> None:
    async with (
        FakeUpstream() as first,
        FakeUpstream() as second,
        serving(first, server=WORKERS) as app,
        clients(app, 4) as connected,
    ):
        for number in range(5):
            before = len(second.requests)

            async def used(before: int = before) -> bool:
                """It has told its models, and gets its share."""
                for client in connected:
                    assert (await client.ask()).status == 200
                return len(second.requests) > before

            added = await admin(app, "/endpoints", "POST", {"url": second.url, "name": f"late{number}"})
            assert added.status == 201
            await until(used)
            assert (await admin(app, f"/endpoints/late{number}", "DELETE")).status == 200
            for client in connected:
                assert (await client.ask()).status == 200
        decisions = json.loads((await admin(app, "/decisions?limit=250")).body)["decisions"]
        assert len(decisions) >= 40
        assert [d["tried_before"] for d in decisions] == [[]] * len(decisions)


async def test_a_state_is_found_again_through_another_worker() -> None:
    made = b'{"id": "resp_1", "object": "response"}'
    async with (
        FakeUpstream([reply(made)]) as a,
        FakeUpstream([reply(made)]) as b,
        serving(a, b, server=WORKERS) as app,
        clients(app, CONNECTIONS) as connected,
    ):
        assert (
            await connected[0].ask(message("POST", "/v1/responses", {"model": "m", "input": "x"}))
        ).status == 200
        maker = a if a.requests else b
        for client in connected:
            assert (await client.ask(message("GET", "/v1/responses/resp_1"))).status == 200
        assert len(maker.requests) == 1 + CONNECTIONS


async def test_a_port_in_use_is_told_as_without_workers() -> None:
    async with FakeUpstream() as engine, FakeUpstream() as other:
        with pytest.raises(SettingsError, match=f"server.port: 127.0.0.1:{other.port} is in use"):
            async with serving(engine, server={**WORKERS, "port": other.port}):
                pass


async def test_workers_that_cannot_serve_say_why() -> None:
    async with FakeUpstream() as engine:
        with pytest.raises(SettingsError, match=r"server\.tls_cert"):
            async with serving(engine, server={**WORKERS, "tls_cert": "/nowhere", "tls_key": "/nowhere"}):
                pass
