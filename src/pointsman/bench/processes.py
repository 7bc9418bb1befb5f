"""Processes of ours: a simulated fleet or a router, started for a measurement and stopped with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from pointsman.errors import PointsmanError
from pointsman.proxy.spawn import spawn

_STOP_S = 5.0
_KEPT_LINES = 200
_LAST_LINES = 10
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class ProcessFailed(PointsmanError):
    """A process of ours ended, or did not get ready; the message has its last words."""


class Process:
    """``python -m pointsman ARGS`` in a session of its own, so that Ctrl-C reaches it through us alone."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._reader = asyncio.create_task(self._read())
        self._changed = asyncio.Event()

    async def _read(self) -> None:
        assert self._process.stdout
        async for line in self._process.stdout:
            self._lines.append(line.decode(errors="replace").rstrip())
            self._changed.set()
        self._changed.set()

    async def says(self, pattern: str, within_s: float) -> re.Match[str]:
        """The match of ``pattern`` in what it has printed lately, as soon as there is one."""
        try:
            async with asyncio.timeout(within_s):
                while True:
                    self._changed.clear()
                    found = re.search(pattern, "\n".join(self._lines), re.MULTILINE)
                    if found:
                        return found
                    if self._reader.done():
                        raise ProcessFailed(f"{self.name} ended: {self._last_words()}")
                    await self._changed.wait()
        except TimeoutError as exc:
            raise ProcessFailed(f"{self.name} was not ready in {within_s:g} s: {self._last_words()}") from exc

    def _last_words(self) -> str:
        return " | ".join(list(self._lines)[-_LAST_LINES:]) or "it printed nothing"

    def cpu_s(self) -> float:
        """CPU seconds it has used so far."""
        if self._process.returncode is not None:
            raise ProcessFailed(f"{self.name} ended: {self._last_words()}")
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    async def stop(self) -> None:
        """Ask it to end, then insist."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_S):
                    await self._process.wait()
                break
        await self._reader


@contextlib.asynccontextmanager
async def running(name: str, args: Sequence[str]) -> AsyncIterator[Process]:
    """The process for as long as the block lasts."""
    started = await spawn(
        sys.executable,
        "-m",
        "pointsman",
        *args,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    process = Process(name, started)
    try:
        yield process
    finally:
        await asyncio.shield(asyncio.ensure_future(process.stop()))
