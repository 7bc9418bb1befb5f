"""Processes of a soak: their output in a file, and what /proc says of them."""

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

READY_S = 30.0
POLL_S = 0.05
STOP_S = 10.0
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Failed(Exception):
    """A process ended, or did not get ready."""


@dataclass
class Process:
    """``python -m pointsman ...``, its output in the file ``log``."""

    name: str
    log: Path
    process: asyncio.subprocess.Process

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    def rss_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * PAGE_BYTES

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def cpu_s(self) -> float:
        """CPU seconds of all its threads so far. The clock id is Linux's make_process_cpuclock."""
        return time.clock_gettime_ns((~self.process.pid << 3) | 2) / 1e9

    def complaints(self) -> list[str]:
        """Lines of its output that speak of a bug rather than of a bad engine."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if re.match(r"Traceback|.* (ERROR|CRITICAL) |\w+Error:", line)]

    async def says(self, pattern: str) -> str:
        """All it has printed, once ``pattern`` is in it."""
        deadline_s = time.monotonic() + READY_S
        while time.monotonic() < deadline_s and self.alive:
            text = self.log.read_text(errors="replace")
            if re.search(pattern, text, re.MULTILINE):
                return text
            await asyncio.sleep(POLL_S)
        raise Failed(f"{self.name} did not get ready: {self.log.read_text(errors='replace')[-2000:]}")


@contextlib.asynccontextmanager
async def running(name: str, args: Sequence[str], log: Path) -> AsyncIterator[Process]:
    """The process, for as long as the block lasts."""
    with log.open("wb") as out:
        started = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "pointsman",
            *args,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    process = Process(name, log, started)
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.alive:
                started.send_signal(number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(started.wait(), STOP_S)
                break
