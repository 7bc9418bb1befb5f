"""``picker`` with workers: gateways' few connections are shared out evenly, and one scheduler decides and
counts.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from envoy.service.accesslog.v3 import als_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from pointsman.config import Settings, convert
from pointsman.errors import SettingsError
from pointsman.extproc.access_log import ALS
from pointsman.extproc.picker import Picker
from pointsman.extproc.port import PROCESS
from pointsman.testing.picking import CHAT, destination
from pointsman.testing.serving import admin, endings, until
from pointsman.testing.upstream import FakeUpstream

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello"}]}).encode()
HEALTH = "/grpc.health.v1.Health/Check"
WORKERS = 3
ESTABLISHED = "01"


def settings(*upstreams: FakeUpstream, **picker: Any) -> Settings:
    given = {"host": "127.0.0.1", "port": 0, "health_port": 0, "tls": False, "responses": "seen", **picker}
    tree = {
        "endpoints": [{"url": upstream.url} for upstream in upstreams],
        "server": {"drain_s": 0.5, "workers": WORKERS},
        "admin": {"port": 0},
        "kv_events": {"mode": "none"},
        "picker": given,
        "scheduling": {"preset": "round-robin", "seed": 1},
    }
    return convert(tree, Settings, "test")


@asynccontextmanager
async def picking(*upstreams: FakeUpstream, **picker: Any) -> AsyncIterator[Picker]:
    async with Picker(settings(*upstreams, **picker), out=io.StringIO()).running() as running:
        yield running


@asynccontextmanager
async def channels(port: int, number: int) -> AsyncIterator[list[grpc.aio.Channel]]:
    """So many connections, all of them open."""
    async with AsyncExitStack() as stack:
        found = []
        for _ in range(number):
            options = [("grpc.use_local_subchannel_pool", 1)]
            opened = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
            found.append(await stack.enter_async_context(opened))
            await opened.channel_ready()
        yield found


def holders(port: int) -> Counter[int]:
    """How many connections to the port each worker has."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].split(":")[1], 16) == port and fields[3] == ESTABLISHED:
            inodes.add(f"socket:[{fields[9]}]")
    found: Counter[int] = Counter()
    for pid in workers():
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                found[pid] += os.readlink(f"/proc/{pid}/fd/{fd}") in inodes
            except FileNotFoundError:
                continue
    return found


