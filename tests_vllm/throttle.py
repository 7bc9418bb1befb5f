"""One core for several engines, dealt out in turns: so each has exactly its share of a core, and no more
when the others have nothing to do.

All processes of the engines are pinned to one core, and all engines but one are stopped (SIGSTOP) at any
time. That is what a CPU quota does, but for any user and on any Linux; the kernel's own (cgroup
``cpu.max``) needs root. A core of their own keeps the router and its clients from taking time from the slow
engine.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

PERIOD_S = 0.04
"""Of all turns: some steps of the engine long, and short beside a request."""


def members(session: int) -> Iterator[int]:
    """Process ids of a session."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(_fields(stat)[3]) == session:
                yield int(stat.parent.name)


def _fields(stat: Path) -> list[str]:
    """From the state on: state, parent, process group, session ..."""
    return stat.read_text().rpartition(")")[2].split()


def pin(session: int, core: int) -> None:
    """All threads that there are now; those they start begin there."""
    for process in members(session):
        with suppress(OSError):
            for thread in Path(f"/proc/{process}/task").iterdir():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread.name), {core})


def cpu_s(session: int) -> float:
    """Seconds of CPU that its processes have used."""
    ticks = 0
    for process in members(session):
        with suppress(OSError):
            fields = _fields(Path(f"/proc/{process}/stat"))
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Turns:
    """Deals ``core`` out to sessions until ``end``; ``shares`` of each are of the core's time, and may be
    replaced.
    """

    def __init__(self, core: int, shares: Mapping[int, float]) -> None:
        self.shares = shares
        self._sessions = tuple(shares)
        self._over = threading.Event()
        for session in self._sessions:
            pin(session, core)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        """All run again."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for session in self._sessions:
                os.killpg(session, signal.SIGSTOP)
            while not self._over.is_set():
                for session, share in self.shares.items():
                    os.killpg(session, signal.SIGCONT)
                    self._over.wait(share * PERIOD_S)
                    os.killpg(session, signal.SIGSTOP)
        finally:
            for session in self._sessions:
                with suppress(ProcessLookupError):
                    os.killpg(session, signal.SIGCONT)
