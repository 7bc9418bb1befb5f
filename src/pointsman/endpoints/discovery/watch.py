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
from pointsman.types import Endpoint as PoolEndpoint

log = logging.getLogger(__name__)


class Discovery:
    """``start`` fills the pool, ``run`` keeps it up to date."""

    def __init__(self, pool: Pool, settings: DiscoverySettings, endpoints: Sequence[Endpoint]) -> None:
        self._pool = pool
        self._settings = settings
        self._sources: dict[str, Sequence[Endpoint]] = {"settings": endpoints}
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._version = (0, 0)
        self._applying = False
        self._dismissed: set[str] = set()
        """Endpoints that somebody else has taken out of the pool; the DNS must not bring them back."""
        pool.listen(self._on_pool)

    def _on_pool(self, event: str, endpoint: PoolEndpoint) -> None:
        if event == "left" and not self._applying:
            self._dismissed.add(endpoint.name)
        elif event == "joined":
            self._dismissed.discard(endpoint.name)

    def check(self) -> int:
        """How many endpoints the settings and the file name; ``SettingsError`` when one cannot be used. Asks
        no DNS.
        """
        return sum(len(targets_of(endpoint)) for endpoint in (*self._sources["settings"], *self._read()))

    def _read(self) -> list[Endpoint]:
        return file.read(self._settings.file) if self._settings.file else []

    async def start(self) -> None:
        """``SettingsError`` when the file cannot be used now."""
        if self._settings.file:
            self._version = file.version(self._settings.file)
            self._sources["file"] = await asyncio.to_thread(self._read)
        for source, endpoints in self._sources.items():
            self._pool_is(source, await self._targets(endpoints))

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            if self._settings.file and self._settings.watch_file:
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
                endpoints = await asyncio.to_thread(self._read)
                targets = await self._targets(endpoints)
            except SettingsError as exc:
                log.error("keeping the endpoints we have: %s", exc)
                continue
            self._sources["file"] = endpoints
            self._pool_is("file", targets)
            log.info("%s: %d endpoints", path, len(endpoints))

    async def _watch_names(self) -> None:
        while True:
            await asyncio.sleep(self._settings.dns_interval_s)
            for source, endpoints in list(self._sources.items()):
                if not any(_is_name(split_url(e.url, "url").host) for e in endpoints):
                    continue
                try:
                    targets = await self._targets(endpoints)
                except SettingsError as exc:
                    log.error("keeping the endpoints we have: %s", exc)
                    continue
                if self._sources[source] is endpoints:  # the file has not changed meanwhile
                    self._pool_is(source, targets)

    async def _targets(self, endpoints: Sequence[Endpoint]) -> list[Target]:
        targets: dict[str, Target] = {}
        for endpoint in endpoints:
            for target in targets_of(endpoint, await self._resolve(split_url(endpoint.url, "url").host)):
                if target.name in targets:
                    raise SettingsError(f"endpoints: two are called {target.name}; give one a name")
                targets[target.name] = target
        return list(targets.values())

    def _pool_is(self, source: str, targets: Sequence[Target]) -> None:
        """Make the pool's endpoints of ``source`` these, but for those that others have or took out."""
        ours = []
        for target in targets:
            taken = self._pool.members.get(target.name)
            if taken is not None and taken.source != source:
                log.error("endpoint %s of %s ignored: %s has it", target.name, source, taken.source)
            elif taken is not None or target.name not in self._dismissed:
                ours.append(target)
        self._applying = True
        self._pool.apply(source, ours)
        self._applying = False

    async def _resolve(self, host: str) -> tuple[str, ...]:
        """The addresses of a name that has several; () for one address or an address itself.

        IPv4 only when there is any, since the second family is mostly the same server again. What was known
        stays while the DNS is silent.
        """
        if not _is_name(host):
            return ()
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as exc:  # a host that is no name at all is a UnicodeError
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
