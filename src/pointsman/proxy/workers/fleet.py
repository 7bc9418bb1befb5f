"""The workers of a scheduler: started, told what changes, started again when they die, drained."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Awaitable, Sequence

from pointsman.config import Settings
from pointsman.errors import SettingsError
from pointsman.proxy.core import Core
from pointsman.proxy.spawn import spawn
from pointsman.proxy.workers.desk import Desk, Unseen
from pointsman.proxy.workers.messages import Hello, Placed, State
from pointsman.types import Endpoint

log = logging.getLogger(__name__)

LOOK_S = 0.05
"""Workers know this late that the first endpoint answers, or of a new model."""
SETTLE_S = 1.0
START_S = 30.0
LAST_WORDS_S = 2.0
"""After the time for draining, until a worker is killed."""
AGAIN_S, MAX_AGAIN_S = 0.1, 5.0
"""Until a worker that has died is replaced; doubles each time, until one has lived for ``LIVED_S``."""
LIVED_S = 10.0


class Worker:
    """A worker's process and its desk."""

    def __init__(self, process: asyncio.subprocess.Process, desk: Desk, control: socket.socket) -> None:
        self.process = process
        self.desk = desk
        self._control = control

    async def ended(self) -> int:
        """All it had to say is counted; its exit code."""
        await self.desk.lost.wait()
        self._control.close()
        return await self.process.wait()

    def take(self, connection: socket.socket) -> bool:
        """Pass a connection on; whether that went well."""
        try:
            socket.send_fds(self._control, [b"."], [connection.fileno()])
        except OSError:  # it has ended, or does not keep up
            return False
        self.desk.connections += 1
        return True

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()


class Fleet:
    """As many workers as the settings say, and what they are told (``desk.Shared``)."""

    def __init__(self, core: Core, module: str, unseen: Unseen | None = None) -> None:
        """``module`` is what a worker runs; ``unseen`` has what workers hand over."""
        self.draining = False
        self.settings: Settings = core.settings
        """As workers are told."""
        self._core = core
        self._module = module
        self._unseen = unseen
        self._workers: list[Worker] = []
        self._state: State | None = None
        self._shown: State | None = None
        """What all workers have been told of."""
        self._stale = True
        self._ends = 0
        core.pool.listen(self._on_pool)

    @property
    def serves(self) -> bool:
        """At least one worker takes requests."""
        return any(worker.desk.serves for worker in self._workers)

    # -- life

    async def begin(self) -> None:
        """Start the workers; returns when they serve."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self.settings.server.workers):
                    tasks.create_task(self._begin())
        except ExceptionGroup as group:
            self.close()
            for worker in list(self._workers):
                await worker.ended()
            raise group.exceptions[0] from None

    async def _begin(self) -> Worker:
        """A new worker that serves; ``SettingsError`` when it cannot."""
        ours, theirs = socket.socketpair()
        control, doorway = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.setblocking(False)
        core = self._core
        desk = Desk(
            core.pool,
            core.router,
            core.opening,
            self,
            core.scraper.refresh_models,
            self._unseen,
            scores=self.settings.picker.scores,
        )
        with theirs, doorway:
            transport, _ = await asyncio.get_running_loop().create_unix_connection(
                lambda: desk.frames, sock=ours
            )
            given = [theirs.fileno(), doorway.fileno()]
            command = [sys.executable, "-m", self._module, *map(str, given)]
            try:
                process = await spawn(*command, pass_fds=given)
            except BaseException:
                transport.abort()
                control.close()
                raise
        worker = Worker(process, desk, control)
        self._workers.append(worker)
        parsers = core.router.parsers
        desk.begin(Hello(self.settings, None if parsers is None else frozenset(parsers)))
        try:
            async with asyncio.timeout(START_S):
                await desk.listening
        except (SettingsError, TimeoutError) as error:
            worker.kill()
            await worker.ended()
            self._workers.remove(worker)
            if isinstance(error, SettingsError):
                raise
            raise SettingsError(f"server.workers: a worker does not serve after {START_S:g} s") from None
        return worker

    async def run(self) -> None:
        """Keep the workers going and informed, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for worker in list(self._workers):
                    tasks.create_task(self._keep(worker))
                while True:
                    await asyncio.sleep(LOOK_S)
                    self._stale = True
                    if self.state is not self._shown:
                        self.changed()
        finally:
            self.close()
            for worker in list(self._workers):
                await worker.ended()

    async def _keep(self, worker: Worker) -> None:
        """See to it that there is always one in its place."""
        loop = asyncio.get_running_loop()
        again_s = AGAIN_S
        while True:
            began_s = loop.time()
            code = await worker.ended()
            self._workers.remove(worker)
            if self.draining:
                return
            if loop.time() - began_s > LIVED_S:
                again_s = AGAIN_S
            log.error("worker %d has ended (%d); another one takes its place", worker.process.pid, code)
            replaced = None
            while replaced is None:
                await asyncio.sleep(again_s)
                again_s = min(2 * again_s, MAX_AGAIN_S)
                if self.draining:
                    return
                try:
                    replaced = await self._begin()
                except SettingsError as error:
                    log.error("no worker takes its place: %s", error.message)
            worker = replaced

    async def drain(self) -> None:
        """Take nothing new and let what runs end, within its time."""
        self.draining = True
        for worker in self._workers:
            worker.desk.down.drain = True
            worker.desk.soon()
        limit_s = self.settings.server.drain_s + LAST_WORDS_S
        try:
            async with asyncio.timeout(limit_s):
                for worker in list(self._workers):
                    await worker.ended()
        except TimeoutError:
            log.warning("workers have not ended in %g s", limit_s)

    def settle(self) -> Awaitable[None] | None:
        """Have all workers tell what is over."""
        settling = [worker.desk.settled() for worker in self._workers if not worker.desk.lost.is_set()]
        return _all(settling) if settling else None

    def close(self) -> None:
        """Cut whatever is left."""
        for worker in self._workers:
            worker.kill()

    def take(self, connection: socket.socket) -> None:
        """Pass a connection on to the worker that has the fewest."""
        with connection:
            for worker in sorted(self._workers, key=lambda worker: worker.desk.connections):
                if worker.desk.serves and worker.take(connection):
                    return
            log.warning("no worker takes a connection")

    # -- what workers are to know (``desk.Shared``)

    @property
    def state(self) -> State:
        """The same object until something changes."""
        if self._stale or self._state is None:
            self._stale = False
            core = self._core
            members = core.pool.members.values()
            ends = tuple(core.index.ends)
            if self._state is None or self._state.block_ends != ends:
                self._ends += 1
            now = State(
                core.pool.ready,
                tuple(
                    [
                        Placed(
                            m.endpoint.slot,
                            m.target,
                            m.endpoint.models,
                            m.models_detail,
                            m.draining,
                            m.usable,
                        )
                        for m in members
                    ]
                ),
                self._ends,
                ends,
                bool(core.blocks.slots),
                core.tracing is not None,
            )
            if now != self._state:
                self._state = now
        return self._state

    def changed(self) -> None:
        """Tell all of them."""
        self._shown = self.state
        for worker in self._workers:
            worker.desk.soon()

    def _on_pool(self, event: str, endpoint: Endpoint) -> None:
        self._stale = True
        if self._workers:
            self.changed()


async def _all(futures: Sequence[asyncio.Future[None]]) -> None:
    """A worker that hangs holds nobody up."""
    await asyncio.wait(futures, timeout=SETTLE_S)
