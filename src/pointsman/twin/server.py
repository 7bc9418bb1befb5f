"""A model server in virtual time: the engine model, what can go wrong with it, and the metrics it
publishes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol, cast

from pointsman.bench.workloads import Call
from pointsman.sim.engine import Engine, EngineRequest
from pointsman.sim.spec import EngineSpec
from pointsman.sim.text import Text
from pointsman.sim.tokens import TOKEN_BYTES
from pointsman.twin.events import Events
from pointsman.twin.kv_events import Publishing
from pointsman.twin.prompts import Prepared
from pointsman.types import Metrics


class Waiter(Protocol):
    """Whoever sent a request to a server hears of it, at the virtual moment it happens."""

    adapter: str
    """The LoRA adapter it asks for, if any."""

    def first_token(self) -> None: ...

    def finished(self) -> None: ...

    def broken(self) -> None:
        """The server died with it."""


class ModelServer:
    """One simulated server. ``up`` is whether it accepts connections."""

    def __init__(self, spec: EngineSpec, events: Events, publishing: Publishing | None = None) -> None:
        """``publishing``: where it tells of its KV events, if it does."""
        self.spec = spec
        self.name = spec.name
        self.engine = Engine(spec.parameters(), None if publishing is None else publishing.journal)
        self._publishing = publishing
        self.up = True
        self.restarted = False
        """It lost its cache since its metrics were last read."""
        self.refused = 0
        self.scraped_s = -math.inf
        self.served_tokens = 0
        """Output tokens of requests that ended well."""
        self._events = events
        self._armed_s = math.inf
        self._stepping = False
        self._first_tokens = self._ended = 0
        self._first_wait_s = 0.0
        """Counted since it last started, as its metrics page has them."""
        self._lives = (0, 0, 0)
        """``counted`` when it last crashed."""

    # requests

    @property
    def full(self) -> bool:
        """It answers 503 to what comes now."""
        limit, engine = self.spec.max_num_queued_reqs, self.engine
        return limit is not None and len(engine.waiting) + len(engine.running) >= limit

    def submit(self, waiter: Waiter, call: Call, prepared: Prepared) -> EngineRequest:
        """Queue the call; ``waiter`` will be told."""
        engine = self.engine
        block = engine.parameters.block_tokens

        def answer(tokens: int) -> bytes:
            return call.answer.encode()[: tokens * TOKEN_BYTES]

        def continuation(kv_tokens: int) -> Sequence[int]:
            return prepared.continued(call.answer, block, kv_tokens)

        request = EngineRequest(
            prepared.blocks(block),
            prepared.tokens,
            call.output_tokens,
            owner=waiter,
            continuation=continuation if call.answer else None,
            content=Text(prepared.data, answer, block, call.model, call.cache_salt),
        )
        engine.submit(request, self._events.now_s)
        self._go_on()
        return request

    def cancel(self, request: EngineRequest) -> None:
        """The client left."""
        if self.engine.cancel(request, self._events.now_s):
            self._ended += 1
        self._go_on()

    def fits(self, call: Call, prepared: Prepared) -> bool:
        """Whether prompt and output together are within what it can hold."""
        return self.engine.fits(prepared.tokens, call.output_tokens)

    # steps

    def _go_on(self) -> None:
        engine = self.engine
        if engine.idle and not self._stepping:
            engine.start(self._events.now_s)
        due_s = engine.due_s
        if due_s != self._armed_s and due_s < math.inf:
            self._armed_s = due_s
            self._events.at(due_s, self._step, due_s)

    def _step(self, due_s: float) -> None:
        engine = self.engine
        if engine.due_s != due_s:
            return  # the run was cut short since, or lost
        self._stepping = True  # whoever is told may submit or cancel
        ran = engine.finish()
        for request in ran.started:
            if not request.preemptions or request.generated <= 1:
                self._first_tokens += 1
                self._first_wait_s += request.first_token_s - request.arrived_s
            _waiter(request).first_token()
        for request in ran.finished:
            self.served_tokens += request.output_tokens
            self._ended += 1
            _waiter(request).finished()
        self._stepping = False
        self._armed_s = math.inf
        if self._publishing is not None:
            self._publishing.publish()
        self._go_on()

    # faults

    def slow_down(self, factor: float) -> None:
        """Steps take ``factor`` times as long from now on."""
        self.engine.interrupt(self._events.now_s)
        self.engine.slowdown = factor
        self._go_on()

    def crash(self) -> None:
        """Everything it has is lost; it stays away until ``come_back``."""
        self.up = False
        self.restarted = True
        self._armed_s = math.inf
        self._lives = self.counted
        self._first_tokens = self._ended = 0
        self._first_wait_s = 0.0
        if self._publishing is not None:
            self._publishing.crash()
            self.engine.journal = self._publishing.journal
        for request in self.engine.reset(self._events.now_s):
            _waiter(request).broken()

    def come_back(self) -> None:
        self.up = True
        if self._publishing is not None:
            self._publishing.come_back()

    # metrics

    @property
    def counted(self) -> tuple[int, int, int]:
        """Prompt tokens looked up in its cache and found there, and preemptions: over all its lives."""
        engine, (looked_up, found, preempted) = self.engine, self._lives
        return (
            looked_up + engine.cache_queries_tokens,
            found + engine.cache_hits_tokens,
            preempted + engine.preemptions,
        )

    def metrics(self) -> Metrics:
        """What its metrics page would say now."""
        now_s, engine = self._events.now_s, self.engine
        engine.observe(now_s)
        loras = self.spec.loras
        return Metrics(
            at_s=now_s,
            waiting=float(len(engine.waiting)),
            running=float(len(engine.running)),
            kv_usage=engine.kv_usage,
            block_tokens=engine.parameters.block_tokens,
            kv_blocks=engine.parameters.kv_blocks,
            prefix_caching=engine.parameters.prefix_caching,
            loras_active=_adapters(engine.running) if loras else frozenset(),
            loras_waiting=_adapters(engine.waiting) if loras else frozenset(),
            max_loras=self.spec.max_loras if loras else 0,
            prefix_queries=float(engine.cache_queries_tokens),
            prefix_hits=float(engine.cache_hits_tokens),
            generation_tokens=float(engine.generated_tokens),
            preemptions=float(engine.preemptions),
            first_tokens=float(self._first_tokens),
            first_wait_s=self._first_wait_s,
            ended=float(self._ended),
        )


def _waiter(request: EngineRequest) -> Waiter:
    return cast(Waiter, request.owner)


def _adapters(requests: Iterable[EngineRequest]) -> frozenset[str]:
    return frozenset(adapter for request in requests if (adapter := _waiter(request).adapter))
