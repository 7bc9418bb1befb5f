"""The small file in which what was learned survives a restart."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from pathlib import Path

from pointsman.config import Learned
from pointsman.endpoints.pool import Pool
from pointsman.errors import SettingsError
from pointsman.predictor.state import State, StateError, decode, encode
from pointsman.scheduling.scheduler import Scheduler
from pointsman.types import Clock

log = logging.getLogger(__name__)

MAX_BYTES = 4 * 1024 * 1024
"""A file that is larger is none of ours."""


class LearnedFile:
    """Reads it at start, writes it now and then and at the end; never on the event loop.

    Nothing about it stops the gateway: who cannot read it learns from nothing, who cannot write it says so.
    """

    def __init__(self, settings: Learned, pool: Pool, scheduler: Scheduler, wall: Clock) -> None:
        """``wall`` gives seconds since 1970, as fast as the clock of the others."""
        self._path = Path(settings.path)
        self._every_s = settings.every_s
        self._pool = pool
        self._scheduler = scheduler
        self._wall = wall
        self._writing = threading.Lock()
        self._number = self._written = 0
        self._failed = ""
        if not self._path.parent.is_dir():
            raise SettingsError(
                f"learned.path: there is no directory {self._path.parent}; make it, or leave it empty"
            )

    async def load(self) -> None:
        """Take up what an earlier process left."""
        state = await asyncio.to_thread(self._read)
        if state is not None:
            self._scheduler.restore(state, max(0.0, self._wall() - state.saved_at_s))

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self.save()

    async def save(self) -> None:
        """Write what is known now."""
        endpoints = [member.endpoint for member in self._pool.members.values()]
        state = self._scheduler.state(endpoints, self._wall())
        if state is None:
            return
        self._number += 1
        failed = await asyncio.to_thread(self._write, encode(state), self._number)
        if failed and failed != self._failed:
            log.warning("what was learned cannot be kept: %s", failed)
        self._failed = failed

    def _read(self) -> State | None:
        try:
            if self._path.stat().st_size > MAX_BYTES:
                raise StateError("is not a file of what was learned")
            return decode(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, StateError) as exc:
            log.warning("what was learned before is lost: %s: %s", self._path, _why(exc))
            return None

    def _write(self, data: bytes, number: int) -> str:
        """All or nothing, and never an older state over a newer one. Returns what went wrong."""
        beside = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with self._writing:
            if number < self._written:
                return ""
            self._written = number
            try:
                beside.write_bytes(data)
                beside.replace(self._path)
            except OSError as exc:
                return f"{self._path}: {_why(exc)}"
        return ""


def _why(exc: OSError | StateError) -> str:
    return exc.message if isinstance(exc, StateError) else exc.strerror or str(exc)