def workers() -> list[int]:
    """Process ids of our children that are workers."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(p) for p in children if b"extproc.worker" in Path(f"/proc/{p}/cmdline").read_bytes()]


async def ask(channel: grpc.aio.Channel, request_id: str) -> tuple[Any, str]:
    """Have a request decided on; its stream, which stays open, and where it goes."""
    call = channel.stream_stream(PROCESS)()
    head = pb.ProcessingRequest()
    for name, value in {":path": CHAT, ":method": "POST", "x-request-id": request_id}.items():
        header = head.request_headers.headers.headers.add()
        header.key, header.raw_value = name, value.encode()
    head.protocol_config.request_body_mode = head.protocol_config.response_body_mode = 4
    await call.write(head.SerializeToString())
    body = pb.ProcessingRequest(request_body=pb.HttpBody(body=BODY, end_of_stream=True))
    await call.write(body.SerializeToString())
    answer = pb.ProcessingResponse.FromString(await call.read())
    return call, destination(answer)


async def loads(picker: Picker) -> dict[str, int]:
    """Requests in flight by endpoint, as the admin port tells."""
    answer = json.loads((await admin(picker, "/endpoints")).body)  # type: ignore[arg-type]  # it has the port
    return {e["name"]: e["in_flight"]["requests"] for e in answer["endpoints"]}


async def test_few_connections_are_shared_out_evenly_and_decisions_are_of_one_view() -> None:
    async with (
        FakeUpstream() as a,
        FakeUpstream() as b,
        picking(a, b) as picker,
        channels(picker.port, 2 * WORKERS) as opened,
    ):
        assert sorted(holders(picker.port).values()) == [2] * WORKERS
        found = [await ask(channel, f"r{i}") for i, channel in enumerate(opened)]
        assert Counter(where for _, where in found) == {a.name: WORKERS, b.name: WORKERS}
        assert await loads(picker) == {a.name: WORKERS, b.name: WORKERS}
        for call, _ in found:
            call.cancel()
        await until(lambda: _is(picker, {a.name: 0, b.name: 0}))
        assert await endings(picker) == {"cancelled": 2 * WORKERS}  # type: ignore[arg-type]


async def _is(picker: Picker, wanted: dict[str, int]) -> bool:
    return await loads(picker) == wanted


async def test_a_worker_that_is_killed_gives_back_what_it_had_and_is_replaced() -> None:
    async with FakeUpstream() as engine, picking(engine) as picker, channels(picker.port, 6) as opened:
        calls = [(await ask(channel, f"r{i}"))[0] for i, channel in enumerate(opened)]
        assert await loads(picker) == {engine.name: 6}
        victim = min(workers())
        os.kill(victim, signal.SIGKILL)
        await until(lambda: _is(picker, {engine.name: 4}))
        assert await endings(picker) == {"failed": 2}  # type: ignore[arg-type]

        async def replaced() -> bool:
            await admin(picker, "/readyz")  # type: ignore[arg-type]
            return len(workers()) == WORKERS and victim not in workers()

        await until(replaced, 5000)
        async with channels(picker.port, 1) as (fresh,):
            call, where = await ask(fresh, "again")
            assert where == engine.name
            call.cancel()
        for call in calls:
            call.cancel()
        await until(lambda: _is(picker, {engine.name: 0}))


async def test_what_nobody_sees_outlives_its_worker_and_ends_by_a_line_of_the_log_at_another() -> None:
    async with (
        FakeUpstream() as engine,
        picking(engine, responses="unseen") as picker,
        channels(picker.port, 1) as (channel,),
    ):
        (holder,) = +holders(picker.port)
        call, _ = await ask(channel, "unseen-1")
        while await call.read() is not grpc.aio.EOF:
            pass  # the body, and then the picker ends the stream
        assert await loads(picker) == {engine.name: 1}
        os.kill(holder, signal.SIGKILL)

        async def gone() -> bool:
            await admin(picker, "/readyz")  # type: ignore[arg-type]
            return holder not in workers()

        await until(gone, 5000)
        assert await loads(picker) == {engine.name: 1}
        line = als_pb2.StreamAccessLogsMessage()
        entry = line.http_logs.log_entry.add()
        entry.request.request_id = "unseen-1"
        entry.response.response_code.value = 200
        address = entry.common_properties.upstream_remote_address.socket_address
        address.address, address.port_value = "127.0.0.1", engine.port
        async with channels(picker.port, 1) as (other,):
            log = other.stream_unary(ALS)()
            await log.write(line.SerializeToString())
            await until(lambda: _is(picker, {engine.name: 0}))
            assert await endings(picker) == {"ok": 1}  # type: ignore[arg-type]
            log.cancel()


async def test_workers_show_one_certificate() -> None:
    async with FakeUpstream() as engine, picking(engine, tls=True) as picker:
        loop = asyncio.get_running_loop()
        address = ("127.0.0.1", picker.port)
        shown = [
            await loop.run_in_executor(None, ssl.get_server_certificate, address) for _ in range(2 * WORKERS)
        ]
        assert len(set(shown)) == 1


async def test_draining_lets_streams_end_and_takes_no_new_connections() -> None:
    async with FakeUpstream() as engine, AsyncExitStack() as stack:
        picker = Picker(settings(engine), out=io.StringIO())
        async with picker.running():
            opened = await stack.enter_async_context(channels(picker.port, WORKERS))
            calls = [(await ask(channel, f"r{i}"))[0] for i, channel in enumerate(opened)]
            draining = asyncio.ensure_future(picker.front.drain())

            async def refused() -> bool:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", picker.port)
                except ConnectionRefusedError:
                    return True
                writer.close()
                return False

            await until(refused)
            assert await loads(picker) == {engine.name: WORKERS}
            for call in calls:
                await call.done_writing()
            await asyncio.wait_for(draining, 2)
            assert await loads(picker) == {engine.name: 0}
            assert workers() == []


async def test_a_port_in_use_is_told_as_without_workers() -> None:
    async with FakeUpstream() as engine, FakeUpstream() as other:
        with pytest.raises(SettingsError, match=f"picker.port: 127.0.0.1:{other.port} is in use"):
            async with picking(engine, port=other.port):
                pass
