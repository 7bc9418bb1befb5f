"""`pointsman envoy` as processes: what it prints, how either half may die, how settings change, how it
ends.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pointsman.testing.client import ASK, ASK_STREAM, RawClient, message
from pointsman.testing.upstream import LAST_CHUNK, SSE_HEAD, FakeUpstream, Received, Step, completion, event

PATIENCE_S = 20.0
LANES = pytest.mark.parametrize("lane", ["", "--fast-lane"], ids=["ext_proc", "fast-lane"])


class Running:
    """A running `pointsman envoy`, and all it prints."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout
        assert process.stderr
        self.process = process
        self.out = ""
        self.err = ""
        self._more = asyncio.Condition()
        loop = asyncio.get_running_loop()
        # Read all the time: a full pipe would stop the writer.
        self._readers = [
            loop.create_task(self._read("out", process.stdout)),
            loop.create_task(self._read("err", process.stderr)),
        ]
        self.port = self.admin_port = 0

    async def _read(self, name: str, stream: asyncio.StreamReader) -> None:
        while data := await stream.read(65536):
            setattr(self, name, getattr(self, name) + data.decode())
            async with self._more:
                self._more.notify_all()

    async def ready(self) -> None:
        """It has said where it serves."""
        await self.said("try:", "out")
        self.port = int(re.findall(r"base URL: https?://127\.0\.0\.1:(\d+)/v1", self.out)[0])
        self.admin_port = int(re.findall(r"admin: +http://127\.0\.0\.1:(\d+)/endpoints", self.out)[0])

    async def said(self, text: str, where: str = "err") -> None:
        """Until ``text`` has been printed."""
        async with asyncio.timeout(PATIENCE_S), self._more:
            await self._more.wait_for(lambda: text in getattr(self, where))

    async def ended(self) -> int:
        """Its exit code, when all is printed."""
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*self._readers)
            return await self.process.wait()

    def child(self, word: str) -> int:
        """The process that has ``word`` in its command line; 0 when there is none."""
        for path in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in path.read_text().split():
                if word in Path(f"/proc/{pid}/cmdline").read_text():
                    return int(pid)
        return 0

    @property
    def picker(self) -> int:
        return self.child("--picker-only")

    @property
    def envoy(self) -> int:
        return self.child("--admin-address-path")


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # empty: it only waits to be collected
    except OSError:
        return False


async def start(*args: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-m", "pointsman", "envoy", *filter(None, args)]
    return await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)


LOOPBACK = (
    "--host",
    "127.0.0.1",
    "--admin-port",
    "0",
    "--set",
    "envoy.admin_port=0",
    "--set",
    "envoy.threads=1",
)


@asynccontextmanager
async def running(*args: str) -> AsyncIterator[Running]:
    found = Running(await start("--port", "0", *LOOPBACK, *args))
    try:
        await found.ready()
        yield found
    finally:
        if found.process.returncode is None:
            if found.picker:
                os.kill(found.picker, signal.SIGCONT)
            found.process.terminate()
        await found.ended()


def stream_or_completion(gate: asyncio.Event) -> list[Step] | object:
    """Streams wait for the gate; others are answered at once."""

    def script(request: Received) -> list[Step]:
        if b'"stream": true' in request.body:
            return [SSE_HEAD, event("one"), gate, event("two"), LAST_CHUNK]
        return completion(request)

    return script


@LANES
async def test_it_says_what_it_serves_and_ends_when_told_after_what_runs(lane: str) -> None:
    gate = asyncio.Event()
    async with FakeUpstream(stream_or_completion(gate)) as engine, running(engine.url, lane) as gateway:
        assert f"curl http://127.0.0.1:{gateway.port}/v1/chat/completions" in gateway.out
        assert engine.name in gateway.out
        async with RawClient(gateway.port) as client:
            client.send(ASK_STREAM)
            await client.head()
            await client.line(event("one"))
            gateway.process.send_signal(signal.SIGTERM)
            await gateway.said("draining")
            gate.set()
            assert (await client.line(LAST_CHUNK)).endswith(event("two") + LAST_CHUNK)
        assert await gateway.ended() == 0, gateway.err
        assert "Traceback" not in gateway.err
        line = rf'path="/v1/completions" .* endpoint={engine.name} status=200 flags=- '
        assert re.search(line, gateway.out)


@LANES
async def test_a_killed_picker_costs_no_request_and_cuts_no_stream(lane: str) -> None:
    gate = asyncio.Event()
    async with (
        FakeUpstream(stream_or_completion(gate)) as a,
        FakeUpstream(stream_or_completion(gate)) as b,
        running(a.url, b.url, lane) as gateway,
    ):
        streams = [RawClient(gateway.port) for _ in range(8)]
        for client in streams:
            await client.__aenter__()
            client.send(ASK_STREAM)
            await client.head()
            await client.line(event("one"))
        asked = 0
        killed = asyncio.Event()
        back = asyncio.Event()

        async def load() -> None:
            nonlocal asked
            while not back.is_set():
                async with RawClient(gateway.port) as client:
                    for _ in range(20):
                        assert (await client.ask(ASK)).status == 200
                        asked += 1
                        if asked == 40:
                            killed.set()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(load())
            await killed.wait()
            before = gateway.picker
            os.kill(before, signal.SIGKILL)
            await gateway.said("the picker is back")
            assert gateway.picker not in (0, before)
            back.set()
        assert asked > 40
        gate.set()
        for client in streams:
            assert (await client.line(LAST_CHUNK)).endswith(event("two") + LAST_CHUNK)
            await client.__aexit__(None, None, None)


