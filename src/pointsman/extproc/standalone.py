"""`pointsman envoy`: Envoy and the picker as two processes, watched over by a third that does nothing else.

Envoy never stops for the picker: it keeps the last list of endpoints, and running responses do not pass the
picker. So the picker may be renewed at any time, with other settings, or fall over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from pointsman.config import Settings
from pointsman.errors import SettingsError
from pointsman.extproc.authz import FastLane
from pointsman.extproc.envoy_config import Picker
from pointsman.extproc.envoy_process import WITH_PARENT, EnvoyProcess
from pointsman.extproc.picker import PickerFront
from pointsman.extproc.processor import SEEN
from pointsman.proxy.core import Core, Front
from pointsman.proxy.spawn import spawn

log = logging.getLogger(__name__)

AGAIN_S = 0.1
MAX_AGAIN_S = 5.0
"""A picker that ends by itself is started again after so long: at first, and at most."""
END_S = 10.0
MESSAGE_REST_BYTES = 1024 * 1024
"""What a gRPC message may have besides the body it carries."""


class PickerEnded(Exception):
    """The picker ended before it answered; it has said why itself."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the picker ended with code {code} at its start")
        self.code = code


class Ready(msgspec.Struct, frozen=True):
    """What a picker tells when it answers."""

    endpoints: list[str]
    """A line each."""
    models: list[str]
    admin: str
    """``host:port`` of its admin page."""


class Sockets(msgspec.Struct, frozen=True):
    """Where picker and Envoy meet."""

    folder: Path

    @property
    def requests(self) -> Path:
        return self.folder / "picker.sock"

    @property
    def control(self) -> Path:
        return self.folder / "control.sock"

    @property
    def picker(self) -> Picker:
        return Picker(requests=f"unix:{self.requests}", control=f"unix:{self.control}")


def picker(settings: Settings, sockets: Sockets) -> tuple[Core, Front]:
    """The picker's core and its front at these sockets; run them by ``core.running(front)``."""
    limit = max(settings.picker.message_bytes, settings.server.body_bytes + MESSAGE_REST_BYTES)
    settings.picker.message_bytes = limit
    sees = settings.picker.responses == SEEN and not settings.envoy.fast_lane
    # A model that no endpoint lists may have been loaded a moment ago: the engine knows.
    core = Core(settings, sees_responses=sees, knows_models=False)
    if settings.envoy.fast_lane:
        return core, FastLane(core, sockets.requests, sockets.control)
    return core, PickerFront(core, (sockets.requests, sockets.control))


Report = Callable[[Settings, Ready, EnvoyProcess], None]


class Standalone:
    """``run`` until SIGTERM or SIGINT; SIGHUP reads the settings again.

    ``command`` starts the picker, given the folder of the sockets and the number of a file to write a
    ``Ready`` to.
    """

    def __init__(
        self, load: Callable[[], Settings], command: Callable[[Path, int], Sequence[str]], report: Report
    ) -> None:
        self._load = load
        self._command = command
        self._report = report
        self._settings = load()
        self._picker: asyncio.subprocess.Process | None = None
        self._renewing = False

    async def run(self) -> int:
        """Exit code: 0 after a signal, that of Envoy when it ends by itself."""
        loop = asyncio.get_running_loop()
        stop, reload = asyncio.Event(), asyncio.Event()
        for number, event in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, reload)):
            loop.add_signal_handler(number, event.set)
        with TemporaryDirectory(prefix="pointsman-") as folder:
            sockets = Sockets(Path(folder))
            envoy = EnvoyProcess(self._settings, sockets.picker, sockets.folder)
            tasks: list[asyncio.Task[object]] = []
            try:
                ready = await self._start_picker(sockets.folder)
                await envoy.start()
                self._report(self._settings, ready, envoy)
                ended = loop.create_task(envoy.wait())
                stopped = loop.create_task(stop.wait())
                tasks = [ended, stopped]
                tasks.append(loop.create_task(self._watch(sockets.folder)))
                tasks.append(loop.create_task(self._reload(reload, envoy)))
                await asyncio.wait((ended, stopped), return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    log.error("Envoy ended by itself, with code %d; its log is above", ended.result())
                    return abs(ended.result()) or 1
                print("draining", file=sys.stderr, flush=True)
                await envoy.drain(self._settings.server.drain_s)
                return 0
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await envoy.stop()
                await self._stop_picker()

    # -- the picker

    async def _start_picker(self, folder: Path) -> Ready:
        """Returns when it answers; ``PickerEnded`` when it will not."""
        reading, writing = os.pipe()
        pipe = os.fdopen(reading, "rb", buffering=0)
        try:
            command = self._command(folder, writing)
            self._picker = await spawn(
                *(sys.executable, "-c", WITH_PARENT, *command), pass_fds=(writing,), start_new_session=True
            )
        finally:
            os.close(writing)
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            told = await reader.read(-1)
        finally:
            transport.close()
        if not told:
            raise PickerEnded(await self._picker.wait())
        return msgspec.json.decode(told, type=Ready)

    async def _watch(self, folder: Path) -> None:
        """Start the picker again whenever it has ended, until cancelled."""
        again_s = AGAIN_S
        while True:
            assert self._picker
            code = await self._picker.wait()
            if not self._renewing:
                log.error("the picker ended with code %d; starting it again", code)
                await asyncio.sleep(again_s)
            self._renewing = False
            try:
                await self._start_picker(folder)
            except PickerEnded:
                again_s = min(again_s * 2, MAX_AGAIN_S)
            else:
                again_s = AGAIN_S
                log.warning("the picker is back")

    async def _stop_picker(self) -> None:
        picker = self._picker
        if picker is None or picker.returncode is not None:
            return
        with suppress(ProcessLookupError):
            picker.terminate()
        try:
            async with asyncio.timeout(END_S):
                await picker.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                picker.kill()
            await picker.wait()

    # -- other settings

    async def _reload(self, asked: asyncio.Event, envoy: EnvoyProcess) -> None:
        """Until cancelled: take up the settings as they are now, as often as asked."""
        while True:
            await asked.wait()
            asked.clear()
            try:
                settings = self._load()
                envoy.renew(settings)
            except SettingsError as error:
                log.error("keeping the settings we have: %s", error.message)
                continue
            self._settings = settings
            self._renewing = True
            await self._stop_picker()
