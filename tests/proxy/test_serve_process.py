"""``pointsman serve`` as a process: what it prints, how it starts badly, how it ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pointsman.testing.client import ASK, ASK_STREAM, RawClient, message
from pointsman.testing.upstream import LAST_CHUNK, SSE_HEAD, FakeUpstream, event

VLLM_PAGE = b"""
vllm:num_requests_running{model_name="m"} 0.0
vllm:num_requests_waiting{model_name="m"} 0.0
vllm:cache_config_info{block_size="16",enable_prefix_caching="True",num_gpu_blocks="1000"} 1.0
"""


class Serve:
    """A running ``pointsman serve``."""

    def __init__(self, process: asyncio.subprocess.Process, report: str) -> None:
        self.process = process
        self.report = report
        self.port = int(re.findall(r"base URL: http://127\.0\.0\.1:(\d+)/v1", report)[0])
        self.admin_port = int(re.findall(r"admin: +http://127\.0\.0\.1:(\d+)/endpoints", report)[0])

    async def readyz(self) -> int:
        async with RawClient(self.admin_port) as client:
            return (await client.ask(message("GET", "/readyz"))).status

    async def ended(self) -> tuple[int, str, str]:
        """Exit code and what was still printed: standard output, standard error."""
        async with asyncio.timeout(10):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, out.decode(), err.decode()


async def start(*args: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-m", "pointsman", "serve", *args]
    return await asyncio.create_subprocess_exec(
        *command, stdout=pipe, stderr=pipe, env={**os.environ, "NO_COLOR": "1"}
    )


@asynccontextmanager
async def serve(*args: str) -> AsyncIterator[Serve]:
    process = await start("--host", "127.0.0.1", "--port", "0", "--admin-port", "0", *args)
    try:
        assert process.stdout
        lines = []
        async with asyncio.timeout(20):
            while not lines or not lines[-1].startswith("try:"):
                line = (await process.stdout.readline()).decode()
                assert line, "it ended before it had said where it serves"
                lines.append(line)
        yield Serve(process, "".join(lines))
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_the_start_says_what_was_learned_and_how_to_ask() -> None:
    down = FakeUpstream()
    await down.start()
    await down.stop()
    async with FakeUpstream() as known, FakeUpstream() as bare:
        known.page = VLLM_PAGE
        async with serve(known.url, "--endpoint", bare.url, "--endpoint", down.url) as gateway:
            report = gateway.report
            lines = {
                name: next(line for line in report.split("\n") if f" {name} " in line)
                for name in (known.name, bare.name, down.name)
            }
            for told in (
                "engine: vllm",
                "models: m",
                "block: 16 tokens",
                "KV: 16,000 tokens",
                "prefix caching: on",
            ):
                assert told in lines[known.name]
            assert "not told: engine, block, KV, prefix caching" in lines[bare.name]
            assert "WARNING" in lines[down.name]
            assert f"curl http://127.0.0.1:{gateway.port}/v1/chat/completions" in report
            assert '"model": "m"' in report
            assert await gateway.readyz() == 200
            async with RawClient(gateway.port) as client:
                assert (await client.ask()).status == 200


async def test_sigterm_lets_running_requests_end_and_takes_no_new_connections() -> None:
    gate = asyncio.Event()
    async with (
        FakeUpstream([SSE_HEAD, event("one"), gate, event("two"), LAST_CHUNK]) as engine,
        serve(engine.url) as gateway,
        RawClient(gateway.port) as idle,
        RawClient(gateway.port) as client,
    ):
        upload = RawClient(gateway.port)
        await upload.__aenter__()
        upload.send(ASK[:-10])
        client.send(ASK_STREAM)
        await client.head()
        await client.read(len(event("one")))
        gateway.process.send_signal(signal.SIGTERM)
        assert await idle.closed() == b""
        assert await gateway.readyz() == 503
        with pytest.raises(ConnectionError):
            await RawClient(gateway.port).__aenter__()
        upload.send(ASK[-10:])
        await engine.request(2)  # a request that was on its way is still served
        gate.set()
        assert await client.line(LAST_CHUNK) == event("two") + LAST_CHUNK
        assert await client.closed() == b""
        assert (await upload.response()).complete
        code, out, err = await gateway.ended()
        assert code == 0
        assert out.count("ending=ok") == 2
        assert "draining" in err
        assert "Traceback" not in err


async def test_what_does_not_end_within_the_drain_time_is_cut() -> None:
    async with (
        FakeUpstream([SSE_HEAD, event("one"), asyncio.Event()]) as engine,
        serve(engine.url, "--set", "server.drain_s=0.3") as gateway,
        RawClient(gateway.port) as client,
    ):
        client.send(ASK_STREAM)
        await client.head()
        gateway.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(engine.requests[0].gone.wait(), 5)
        await client.closed()
        code, _, err = await gateway.ended()
        assert code == 0
        assert "1 requests unfinished" in err


async def test_the_request_log_has_a_line_for_each_request() -> None:
    async with FakeUpstream() as engine, serve(engine.url) as gateway:
        async with RawClient(gateway.port) as client:
            await client.ask(message("POST", "/v1/completions", {"model": "m"}, "x-request-id: mine"))
            await client.ask(message(body={"model": "other"}))
        gateway.process.send_signal(signal.SIGINT)
        code, out, _ = await gateway.ended()
        second, first = sorted(out.strip().split("\n"), key=lambda line: "ending=ok" in line)
        assert code == 0
        assert all(
            word in first for word in ("id=mine", f"endpoint={engine.name}", "status=200", "ending=ok")
        )
        assert all(
            word in second
            for word in ("endpoint=-", "status=404", "ending=refused", "reason=model_not_found")
        )


@pytest.mark.parametrize("which", ["server.port", "admin.port"])
async def test_a_busy_port_is_one_line_that_names_it(which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"server.port": 0, "admin.port": 0, which: port}
        settings = [f"--set={key}={value}" for key, value in ports.items()]
        process = await start("http://127.0.0.1:9", "--host", "127.0.0.1", *settings)
        out, err = await asyncio.wait_for(process.communicate(), 20)
        lines = [line for line in err.decode().strip().split("\n") if line.startswith("pointsman serve:")]
        assert (process.returncode, out) == (2, b"")
        assert lines == [f"pointsman serve: {which}: 127.0.0.1:{port} is in use; choose another"]
        assert "Traceback" not in err.decode()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "endpoints"),
        (("ftp://x",), "must start with http"),
        (("http://127.0.0.1:9", "--set", "upstream.trys=2"), "upstream.trys"),
        (("http://127.0.0.1:9", "--set", "scheduling.preset=best"), "best"),
        (("http://127.0.0.1:9", "--config", "/nowhere/pointsman.yaml"), "/nowhere/pointsman.yaml"),
    ],
)
async def test_a_users_mistake_is_one_line_and_exit_code_2(args: tuple[str, ...], says: str) -> None:
    process = await start(*args)
    _, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 2
    assert len(err.decode().strip().split("\n")) == 1
    assert says in err.decode()
