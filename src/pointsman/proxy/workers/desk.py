"""The scheduler's end: what one worker asks is decided, what it tells is counted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol

from msgspec.structs import force_setattr, replace

from pointsman.endpoints.pool import Pool
from pointsman.errors import PointsmanError, SettingsError
from pointsman.observability.decisions import totals
from pointsman.proxy.opening import Opening
from pointsman.proxy.workers.frames import Frames
from pointsman.proxy.workers.messages import (
    MAX_HEADS,
    Asked,
    Decided,
    Down,
    Hello,
    State,
    Unserved,
    Up,
    encode,
    read_up,
)
from pointsman.router import Flight, Router
from pointsman.types import Ending, Endpoint, InferenceRequest, Outcome

log = logging.getLogger(__name__)


class Shared(Protocol):
    """What all desks share."""

    @property
    def state(self) -> State:
        """What workers are to know now."""

    def changed(self) -> None:
        """An endpoint is in trouble, or out of it."""


class Unseen(Protocol):
    """Takes requests over whose responses nobody sees."""

    def add(self, name: str, flight: Flight, started_s: float) -> None: ...

    def line(self, fields: Sequence[Any]) -> None:
        """Of a gateway's access log."""


class Desk:
    """Owns the flights of one worker; when it is gone they are over."""

    def __init__(
        self,
        pool: Pool,
        router: Router,
        opening: Opening,
        shared: Shared,
        refresh_models: Callable[[], Awaitable[None]],
        unseen: Unseen | None = None,
        *,
        scores: bool = False,
    ) -> None:
        self._pool = pool
        self._router = router
        self._opening = opening
        self._shared = shared
        self._refresh_models = refresh_models
        self._unseen = unseen
        self._scores = scores
        self._refreshing: set[asyncio.Task[None]] = set()
        self.frames = Frames(self._message, self._on_lost)
        self.down = Down()
        self.listening: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the worker serves; ``SettingsError`` when it cannot."""
        self.connections = 0
        """That were passed on to it and are open, about."""
        self.lost = asyncio.Event()
        self._failed = ""
        """Why the worker cannot serve."""
        self._flights: dict[int, Flight] = {}
        self._heads: dict[int, dict[str, str]] = {}
        self._settling: list[asyncio.Future[None]] = []
        self._told: State | None = None
        self._due = False

    @property
    def serves(self) -> bool:
        """The worker is there and listens."""
        return not self.lost.is_set() and self.listening.done()

    # -- telling

    def begin(self, hello: Hello) -> None:
        """The worker has been started."""
        self.frames.send(encode(hello))
        self.soon()

    def soon(self) -> None:
        """Send what this turn of the event loop brings."""
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Send what there is to tell."""
        self._due = False
        down, self.down = self.down, Down()
        if self.lost.is_set():
            return
        state = self._shared.state
        if state is not self._told and not self.frames.stuck:
            down.state = self._told = state
        down.troubled = list(self._pool.troubled)
        self.frames.send(encode(down))

    def settled(self) -> asyncio.Future[None]:
        """Done when the worker has told of everything that is over."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settling.append(done)
        self.down.settle += 1
        self.soon()
        return done

    # -- what the worker tells

    def _message(self, data: bytes) -> None:
        up = read_up(data)
        pool, flights = self._pool, self._flights
        troubled = len(pool.troubled)
        self._take_rare(up)
        for number, first_s, body_bytes, over in up.progress:
            flight = flights[number]
            if first_s:
                flight.first_output(first_s)
            if body_bytes:
                flight.received(body_bytes)
            if over:
                flight.release()
        for number, name in up.moved:
            if name in pool.members:
                self._router.moved(flights[number], pool.members[name].endpoint)
        for number, state_id in up.made:
            self._router.remember(flights[number], state_id)
        for number, outcome in up.closed:
            self._close(number, outcome)
        if self._unseen is not None:
            for number, name, started_s in up.handed:
                self._unseen.add(name, flights.pop(number), started_s)
            for line in up.lines:
                self._unseen.line(line)
        for request_id, path, model, outcome in up.refused:
            self._observe(InferenceRequest(id=request_id, path=path, format="", model=model), outcome)
        for number in up.again:
            if number in flights:
                self._again(number, flights[number])
        known = self._told is not None and up.ends == self._told.ends
        for asked in up.asked:
            self._ask(asked, known)
        while len(self._heads) > MAX_HEADS:  # the oldest; only the last ones are still named
            del self._heads[next(iter(self._heads))]
        self._settle(up.settled)
        if len(pool.troubled) != troubled:
            self._shared.changed()

    def _settle(self, questions: int) -> None:
        answered, self._settling = self._settling[:questions], self._settling[questions:]
        for done in answered:
            if not done.done():
                done.set_result(None)

    def _take_rare(self, up: Up) -> None:
        self.connections = up.connections
        if up.failed:
            self._failed = up.failed
        if up.listening and not self.listening.done():
            self.listening.set_result(None)
        for number, headers in up.heads:
            self._heads[number] = headers
        for what, name in up.health:
            self._saw(what, name)
        for _ in range(up.refreshes):
            task = asyncio.get_running_loop().create_task(self._refresh())
            self._refreshing.add(task)
            task.add_done_callback(self._refreshing.discard)

    def _saw(self, what: str, name: str) -> None:
        pool = self._pool
        member = pool.members.get(name)
        if what == "unreachable":
            pool.unreachable(name)
        elif member is not None:
            tell = {"answered": pool.answered, "failed": pool.failed, "abandoned": pool.abandoned}[what]
            tell(member.endpoint)

    async def _refresh(self) -> None:
        await self._refresh_models()
        self.down.refreshed += 1
        self.soon()

    def _close(self, number: int, outcome: Outcome) -> None:
        try:
            self._router.close(self._flights.pop(number), outcome)
        except Exception:  # an observer's bug must not keep the others from being told
            log.exception("a finished request could not be told")

    def _observe(self, request: InferenceRequest, outcome: Outcome) -> None:
        try:
            self._router.observe(request, None, outcome)
        except Exception:
            log.exception("a refused request could not be told")

    # -- decisions

    def _ask(self, request: Asked, known: bool) -> None:
        force_setattr(request, "headers", self._heads[request.head])
        if not known:
            unhashed = [replace(prompt, digests=b"") for prompt in request.prompts]
            force_setattr(request, "prompts", tuple(unhashed))
        names, eligible = request.eligible, None
        if names is not None:

            def eligible(endpoint: Endpoint) -> bool:
                return endpoint.name in names

        told = partial(self._decided, request.number)
        try:
            self._opening.open(request, told, eligible)
        except Exception:  # a plugin's bug must not cost the others their answer
            log.exception("request for %s could not be decided", request.path)
            told(PointsmanError("Internal error; see the log."))

    def _decided(self, number: int, found: Flight | PointsmanError) -> None:
        if isinstance(found, PointsmanError):
            self.down.unserved.append(Unserved(number, found.reason, found.message, found.param))
        elif self.lost.is_set():  # meanwhile
            self._lose(found)
            return
        else:
            self._flights[number] = found
            self.down.decided.append(self._told_of(number, found))
        self.soon()

    def _again(self, number: int, flight: Flight) -> None:
        try:
            self._opening.reopen(flight, partial(self._reopened, number, flight))
        except Exception:
            log.exception("request for %s could not be sent elsewhere", flight.request.path)
            self._reopened(number, flight, False)

    def _reopened(self, number: int, flight: Flight, elsewhere: bool) -> None:
        if elsewhere:
            self.down.decided.append(self._told_of(number, flight))
        else:
            self.down.nowhere.append(number)
        self.soon()

    def _told_of(self, number: int, flight: Flight) -> Decided:
        decision = flight.decision
        found = Decided(number, decision.chosen.name, decision.at_s, flight.guess, decision.response_headers)
        if decision.fallbacks:
            found.fallbacks = tuple([endpoint.name for endpoint in decision.fallbacks])
        if self._scores and decision.scores:
            found.scores = dict(zip([e.name for e in decision.scored], totals(decision), strict=True))
        if decision.request_headers:
            found.request_headers = decision.request_headers
        return found

    # -- the end

    def _on_lost(self) -> None:
        """The worker has ended, however it did: so have the requests it had."""
        self.lost.set()
        if not self.listening.done():
            why = self._failed or "server.workers: a worker ended before it served"
            self.listening.set_exception(SettingsError(why))
        for task in self._refreshing:
            task.cancel()
        self._settle(len(self._settling))
        flights, self._flights = self._flights, {}
        for flight in flights.values():
            self._lose(flight)

    def _lose(self, flight: Flight) -> None:
        outcome = Outcome(
            ending=Ending.FAILED,
            status=0,
            endpoint=flight.decision.chosen.name,
            tries=len(flight.tried),
            reason="worker_lost",
        )
        self._router.close(flight, outcome)
