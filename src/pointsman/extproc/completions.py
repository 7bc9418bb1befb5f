"""Requests whose responses we do not see: who is still on its way, and how we hear of its end.

Best is Envoy's access log. Without it, or when it loses a line, the engine's own counters bound what we
believe: when an engine has fewer requests than we count, the oldest of ours are over. A time-out bounds the
rest, at engines without a metrics page.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from msgspec.structs import replace

from pointsman.extproc.access_log import Completion
from pointsman.extproc.destinations import Destinations
from pointsman.proxy.plane import Routing
from pointsman.router import Flight, Router
from pointsman.types import Clock, Ending, Endpoint, Outcome

ARRIVAL_S = 0.5
"""Later than this after the decision a request is at the engine, and in the page the engine writes then."""
LOG_DELAY_S = 5.0
"""How late a line of the access log may be; Envoy buffers them for a second by default. What has no line by
then and is not at its engine either is over."""
NO_LOG = 20
"""So many requests in a row without a line mean that there is no log; then pages are believed at once."""


class Unseen(NamedTuple):
    """A request that is on its way, and what of its end is known already."""

    flight: Flight
    started_s: float
    """When it came."""
    request_bytes: int
    """Of its body, which is not kept."""


class _Page(NamedTuple):
    """What an engine's metrics page said."""

    at_s: float
    requests: int
    """At the engine, whoever sent them."""


def follow(router: Routing, destinations: Destinations, flight: Flight, address: str) -> None:
    """Whoever forwards the request says that ``address`` served it: its load is there."""
    if address and address != destinations.of(flight.decision.chosen.name):
        members = router.pool.members.values()
        found = next((m for m in members if destinations.at(m.target) == address), None)
        if found is not None:
            router.moved(flight, found.endpoint)


class HandedOver(Protocol):
    """Where requests go whose responses nobody sees."""

    def name(self) -> str:
        """A new name, by which Envoy's log may call a request."""

    def add(self, name: str, flight: Flight, started_s: float) -> None:
        """Nothing more will be seen of this request."""


