"""What every exchange of the data plane shares: settings, pool, router, clock, and the connections to
endpoints.
"""

from __future__ import annotations

from pointsman.config import Settings
from pointsman.endpoints.pool import Pool
from pointsman.proxy.upstream import Connections
from pointsman.router import Router
from pointsman.types import Clock, Endpoint


class Plane:
    """Owns the connections to endpoints."""

    def __init__(self, settings: Settings, pool: Pool, router: Router, clock: Clock) -> None:
        self.settings = settings
        self.pool = pool
        self.router = router
        self.clock = clock
        self._connections: dict[str, Connections] = {}
        pool.listen(self._on_pool)

    def _on_pool(self, event: str, endpoint: Endpoint) -> None:
        if event == "left":
            connections = self._connections.pop(endpoint.name, None)
            if connections:
                connections.close()

    def connections(self, name: str) -> Connections | None:
        """The connections to an endpoint; None when it has left the pool."""
        found = self._connections.get(name)
        if found is None and name in self.pool.members:
            upstream = self.settings.upstream
            target = self.pool.members[name].target
            found = Connections(target, upstream.connect_timeout_s, upstream.idle_s, self.clock)
            self._connections[name] = found
        return found

    def close(self) -> None:
        for connections in self._connections.values():
            connections.close()
