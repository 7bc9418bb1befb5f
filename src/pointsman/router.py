"""One request's life, top to bottom: parse, admit, schedule, send, observe.

Plain synchronous code that returns what to do; the gateway, the picker and the simulator do the sending.
Whoever calls ``open`` calls ``close`` exactly once with what became of the request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

from msgspec.structs import replace

from pointsman import api
from pointsman.endpoints.pool import Pool
from pointsman.errors import BadRequest, ModelNotFound, NoEndpoints, PreconditionFailed, Saturated
from pointsman.predictor.token_bytes import TokenBytes
from pointsman.scheduling.scheduler import Scheduler
from pointsman.types import Decision, Endpoint, InferenceRequest, Load, Outcome, UnderWay

Observer = Callable[[InferenceRequest, Decision | None, Outcome], None]
"""Told of every request's end, also of those refused before a decision."""

Eligible = Callable[[Endpoint], bool]
"""Whether a request may go to an endpoint at all."""

MAX_STATES = 100_000
"""Responses, conversations and files whose holder is remembered; the least recently used are forgotten."""


def format_of(path: str, parsers: Collection[str] | None) -> api.Format:
    """How requests for ``path`` are read where only ``parsers`` are configured; None: all are."""
    found = api.find(path)
    if parsers is None or found.name in parsers:
        return found
    if api.PASSTHROUGH.name not in parsers:
        raise BadRequest(f"No configured parser reads requests for {path}.")
    return api.PASSTHROUGH


class Flight:
    """A request on its way: what was decided, and its share of the endpoint's load.

    The share is given back once, whoever calls ``release`` first, so the load can neither leak nor go
    negative.
    """

    __slots__ = ("_load", "_number", "_seen", "_under_way", "decision", "guess", "request", "tried")

    def __init__(self, request: InferenceRequest, decision: Decision, seen: bool = True) -> None:
        """``seen``: we see its response."""
        self.request = request
        self._seen = seen and request.stream  # else it is the whole answer that we see
        self.tried: list[str] = []
        """Endpoints this request has been sent to; it is never sent to one of them again."""
        self.guess = False
        """It needs earlier state and we do not know who holds it: a 404 means ask the next one."""
        self._load: Load | None = None
        self.board(decision)

    def board(self, decision: Decision) -> None:
        """The request goes to the endpoint of this decision."""
        chosen = decision.chosen
        self.decision = decision
        self.tried.append(chosen.name)
        load = self._load = chosen.load
        tokens = decision.prompt_tokens - decision.matched_tokens
        ahead, before_first = load.tokens + tokens, load.before_first
        if before_first:  # the first of them is half computed on average
            ahead -= next(iter(before_first.values())).tokens // 2
        load.requests += 1
        load.tokens += tokens
        self._number = load.sent
        self._under_way = before_first[load.sent] = UnderWay(decision.at_s, tokens, ahead, self._seen)
        load.context_tokens += decision.prompt_tokens
        load.since_sum_s += decision.at_s
        load.sent += 1
        load.changes += 1

    def first_output(self, now: float) -> None:
        """The prefill is over: its tokens no longer weigh on the endpoint."""
        if self._load is not None:
            self._load.first_output(self._number, now - self.decision.at_s if self._seen else None)

    def received(self, body_bytes: int) -> None:
        """So much more of the response has come."""
        if self._load is not None:
            self._load.received_bytes += body_bytes

    def likely_tokens(self) -> float | None:
        """Output tokens so far, by how far others at the endpoint got since its first; None without a sign of
        either.
        """
        load, first = self._load, self._under_way.first_step
        return load.steps - first + 1 if load is not None and first is not None and load.steps else None

    def release(self) -> None:
        """The endpoint is rid of this request. Later calls do nothing."""
        load = self._load
        if load is not None:
            self._load = None
            load.requests -= 1
            load.first_output(self._number, None)
            load.context_tokens -= self.decision.prompt_tokens
            load.since_sum_s = load.since_sum_s - self.decision.at_s if load.requests else 0.0
            load.changes += 1


