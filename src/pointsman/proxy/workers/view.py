"""The pool as a worker sees it: what the scheduler has told of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from pointsman.endpoints.pool import Listener
from pointsman.endpoints.target import Target
from pointsman.proxy.workers.messages import Placed
from pointsman.types import Endpoint, Load


class Seat:
    """An endpoint of the pool (``plane.Seat``)."""

    __slots__ = ("draining", "endpoint", "models_detail", "target", "usable")

    def __init__(self, placed: Placed) -> None:
        target = placed.target
        self.target: Target = target
        self.models_detail: tuple[dict[str, Any], ...] = placed.models_detail
        self.draining = placed.draining
        self.usable = placed.usable
        self.endpoint = Endpoint(
            name=target.name,
            slot=placed.slot,
            address=target.url.authority,
            load=Load(),
            labels=target.labels,
            models=placed.models,
        )


class PoolView:
    """The endpoints by name (``plane.Endpoints``); ``tell`` passes on what requests find out of them."""

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        self.members: dict[str, Seat] = {}
        self.troubled: Collection[int] = ()
        self.ready = False
        self._tell = tell
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def renew(self, endpoints: Iterable[Placed], ready: bool) -> None:
        """These are the endpoints now."""
        self.ready = ready
        before, self.members = self.members, {placed.target.name: Seat(placed) for placed in endpoints}
        for name, seat in before.items():
            now = self.members.get(name)
            if now is None or now.target != seat.target:
                for listener in self._listeners:
                    listener("left", seat.endpoint)

    def models(self) -> list[str]:
        """Every model any endpoint serves, sorted."""
        return sorted({model for m in self.members.values() for model in m.endpoint.models or ()})

    def answered(self, endpoint: Endpoint) -> None:
        self._tell("answered", endpoint.name)

    def failed(self, endpoint: Endpoint) -> None:
        self._tell("failed", endpoint.name)

    def abandoned(self, endpoint: Endpoint) -> None:
        self._tell("abandoned", endpoint.name)

    def unreachable(self, name: str) -> None:
        self._tell("unreachable", name)
