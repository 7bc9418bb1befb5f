"""Keeps the pool equal to what the settings, the watched file and the DNS say."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Sequence

from pointsman.config import Discovery as DiscoverySettings
from pointsman.config import Endpoint, split_url
from pointsman.endpoints.discovery import file
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.target import Target, targets_of
from pointsman.errors import SettingsError

log = logging.getLogger(__name__)


class Discovery:
    """``start`` fills the pool, ``run`` keeps it up to date."""

    def __init__(self, pool: Pool, settings: DiscoverySettings, endpoints: Sequence[Endpoint]) -> None:
        self._pool = pool
        self._settings = settings
        self._sources: dict[str, Sequence[Endpoint]] = {"settings": endpoints}
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._version = (0, 0)

    async def start(self) -> None:
        """``SettingsError`` when the file cannot be used now."""
        if self._settings.file:
            self._version = file.version(self._settings.file)
            self._sources["file"] = file.read(self._settings.file)
        for source in self._sources:
            await self._apply(source)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            if self._settings.file:
                tasks.create_task(self._watch_file())
            tasks.create_task(self._watch_names())

    async def _watch_file(self) -> None:
        path = self._settings.file
        while True:
            await asyncio.sleep(self._settings.file_interval_s)
            version = file.version(path)
            if version == self._version:
                continue
            self._version = version
            try:
                self._sources["file"] = file.read(path)
            except SettingsError as exc:
                log.error("keeping the endpoints we have: %s", exc)
                continue
            await self._apply("file")
            log.info("%s: %d endpoints", path, len(self._sources["file"]))

    async def _watch_names(self) -> None:
        while True:
            await asyncio.sleep(self._settings.dns_interval_s)
            for source, endpoints in self._sources.items():
                if any(_is_name(split_url(e.url, "url").host) for e in endpoints):
                    await self._apply(source)

    async def _apply(self, source: str) -> None:
        targets: dict[str, Target] = {}
        for endpoint in self._sources[source]:
            for target in targets_of(endpoint, await self._resolve(split_url(endpoint.url, "url").host)):
                if target.name in targets:
                    raise SettingsError(f"endpoints: two are called {target.name}; give one a name")
                taken = self._pool.members.get(target.name)
                if taken is not None and taken.source != source:
                    log.error("endpoint %s of %s ignored: %s has it", target.name, source, taken.source)
                    continue
                targets[target.name] = target
        self._pool.apply(source, targets.values())

    async def _resolve(self, host: str) -> tuple[str, ...]:
        """The addresses of a name that has several; () for one address or an address itself.

        IPv4 only when there is any, since the second family is mostly the same server again. What was known
        stays while the DNS is silent.
        """
        if not _is_name(host):
            return ()
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as exc:
            if host not in self._addresses:
                log.warning("cannot resolve %s: %s", host, exc)
            return self._addresses.get(host, ())
        ipv4 = sorted({str(info[4][0]) for info in found if info[0] == socket.AF_INET})
        addresses = tuple(ipv4 or sorted({str(info[4][0]) for info in found}))
        self._addresses[host] = addresses if len(addresses) > 1 else ()
        return self._addresses[host]


def _is_name(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False
