"""One request's life, top to bottom: parse, admit, schedule, send, observe.

Plain synchronous code that returns what to do; the gateway, the picker and the simulator do the sending.
Whoever calls ``open`` calls ``close`` exactly once with what became of the request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence

from pointsman import api
from pointsman.endpoints.pool import Pool
from pointsman.errors import BadRequest, NoEndpoints
from pointsman.scheduling.scheduler import Scheduler
from pointsman.types import Decision, InferenceRequest, LoadToken, Outcome

Observer = Callable[[InferenceRequest, Decision | None, Outcome], None]
"""Told of every request's end, also of those refused before a decision."""

MAX_STATES = 100_000
"""Responses, conversations and files whose holder is remembered; the least recently used are forgotten."""


class Flight:
    """A request on its way: what was decided, and its share of the endpoint's load."""

    __slots__ = ("_token", "decision", "guess", "request", "tried")

    def __init__(self, request: InferenceRequest) -> None:
        self.request = request
        self.decision: Decision | None = None
        self.tried: list[str] = []
        """Endpoints this request has been sent to; it is never sent to one of them again."""
        self.guess = False
        """It needs earlier state and we do not know who holds it: a 404 means ask the next one."""
        self._token: LoadToken | None = None

    def _take(self, decision: Decision) -> None:
        self.release()
        self.decision = decision
        self.tried.append(decision.chosen.name)
        uncached = max(0, decision.prompt_tokens - decision.matched_tokens)
        self._token = LoadToken(decision.chosen.load, uncached)

    def first_output(self) -> None:
        """The prefill is over."""
        if self._token:
            self._token.release_tokens()

    def release(self) -> None:
        """The endpoint is rid of this request."""
        if self._token:
            self._token.release()
            self._token = None


class Router:
    """Decides for each request where it runs, and learns from how it ended."""

    def __init__(
        self,
        pool: Pool,
        scheduler: Scheduler,
        observers: Sequence[Observer] = (),
        parsers: Collection[str] | None = None,
    ) -> None:
        self.pool = pool
        self._scheduler = scheduler
        self._parsers = parsers
        """Names of the formats to read, ``passthrough`` for the others; None: all of them."""
        self._observers = tuple(observers)
        self._holders: OrderedDict[str, str] = OrderedDict()

    def parse(self, request_id: str, path: str, headers: Mapping[str, str], body: bytes) -> InferenceRequest:
        """The request as the scheduler sees it; ``BadRequest`` when it cannot be read."""
        found = api.find(path) or api.PASSTHROUGH
        if self._parsers is not None and found.name not in self._parsers:
            if api.PASSTHROUGH.name not in self._parsers:
                raise BadRequest(f"No configured parser reads requests for {path}.")
            found = api.PASSTHROUGH
        return found.parse(request_id, path, headers, body)

    def open(self, request: InferenceRequest) -> Flight:
        """Admit and schedule. Raises what the client is to be told when it cannot be served."""
        flight = Flight(request)
        self._schedule(flight, ())
        return flight

    def reopen(self, flight: Flight) -> bool:
        """Send it elsewhere after a failure. False when no endpoint is left that has not had it."""
        flight.release()
        try:
            self._schedule(flight, flight.tried)
        except NoEndpoints:
            return False
        return True

    def _schedule(self, flight: Flight, tried: Collection[str]) -> None:
        request = flight.request
        endpoints = self.pool.candidates(request.model)
        if tried:
            endpoints = [e for e in endpoints if e.name not in tried]
        if request.state_id:
            holder = self._holders.get(request.state_id)
            flight.guess = holder is None
            endpoints = [e for e in endpoints if e.name == holder] or endpoints
        if not endpoints:
            raise NoEndpoints("No further endpoint can answer this request.")
        decision = self._scheduler.schedule(request, endpoints)
        decision.tried = tuple(flight.tried)
        flight._take(decision)
        self.pool.sent(decision.chosen)

    def remember(self, flight: Flight, state_id: str) -> None:
        """The endpoint made a response, conversation or file that later calls will name."""
        if flight.decision and state_id:
            self._holders[state_id] = flight.decision.chosen.name
            self._holders.move_to_end(state_id)
            if len(self._holders) > MAX_STATES:
                self._holders.popitem(last=False)

    def close(self, flight: Flight, outcome: Outcome) -> None:
        """The request is over: the load is given back and everybody who learns from it is told."""
        flight.release()
        decision = flight.decision
        if decision is not None:
            decision.outcome = outcome
            self._scheduler.finish(flight.request, decision, outcome)
        self.observe(flight.request, decision, outcome)

    def observe(self, request: InferenceRequest, decision: Decision | None, outcome: Outcome) -> None:
        """Tell the observers; directly for requests that were refused before they could fly."""
        for observer in self._observers:
            observer(request, decision, outcome)
