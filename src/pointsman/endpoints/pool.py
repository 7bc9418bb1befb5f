"""The pool owns the endpoints: which exist, what is known of each, and which may take a request now.

Others get immutable snapshots. Everything here is synchronous; discovery, the scraper and the router tell it
what they saw, listeners hear what changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from msgspec.structs import replace

from pointsman.config import Breaker as BreakerSettings
from pointsman.config import RunningCost
from pointsman.endpoints.breaker import Breaker, State
from pointsman.endpoints.spending import Spending
from pointsman.endpoints.target import Target
from pointsman.endpoints.unseen import Asked, Unseen
from pointsman.errors import ModelNotFound, NoEndpoints
from pointsman.types import Clock, Endpoint, Load, Metrics

REFRESH_S = 0.02
"""Metrics become visible to scheduling at most this late, so that 1,000 endpoints do not rebuild the list for
each page that arrives."""


class Member:
    """One endpoint and its state. Belongs to the pool; read elsewhere, written here."""

    __slots__ = (
        "breaker",
        "draining",
        "endpoint",
        "models_detail",
        "reached",
        "source",
        "spending",
        "target",
        "unseen",
    )

    def __init__(
        self, target: Target, endpoint: Endpoint, source: str, breaker: Breaker, spending: Spending
    ) -> None:
        self.target = target
        self.endpoint = endpoint
        self.source = source
        self.breaker = breaker
        self.spending = spending
        self.draining = False
        self.reached = False
        """It has answered anything since it joined or since it was last unreachable."""
        self.models_detail: tuple[dict[str, Any], ...] = ()
        self.unseen = Unseen()

    @property
    def usable(self) -> bool:
        return not self.draining and self.breaker.passes


Listener = Callable[[str, Endpoint], None]
"""Called with what happened (joined, left, restarted, cache, models) and the endpoint's snapshot."""


