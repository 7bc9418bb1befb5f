"""``pointsman serve`` as a process: what it prints, how it starts and how it stops."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pointsman.cli.serve import describe
from pointsman.config import Endpoint as Settings
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.target import targets_of
from pointsman.testing.client import ASK, ASK_STREAM, RawClient, message
from pointsman.testing.serving import until
from pointsman.testing.upstream import LAST_CHUNK, SSE_HEAD, FakeUpstream, event
from pointsman.types import Metrics

SERVE = (
    sys.executable,
    "-m",
    "pointsman",
    "serve",
    "--host",
    "127.0.0.1",
    "--port",
    "0",
    "--admin-port",
    "0",
)


PAGE = (
    b"# a page\nvllm:num_requests_running 0\n"
    b'vllm:cache_config_info{block_size="16",enable_prefix_caching="True",num_gpu_blocks="100"} 1\n'
)


class Process:
    """A running gateway: what it has printed, and the port it said."""

    def __init__(self, process: asyncio.subprocess.Process, told: str) -> None:
        self.process = process
        self.told = told
        self.port = int(re.findall(r"base URL: http://127\.0\.0\.1:(\d+)/v1", told)[0])
        self.admin_port = int(re.findall(r"admin: +http://127\.0\.0\.1:(\d+)/", told)[0])

    async def stop(self) -> tuple[int, str, str]:
        """Exit code after SIGTERM, the rest of standard output, and standard error."""
        self.process.send_signal(signal.SIGTERM)
        out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, out.decode(), err.decode()


async def start(*arguments: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*SERVE, *arguments, stdout=pipe, stderr=pipe)


@asynccontextmanager
async def gateway(*arguments: str) -> AsyncIterator[Process]:
    process = await start(*arguments)
    try:
        assert process.stdout
        told = b""
        while not told.endswith(b"}'\n"):
            line = await process.stdout.readline()
            assert line, (await process.stderr.read()).decode() if process.stderr else ""
            told += line
        yield Process(process, told.decode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_it_tells_what_it_found_serves_and_stops() -> None:
    async with FakeUpstream() as engine, FakeUpstream() as down:
        engine.page = PAGE
        await down.stop()
        async with gateway(engine.url, "--endpoint", down.url) as serve:
            lines = serve.told.splitlines()
            assert lines[0] == "pointsman serve: 2 endpoints"
            facts = "engine: vllm  models: m  block: 16 tokens  KV: 1,600 tokens  prefix caching: on"
            assert lines[1] == f"  {engine.name}  {facts}"
            assert lines[2] == f"  {down.name}  WARNING: does not answer; it will be used as soon as it does"
            assert lines[3] == "policy: least-cost"
            assert '"model": "m"' in lines[-1]
            assert lines[-1].startswith(f"try: curl http://127.0.0.1:{serve.port}/v1/chat/completions")
            async with RawClient(serve.port) as client:
                assert (await client.ask(ASK)).status == 200
            code, out, err = await serve.stop()
    assert code == 0
    assert out.count(" status=200 ending=ok ") == 1
    assert "draining" in err


async def test_its_clock_can_run_as_fast_as_simulated_engines() -> None:
    async with FakeUpstream() as engine, gateway(engine.url, "--clock-speed", "1000") as serve:
        before_s = time.monotonic()
        async with RawClient(serve.port) as client:
            await client.ask(ASK)
        after_s = time.monotonic()
        async with RawClient(serve.admin_port) as client:
            told = json.loads((await client.ask(message("GET", "/decisions"))).body)
        await serve.stop()
    (decision,) = told["decisions"]
    assert 1000 * before_s <= decision["at_s"] <= 1000 * after_s


async def refused(port: int) -> bool:
    """Whether new connections are."""
    try:
        async with RawClient(port):
            return False
    except OSError:
        return True


async def test_sigterm_lets_a_running_stream_end() -> None:
    more = asyncio.Event()
    steps = [SSE_HEAD, event({"choices": [{"text": "a"}]}), more, event("[DONE]"), LAST_CHUNK]
    async with FakeUpstream(steps) as engine, gateway(engine.url) as serve, RawClient(serve.port) as client:
        client.send(ASK_STREAM)
        await client.line(b'"a"}]}')
        stopping = asyncio.create_task(serve.stop())
        await until(lambda: refused(serve.port))
        more.set()
        rest = await client.closed()
        assert b"[DONE]" in rest
        code, _, _ = await stopping
    assert code == 0


async def test_a_port_that_is_taken_is_named_and_exits_2() -> None:
    async with FakeUpstream() as engine:
        engine.page = PAGE
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            for option, key in (("--port", "server.port"), ("--admin-port", "admin.port")):
                process = await start(engine.url, option, str(port))
                _, err = await process.communicate()
                assert process.returncode == 2
                assert err.decode().startswith(f"pointsman serve: {key}: ")
                assert str(port) in err.decode()
                assert err.count(b"\n") == 1


async def test_settings_and_a_picker_configuration_together(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("serve")
    async with FakeUpstream() as engine:
        config, picker = folder / "pointsman.yaml", folder / "epp.yaml"
        config.write_text(
            json.dumps({"endpoints": [{"url": engine.url, "name": "one"}], "log": {"requests": False}})
        )
        picker.write_text(
            json.dumps(
                {
                    "apiVersion": "llm-d.ai/v1alpha1",
                    "kind": "EndpointPickerConfig",
                    "plugins": [{"type": "random-picker"}],
                }
            )
        )
        async with gateway("--config", str(picker), "--config", str(config)) as serve:
            assert f"policy: {picker}" in serve.told
            async with RawClient(serve.port) as client:
                assert (await client.ask(ASK)).status == 200
            code, out, _ = await serve.stop()
    assert (code, out) == (0, ""), "no request log"


def test_what_an_endpoint_did_not_tell_is_said() -> None:
    pool = Pool(lambda: 0.0)
    member = pool.add(targets_of(Settings(url="http://a:1"))[0], "settings")
    assert "WARNING: does not answer" in describe(member)
    pool.reached("a:1")
    assert describe(member) == "a:1    (not told: engine, models, block, KV, prefix caching)"
    pool.learn_metrics("a:1", "vllm", Metrics(block_tokens=16, kv_blocks=10, prefix_caching=False), False)
    pool.learn_models("a:1", [{"id": "b"}, {"id": "a"}])
    assert describe(member) == (
        "a:1  engine: vllm  models: a, b  block: 16 tokens  KV: 160 tokens  prefix caching: off"
    )
