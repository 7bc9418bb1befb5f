"""The shipped router in virtual time, with what sending a request through it costs."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec

from pointsman.bench.client import Record
from pointsman.bench.workloads import Call
from pointsman.errors import PointsmanError
from pointsman.router import Flight
from pointsman.sim.engine import EngineRequest
from pointsman.twin.events import Events
from pointsman.twin.prompts import Prompts
from pointsman.twin.routers import Replica, Routers
from pointsman.twin.server import ModelServer
from pointsman.types import Ending, InferenceRequest, Outcome, Usage

TRIES = 3
"""Endpoints one request may be sent to, as ``upstream.tries``."""


class RouterCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the router itself takes. All zero: a router that costs nothing."""

    delay_s: float = 0.0
    """Added to every request before it reaches an endpoint."""
    request_s: float = 0.0
    """CPU seconds a request; requests and chunks wait for each other."""
    chunk_s: float = 0.0
    """CPU seconds for each token an endpoint streams."""
    cores: float = 1.0
    stream_s: float = 0.0
    """Waited by a request for each sequence that runs: a router short of CPU takes its streams in turn."""


class Served(Record):
    """One request as the client saw it, and what the router had thought of it."""

    number: int = 0
    prompt_tokens: int = 0
    slo_class: str = ""
    matched_tokens: int = 0
    """Prompt tokens the router believed to be cached where it sent the request."""
    preemptions: int = 0
    tries: int = 0


class Gateway:
    """Takes calls and hands back a record each."""

    def __init__(
        self,
        events: Events,
        replicas: Sequence[Replica],
        servers: Mapping[str, ModelServer],
        prompts: Prompts,
        cost: RouterCost,
        timeout_s: float,
        routers: Routers,
        dice: random.Random,
    ) -> None:
        self.events = events
        self.routers = routers
        self._replicas = replicas
        self._dice = dice
        self.servers = servers
        self.prompts = prompts
        self.cpu = _Cpu(cost, servers, events, len(replicas))
        self.sent = 0
        self._timeout_s = timeout_s
        self._deadlines: deque[tuple[float, Exchange]] = deque()

    def send(self, call: Call, on_end: Callable[[Call, Served], None]) -> None:
        """A client sends ``call`` now."""
        self.sent += 1
        replicas = self._replicas
        replica = replicas[0] if len(replicas) == 1 else self._dice.choice(replicas)
        exchange = Exchange(self, replica, call, self.sent, on_end)
        if not exchange.over:
            deadlines = self._deadlines
            deadlines.append((self.events.now_s + self._timeout_s, exchange))
            if len(deadlines) == 1:
                self.events.at(deadlines[0][0], self._time_out)

    def under_way(self) -> list[Served]:
        """The records, as far as they are, of requests that have not ended."""
        return [exchange.record for _, exchange in self._deadlines if not exchange.over]

    def _time_out(self) -> None:
        """Clients give up ``timeout_s`` after they have sent, so the first to send is the first to leave."""
        deadlines = self._deadlines
        while deadlines and (deadlines[0][1].over or deadlines[0][0] <= self.events.now_s):
            deadlines.popleft()[1].time_out()
        if deadlines:
            self.events.at(deadlines[0][0], self._time_out)


