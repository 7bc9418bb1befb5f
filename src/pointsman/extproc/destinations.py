"""Where each endpoint is, as Envoy names endpoints: an address and a port, never a host name."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from functools import lru_cache

from pointsman.endpoints.target import Target
from pointsman.proxy.plane import Endpoints

log = logging.getLogger(__name__)

RESOLVE_S = 10.0


class Destinations:
    """``of`` an endpoint's name; names of hosts are looked up by ``resolve`` and again every 10 s."""

    def __init__(self, pool: Endpoints) -> None:
        self._pool = pool
        self._addresses: dict[str, str] = {}
        """Host name to address, as the DNS said last."""

    def of(self, name: str) -> str:
        """``address:port`` of the endpoint; empty when it is not in the pool or its host name is unknown."""
        member = self._pool.members.get(name)
        return self.at(member.target) if member else ""

    def at(self, target: Target) -> str:
        """``address:port`` of the target; empty while its host name is unknown."""
        host = target.connect_host
        address = host if is_address(host) else self._addresses.get(host, "")
        if not address:
            return ""
        return f"[{address}]:{target.url.port}" if ":" in address else f"{address}:{target.url.port}"

    async def resolve(self) -> None:
        """Look up the host names that have no address of their own. What was known stays while the DNS is
        silent.
        """
        hosts = {m.target.connect_host for m in self._pool.members.values()}
        names = sorted(host for host in hosts if not is_address(host))
        for name in names:
            try:
                found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as exc:
                if name not in self._addresses:
                    log.warning("cannot resolve %s: %s", name, exc)
                continue
            ipv4 = sorted(str(info[4][0]) for info in found if info[0] == socket.AF_INET)
            self._addresses[name] = (ipv4 or sorted(str(info[4][0]) for info in found))[0]

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(RESOLVE_S)
            await self.resolve()


@lru_cache(maxsize=4096)  # asked for every decision
def is_address(host: str) -> bool:
    """Whether it is an IP address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
