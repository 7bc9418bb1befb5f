"""A core for each engine, and for some of them only a share of its time.

An engine's processes are pinned to one core and, to be slower, stopped (SIGSTOP) for the rest of each period:
what a CPU quota does, for any user and on any Linux. Quotas of the kernel (cgroup ``cpu.max``) need root.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PERIOD_S = 0.03
"""A stop lasts for less than a look at the engine's metrics may take, and for a few of its steps."""


def members(session: int) -> Iterator[int]:
    """Process ids of a session."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()  # from the state on: ppid, pgrp, session
            if int(fields[3]) == session:
                yield int(stat.parent.name)


def pin(session: int, core: int) -> None:
    """All threads that there are now; those they start are born there."""
    for process in members(session):
        for thread in Path(f"/proc/{process}/task").iterdir():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), {core})


def cpu_s(session: int) -> float:
    """Seconds of CPU its processes have used."""
    ticks = 0
    for process in members(session):
        with suppress(OSError):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Throttle:
    """Lets one session at a time run for ``share`` of the time only, from when it is given until ``release``."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def hold(self, session: int) -> None:
        """Throttle this one instead of the one before."""
        self.release()
        self._over.clear()
        self._thread = threading.Thread(target=self._run, args=(session,))
        self._thread.start()

    def release(self) -> None:
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None

    def _run(self, session: int) -> None:
        """Whole periods by the clock: a late wake-up makes one period longer, not the share larger."""
        began = time.monotonic()
        stopped_s = 0.0
        try:
            while not self._over.wait(self._share * PERIOD_S):
                at = time.monotonic()
                os.killpg(session, signal.SIGSTOP)
                due_s = (1 - self._share) * (at - began + PERIOD_S * (1 - self._share)) - stopped_s
                self._over.wait(max(0.0, due_s))
                os.killpg(session, signal.SIGCONT)
                stopped_s += time.monotonic() - at
        except ProcessLookupError:
            return  # it has ended
        finally:
            with suppress(ProcessLookupError):
                os.killpg(session, signal.SIGCONT)
