"""A worker's end: decisions come from the scheduler, and what becomes of requests is told to it."""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence

from pointsman import api
from pointsman.errors import NoEndpoints, PointsmanError
from pointsman.predictor.lengths import HEAD_BYTES
from pointsman.prefix.hashing import chains_of
from pointsman.proxy.opening import Told
from pointsman.proxy.workers.frames import Frames
from pointsman.proxy.workers.messages import (
    MAX_HEADS,
    Decided,
    Hello,
    State,
    Up,
    asking,
    encode,
    on_its_way,
    read_down,
    read_hello,
)
from pointsman.proxy.workers.view import PoolView
from pointsman.router import Eligible, Flight, format_of
from pointsman.types import Decision, Endpoint, InferenceRequest, Load, Outcome

log = logging.getLogger(__name__)


LATER_S = 0.005
"""So late the scheduler may hear of a request's progress and end."""


class RemoteFlight(Flight):
    """A flight whose share of the load is counted by the scheduler, which hears of it a little later."""

    __slots__ = ("_bytes", "_first_s", "_holds", "_link", "_told", "number")

    def __init__(self, link: Link, number: int, request: InferenceRequest, decision: Decision) -> None:
        self._link = link
        self.number = number
        self.request = request
        self.tried = []
        self.guess = False
        self._told = True
        """There is nothing to tell."""
        self._first_s = 0.0
        self._bytes = 0
        self.board(decision)

    def board(self, decision: Decision) -> None:
        self.decision = decision
        self.tried.append(decision.chosen.name)
        self._holds = True

    def first_output(self, now: float) -> None:
        if self._holds:
            self._first_s = now
            self._tell()

    def received(self, body_bytes: int) -> None:
        if self._holds:
            self._bytes += body_bytes
            self._tell()

    def release(self) -> None:
        if self._holds:
            self._holds = False
            self._tell()

    def _tell(self) -> None:
        if self._told:
            self._told = False
            self._link.moving(self)

    def progress(self) -> tuple[int, float, int, bool]:
        """What there is to tell, as ``Up.progress``."""
        found = self.number, self._first_s, self._bytes, not self._holds
        self._told, self._first_s, self._bytes = True, 0.0, 0
        return found


