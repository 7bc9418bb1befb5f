"""``pointsman picker`` as an object: the core behind a gRPC port that Envoy asks."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TextIO

from pointsman.config import Picker as PickerSettings
from pointsman.config import Settings
from pointsman.extproc.access_log import AccessLogIntake
from pointsman.extproc.completions import Completions
from pointsman.extproc.destinations import Destinations
from pointsman.extproc.grpc import GrpcServer, Service
from pointsman.extproc.health import Health
from pointsman.extproc.port import HEALTH_NAMES, PROCESS, tell_health, tls_of
from pointsman.extproc.processor import SEEN, Processor
from pointsman.extproc.tls import Certificate
from pointsman.extproc.workers import PickerWorkers
from pointsman.extproc.xds import EndpointLists
from pointsman.proxy.core import Core
from pointsman.types import Clock

SWEEP_S = 0.25


class PickerFront:
    """Answers gateways on the gRPC port, or on unix sockets (``core.Front``)."""

    def __init__(self, core: Core, sockets: Sequence[Path] = ()) -> None:
        """``sockets``: listen there instead of where the settings say, in the clear and without a port for
        probes.
        """
        self.settings: PickerSettings = core.settings.picker
        self.draining = False
        self._core = core
        self._sockets = tuple(sockets)
        self.destinations = Destinations(core.pool)
        self.completions = Completions(
            core.router, self.destinations, core.clock, core.settings.upstream.first_byte_timeout_s
        )
        self.processor = Processor(
            core.router,
            core.opening,
            self.destinations,
            self.completions,
            core.clock,
            random.Random(core.settings.scheduling.seed),
            responses=self.settings.responses,
            max_body_bytes=core.settings.server.body_bytes,
            subsets=self.settings.subsets,
            emits_scores=self.settings.scores,
        )
        self._lists = EndpointLists(core.pool, self.destinations)
        self._log = AccessLogIntake(self.completions.completed)
        self._health = Health(HEALTH_NAMES)
        self._server = GrpcServer(self._services(), max_message_bytes=self.settings.message_bytes)
        self._probes = GrpcServer(self._health.services())
        self._certificate: Certificate | None = None
        self.health_port = 0

    def _services(self) -> Mapping[str, Service]:
        return {
            PROCESS: self.processor,
            **self._health.services(),
            **self._log.services,
            **self._lists.services,
        }

    # -- life

    async def start(self) -> int:
        await self.destinations.resolve()
        self._lists.renew()
        self._tell_health()
        settings = self.settings
        sockets = self._sockets or ((Path(settings.socket),) if settings.socket else ())
        for path in sockets:
            await self._server.start(path=str(path), setting="picker.socket")
        if self._sockets:
            return 0
        if settings.health_port is not None:
            self.health_port = await self._probes.start(
                settings.host, settings.health_port, setting="picker.health_port"
            )
        if settings.socket:
            return 0
        tls, self._certificate = tls_of(settings)
        return await self._server.start(settings.host, settings.port, tls=tls, setting="picker.port")

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._lists.run())
            tasks.create_task(self.destinations.run())
            if self._certificate and self.settings.tls_reload:
                tasks.create_task(self._certificate.run())
            while True:
                await asyncio.sleep(SWEEP_S)
                self.completions.sweep()
                self._tell_health()

    def _tell_health(self) -> None:
        tell_health(self._health, ready=self._core.pool.ready, draining=self.draining)

    async def drain(self) -> None:
        self.draining = True
        self._tell_health()
        self._lists.drain()
        self._log.drain()
        await self._server.drain(self._core.settings.server.drain_s)

    def settle(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self._server.close()
        self._probes.close()
        self.completions.close()


class Picker:
    """The picker with everything it stands on. ``running`` is its whole life."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock = time.monotonic,
        out: TextIO | None = None,
        wall: Clock = time.time,
        *,
        sockets: Sequence[Path] = (),
    ) -> None:
        sees_responses = settings.picker.responses == SEEN
        self.settings = settings
        self.core = Core(settings, clock, out, wall, sees_responses=sees_responses, knows_models=False)
        own = not settings.server.workers or sockets
        self.front = PickerFront(self.core, sockets) if own else PickerWorkers(self.core)

    @property
    def port(self) -> int:
        """The gRPC port in use; 0 on a unix socket."""
        return self.core.port

    @property
    def admin_port(self) -> int:
        return self.core.admin_port

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Picker]:
        """Learn the endpoints, listen, serve until the block ends, then drain."""
        async with self.core.running(self.front):
            yield self
