"""A simulated engine behind its port: wall-clock time drives the engine model, its progress becomes bytes."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping
from email.utils import formatdate
from functools import partial

from msgspec import structs
from xxhash import xxh64_intdigest

from pointsman.sim import tokens
from pointsman.sim.connection import GARBAGE, Connection, Request
from pointsman.sim.engine import Engine, EngineRequest, Phase
from pointsman.sim.faults import ENGINE_KINDS, Fault, Faults, parse
from pointsman.sim.formats.ask import Ask, Context, Refused
from pointsman.sim.formats.responses import Responses
from pointsman.sim.job import Job, Output
from pointsman.sim.kv_journal import Journal
from pointsman.sim.kv_layouts import Writer
from pointsman.sim.kv_names import NAMERS
from pointsman.sim.kv_publisher import Publisher
from pointsman.sim.limits import answer_length
from pointsman.sim.metrics import EngineMetrics
from pointsman.sim.port import Port
from pointsman.sim.spec import EngineSpec, Pace
from pointsman.sim.state import EngineState, Lag, LogRecord, Totals
from pointsman.sim.text import Text
from pointsman.types import Clock

EARLY_S = 0.0005
"""A run counts as over this long before its wall-clock end: event loops' timers tick in milliseconds."""
KEEP_ALIVE_S = 5.0
"""Idle connections are closed after so long, as vLLM's server does."""
LOG_LENGTH = 20_000

Handler = Callable[["SimulatedEngine", Connection, Request], None]