@LANES
@pytest.mark.parametrize("down", ["open", "closed"])
async def test_a_hung_picker_costs_a_moment_and_then_nothing(lane: str, down: str) -> None:
    settings = ("--set", f"envoy.picker_down={down}", "--set", "envoy.decision_timeout_s=0.5")
    async with (
        FakeUpstream() as engine,
        running(engine.url, lane, *settings) as gateway,
    ):
        clock = asyncio.get_running_loop().time

        async def took() -> float:
            """Seconds of one request that is answered as set."""
            began = clock()
            async with asyncio.timeout(PATIENCE_S), RawClient(gateway.port) as client:
                assert (await client.ask(ASK)).status in ((200,) if down == "open" else (503, 504))
            return clock() - began

        os.kill(gateway.picker, signal.SIGSTOP)
        assert await took() < 2.5
        async with asyncio.timeout(PATIENCE_S):
            while await took() > 0.25:  # until Envoy's health check has seen it
                pass
        os.kill(gateway.picker, signal.SIGCONT)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                async with RawClient(gateway.admin_port) as admin, RawClient(gateway.port) as client:
                    status = (await client.ask(ASK)).status
                    if status == 200 and b'"chosen"' in (await admin.ask(message("GET", "/decisions"))).body:
                        return


async def test_envoy_s_death_is_the_end_and_leaves_nothing(tmp_path: Path) -> None:
    async with FakeUpstream() as engine, running(engine.url) as gateway:
        picker = gateway.picker
        os.kill(gateway.envoy, signal.SIGKILL)
        assert await gateway.ended() == signal.SIGKILL
        assert "Envoy ended by itself" in gateway.err
        assert not lives(picker)


async def test_nothing_outlives_a_killed_command() -> None:
    async with FakeUpstream() as engine, running(engine.url) as gateway:
        children = (gateway.picker, gateway.envoy)
        assert all(children)
        gateway.process.kill()
        await gateway.ended()
        async with asyncio.timeout(PATIENCE_S):
            while any(map(lives, children)):  # noqa: ASYNC110 - they are nobody's children any more
                await asyncio.sleep(0.01)


async def test_sighup_takes_up_other_settings_and_cuts_nothing(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with (
        FakeUpstream(stream_or_completion(gate)) as a,
        FakeUpstream(stream_or_completion(gate)) as b,
    ):
        file = tmp_path / "pointsman.yaml"
        file.write_text(f"endpoints: [{{url: '{a.url}'}}]")
        async with running("--config", str(file)) as gateway, RawClient(gateway.port) as client:
            client.send(ASK_STREAM)
            await client.head()
            await client.line(event("one"))

            async def status(path: str) -> int:
                async with RawClient(gateway.port) as other:
                    return (await other.ask(message("POST", path, {"model": "m"}))).status

            assert await status("/sleep") == 404
            file.write_text("endpoints: [{url: 'ftp://x'}]")
            gateway.process.send_signal(signal.SIGHUP)
            await gateway.said("keeping the settings we have: ")
            await gateway.said("must start with http")
            file.write_text(f"endpoints: [{{url: '{b.url}'}}]\nserver: {{allow_paths: [/sleep]}}")
            gateway.process.send_signal(signal.SIGHUP)
            await gateway.said("the picker is back")
            async with asyncio.timeout(PATIENCE_S):
                while not b.requests:
                    assert await status("/v1/completions") == 200
                while await status("/sleep") != 200:
                    pass
            gate.set()
            assert (await client.line(LAST_CHUNK)).endswith(event("two") + LAST_CHUNK)


@pytest.mark.parametrize("which", ["server.port", "envoy.admin_port", "admin.port"])
async def test_a_busy_port_is_one_line_that_names_it(which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"server.port": 0, "envoy.admin_port": 0, "admin.port": 0, which: port}
        settings = [f"--set={key}={value}" for key, value in ports.items()]
        process = await start("http://127.0.0.1:9", "--host", "127.0.0.1", *settings)
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
        lines = [line for line in err.decode().split("\n") if line.startswith("pointsman envoy:")]
        assert (process.returncode, out) == (2, b""), err
        assert len(lines) == 1
        assert lines[0].startswith(f"pointsman envoy: {which}: 127.0.0.1:{port}")
        assert "Traceback" not in err.decode()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "endpoints"),
        (("http://127.0.0.1:9/prefix",), "path prefix"),
        (("http://127.0.0.1:9", "--envoy-binary", "/nowhere/envoy"), "/nowhere/envoy"),
        (("http://127.0.0.1:9", "--set", "server.tls_cert=/a"), "server.tls_key"),
        (("http://127.0.0.1:9", "--set", "server.tls_cert=/a", "--set", "server.tls_key=/b"), "tls_cert"),
        (("http://127.0.0.1:9", "--print", "--fast-lane", "--picker", "x:1"), "--picker"),
    ],
)
async def test_a_users_mistake_is_one_line_and_exit_code_2(args: tuple[str, ...], says: str) -> None:
    process = await start(*args, *LOOPBACK)
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert (process.returncode, out) == (2, b""), err
    assert "Traceback" not in err.decode()
    assert says in err.decode().strip().split("\n")[-1]


async def test_the_printed_configuration_is_whole() -> None:
    process = await start("http://127.0.0.1:9", *LOOPBACK, "--print", "--sockets", "/run/there")
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    text = out.decode()
    assert process.returncode == 0
    for part in ("static_resources:", "path: /run/there/picker.sock", "name: envoy.filters.http.ext_proc"):
        assert part in text
