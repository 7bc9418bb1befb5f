"""``pointsman engine`` as a user runs it."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

TIMEOUT_S = 20


@asynccontextmanager
async def engine(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pointsman", "engine", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def said(process: asyncio.subprocess.Process, lines: int) -> str:
    assert process.stdout is not None
    return b"".join([await process.stdout.readline() for _ in range(lines)]).decode()


async def get(url: str, path: str) -> bytes:
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_one_engine_says_where_it_is_serves_and_stops_cleanly(number: signal.Signals) -> None:
    async with engine(
        "--port", "0", "--model", "m", "--accelerator", "gaudi3", "--set", "kv_tokens=2560"
    ) as process:
        text = await said(process, 3)
        url = re.findall(r"http://[\d.:]+", text)[0]
        assert "simulated" in text
        assert "block: 128 tokens  KV: 2,560 tokens" in text
        assert text.endswith(f"pointsman serve {url}\n")
        assert b'"id":"m"' in await get(url, "/v1/models")
        process.send_signal(number)
        out, err = await process.communicate()
    assert (process.returncode, out, err) == (0, b"", b"")


async def test_a_fleet_runs_in_one_process_at_the_pace_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(
        "speed: 2\nengines:\n- {accelerator: h100-nvl, count: 2}\n- {accelerator: mi325x, name: amd}\n"
    )
    async with engine("--fleet", str(file), "--speed", "8") as process:
        text = await said(process, 5)
        urls = re.findall(r"http://[\d.:]+", text)
        assert [line.split()[0] for line in text.splitlines()[1:4]] == ["h100-nvl-0", "h100-nvl-1", "amd"]
        assert text.endswith(f"pointsman serve {' '.join(urls[:3])}\n")
        assert b'"speed":8.0' in await get(urls[2], "/sim/state")
        assert b'"name":"h100-nvl-1"' in await get(urls[2], "/sim/state/h100-nvl-1")


async def test_variants_are_options_and_said() -> None:
    options = "--batch-buckets hpu --recompile-s 2 --num-speculative-tokens 3 --step-jitter"
    async with engine("--port", "0", *options.split(), "--kv-scale", "0.7", "--seed", "4") as process:
        text = await said(process, 2)
    assert "KV: 254,096 tokens" in text  # 0.7 of 363,000, in whole blocks
    assert (
        "batch_buckets: hpu  recompile_s: 2.0  num_speculative_tokens: 3  step_jitter: 0.1  seed: 4\n" in text
    )


async def test_a_busy_port_is_named_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with engine("--port", str(port)) as process:
            _, err = await process.communicate()
    assert process.returncode == 2
    assert err.decode().count("\n") == 1
    assert f"127.0.0.1:{port}" in err.decode()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--set", "kv_token=3"), "`kv_token`"),
        (("--set", "kv_tokens"), "KEY=VALUE"),
        (("--accelerator", "h100"), "'h100'"),
        (("--speed", "0"), "speed"),
        (("--fleet", "nowhere.yaml"), "nowhere.yaml"),
        (("--fleet", "nowhere.yaml", "--port", "1"), "--port"),
        (("--fleet", "nowhere.yaml", "--kv-scale", "1"), "--kv-scale"),
        (("--kv-scale", "0"), "kv_scale"),
        (("--recompile-s", "1"), "recompile_s"),
    ],
)
async def test_a_mistake_is_one_line_that_names_it(arguments: tuple[str, ...], named: str) -> None:
    async with engine(*arguments) as process:
        out, err = await process.communicate()
    assert process.returncode == 2
    assert not out
    assert err.decode().count("\n") == 1
    assert named in err.decode()