class Completions:
    """Owns the flights from the moment we see no more of them to their end; each ends exactly once."""

    def __init__(self, router: Router, destinations: Destinations, clock: Clock, timeout_s: float) -> None:
        self._router = router
        self._destinations = destinations
        self._pool = pool = router.pool
        self._clock = clock
        self._timeout_s = timeout_s
        self._flying: dict[str, Unseen] = {}
        """By our own name for them, the oldest first."""
        self._names: dict[str, list[str]] = {}
        """By request id: clients may use one twice."""
        self._pages: dict[str, _Page] = {}
        """By endpoint: what is compared with our own count as soon as the log has had its time."""
        self._without_line = 0
        """Requests that pages told the end of, since a line came."""
        self._probes: dict[str, float] = {}
        """Requests that are to show whether an endpoint is back, and since when we have seen no more of
        them.
        """
        self._count = 0
        pool.listen(self._on_pool)

    def __len__(self) -> int:
        return len(self._flying)

    def name(self) -> str:
        """A new name, by which Envoy's log may call a request."""
        self._count += 1
        return f"{self._count:x}"

    def add(self, name: str, flight: Flight, started_s: float) -> None:
        """Nothing more will be seen of this request."""
        if self._without_line >= NO_LOG:
            self._pool.abandoned(flight.decision.chosen)  # its answer would prove the endpoint; nobody tells
        elif self._pool.troubled and self._probes_endpoint(flight):
            self._probes[name] = self._clock()
        request = flight.request
        flight.request = replace(request, body=b"")  # long gone, and memory that is used again is warm
        self._flying[name] = Unseen(flight, started_s, len(request.body))
        self._names.setdefault(flight.request.id, []).append(name)

    # -- how we hear of an end

    def completed(self, told: Completion) -> None:
        """A line of the access log. Those we do not know, or know to be over, are nobody's business."""
        self._without_line = 0
        name = told.flight or next(iter(self._names.get(told.request_id, ())), "")
        unseen = self._flying.get(name)
        if unseen is None or (told.request_id and unseen.flight.request.id != told.request_id):
            return
        self._answered(unseen.flight, told)
        chosen = unseen.flight.decision.chosen
        if told.client_left:
            ending, reason = Ending.CANCELLED, "client_left"
        elif told.fault:
            ending, reason = Ending.FAILED, told.fault
        elif told.status >= 400:
            ending, reason = Ending.ERROR, f"status_{told.status}"
        else:
            ending, reason = Ending.OK, ""
        self._close(
            name,
            Outcome(
                ending=ending,
                status=told.status,
                endpoint=chosen.name,
                tries=max(1, told.tries),
                decided_s=unseen.flight.decision.at_s - unseen.started_s,
                ttft_s=told.first_byte_s if told.status == 200 and not unseen.flight.request.stream else None,
                duration_s=told.duration_s,
                request_bytes=told.request_bytes,
                reason=reason,
            ),
        )

    def _answered(self, flight: Flight, told: Completion) -> None:
        """What the line says of the endpoints."""
        follow(self._router, self._destinations, flight, told.upstream)
        pool, chosen = self._pool, flight.decision.chosen
        if told.client_left:
            pool.abandoned(chosen)
        elif told.fault or (told.status >= 500 and told.status != 503 and told.upstream):
            pool.failed(chosen)
        elif told.upstream:
            pool.answered(chosen)

    def sweep(self) -> None:
        """Called a few times a second: what do the engines' pages and the clock say?"""
        now_s = self._clock()
        for name, unseen in list(self._flying.items()):
            if now_s - unseen.started_s < self._timeout_s:
                break
            self._pool.abandoned(unseen.flight.decision.chosen)
            self._end(name, Ending.OK, "unseen_timeout")
        self._give_up_probes(now_s)
        delay_s = LOG_DELAY_S if self._without_line < NO_LOG else 0.0
        for endpoint, names in self._by_endpoint().items():
            page = self._page(endpoint)
            if now_s - page.at_s >= delay_s:
                self._pages.pop(endpoint, None)
                flying = self._flying
                there = [n for n in names if flying[n].flight.decision.at_s + ARRIVAL_S <= page.at_s]
                for name in there[: max(0, len(there) - page.requests)]:
                    self._without_line += 1
                    self._pool.answered(flying[name].flight.decision.chosen)
                    self._end(name, Ending.OK, "unseen")

    def _probes_endpoint(self, flight: Flight) -> bool:
        member = self._pool.members.get(flight.decision.chosen.name)
        return member is not None and member.breaker.probing

    def _give_up_probes(self, now_s: float) -> None:
        """What nobody tells of soon shows nothing: a stream may last for minutes, a line may never come. The
        endpoint gets another request.
        """
        for name, since_s in list(self._probes.items()):
            unseen = self._flying.get(name)
            if unseen is not None and now_s - since_s < LOG_DELAY_S:
                continue
            del self._probes[name]
            if unseen is not None:
                self._pool.abandoned(unseen.flight.decision.chosen)

    def _by_endpoint(self) -> dict[str, list[str]]:
        """Names of what is flying, the oldest first."""
        found: dict[str, list[str]] = {}
        for name, unseen in self._flying.items():
            found.setdefault(unseen.flight.decision.chosen.name, []).append(name)
        return found

    def _page(self, endpoint: str) -> _Page:
        """The page to compare with: kept until the log has had its time."""
        member = self._pool.members.get(endpoint)
        page = _Page(self._clock(), 0)  # of one that has left the pool: nobody else will tell
        if member is not None:
            metrics = member.endpoint.metrics
            page = _Page(metrics.at_s, round(metrics.running + metrics.waiting))
        return self._pages.setdefault(endpoint, page)

    def _on_pool(self, event: str, endpoint: Endpoint) -> None:
        """An engine that starts anew has nothing of ours any more."""
        if event in ("left", "restarted"):
            self._pages.pop(endpoint.name, None)
        if event == "restarted":
            for name, unseen in list(self._flying.items()):
                if unseen.flight.decision.chosen.name == endpoint.name:
                    self._end(name, Ending.FAILED, "upstream_failed")

    def close(self) -> None:
        """The picker stops: what flies now is over for us."""
        for name in list(self._flying):
            self._end(name, Ending.OK, "unseen")

    def _end(self, name: str, ending: Ending, reason: str) -> None:
        unseen = self._flying[name]
        flight, now_s = unseen.flight, self._clock()
        outcome = Outcome(
            ending=ending,
            status=0,
            endpoint=flight.decision.chosen.name,
            decided_s=flight.decision.at_s - unseen.started_s,
            duration_s=now_s - unseen.started_s,
            request_bytes=unseen.request_bytes,
            reason=reason,
        )
        self._close(name, outcome)

    def _close(self, name: str, outcome: Outcome) -> None:
        unseen = self._flying.pop(name)
        request_id = unseen.flight.request.id
        names = self._names[request_id]
        names.remove(name)
        if not names:
            del self._names[request_id]
        self._router.close(unseen.flight, outcome)
