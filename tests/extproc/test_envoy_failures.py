"""What breaks around a real Envoy: the picker's process dies or hangs behind a gateway, endpoints die or
leave while requests are at them.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import gateway_envoy as envoy
import pytest
from test_envoy_picker import Site

from pointsman.extproc.envoy_process import WITH_PARENT
from pointsman.testing.client import ASK, ASK_STREAM, Cut, RawClient, message
from pointsman.testing.envoy import behind_envoy
from pointsman.testing.upstream import LAST_CHUNK, SSE_HEAD, FakeUpstream, Received, Step, completion, event

PATIENCE_S = 20.0
IDLE_S = 1.0


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    listeners = [envoy.listener("full"), envoy.listener("idle", idle_timeout=f"{IDLE_S}s")]
    with tempfile.TemporaryDirectory(prefix="pointsman-") as name:
        folder = Path(name)
        with envoy.running(folder, folder / "picker.sock", listeners, [1]) as ports:
            yield Site(folder, ports, [])


@asynccontextmanager
async def picker(site: Site, *engines: FakeUpstream, responses: str = "unseen") -> AsyncIterator[int]:
    """`pointsman picker` as a process of its own on the site's socket; gives its pid when it answers."""
    options = {"picker.socket": site.socket, "picker.responses": responses, "admin.port": 0}
    options |= {"kv_events.mode": "none", "server.drain_s": 0.1}
    command = [sys.executable, "-c", WITH_PARENT, sys.executable, "-m", "pointsman", "picker"]
    command += [*(e.url for e in engines), *(f"--set={key}={value}" for key, value in options.items())]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert b"pointsman picker: " in await process.stdout.readline()
        yield process.pid
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        await process.communicate()


def streams_wait_for(gate: asyncio.Event) -> object:
    """Streams wait for the gate; other requests are answered at once."""

    def script(request: Received) -> list[Step]:
        if b'"stream": true' in request.body:
            return [SSE_HEAD, event("one"), gate, event("two"), LAST_CHUNK]
        return completion(request)

    return script


async def opened(port: int, stack: AsyncExitStack) -> RawClient:
    """A stream that has begun."""
    client = await stack.enter_async_context(RawClient(port))
    client.send(ASK_STREAM)
    assert (await client.head()).status == 200
    await client.line(event("one"))
    return client


