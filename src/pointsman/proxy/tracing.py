"""The trace of ``serve``: its observer, its file, and what it tells of the endpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from pointsman.config import Settings, read_text
from pointsman.endpoints.pool import Pool
from pointsman.observability.trace import Header, Recorder, Ruled, Speeds
from pointsman.observability.trace_file import TraceFile
from pointsman.scheduling.scheduler import Scheduler
from pointsman.types import Clock, Endpoint

FLEET_S = 120.0
"""How often what is known of the endpoints is written."""


class Tracing:
    """``observer`` goes to the router; ``open`` before the first request, then ``run``."""

    def __init__(self, settings: Settings, pool: Pool, scheduler: Scheduler, clock: Clock) -> None:
        self._settings = settings
        self._pool = pool
        self._scheduler = scheduler
        self._file = TraceFile(settings.trace.path, settings.trace.max_bytes)
        self.observer = Recorder(self._file.write, self._header, self._facts, clock)

    def open(self) -> None:
        """Begin the file; ``SettingsError`` when that cannot be done."""
        self._file.open(self.observer.begin)

    async def run(self) -> None:
        """Write, until cancelled."""
        await self._file.run(self.observer.fleet, FLEET_S)

    def _header(self) -> Header:
        settings = self._settings
        scheduling = settings.scheduling
        picker = scheduling.picker_config
        ruled = Ruled(
            preset=scheduling.preset,
            parameters=scheduling.parameters,
            picker_config=read_text(Path(picker)) if picker else None,
        )
        return Header(
            unix_s=time.time(),
            policy=ruled,
            prefix_block_tokens=settings.prefix.block_tokens,
            metrics_interval_s=settings.metrics.interval_s,
        )

    def _facts(self) -> Sequence[tuple[Endpoint, Speeds | None]]:
        endpoints = [member.endpoint for member in self._pool.members.values()]
        learned = self._scheduler.learned(endpoints)
        return [(e, msgspec.to_builtins(learned.get(e.name))) for e in endpoints]