class Link:
    """The scheduler, from a worker: ``opening.Opening`` and ``plane.Ends`` in one.

    When the scheduler is gone new requests get 503; those under way go on, with nobody to tell.
    """

    def __init__(self) -> None:
        self.up = Up()
        self.pool = PoolView(self._saw)
        self.frames = Frames(self._message, self._on_lost)
        self._hello: Hello | None = None
        self.hello: asyncio.Future[Hello] = asyncio.get_running_loop().create_future()
        """Done when all is known that a worker must know to serve."""
        self.stop = asyncio.Event()
        """The scheduler wants us to drain, or is gone."""
        self.lost = asyncio.Event()
        self.connections: Callable[[], int] = int
        """How many the worker has, where that is to be known."""
        self.settle: Callable[[], None] = _nothing
        """Has everything told that is over."""
        self._number = self._head_number = 0
        self._parsers: Collection[str] | None = None
        self._state: State | None = None
        self._loop = asyncio.get_running_loop()
        self._due = False
        self._timer: asyncio.TimerHandle | None = None
        self._moving: list[RemoteFlight] = []
        self._asking: dict[int, tuple[InferenceRequest, Told]] = {}
        self._reopening: dict[int, tuple[RemoteFlight, Callable[[bool], None]]] = {}
        self._refreshing: list[asyncio.Future[None]] = []
        self._heads: dict[int, tuple[int, Mapping[str, str]]] = {}
        """Number by the identity of the headers, which are kept so that it stays theirs."""

    # -- telling

    def soon(self) -> None:
        """Send what this turn of the event loop brings."""
        if not self._due:
            self._due = True
            self._loop.call_soon(self.flush)

    def later(self) -> None:
        """Send what nobody waits for, with what must be sent if that comes first."""
        if not self._due and self._timer is None:
            self._timer = self._loop.call_later(LATER_S, self.flush)

    def flush(self) -> None:
        """Send what there is to tell."""
        self._due = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        up, self.up = self.up, Up()
        moving, self._moving = self._moving, []
        up.progress = [flight.progress() for flight in moving]
        if self._state:
            up.ends = self._state.ends
        up.connections = self.connections()
        if not self.lost.is_set():
            self.frames.send(encode(up))

    def moving(self, flight: RemoteFlight) -> None:
        """There is something to tell of it."""
        self._moving.append(flight)
        self.later()

    def hand_over(self, flight: Flight, name: str, started_s: float) -> None:
        """We see no more of it; ``name`` is what a gateway calls it."""
        assert isinstance(flight, RemoteFlight)
        self.up.handed.append((flight.number, name, started_s))
        self.later()

    def line(self, fields: Sequence[object]) -> None:
        """A gateway's access log says this."""
        self.up.lines.append(list(fields))
        self.later()

    def _saw(self, what: str, name: str) -> None:
        self.up.health.append((what, name))
        self.soon()

    # -- requests

    def format_of(self, path: str) -> api.Format:
        return format_of(path, self._parsers)

    def open(self, request: InferenceRequest, told: Told, eligible: Eligible | None = None) -> None:
        if self.lost.is_set() or self.frames.stuck:
            told(NoEndpoints("No endpoint can answer: there is no word from the scheduler."))
            return
        self._number += 1
        self._asking[self._number] = request, told
        state = self._state
        assert state, "the scheduler speaks first"
        names = None
        if eligible is not None:
            seats = self.pool.members.values()
            names = frozenset(s.endpoint.name for s in seats if eligible(s.endpoint))
        self.up.asked.append(
            asking(
                request,
                self._number,
                self._head(request.headers),
                _parts(request, state),
                names,
                body=state.bodies and not request.tokenized,
            )
        )
        self.soon()

    def _head(self, headers: Mapping[str, str]) -> int:
        """The number of these headers, which the scheduler knows or is told."""
        known = self._heads.get(id(headers))
        if known is not None:
            return known[0]
        if len(self._heads) == MAX_HEADS:
            self._heads.clear()
        self._head_number += 1
        number = self._head_number
        self._heads[id(headers)] = number, headers
        self.up.heads.append((number, dict(headers)))
        return number

    def reopen(self, flight: Flight, told: Callable[[bool], None]) -> None:
        assert isinstance(flight, RemoteFlight)
        if self.lost.is_set():
            told(False)
            return
        flight.release()
        self._reopening[flight.number] = flight, told
        self.up.again.append(flight.number)
        self.soon()

    # -- what becomes of them

    def moved(self, flight: Flight, endpoint: Endpoint) -> None:
        """Whoever sends the request has sent it to another endpoint than was chosen."""
        assert isinstance(flight, RemoteFlight)
        flight.decision.chosen = endpoint
        flight.board(flight.decision)
        self.up.moved.append((flight.number, endpoint.name))
        self.later()

    def candidates(self, model: str, eligible: Eligible | None = None) -> Sequence[Endpoint]:
        """Endpoints that may take a request of which nothing is known, as far as we have heard; never
        empty.
        """
        assert not model, "others are decided on by the scheduler"
        staying = [seat for seat in self.pool.members.values() if not seat.draining]
        found = [s.endpoint for s in staying if s.usable] or [s.endpoint for s in staying]
        if eligible is not None:
            found = list(filter(eligible, found))
        if not found:
            raise NoEndpoints("No endpoint can answer: none that may is in the pool.")
        return found

    def remember(self, flight: Flight, state_id: str) -> None:
        assert isinstance(flight, RemoteFlight)
        if state_id:
            self.up.made.append((flight.number, state_id))
            self.later()

    def close(self, flight: Flight, outcome: Outcome) -> None:
        assert isinstance(flight, RemoteFlight)
        self.up.closed.append((flight.number, on_its_way(outcome)))
        self.later()

    def observe(self, request: InferenceRequest, decision: Decision | None, outcome: Outcome) -> None:
        assert decision is None, "what has been decided on is closed"
        self.up.refused.append((request.id, request.path, request.model, on_its_way(outcome)))
        self.later()

    async def refresh_models(self) -> None:
        """The endpoints have been asked for their models."""
        if self.lost.is_set():
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._refreshing.append(done)
        self.up.refreshes += 1
        self.soon()
        await done

    # -- what the scheduler tells

    def _message(self, data: bytes) -> None:
        if self._hello is None:
            self._hello = read_hello(data)
            self._parsers = self._hello.parsers
            return
        down = read_down(data)
        if down.state is not None:
            self._state = down.state
            self.pool.renew(down.state.endpoints, down.state.ready)
            if not self.hello.done():
                self.hello.set_result(self._hello)
        self.pool.troubled = down.troubled
        for _ in range(down.refreshed):
            self._refreshed()
        for unserved in down.unserved:
            self._answer(unserved.number, unserved.error())
        for number in down.nowhere:
            self._moved(number, None)
        for decided in down.decided:
            if decided.number in self._reopening:
                self._moved(decided.number, decided)
            else:
                self._answer(decided.number, decided)
        if down.settle:
            self.settle()
            self.up.settled += down.settle
            self.soon()
        if down.drain:
            self.stop.set()

    def _refreshed(self) -> None:
        done = self._refreshing.pop(0)
        if not done.done():
            done.set_result(None)

    def _answer(self, number: int, found: Decided | PointsmanError) -> None:
        request, told = self._asking.pop(number)
        try:
            if isinstance(found, PointsmanError):
                told(found)
            else:
                flight = RemoteFlight(self, number, request, self._decision(request, found))
                flight.guess = found.guess
                told(flight)
        except Exception:  # one request's bug must not cost the others their answer
            log.exception("request for %s could not be answered", request.path)

    def _moved(self, number: int, found: Decided | None) -> None:
        flight, told = self._reopening.pop(number)
        if found is not None:
            flight.board(self._decision(flight.request, found))
        try:
            told(found is not None)
        except Exception:
            log.exception("request for %s could not be sent elsewhere", flight.request.path)

    def _decision(self, request: InferenceRequest, found: Decided) -> Decision:
        scores = found.scores or {}
        return Decision(
            request.id,
            request.model,
            found.at_s,
            "",
            (),
            self._endpoint(found.endpoint),
            tuple(map(self._endpoint, found.fallbacks)),
            scored=tuple(map(self._endpoint, scores)),
            scores={"total": tuple(scores.values())} if scores else {},
            request_headers=found.request_headers,
            response_headers=found.response_headers,
        )

    def _endpoint(self, name: str) -> Endpoint:
        seat = self.pool.members.get(name)
        # one that left in this very moment is not found among the connections either
        return seat.endpoint if seat else Endpoint(name=name, slot=-1, address="", load=Load())

    def _on_lost(self) -> None:
        self.lost.set()
        self.stop.set()
        if not self.hello.done():
            self.hello.cancel()
        while self._refreshing:
            self._refreshed()
        for number in list(self._asking):
            self._answer(number, NoEndpoints("No endpoint can answer: the scheduler has gone."))
        for number in list(self._reopening):
            self._moved(number, None)


def _nothing() -> None:
    pass


def _parts(request: InferenceRequest, state: State) -> Sequence[tuple[bytes, int, bytes, int]]:
    """The prompts with their hashes; of the first also the beginning, which tells prompts of one kind."""
    prompts = request.prompts
    if not prompts:
        return ()
    ends = state.block_ends
    chains = iter(chains_of(request, ends) if any(len(p.data) >= ends[0] for p in prompts) else ())
    parts = []
    for i, prompt in enumerate(prompts):
        data, size = prompt.data, len(prompt.data)
        digests = next(chains).rest(bisect_right(ends, size)) if size >= ends[0] else b""
        if size < ends[0] or (state.prompts and not i):
            kept = bytes(data)
        else:
            kept = b"" if i else bytes(data[:HEAD_BYTES])
        parts.append((kept, prompt.tokens, digests, 0 if len(kept) == size else size))
    return parts