class Exchange:
    """One request between client, router and servers."""

    __slots__ = (
        "_call",
        "_flight",
        "_gateway",
        "_on_end",
        "_pool",
        "_prepared",
        "_request",
        "_router",
        "_running",
        "_server",
        "adapter",
        "over",
        "record",
    )

    def __init__(
        self,
        gateway: Gateway,
        replica: Replica,
        call: Call,
        number: int,
        on_end: Callable[[Call, Served], None],
    ) -> None:
        events = gateway.events
        now_s = events.now_s
        self._gateway = gateway
        self._pool, self._router = replica.pool, replica.router
        self._call = call
        self._on_end = on_end
        self.over = False
        self._prepared = gateway.prompts.prepare(call)
        self._request: InferenceRequest = gateway.prompts.request(number, call, self._prepared)
        self._flight: Flight | None = None
        self._server: ModelServer | None = None
        self._running: EngineRequest | None = None
        self.adapter = call.model
        self.record = Served(
            due_s=now_s,
            sent_s=now_s,
            group=call.group,
            number=number,
            prompt_tokens=self._prepared.tokens,
            slo_class=call.slo_class,
        )
        if gateway.cpu.free:
            self._decide()
        else:
            events.at(gateway.cpu.decided_s(), self._decide)

    def _decide(self) -> None:
        if self.over:
            return
        try:
            self._flight = self._router.open(self._request)
        except PointsmanError as error:
            outcome = Outcome(ending=Ending.REFUSED, status=error.status, reason=error.reason)
            self._router.observe(self._request, None, outcome)
            self._end(f"status {error.status}", error.status)
            return
        self._dispatch(self._flight)

    def _dispatch(self, flight: Flight) -> None:
        """To the chosen endpoint, or while it cannot be reached or refuses to the next one."""
        gateway, record = self._gateway, self.record
        while True:
            decision = flight.decision
            server = gateway.servers[decision.chosen.name]
            record.tries += 1
            if server.up and not server.full:
                break
            if server.up:
                server.refused += 1
                self._pool.abandoned(decision.chosen)
            else:
                self._pool.unreachable(server.name)
            if record.tries >= TRIES or not self._router.reopen(flight):
                status, reason = (503, "status_503") if server.up else (502, "upstream_failed")
                self._close(Ending.ERROR if server.up else Ending.FAILED, status, reason)
                return
        record.endpoint = server.name
        record.matched_tokens = decision.matched_tokens
        if not server.fits(self._call, self._prepared):
            self._close(Ending.ERROR, 400, "status_400")
            return
        self._server = server
        self._running = server.submit(self, self._call, self._prepared)

    # what the server tells

    def first_token(self) -> None:
        """A token is out: the first, or the next after a preemption."""
        record = self.record
        if record.first_s:
            return
        assert self._flight is not None
        gateway = self._gateway
        if gateway.routers.evidence == "full":
            self._flight.first_output(gateway.events.now_s)
            if self._pool.troubled:
                self._pool.answered(self._flight.decision.chosen)
        record.first_s = gateway.events.now_s + gateway.cpu.relay_s()

    def finished(self) -> None:
        """The last token is out."""
        running = self._running
        assert running is not None
        if not self.record.first_s:
            self.first_token()
        self.record.usage = Usage(running.prompt_tokens, running.output_tokens, running.cached_tokens)
        self.record.events = running.output_tokens
        self._close(Ending.OK, 200, "")

    def broken(self) -> None:
        """The server died."""
        flight = self._flight
        assert flight is not None
        self._running = None
        self._pool.failed(flight.decision.chosen)
        if self.record.first_s:
            self._close(Ending.FAILED, 200, "upstream_failed")
        elif self.record.tries < TRIES and self._router.reopen(flight):
            self._dispatch(flight)
        else:
            self._close(Ending.FAILED, 502, "upstream_failed")

    def time_out(self) -> None:
        """The client has waited for long enough."""
        if self.over:
            return
        running, server = self._running, self._server
        if running is not None and server is not None:
            self.record.events = server.engine.generated(running)
            server.cancel(running)
        if self._flight is None:
            self._end("timeout", 0)
        else:
            self._close(Ending.CANCELLED, 0, "client_left")

    # the end

    def _close(self, ending: Ending, status: int, reason: str) -> None:
        gateway, record, flight = self._gateway, self.record, self._flight
        assert flight is not None
        seen = gateway.routers.evidence == "full"
        outcome = Outcome(
            ending=ending,
            status=status,
            endpoint=flight.tried[-1],
            tries=len(flight.tried),
            ttft_s=record.first_s - record.sent_s if seen and record.first_s else None,
            duration_s=gateway.events.now_s - record.sent_s,
            chunks=record.events if seen else 0,
            usage=record.usage if seen else Usage(),
            reason=reason,
        )
        late_s = 0.0 if seen else gateway.routers.completion_delay_s
        if late_s:
            gateway.events.at(gateway.events.now_s + late_s, self._router.close, flight, outcome)
        else:
            self._router.close(flight, outcome)
        if ending is Ending.CANCELLED:
            self._end("timeout", status)
        elif ending is Ending.FAILED and record.first_s:
            self._end("error in stream", status)
        else:
            self._end("" if ending is Ending.OK else f"status {status}", status)

    def _end(self, error: str, status: int) -> None:
        gateway, record = self._gateway, self.record
        self.over = True
        record.end_s = record.last_s = gateway.events.now_s + (0.0 if error else gateway.cpu.relay_s())
        record.error, record.status = error, status
        if self._running is not None:
            record.preemptions = self._running.preemptions
        self._running = self._server = None
        self._on_end(self._call, record)


class _Cpu:
    """The routers' processors as one: requests and the chunks that endpoints stream wait for it in one queue.

    Chunks are a flow, not events: every token that an engine gives in a decode step is ``chunk_s`` of work.
    """

    def __init__(
        self, cost: RouterCost, servers: Mapping[str, ModelServer], events: Events, replicas: int
    ) -> None:
        self._cost = msgspec.structs.replace(cost, cores=cost.cores * replicas)
        self._servers = servers
        self._events = events
        self._work_s = 0.0
        self._at_s = 0.0
        self.free = not (cost.delay_s or cost.request_s or cost.chunk_s or cost.stream_s)
        """It costs nothing."""

    def decided_s(self) -> float:
        """When a request that arrives now has been dealt with."""
        self._catch_up()
        cost = self._cost
        self._work_s += cost.request_s
        turns_s = cost.stream_s * self._streams() if cost.stream_s else 0.0
        return self._events.now_s + cost.delay_s + turns_s + self._work_s / cost.cores

    def relay_s(self) -> float:
        """How long a token that arrives now waits here."""
        if self.free:
            return 0.0
        self._catch_up()
        return (self._work_s + self._cost.chunk_s) / self._cost.cores

    def _catch_up(self) -> None:
        now_s = self._events.now_s
        passed_s, self._at_s = now_s - self._at_s, now_s
        if passed_s > 0:
            came_s = self._cost.chunk_s * self._tokens_per_s() if self._cost.chunk_s else 0.0
            self._work_s = max(0.0, self._work_s + (came_s - self._cost.cores) * passed_s)

    def _streams(self) -> int:
        return sum(len(server.engine.running) for server in self._servers.values())

    def _tokens_per_s(self) -> float:
        rate = 0.0
        for server in self._servers.values():
            engine = server.engine
            if engine.decoding:
                rate += engine.decoding / engine.parameters.step_s(engine.decoding, engine.context_tokens)
        return rate