class Asking:
    """Clients that ask one after the other, until told to stop."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.statuses: list[int] = []
        self.slowest_s = 0.0
        self.stop = False

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        while not self.stop:
            began = clock()
            async with asyncio.timeout(PATIENCE_S), RawClient(self._port) as client:
                self.statuses.append((await client.ask(ASK)).status)
            self.slowest_s = max(self.slowest_s, clock() - began)

    async def until(self, status: int, after: int) -> None:
        """One has been answered so, of those that were sent after the first ``after``."""
        async with asyncio.timeout(PATIENCE_S):
            while status not in self.statuses[after:]:  # noqa: ASYNC110 - others ask
                await asyncio.sleep(0.005)


async def test_a_killed_picker_cuts_no_stream_and_its_successor_goes_on(site: Site) -> None:
    gate, port = asyncio.Event(), site.ports["full"]
    async with (
        FakeUpstream(streams_wait_for(gate)) as a,
        FakeUpstream(streams_wait_for(gate)) as b,
        AsyncExitStack() as stack,
    ):
        asking = Asking(port)
        async with picker(site, a, b) as pid:
            streams = [await opened(port, stack) for _ in range(8)]
            async with asyncio.TaskGroup() as tasks:
                for _ in range(4):
                    tasks.create_task(asking.run())
                await asking.until(200, 40)
                os.kill(pid, signal.SIGKILL)
                await asking.until(500, 0)  # in FULL_DUPLEX_STREAMED Envoy fails closed
                async with picker(site, a, b):
                    await asking.until(200, len(asking.statuses) + 4)
                    asking.stop = True
        gate.set()
        for client in streams:
            assert (await client.line(LAST_CHUNK)).endswith(event("two") + LAST_CHUNK)
        assert set(asking.statuses) == {200, 500}
        assert asking.slowest_s < PATIENCE_S / 4
        assert sum(b'"stream": true' in r.body for e in (a, b) for r in e.requests) == len(streams)


async def test_streams_that_pass_a_killed_picker_are_cut(site: Site) -> None:
    """Why they should not."""
    gate = asyncio.Event()
    async with FakeUpstream(streams_wait_for(gate)) as engine, AsyncExitStack() as stack:
        async with picker(site, engine, responses="seen") as pid:
            client = await opened(site.ports["full"], stack)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(Cut):
                await client.line(LAST_CHUNK)
        await asyncio.wait_for(engine.requests[0].gone.wait(), PATIENCE_S)


async def test_a_hung_picker_is_bounded_by_the_gateway_s_idle_timeout(site: Site) -> None:
    clock = asyncio.get_running_loop().time
    async with FakeUpstream() as engine, picker(site, engine) as pid:

        async def ask() -> tuple[int, float]:
            began = clock()
            async with asyncio.timeout(PATIENCE_S), RawClient(site.ports["idle"]) as client:
                return (await client.ask(ASK)).status, clock() - began

        assert (await ask())[0] == 200
        os.kill(pid, signal.SIGSTOP)
        for status, took_s in await asyncio.gather(*(ask() for _ in range(5))):
            assert status in (408, 500, 504)
            assert IDLE_S * 0.9 < took_s < IDLE_S * 5
        assert len(engine.requests) == 1
        os.kill(pid, signal.SIGCONT)
        async with asyncio.timeout(PATIENCE_S):
            while (await ask())[0] != 200:
                pass


@pytest.mark.parametrize("size", [64 << 10, 8 << 20])
async def test_a_body_is_kept_for_the_endpoint_that_is_tried_when_one_is_dead(size: int) -> None:
    body = json.dumps({"model": "m", "prompt": "x" * size}).encode()
    async with (
        FakeUpstream() as engine,
        FakeUpstream() as dying,
        behind_envoy(engine, dying, metrics={"idle_interval_s": 60.0}) as gateway,
        gateway.client() as client,
    ):
        await dying.stop()
        for _ in range(4):
            assert (await client.ask(message("POST", "/v1/completions", body))).status == 200
        assert [request.body == body for request in engine.requests] == [True] * 4
        assert await gateway.stat("cluster.endpoints.upstream_rq_retry_success") >= 1
        await gateway.until(lambda: len(gateway.ended) == 4)
        assert {d["outcome"]["endpoint"] for d in gateway.ended} == {engine.name}
        assert gateway.in_flight == 0


async def test_an_endpoint_that_leaves_the_list_finishes_its_streams() -> None:
    gate = asyncio.Event()
    async with (
        FakeUpstream(streams_wait_for(gate)) as leaving,
        FakeUpstream() as staying,
        behind_envoy(leaving, staying) as gateway,
        AsyncExitStack() as stack,
    ):
        stream = await opened(gateway.port, stack)  # round-robin: the first one
        assert len(leaving.requests) == 1
        gateway.core.pool.remove(leaving.name)

        async def gone() -> bool:
            return await gateway.endpoint(leaving.name, "weight") == ""

        await gateway.until(gone)
        async with gateway.client() as client:
            for _ in range(4):
                assert (await client.ask(ASK)).status == 200
        assert (len(leaving.requests), len(staying.requests)) == (1, 4)
        gate.set()
        assert (await stream.line(LAST_CHUNK)).endswith(event("two") + LAST_CHUNK)
        await gateway.until(lambda: len(gateway.ended) == 5)
        assert gateway.in_flight == 0


async def test_an_endpoint_that_dies_in_mid_stream_has_failed() -> None:
    gate = asyncio.Event()
    async with (
        FakeUpstream(streams_wait_for(gate)) as engine,
        behind_envoy(engine) as gateway,
        AsyncExitStack() as stack,
    ):
        client = await opened(gateway.port, stack)
        await engine.stop()
        with pytest.raises(Cut):
            await client.line(LAST_CHUNK)
        await gateway.until(lambda: gateway.ended)
        assert [d["outcome"]["ending"] for d in gateway.ended] == ["failed"]
        assert gateway.in_flight == 0
