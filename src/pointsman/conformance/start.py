"""Starting the picker under test, or finding the one that runs."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

from pointsman.conformance.checks import Failed, Skipped
from pointsman.conformance.groups import CONFIG_FILE, Group
from pointsman.conformance.subject import Place
from pointsman.errors import SettingsError
from pointsman.proxy.spawn import spawn

Launch = Callable[[str, Group, Path], AbstractAsyncContextManager[Place]]
"""Runs the picker on a group's configuration (its name, and the folder of its files)."""

START_PATIENCE_S = 30.0
STOP_PATIENCE_S = 15.0
LOG_FILE = "picker.log"
FLAGS = "{flags}"
OWN = (
    sys.executable,
    "-m",
    "pointsman",
    "picker",
    *("--config-file", "{config}", "--grpc-port", "{port}"),
    *("--grpc-health-port", "{health_port}", "--metrics-port", "{metrics_port}"),
    *("--refresh-metrics-interval", "50ms", "--metrics-endpoint-auth=false"),
    *("--set", "picker.responses=seen", "--set", "metrics.idle_interval_s=0.05", FLAGS),
)
"""This installation's picker; it looks at responses and at idle endpoints as often as llm-d's does."""


def parse_command(text: str) -> tuple[str, ...]:
    """A command line with placeholders; the group's flags come last unless it says where."""
    try:
        words = shlex.split(text)
    except ValueError as exc:
        raise SettingsError(f"--command: {exc}") from exc
    joined = " ".join(words)
    if not words or shutil.which(words[0]) is None:
        raise SettingsError(f"--command: {joined.partition(' ')[0]!r} is no program that can be run")
    for needed in ("{config}", "{port}"):
        if needed not in joined:
            raise SettingsError(f"--command: has no {needed}: where the picker is to read it from")
    return tuple(words if FLAGS in words else [*words, FLAGS])


def by_command(command: Sequence[str], *, tls: bool = False) -> Launch:
    """A picker for each group, started with this command and stopped afterwards."""

    @asynccontextmanager
    async def launch(name: str, group: Group, folder: Path) -> AsyncIterator[Place]:
        ports = dict(zip(("port", "health_port", "metrics_port"), map(str, free_ports(3)), strict=True))
        placeholders = {"config": str(folder / CONFIG_FILE), **ports}
        words: list[str] = []
        for word in command:
            words += group.start_flags(tls) if word == FLAGS else [_filled(word, placeholders)]
        joined = " ".join(command)
        with (folder / LOG_FILE).open("wb") as log:
            process = await spawn(
                *words, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            try:
                await _listening(process, int(ports["port"]), folder / LOG_FILE)
                yield Place(
                    address=f"127.0.0.1:{ports['port']}",
                    tls=tls or group.tls,
                    health_address=f"127.0.0.1:{ports['health_port']}" if "{health_port}" in joined else "",
                    metrics_url=f"http://127.0.0.1:{ports['metrics_port']}/metrics"
                    if "{metrics_port}" in joined
                    else "",
                )
            finally:
                await _stopped(process)

    return launch


def running_at(place: Place, group_name: str) -> Launch:
    """A picker that somebody started on the configuration of one group."""

    @asynccontextmanager
    async def launch(name: str, group: Group, folder: Path) -> AsyncIterator[Place]:
        if name != group_name:
            raise Skipped(f"needs the picker on configuration {name!r}")
        yield place

    return launch


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _filled(word: str, placeholders: dict[str, str]) -> str:
    for name, value in placeholders.items():
        word = word.replace(f"{{{name}}}", value)
    return word


async def _listening(process: asyncio.subprocess.Process, port: int, log: Path) -> None:
    """Wait until it accepts connections. ``Failed`` when it ends or takes too long."""
    exits = asyncio.create_task(process.wait())
    try:
        async with asyncio.timeout(START_PATIENCE_S):
            while not exits.done():
                with suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    return
                await asyncio.wait([exits], timeout=0.05)
    except TimeoutError:
        raise Failed(f"the picker does not listen within {START_PATIENCE_S:g} s{_said(log)}") from None
    finally:
        exits.cancel()
    raise Failed(f"the picker does not start{_said(log)}")


def _said(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f": {lines[-1]}" if lines else ""


async def _stopped(process: asyncio.subprocess.Process) -> None:
    """End it, and with force what it left of its process group."""
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_PATIENCE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