class SimulatedEngine:
    """One engine of a fleet: ``url``, ``fault(...)``, ``state``, ``log``. Its time is the wall clock's times
    ``pace.speed``. Counters outlive a crash; the engine, its cache and its metrics do not.
    """

    def __init__(
        self,
        spec: EngineSpec,
        pace: Pace,
        handler: Handler,
        *,
        host: str = "127.0.0.1",
        hasher: tokens.BlockHasher,
        clock: Clock,
        unix_s: Clock,
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.pace = pace
        self.fleet: Mapping[str, SimulatedEngine] = {spec.name: self}
        """Itself and its siblings, by name."""
        self.log: deque[LogRecord] = deque(maxlen=LOG_LENGTH)
        self.faults = Faults()
        self.lag = Lag()
        self.totals = Totals()
        self.max_model_len = spec.context_tokens()
        self.loras: dict[str, None] = dict.fromkeys(spec.loras)
        self._parameters = spec.parameters()
        self._handler = handler
        self._hasher = hasher
        self._port = Port(host, spec.port, partial(Connection, self), self._opened)
        self._clock = clock
        self._unix_s = unix_s
        self._connections: set[Connection] = set()
        self._held: list[tuple[Connection, Request, Fault]] = []
        self._ids = 0
        self._date = (0, b"")
        self._waiters: dict[asyncio.Future[None], Callable[[EngineState], bool]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._armed_s = math.inf
        self._sweep: asyncio.TimerHandle | None = None
        self._return: asyncio.TimerHandle | None = None
        self._expiries: dict[Fault, asyncio.TimerHandle] = {}
        self.publisher: Publisher | None = None
        if spec.kv_events is not None:
            events, block = spec.kv_events, self._parameters.block_tokens
            writer = Writer(
                events.layout, block, self.loras, spec.data_parallel_rank, events.int_block_hashes
            )
            self.publisher = Publisher(events, writer, self.faults, host, clock, unix_s)
        self._boot()

    def _boot(self) -> None:
        """A fresh engine process: nothing cached, nothing counted."""
        events = self.spec.kv_events
        self.journal = None if events is None else Journal(NAMERS[events.hash_algo])
        self.engine = Engine(self._parameters, self.journal)
        self.created_s = int(self._unix_s())
        self.metrics = EngineMetrics(self.engine, self.spec.models[0], self.max_model_len, self._unix_s())
        self.responses = Responses()
        self._streams: dict[EngineRequest, Output] = {}
        self._jobs: dict[Job, None] = {}
        self._origin_s = self._clock()
        self._frozen_s: float | None = None
        self._last_due_s = 0.0

    # life

    async def start(self) -> None:
        """Open the port. ``OSError`` when it is taken."""
        self._loop = asyncio.get_running_loop()
        await self._port.open()
        if self.publisher is not None:
            self.publisher.open(f"kv@{self.url.removeprefix('http://')}@{self.spec.models[0]}")
        self._close_idle()

    async def stop(self) -> None:
        """Close the port and every connection."""
        await self._port.give_up()
        if self.publisher is not None:
            self.publisher.close()
        for handle in (self._timer, self._sweep, self._return, *self._expiries.values()):
            if handle is not None:
                handle.cancel()
        for connection in tuple(self._connections):
            connection.transport.abort()
        await self.until(lambda state: not state.connections)
        if self._timer is not None:
            self._timer.cancel()

    @property
    def url(self) -> str:
        host = f"[{self._port.host}]" if ":" in self._port.host else self._port.host
        return f"http://{host}:{self._port.number}"

    @property
    def port(self) -> int:
        return self._port.number

    @property
    def up(self) -> bool:
        """It accepts connections."""
        return self._port.is_open

    # faults

    def fault(self, kind: str, **fields: object) -> None:
        """Make something go wrong; see ``faults.Fault`` for kinds and fields."""
        self.inflict(parse({"kind": kind} | fields))

    def inflict(self, fault: Fault) -> None:
        if fault.kind in ("crash", "restart"):
            self._crash(0.0 if fault.kind == "restart" else fault.for_s)
            return
        if fault.kind == "renumber-events":
            if self.publisher is not None:
                self.publisher.renumber()
            return
        self.faults.active.append(fault)
        if fault.for_s is not None:
            self._expiries[fault] = self._loop.call_later(fault.for_s, self._lift, fault)
        if fault.kind == "refuse":
            self._port.close()
        elif fault.kind == "slow":
            self.engine.interrupt(self.now_s())
            self.engine.slowdown = fault.factor
            self._arm()
        elif fault.kind == "freeze" and self._frozen_s is None:
            self._catch_up()
            self._frozen_s = self._clock()
            self._arm()

    def clear_faults(self) -> None:
        """End every fault; what they held back goes on. A crashed engine comes back."""
        for fault in tuple(self.faults.active):
            self._lift(fault)
        self._port.reopen()

    def _lift(self, fault: Fault) -> None:
        if fault not in self.faults.active:
            return
        self.faults.active.remove(fault)
        expiry = self._expiries.pop(fault, None)
        if expiry is not None:
            expiry.cancel()
        if fault.kind == "refuse":
            self._port.reopen()
        elif fault.kind == "slow":
            self.engine.interrupt(self.now_s())
            self.engine.slowdown = 1.0
            self._arm()
        elif fault.kind == "freeze" and self._frozen_s is not None:
            self._origin_s += self._clock() - self._frozen_s
            self._frozen_s = None
            self._arm()
        elif fault.kind == "stall":
            for job in [job for job in self._jobs if job.stalled]:
                self._resume(job)
        elif fault.kind == "hang":
            held = [(c, r) for c, r, by in self._held if by is fault]
            self._held = [entry for entry in self._held if entry[2] is not fault]
            for connection, request in held:
                self._handler(self, connection, request)

    def _resume(self, job: Job) -> None:
        job.resume()
        if not job.unfinished:
            self._jobs.pop(job, None)

    def _crash(self, for_s: float | None) -> None:
        for fault in tuple(self.faults.active):
            if fault.kind in ENGINE_KINDS:
                self._lift(fault)
        self._port.close()
        for job in tuple(self._jobs):
            self._drop(job, "lost")
        self._held.clear()
        for connection in tuple(self._connections):
            connection.work = None
            if not connection.transport.is_closing():
                connection.reset()
        self.totals.restarts += 1
        if self.publisher is not None:
            self.publisher.close()
        self._boot()
        self._arm()
        if self._return is not None:
            self._return.cancel()
        if for_s is not None:
            self._return = self._loop.call_later(for_s, self._port.reopen)

    # time

    def now_s(self) -> float:
        """The engine's own clock."""
        return ((self._frozen_s or self._clock()) - self._origin_s) * self.pace.speed

    def now_wall_s(self) -> float:
        return self._clock()

    def date(self) -> bytes:
        second = int(self._unix_s())
        if second != self._date[0]:
            self._date = (second, formatdate(second, usegmt=True).encode())
        return self._date[1]

    def _tick(self) -> None:
        self._timer = None
        late_s = (self.now_s() - self.engine.due_s) / self.pace.speed
        if late_s > -EARLY_S:
            self.lag.note(late_s, self.engine.run_s / self.pace.speed)
        self._catch_up()
        self._arm()

    def _arm(self) -> None:
        """Wake up when the run under way ends."""
        due_s = math.inf if self._frozen_s is not None else self.engine.due_s
        if self._timer is not None:
            if due_s == self._armed_s:
                return
            self._timer.cancel()
            self._timer = None
        self._armed_s = due_s
        if math.isfinite(due_s):
            self._timer = self._loop.call_later(
                max(0.0, (due_s - self.now_s()) / self.pace.speed), self._tick
            )

    def _catch_up(self) -> None:
        """Finish the runs that are over by now; each next one begins when the one before ended, however late
        we are.
        """
        engine = self.engine
        until_s = self.now_s() + EARLY_S * self.pace.speed
        while engine.due_s <= until_s:
            self._last_due_s = due_s = engine.due_s
            self._progress()
            engine.start(due_s, self._steps_to_chunk())

    def _steps_to_chunk(self) -> int:
        """Streams are written to every ``tokens_per_chunk`` steps, all in the same step."""
        if not self._streams:
            return 1 << 40
        each = self.pace.tokens_per_chunk
        return each - self.engine.step % each

    def _progress(self) -> None:
        engine, metrics = self.engine, self.metrics
        ran = engine.finish()
        metrics.ran(ran)
        for request in ran.started:
            output = _output(request)
            if engine.generated(request) <= 1:
                metrics.started(request)
            if output.job.stream and request.phase is not Phase.DONE:
                output.job.advance(output, engine.generated(request))
                self._streams[request] = output
        for request in ran.finished:
            output = _output(request)
            self._streams.pop(request, None)
            metrics.finished(request, output.job.reason, output.job.max_tokens)
            if output.job.finish(output):
                self._over(output.job, "served")
        if self._streams and engine.step % self.pace.tokens_per_chunk == 0:
            for request, output in self._streams.items():
                generated = engine.generated(request)
                if generated > output.sent:
                    output.job.advance(output, generated)
        if self.publisher is not None and self.journal is not None:
            self.publisher.publish(self.journal.take())

    # requests

    def _opened(self) -> None:
        """The port is open."""
        if self.publisher is not None:
            self.publisher.reopen()
        self._changed()

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)
        self._changed()

    def handle(self, connection: Connection, request: Request) -> None:
        """Answer ``request``, or begin to; faults come first."""
        fault = self.faults.for_request(request.path)
        if fault is None:
            self._handler(self, connection, request)
        elif fault.kind == "status":
            retry = b"" if fault.retry_after is None else b"retry-after: %d\r\n" % fault.retry_after
            self.refuse(connection, Refused(fault.status, "Simulated fault.", "SimulatedFault"), retry)
        elif fault.kind == "hang" or (fault.kind == "stall" and fault.after_chunks is None):
            self._held.append((connection, request, fault))
            self._changed()
        elif fault.after_chunks is not None:
            connection.work = fault
            self._handler(self, connection, request)
        elif fault.kind == "reset":
            connection.reset()
        else:
            connection.write(GARBAGE if fault.kind == "garbage" else b"")
            connection.transport.close()

    def refuse(self, connection: Connection, refused: Refused, more: bytes = b"") -> None:
        """Answer with an error."""
        self.totals.refused += 1
        connection.answer(refused.status, refused.body(), more=more)
        self._changed()

    def lost(self, connection: Connection) -> None:
        """The connection is gone: free what it waited for."""
        self._connections.discard(connection)
        self._held = [entry for entry in self._held if entry[0] is not connection]
        if isinstance(connection.work, Job):
            self._drop(connection.work, "aborted")
        self._changed()

    def generate(self, connection: Connection, request: Request, ask: Ask) -> None:
        """Queue what ``ask`` wants; ``Refused`` when it cannot be."""
        engine = self.engine
        lora = self._lora(ask.model)
        limit = self.spec.max_num_queued_reqs
        if limit is not None and len(engine.waiting) + len(engine.running) >= limit:
            self.metrics.rejected += 1
            raise Refused(
                503,
                "The engine is currently busy and cannot accept new requests. "
                "Please try again later or on a different instance.",
                "Service Unavailable",
            )
        output_tokens, reason = answer_length(ask, self.max_model_len, self.spec.output_tokens)
        self._ids += 1
        name = request.headers.get(b"x-request-id") or f"{self._ids:x}-{self.name}"
        model = ask.model or self.spec.models[0]
        fault = connection.work if isinstance(connection.work, Fault) else None
        job = Job(
            connection,
            ask.reply(Context(name, int(self._unix_s()), ask.prompts, model)),
            name=name,
            path=request.path,
            model=model,
            stream=ask.stream,
            choices=ask.choices,
            reason=reason,
            max_tokens=output_tokens if ask.max_tokens is None else ask.max_tokens,
            fault=fault,
        )
        connection.work = job
        self._jobs[job] = None
        self._catch_up()
        now_s = max(self.now_s(), self._last_due_s)
        for prompt in ask.prompts:
            self._submit(job, prompt, output_tokens, ask, lora, now_s)
        if ask.stream:
            connection.open_stream()
        if engine.idle:
            engine.start(now_s, self._steps_to_chunk())
        self._arm()
        self._changed()

    def _submit(self, job: Job, prompt: bytes, output_tokens: int, ask: Ask, lora: str, now_s: float) -> None:
        block = self._parameters.block_tokens
        seed = xxh64_intdigest(ask.salt.encode(), xxh64_intdigest(lora.encode()))
        chain = self._hasher.hash(prompt, block, seed)
        start = xxh64_intdigest(
            prompt[len(chain) * block * tokens.TOKEN_BYTES :], chain[-1] if chain else seed
        )
        count = tokens.count(prompt)
        for choice in range(ask.choices):
            place = start + choice
            answer = partial(tokens.output, place, 0)

            def continuation(kv_tokens: int, answer: Callable[[int], bytes] = answer) -> list[int]:
                return tokens.continued_hashes(prompt, chain, answer(kv_tokens - count), block, seed)

            text = Text(prompt, answer, block, lora, ask.salt)
            sequence = EngineRequest(chain, count, output_tokens, continuation=continuation, content=text)
            output = Output(job, len(job.outputs), place, sequence)
            sequence.owner = output
            job.outputs.append(output)
            job.unfinished += 1
            self.engine.submit(sequence, now_s)

    def _lora(self, model: str | None) -> str:
        """The adapter a model name means, empty for the base model; ``Refused`` when it is not served."""
        if model is None or model in self.spec.models:
            return ""
        if model in self.loras:
            return model
        aliases = ", ".join((*self.spec.models, *self.loras))
        message = f"The model `{model}` does not exist. Valid aliases: {aliases}."
        raise Refused(404, message, "NotFoundError", "model")

    def check_model(self, model: str | None) -> None:
        """``Refused`` when ``model`` is not served here."""
        self._lora(model)

    def _over(self, job: Job, ending: str) -> None:
        """The job has ended: count it."""
        if not job.stalled:
            self._jobs.pop(job, None)
        requests = [output.request for output in job.outputs]
        usage = job.usage()
        arrived_s = requests[0].arrived_s
        first_s = [r.first_token_s for r in requests if math.isfinite(r.first_token_s)]
        record = LogRecord(
            id=job.id,
            path=job.path,
            model=job.model,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=sum(map(self.engine.generated, requests)),
            arrived_s=arrived_s,
            ttft_s=min(first_s) - arrived_s if first_s else None,
            duration_s=max(r.ended_s for r in requests) - arrived_s,
            ending=ending,
        )
        self.totals.add(record)
        self.log.append(record)
        self._changed()

    def _drop(self, job: Job, ending: str) -> None:
        """Forget a job that will not be answered."""
        self._catch_up()
        if job not in self._jobs:
            return
        del self._jobs[job]
        if not job.unfinished:  # complete, and held back by a stall
            return
        now_s = max(self.now_s(), self._last_due_s)
        for output in job.outputs:
            self._streams.pop(output.request, None)
            if self.engine.cancel(output.request, now_s):
                self.metrics.ended["abort"] += 1
        self._over(job, ending)
        self._arm()

    def _close_idle(self) -> None:
        """Close connections that nobody uses, once a second."""
        before_s = self._clock() - KEEP_ALIVE_S
        for connection in tuple(self._connections):
            if connection.idle and connection.idle_since_s < before_s:
                connection.transport.close()
        self._sweep = self._loop.call_later(1.0, self._close_idle)

    # for everybody

    def observed(self) -> Engine:
        """The engine, as it is at this moment."""
        self.engine.observe(self.now_s())
        return self.engine

    @property
    def state(self) -> EngineState:
        engine = self.observed()
        return EngineState(
            name=self.name,
            url=self.url,
            accelerator=self.spec.accelerator,
            models=self.spec.models,
            labels=self.spec.labels,
            up=self.up,
            speed=self.pace.speed,
            engine_s=self.now_s(),
            running=len(engine.running),
            waiting=len(engine.waiting),
            held=len(self._held),
            kv_usage=engine.kv_usage,
            kv_blocks=engine.kv.blocks,
            cached_blocks=engine.kv.cached_blocks,
            connections=len(self._connections),
            preemptions=engine.preemptions,
            log_length=len(self.log),
            faults=tuple(self.faults.active),
            lag=self.lag,
            **structs.asdict(self.totals),
        )

    async def until(self, condition: Callable[[EngineState], bool]) -> None:
        """Return once the state fulfils ``condition``. Looked at when a request arrives, begins or ends,
        a connection opens or closes, and the port does.
        """
        if condition(self.state):
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = condition
        try:
            await waiter
        finally:
            del self._waiters[waiter]

    def _changed(self) -> None:
        if not self._waiters:
            return
        state = self.state
        for waiter, condition in self._waiters.items():
            if not waiter.done() and condition(state):
                waiter.set_result(None)

    def loras_line(self) -> bytes:
        """The metrics page's line on adapters in use; empty where there are none."""
        if not self.loras:
            return b""
        running, waiting = (
            ",".join(sorted({o.job.model for o in map(_output, group)} & self.loras.keys()))
            for group in (self.engine.running, self.engine.waiting)
        )
        return (
            f'vllm:lora_requests_info{{max_lora="{self.spec.max_loras}",running_lora_adapters="{running}",'
            f'waiting_lora_adapters="{waiting}"}} {self._unix_s()!r}\n'
        ).encode()


def _output(request: EngineRequest) -> Output:
    assert isinstance(request.owner, Output)
    return request.owner
