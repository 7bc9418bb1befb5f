"""The workers of a scheduler: started, told what changes, started again when they die, drained."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
from collections.abc import Awaitable, Sequence

from msgspec.structs import replace

from pointsman.config import Server, Settings
from pointsman.errors import SettingsError
from pointsman.proxy.core import Core
from pointsman.proxy.workers.desk import Desk
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

    def __init__(self, process: asyncio.subprocess.Process, desk: Desk) -> None:
        self.process = process
        self.desk = desk

    async def ended(self) -> int:
        """All it had to say is counted; its exit code."""
        await self.desk.lost.wait()
        return await self.process.wait()

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()


class Fleet:
    """Takes requests in by processes of its own (``core.Front``)."""

    def __init__(self, core: Core) -> None:
        self.draining = False
        self._core = core
        self._settings: Settings = core.settings
        self._workers: list[Worker] = []
        self._held: Sequence[socket.socket] = ()
        """Keep the port ours while no worker listens."""
        self._state: State | None = None
        self._shown: State | None = None
        """What all workers have been told of."""
        self._stale = True
        self._ends = 0
        core.pool.listen(self._on_pool)

    # -- life

    async def start(self) -> int:
        """Start the workers; returns their port."""
        server = self._settings.server
        self._held, port = await _hold(server)
        self._settings = replace(self._settings, server=replace(server, port=port))
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(server.workers):
                    tasks.create_task(self._begin())
        except ExceptionGroup as group:
            self.close()
            for worker in list(self._workers):
                await worker.ended()
            raise group.exceptions[0] from None
        return port

    async def _begin(self) -> Worker:
        """A new worker that serves; ``SettingsError`` when it cannot."""
        ours, theirs = socket.socketpair()
        core = self._core
        desk = Desk(core.pool, core.router, core.opening, self, core.scraper.refresh_models)
        with theirs:
            transport, _ = await asyncio.get_running_loop().create_unix_connection(
                lambda: desk.frames, sock=ours
            )
            command = [sys.executable, "-m", "pointsman.proxy.workers.worker", str(theirs.fileno())]
            try:
                process = await asyncio.create_subprocess_exec(*command, pass_fds=[theirs.fileno()])
            except BaseException:
                transport.abort()
                raise
        worker = Worker(process, desk)
        self._workers.append(worker)
        parsers = core.router.parsers
        desk.begin(Hello(self._settings, None if parsers is None else frozenset(parsers)))
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
        self._release()
        for worker in self._workers:
            worker.desk.down.drain = True
            worker.desk.soon()
        limit_s = self._settings.server.drain_s + LAST_WORDS_S
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
        self._release()
        for worker in self._workers:
            worker.kill()

    def _release(self) -> None:
        for sock in self._held:
            sock.close()

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
                    [Placed(m.endpoint.slot, m.target, m.endpoint.models, m.models_detail) for m in members]
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


async def _hold(server: Server) -> tuple[list[socket.socket], int]:
    """Bound sockets that do not listen, and their port: nobody else can have it meanwhile."""
    port, held = server.port, list[socket.socket]()
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            server.host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:  # one that listens would share with us
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                _bind(probe, address, port)
            sock = socket.socket(family, kind, protocol)
            held.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _bind(sock, address, port)
            port = sock.getsockname()[1]
    except OSError as exc:
        for sock in held:
            sock.close()
        why = "is in use" if exc.errno == errno.EADDRINUSE else f"cannot be opened: {exc.strerror}"
        raise SettingsError(f"server.port: {server.host}:{server.port} {why}; choose another") from exc
    return held, port


def _bind(sock: socket.socket, address: tuple[object, ...], port: int) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((address[0], port, *address[2:]))