class Router:
    """Decides for each request where it runs, and learns from how it ended."""

    def __init__(
        self,
        pool: Pool,
        scheduler: Scheduler,
        observers: Sequence[Observer] = (),
        parsers: Collection[str] | None = None,
        *,
        sees_responses: bool = True,
        knows_models: bool = True,
    ) -> None:
        """Without ``sees_responses`` a request's first output is known from the engine's counters alone.
        Without ``knows_models`` one for a model that no endpoint lists goes to any of them.
        """
        self.pool = pool
        self._knows_models = knows_models
        self._scheduler = scheduler
        self._sees_responses = sees_responses
        self.parsers = parsers
        """Names of the formats to read, ``passthrough`` for the others; None: all of them."""
        self._observers = tuple(observers)
        self._holders: OrderedDict[str, str] = OrderedDict()
        self._token_bytes = TokenBytes()

    def format_of(self, path: str) -> api.Format:
        """How requests for ``path`` are read; ``BadRequest`` when no configured parser takes it."""
        return format_of(path, self.parsers)

    def open(self, request: InferenceRequest, eligible: Eligible | None = None) -> Flight:
        """Admit and schedule, among the ``eligible``. Raises what the client is to be told when it cannot be
        served.
        """
        endpoints = self.candidates(request.model, eligible)
        request = self._token_bytes.corrected(request)
        holder = None
        if request.state_id:
            holder = self._holders.get(request.state_id)
            endpoints = [e for e in endpoints if e.name == holder] or endpoints
        flight = Flight(request, self._scheduler.schedule(request, endpoints), self._sees_responses)
        if request.state_id:
            flight.guess = holder is None
        if self.pool.troubled:
            self.pool.sent(flight.decision.chosen)
        return flight

    def candidates(self, model: str, eligible: Eligible | None = None) -> Sequence[Endpoint]:
        """Endpoints that may take a request for ``model`` now; never empty."""
        pool = self.pool
        try:
            endpoints = pool.candidates(model)
        except ModelNotFound:
            if self._knows_models:
                raise
            endpoints = pool.candidates("")
        if eligible is None:
            return endpoints
        found = list(filter(eligible, endpoints))
        if not found and not self._knows_models:
            found = list(filter(eligible, pool.candidates("")))
        if not found:
            raise NoEndpoints("No endpoint can answer: none of those that the gateway allows is in the pool.")
        return found

    def moved(self, flight: Flight, endpoint: Endpoint) -> None:
        """Whoever sends the request has sent it to another endpoint than we chose."""
        flight.release()
        decision = flight.decision
        decision.tried = tuple(flight.tried)
        decision.chosen, decision.matched_tokens, decision.predicted = endpoint, 0, None
        flight.board(decision)

    def reopen(self, flight: Flight) -> bool:
        """Send it elsewhere after a failure. False when no endpoint is left that has not had it."""
        flight.release()
        try:
            endpoints = self.pool.untried(flight.request.model, flight.tried)
            if not endpoints:
                return False
            decision = self._scheduler.schedule(flight.request, endpoints)
        except (NoEndpoints, ModelNotFound, Saturated, PreconditionFailed):
            return False
        decision.tried = tuple(flight.tried)
        flight.board(decision)
        if self.pool.troubled:
            self.pool.sent(decision.chosen)
        return True

    def remember(self, flight: Flight, state_id: str) -> None:
        """The endpoint made a response, conversation or file that later calls will name."""
        if state_id:
            self._holders[state_id] = flight.decision.chosen.name
            self._holders.move_to_end(state_id)
            if len(self._holders) > MAX_STATES:
                self._holders.popitem(last=False)

    def close(self, flight: Flight, outcome: Outcome) -> None:
        """The request is over: the load is given back and everybody who learns from it is told."""
        if outcome.usage.output_tokens is None and not outcome.response_bytes:
            outcome = replace(outcome, likely_tokens=flight.likely_tokens())
        flight.release()
        decision = flight.decision
        decision.outcome = outcome
        self._token_bytes.learn(flight.request, outcome)
        self._scheduler.finish(flight.request, decision, outcome)
        self.observe(flight.request, decision, outcome)

    def observe(self, request: InferenceRequest, decision: Decision | None, outcome: Outcome) -> None:
        """Tell the observers; directly for requests that were refused before they could fly."""
        for observer in self._observers:
            observer(request, decision, outcome)
