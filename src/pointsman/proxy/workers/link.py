"""A worker's end: decisions come from the scheduler, and what becomes of requests is told to it."""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping

from pointsman import api
from pointsman.errors import NoEndpoints, PointsmanError
from pointsman.predictor.lengths import HEAD_BYTES
from pointsman.prefix.hashing import chains_of
from pointsman.proxy.opening import Told
from pointsman.proxy.workers.frames import Frames
from pointsman.proxy.workers.messages import (
    MAX_HEADS,
    Asked,
    Closed,
    Decided,
    Hello,
    Part,
    Refused,
    State,
    Up,
    encode,
    on_its_way,
    read_down,
    read_hello,
)
from pointsman.proxy.workers.view import PoolView
from pointsman.router import Eligible, Flight, format_of
from pointsman.types import Decision, Endpoint, InferenceRequest, Load, Outcome

log = logging.getLogger(__name__)


class RemoteFlight(Flight):
    """A flight whose share of the load is counted by the scheduler."""

    __slots__ = ("_holds", "_link", "number")

    def __init__(self, link: Link, number: int, request: InferenceRequest, decision: Decision) -> None:
        self._link = link
        self.number = number
        self.request = request
        self.tried = []
        self.guess = False
        self.board(decision)

    def board(self, decision: Decision) -> None:
        self.decision = decision
        self.tried.append(decision.chosen.name)
        self._holds = True

    def first_output(self, now: float) -> None:
        if self._holds:
            self._link.up.first.append((self.number, now))
            self._link.soon()

    def received(self, body_bytes: int) -> None:
        if self._holds:
            self._link.up.received.append((self.number, body_bytes))
            self._link.soon()

    def release(self) -> None:
        if self._holds:
            self._holds = False
            self._link.up.released.append(self.number)
            self._link.soon()


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
        self.settle: Callable[[], None] = _nothing
        """Has everything told that is over."""
        self._number = self._head_number = 0
        self._parsers: Collection[str] | None = None
        self._state: State | None = None
        self._due = False
        self._asking: dict[int, tuple[InferenceRequest, Told]] = {}
        self._moving: dict[int, tuple[RemoteFlight, Callable[[bool], None]]] = {}
        self._refreshing: list[asyncio.Future[None]] = []
        self._heads: dict[int, tuple[int, Mapping[str, str]]] = {}
        """Number by the identity of the headers, which are kept so that it stays theirs."""

    # -- telling

    def soon(self) -> None:
        """Send what this turn of the event loop brings."""
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Send what there is to tell."""
        self._due = False
        up, self.up = self.up, Up()
        if self._state:
            up.ends = self._state.ends
        if not self.lost.is_set():
            self.frames.send(encode(up))

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
        self.up.asked.append(self._asked(request, eligible))
        self.soon()

    def _asked(self, request: InferenceRequest, eligible: Eligible | None) -> Asked:
        state = self._state
        assert state, "the scheduler speaks first"
        asked = Asked(
            self._number,
            request.id,
            request.path,
            request.format,
            request.model,
            request.stream,
            request.root,
            _parts(request, state),
            request.prompt_tokens,
            request.max_tokens,
            self._head(request.headers),
            request.n,
            request.priority,
            request.cache_salt,
            request.state_id,
            request.media,
            request.tokenized,
            request.body if state.bodies and not request.tokenized else b"",
        )
        if eligible is not None:
            seats = self.pool.members.values()
            asked.eligible = frozenset(s.endpoint.name for s in seats if eligible(s.endpoint))
        return asked

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
        self._moving[flight.number] = flight, told
        self.up.again.append(flight.number)
        self.soon()

    # -- what becomes of them

    def remember(self, flight: Flight, state_id: str) -> None:
        assert isinstance(flight, RemoteFlight)
        if state_id:
            self.up.made.append((flight.number, state_id))
            self.soon()

    def close(self, flight: Flight, outcome: Outcome) -> None:
        assert isinstance(flight, RemoteFlight)
        self.up.closed.append(Closed(flight.number, on_its_way(outcome)))
        self.soon()

    def observe(self, request: InferenceRequest, decision: Decision | None, outcome: Outcome) -> None:
        assert decision is None, "what has been decided on is closed"
        self.up.refused.append(Refused(request.id, request.path, request.model, on_its_way(outcome)))
        self.soon()

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
            if decided.number in self._moving:
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
        flight, told = self._moving.pop(number)
        if found is not None:
            flight.board(self._decision(flight.request, found))
        try:
            told(found is not None)
        except Exception:
            log.exception("request for %s could not be sent elsewhere", flight.request.path)

    def _decision(self, request: InferenceRequest, found: Decided) -> Decision:
        return Decision(
            request.id,
            request.model,
            found.at_s,
            "",
            (),
            self._endpoint(found.endpoint),
            tuple(map(self._endpoint, found.fallbacks)),
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
        for number in list(self._moving):
            self._moved(number, None)


def _nothing() -> None:
    pass


def _parts(request: InferenceRequest, state: State) -> list[Part]:
    """The prompts with their hashes; of the first also the beginning, which tells prompts of one kind."""
    prompts = request.prompts
    if not prompts:
        return []
    ends = state.block_ends
    chains = iter(chains_of(request, ends))
    parts = []
    for i, prompt in enumerate(prompts):
        data, size = prompt.data, len(prompt.data)
        digests = next(chains).rest(bisect_right(ends, size)) if size >= ends[0] else b""
        if size < ends[0] or (state.prompts and not i):
            kept = bytes(data)
        else:
            kept = b"" if i else bytes(data[:HEAD_BYTES])
        parts.append(Part(kept, prompt.tokens, digests, 0 if len(kept) == size else size))
    return parts