class Pool:
    """Endpoints by name, and for each model the list that may take a request."""

    def __init__(
        self,
        clock: Clock,
        breaker: BreakerSettings | None = None,
        running_costs: Sequence[RunningCost] = (),
    ) -> None:
        self._clock = clock
        self._running_costs = running_costs
        self._breaker = breaker or BreakerSettings()
        self.members: dict[str, Member] = {}
        self._by_slot: dict[int, Member] = {}
        self._listeners: list[Listener] = []
        self._candidates: dict[str, Sequence[Endpoint]] = {}
        self._built_at = 0.0
        self._stale = False
        self._retry_at = float("inf")
        self.troubled: set[int] = set()
        """Slots of endpoints whose breaker is not at rest; while it is empty nobody need ask."""

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def _tell(self, event: str, endpoint: Endpoint) -> None:
        for listener in self._listeners:
            listener(event, endpoint)

    # -- membership

    def apply(self, source: str, targets: Iterable[Target]) -> None:
        """Make the endpoints that ``source`` vouches for exactly these: join new ones, let missing ones
        leave.
        """
        wanted = {target.name: target for target in targets}
        for name, member in list(self.members.items()):
            if member.source == source and wanted.get(name) != member.target:
                self.remove(name)
        for name, target in wanted.items():
            if name not in self.members:
                self.add(target, source)

    def add(self, target: Target, source: str) -> Member:
        """A new endpoint joins. It takes requests at once; what it is will be learned."""
        assert target.name not in self.members, f"{target.name} is in the pool already"
        slot = next(i for i in range(len(self._by_slot) + 1) if i not in self._by_slot)
        spending = Spending(self._clock())
        spending.settle(target.settings, target.labels, "", self._running_costs)
        endpoint = Endpoint(
            name=target.name,
            slot=slot,
            address=target.url.authority,
            load=Load(),
            labels=target.labels,
            weight=target.settings.weight,
            price_per_hour=spending.price_per_hour,
            watts=spending.watts,
        )
        member = Member(target, endpoint, source, Breaker(self._breaker), spending)
        self.members[target.name] = self._by_slot[slot] = member
        self._changed()
        self._tell("joined", endpoint)
        return member

    def remove(self, name: str) -> None:
        """The endpoint leaves. Requests it has go on; nothing new is sent there."""
        member = self.members.pop(name)
        del self._by_slot[member.endpoint.slot]
        self.troubled.discard(member.endpoint.slot)
        self._changed()
        self._tell("left", member.endpoint)

    def drain(self, name: str, draining: bool = True) -> None:
        """Send nothing new there (or send again), but keep it."""
        self.members[name].draining = draining
        self._changed()

    # -- what may take a request

    def _changed(self) -> None:
        self._candidates = {}
        self._stale = False
        self._built_at = self._clock()
        self._retry_at = min(
            (m.breaker.retry_at_s for m in self.members.values() if m.breaker.state is State.OPEN),
            default=float("inf"),
        )

    def candidates(self, model: str) -> Sequence[Endpoint]:
        """Endpoints that serve ``model`` (any, when empty) and may take a request now; never empty.

        ``ModelNotFound`` when every endpoint has told its models and none is this one, ``NoEndpoints`` when
        those that serve it are away.
        """
        now = self._clock()
        if now >= self._retry_at:
            for member in self.members.values():
                if member.breaker.state is State.OPEN and now >= member.breaker.retry_at_s:
                    member.breaker.half_open()
            self._changed()
        elif self._stale and now - self._built_at > REFRESH_S:
            self._changed()
        found = self._candidates.get(model)
        if found is None:
            found = self._find(model)
            if len(self._candidates) < 1024:  # a client may invent model names; they must not grow memory
                self._candidates[model] = found
        return found

    def untried(self, model: str, tried: Collection[str]) -> Sequence[Endpoint]:
        """Candidates whose name is not in ``tried``; where none is left, those whose breaker keeps requests
        away: a request that would fail for certain may as well try.
        """
        left = [e for e in self.candidates(model) if e.name not in tried]
        return left or [m.endpoint for m in self._staying(model) if m.endpoint.name not in tried]

    def _find(self, model: str) -> Sequence[Endpoint]:
        staying = self._staying(model)
        # When every breaker is open, trying is better than refusing for certain.
        return tuple(m.endpoint for m in staying if m.breaker.passes) or tuple(m.endpoint for m in staying)

    def _staying(self, model: str) -> Sequence[Member]:
        """Members that serve ``model`` and do not drain, whatever their breaker says."""
        members = list(self.members.values())
        serving = [m for m in members if not model or (m.endpoint.models and model in m.endpoint.models)]
        if not serving:
            serving = [m for m in members if m.endpoint.models is None]
            if members and not serving:
                raise ModelNotFound(model, self.models())
        staying = [m for m in serving if not m.draining]
        if not staying:
            draining = f"No endpoint can answer: all {len(serving)} are draining."
            raise NoEndpoints(draining if serving else "No endpoint can answer: the pool is empty.")
        return staying

    def models(self) -> list[str]:
        """Every model any endpoint serves, sorted."""
        return sorted({model for m in self.members.values() for model in m.endpoint.models or ()})

    @property
    def ready(self) -> bool:
        """At least one endpoint can answer: it takes requests and has been reached."""
        return any(m.usable and m.reached for m in self.members.values())

    # -- what was learned

    def learn_models(self, name: str, models: Sequence[dict[str, Any]]) -> None:
        """The entries of the endpoint's /v1/models."""
        member = self.members.get(name)
        if member is None:
            return
        member.models_detail = tuple(models)
        ids = frozenset(str(m["id"]) for m in models if "id" in m)
        self._reached(member)
        if ids != member.endpoint.models:
            member.endpoint = replace(member.endpoint, models=ids)
            self._changed()
            self._tell("models", member.endpoint)

    def learn_metrics(
        self, name: str, engine: str, metrics: Metrics, restarted: bool, asked: Asked | None = None
    ) -> None:
        """What the endpoint's metrics page says; ``asked`` is what was in flight there when it was asked."""
        member = self.members.get(name)
        if member is None:
            return
        before = member.endpoint
        member.endpoint = replace(before, engine=engine, metrics=metrics)
        if engine != before.engine and self._running_costs:
            self._settle(member)
        self._stale = True
        if asked is not None:
            member.unseen.read(before.load, metrics, asked)
        self._reached(member)
        if restarted:
            self._tell("restarted", member.endpoint)
        old = before.metrics
        if (old.block_tokens, old.kv_blocks) != (metrics.block_tokens, metrics.kv_blocks):
            self._tell("cache", member.endpoint)

    def learn_watts(self, name: str, watts: float) -> None:
        """What the endpoint draws, as a page says."""
        member = self.members.get(name)
        if member is not None:
            working = member.endpoint.load.requests > 0 or member.endpoint.metrics.running > 0
            member.spending.read(watts, working, self._clock())
            self._price(member)

    def _settle(self, member: Member) -> None:
        """Another rule may fit the endpoint now."""
        member.spending.advance(self._clock())
        engine = member.endpoint.engine
        member.spending.settle(member.target.settings, member.target.labels, engine, self._running_costs)
        self._price(member)

    def _price(self, member: Member) -> None:
        spending = member.spending
        member.endpoint = replace(
            member.endpoint, price_per_hour=spending.price_per_hour, watts=spending.watts
        )
        self._stale = True

    def reached(self, name: str) -> None:
        """It answered something, if only that it does not know what we asked for."""
        if name in self.members:
            self._reached(self.members[name])

    def _reached(self, member: Member) -> None:
        came_back = not member.reached
        member.reached = True
        # Only where nobody listened does a page prove anything: an engine that fails requests may well
        # have a metrics page, and its breaker has to run its time.
        if came_back and member.breaker.state is State.OPEN:
            member.breaker.half_open()
            self._changed()

    def unreachable(self, name: str) -> None:
        """Nobody listens at its address. Believed at once, before anything else we have heard."""
        member = self.members.get(name)
        if member is None:
            return
        if member.reached:
            member.reached = False
            self._tell("restarted", member.endpoint)
        self.troubled.add(member.endpoint.slot)
        if member.breaker.fault(self._clock(), certain=True):
            self._changed()

    # -- what requests found

    def sent(self, endpoint: Endpoint) -> None:
        """A request goes to ``endpoint``; when its breaker is half open, this is the probe."""
        member = self._by_slot.get(endpoint.slot)
        if member is not None and member.breaker.state is State.HALF_OPEN:
            member.breaker.probing = True
            self._changed()

    def answered(self, endpoint: Endpoint) -> None:
        """It gave an answer that is no fault."""
        member = self._member(endpoint)
        if member is not None:
            member.reached = True
            self.troubled.discard(endpoint.slot)
            if member.breaker.success():
                self._changed()

    def failed(self, endpoint: Endpoint) -> None:
        """A real fault: reset, timeout, or 5xx other than 503."""
        member = self._member(endpoint)
        if member is None:
            return
        self.troubled.add(endpoint.slot)
        if member.breaker.fault(self._clock()):
            self._changed()

    def abandoned(self, endpoint: Endpoint) -> None:
        """The client left before the endpoint could prove itself."""
        member = self._member(endpoint)
        if member is not None and member.breaker.probing:
            member.breaker.abandon()
            self._changed()

    def _member(self, endpoint: Endpoint) -> Member | None:
        member = self._by_slot.get(endpoint.slot)
        return member if member is not None and member.endpoint.name == endpoint.name else None
