"""What every exchange of the data plane shares: settings, pool, router, where decisions come from, clock,
connections, and the finished ones.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from pointsman.api import Format
from pointsman.config import Settings
from pointsman.endpoints.pool import Listener
from pointsman.endpoints.target import Target
from pointsman.proxy.opening import Opening
from pointsman.proxy.upstream import Connections
from pointsman.router import Eligible, Flight
from pointsman.types import Clock, Decision, Endpoint, InferenceRequest, Outcome

log = logging.getLogger(__name__)

SETTLE_S = 0.05
SETTLE_AT = 64


class Finished(Protocol):
    """An exchange that is over, with nothing left to do but to tell."""

    def settle(self) -> None:
        """Tell the router what became of the request."""


class Seat(Protocol):
    """An endpoint of the pool."""

    @property
    def target(self) -> Target: ...

    @property
    def endpoint(self) -> Endpoint: ...

    @property
    def draining(self) -> bool: ...

    @property
    def usable(self) -> bool: ...

    @property
    def models_detail(self) -> tuple[dict[str, Any], ...]: ...


class Endpoints(Protocol):
    """The pool, as far as the data plane reads it and tells it what requests found."""

    @property
    def members(self) -> Mapping[str, Seat]: ...

    @property
    def troubled(self) -> Collection[int]: ...

    @property
    def ready(self) -> bool: ...

    def listen(self, listener: Listener) -> None: ...

    def models(self) -> list[str]: ...

    def answered(self, endpoint: Endpoint) -> None: ...

    def failed(self, endpoint: Endpoint) -> None: ...

    def abandoned(self, endpoint: Endpoint) -> None: ...

    def unreachable(self, name: str) -> None: ...


class Ends(Protocol):
    """The router, as far as it is told what became of requests."""

    def format_of(self, path: str) -> Format: ...

    def remember(self, flight: Flight, state_id: str) -> None: ...

    def close(self, flight: Flight, outcome: Outcome) -> None: ...

    def observe(self, request: InferenceRequest, decision: Decision | None, outcome: Outcome) -> None: ...


class Routing(Ends, Protocol):
    """The router, as far as a front uses it that does not send requests itself."""

    @property
    def pool(self) -> Endpoints: ...

    def candidates(self, model: str, eligible: Eligible | None = None) -> Sequence[Endpoint]: ...

    def moved(self, flight: Flight, endpoint: Endpoint) -> None: ...


class Plane:
    """Owns the connections to endpoints, and tells the router of finished requests in batches.

    The same few functions run over a batch in a third of the time that they take between other work, and
    nothing waits for what they tell; an endpoint's load is given back at once.
    """

    def __init__(
        self, settings: Settings, pool: Endpoints, router: Ends, opening: Opening, clock: Clock
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.router = router
        self.opening = opening
        self.clock = clock
        self._connections: dict[str, Connections] = {}
        self._finished: list[Finished] = []
        self._settling: asyncio.TimerHandle | None = None
        self._closed = False
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
            target = self.pool.members[name].target
            found = Connections(target, self.settings.upstream.connect_timeout_s)
            self._connections[name] = found
        return found

    def sweep(self, every_s: float) -> None:
        """Called every ``every_s`` seconds: close connections that have been idle for too long."""
        max_age = int(self.settings.upstream.idle_s / every_s)
        for connections in self._connections.values():
            connections.sweep(max_age)

    def finished(self, exchange: Finished) -> None:
        """The exchange is over; the router hears of it soon."""
        self._finished.append(exchange)
        if self._closed:
            self.settle()
        elif self._settling is None:
            self._settling = asyncio.get_running_loop().call_later(SETTLE_S, self.settle)
        elif len(self._finished) >= SETTLE_AT:
            self.settle()

    def settle(self) -> None:
        """Tell the router of everything that is over, now."""
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
        finished, self._finished = self._finished, []
        for exchange in finished:
            try:
                exchange.settle()
            except Exception:  # an observer's bug must not keep the others from being told
                log.exception("a finished request could not be told")

    def close(self) -> None:
        """Connections end; what finishes from now on is told at once."""
        self._closed = True
        self.settle()
        for connections in self._connections.values():
            connections.close()
