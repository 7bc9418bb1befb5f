"""``pointsman serve`` as an object: the core behind a data port of HTTP, here or in workers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TextIO

from pointsman.config import Settings
from pointsman.proxy.core import Core, Front
from pointsman.proxy.gateway import Gateway
from pointsman.proxy.plane import Plane
from pointsman.proxy.workers.front import Workers
from pointsman.types import Clock


class Application:
    """The gateway with everything it stands on. ``running`` is its whole life."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock = time.monotonic,
        out: TextIO | None = None,
        wall: Clock = time.time,
    ) -> None:
        self.settings = settings
        self.core = core = Core(settings, clock, out, wall)
        self.pool = core.pool
        self.index = core.index
        self.front: Front
        if settings.server.workers:
            self.front = Workers(core)
        else:
            plane = Plane(settings, core.pool, core.router, core.opening, clock)
            self.front = Gateway(plane, core.scraper.refresh_models)

    @property
    def port(self) -> int:
        """The data port in use."""
        return self.core.port

    @property
    def admin_port(self) -> int:
        return self.core.admin_port

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Application]:
        """Learn the endpoints, listen, serve until the block ends, then drain."""
        async with self.core.running(self.front):
            yield self
