"""One run: a scenario under a policy, from an empty fleet to the last answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import msgspec
from msgspec import structs

from pointsman.bench.pace import due_times
from pointsman.bench.run import Load
from pointsman.bench.workloads import Call
from pointsman.config import Endpoint as EndpointSettings
from pointsman.endpoints.target import targets_of
from pointsman.errors import SettingsError
from pointsman.predictor.speed import SAMPLE_S
from pointsman.router import Observer
from pointsman.sim.spec import EngineSpec
from pointsman.twin.events import Events
from pointsman.twin.gateway import Gateway, Served
from pointsman.twin.kv_events import Publishing, Wires
from pointsman.twin.policies import Policy
from pointsman.twin.prompts import Prompts
from pointsman.twin.routers import build
from pointsman.twin.scenario import Incident, Scenario
from pointsman.twin.scraping import Scraping
from pointsman.twin.server import ModelServer

WATCH_S = 5.0
Hopeless = Callable[[Sequence[Served], Sequence[Served], float], bool]
"""Asked every ``WATCH_S`` of a stage whether to break it off: the records of the requests that have ended,
those of requests under way as far as they are, the time.
"""


class ServerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What one server did in a stage."""

    name: str
    accelerator: str
    output_tokens: int
    """Of requests that ended well in the stage."""
    prompt_tokens: int
    """Looked up in its prefix cache; ``cached_tokens`` of them were there."""
    cached_tokens: int
    preemptions: int
    refused: int
    kv_usage_mean: float
    kv_usage_max: float
    """As scraped while it had requests."""
    price_per_hour: float = 0.0
    watts: float = 0.0
    """As the scenario says; 0.0 where it does not."""


class StageRun(msgspec.Struct, frozen=True, kw_only=True):
    """One stage as it went."""

    load: Load
    start_s: float
    end_s: float
    records: list[Served]
    """In the order in which they ended."""
    servers: tuple[ServerFigures, ...]


class Simulation:
    """Builds what ``pointsman serve`` builds, around simulated servers. ``run`` is its whole life.

    Everything depends on scenario, policy and ``seed`` alone: equal runs are equal to the last bit.
    """

    def __init__(
        self,
        scenario: Scenario,
        policy: Policy,
        *,
        seed: int = 0,
        observers: tuple[Observer, ...] = (),
        dice: random.Random | None = None,
    ) -> None:
        """``dice`` are the policy's (of the first router); by default its own ones of ``seed``."""
        self.scenario = scenario
        self.events = events = Events()
        specs = [structs.replace(spec, seed=spec.seed + seed) for spec in scenario.specs()]
        late = {i.endpoint for i in scenario.incidents if i.kind == "join"}
        told = scenario.kv_events
        dice_of_events = random.Random(f"kv events {seed}")
        publishing = {s.name: Publishing(s, told, events, dice_of_events) for s in specs if told}
        self.servers = {spec.name: ModelServer(spec, events, publishing.get(spec.name)) for spec in specs}
        routers = scenario.routers
        several = [random.Random(f"policy {seed} {i}") for i in range(1, routers.replicas)]
        self.replicas = build(
            routers,
            policy,
            events,
            observers,
            [dice or random.Random(f"policy {seed}"), *several],
            scenario.prefix_block_tokens,
            Wires(publishing, told, events) if told else None,
        )
        first = self.replicas[0]
        self.pool, self.router, self.scheduler = first.pool, first.router, first.scheduler
        pools = [replica.pool for replica in self.replicas]
        self.scraping = Scraping(events, pools, self.servers, scenario.metrics_interval_s, routers.view_s)
        self.gateway = Gateway(
            events,
            self.replicas,
            self.servers,
            Prompts(specs[0].models[0], tokenized=told is not None),
            scenario.router,
            scenario.timeout_s,
            routers,
            random.Random(f"routers {seed}"),
        )
        for spec in specs:
            if spec.name not in late:
                self._join(spec)
        if routers.replicas > 1:
            events.at(SAMPLE_S, self._watch_metrics)
        for incident in scenario.incidents:
            events.at(incident.at_s, self._happens, incident)
        self._calls: Iterator[Call] = scenario.workload.calls(seed)
        self._arrivals = random.Random(f"arrivals {seed}")

    def run(self, on_stage: Callable[[StageRun], None] = lambda _: None) -> list[StageRun]:
        """All stages, one after the other has ended; those of the warm-up first."""
        runs = []
        for load in self.scenario.stages:
            runs.append(self.stage(load))
            on_stage(runs[-1])
        return runs

    def stage(self, load: Load, hopeless: Hopeless | None = None) -> StageRun:
        """One stage, until all of it has ended or it is broken off, after which nothing more can be run."""
        start_s = self.events.now_s
        before = {name: _counters(server) for name, server in self.servers.items()}
        self.scraping.begin()
        decided_at_once = self.gateway.cpu.free and not self.scenario.incidents
        on_sent = self.scraping.slacken if decided_at_once else lambda: None
        stage = _Stage(self.gateway, self.events, load, self._calls, self._arrivals, on_sent)
        if hopeless is not None:
            self._watch(stage, hopeless)
        self.events.run_until(lambda: stage.over)
        self.scraping.end()
        if not stage.sent:
            raise SettingsError(f"stages: {load.name}: the workload had no calls left; give it fewer stages")
        figures = tuple(self._figures(server, before[name]) for name, server in self.servers.items())
        return StageRun(
            load=load, start_s=start_s, end_s=self.events.now_s, records=stage.records, servers=figures
        )

    def _watch(self, stage: _Stage, hopeless: Hopeless) -> None:
        if stage.over:
            return
        if hopeless(stage.records, self.gateway.under_way(), self.events.now_s):
            stage.stop()
        else:
            self.events.at(self.events.now_s + WATCH_S, self._watch, stage, hopeless)

    def _figures(self, server: ModelServer, before: tuple[int, ...]) -> ServerFigures:
        output, prompt, cached, preempted, refused = (
            now - then for now, then in zip(_counters(server), before, strict=True)
        )
        mean, most = self.scraping.kv_usage(server.name)
        return ServerFigures(
            name=server.name,
            accelerator=server.spec.accelerator,
            output_tokens=output,
            prompt_tokens=prompt,
            cached_tokens=cached,
            preemptions=preempted,
            refused=refused,
            kv_usage_mean=mean,
            kv_usage_max=most,
            price_per_hour=server.spec.price_per_hour,
            watts=server.spec.watts,
        )

    def _watch_metrics(self) -> None:
        """Routers that share a fleet decide seldom, and learn from metrics meanwhile."""
        for replica in self.replicas:
            busy = [m.endpoint for m in replica.pool.members.values() if m.endpoint.metrics.running]
            if busy:
                replica.scheduler.watch(replica.pool.candidates(""))
        self.events.at(self.events.now_s + SAMPLE_S, self._watch_metrics)

    # the fleet

    def _join(self, spec: EngineSpec) -> None:
        settings = EndpointSettings(
            url=f"http://{spec.name}:8000",
            name=spec.name,
            labels=spec.labels,
            weight=spec.weight,
            price_per_hour=spec.price_per_hour,
            watts=spec.watts,
        )
        (target,) = targets_of(settings)
        for replica in self.replicas:
            replica.pool.add(target, "scenario")
            replica.pool.learn_models(spec.name, [{"id": model} for model in (*spec.models, *spec.loras)])
        self.scraping.read(spec.name)

    def _happens(self, incident: Incident) -> None:
        server = self.servers[incident.endpoint]
        if incident.kind == "join":
            self._join(server.spec)
        elif incident.kind == "leave":
            for replica in self.replicas:
                replica.pool.drain(server.name)
        elif incident.kind == "slow":
            server.slow_down(incident.factor)
            if incident.for_s:
                self.events.at(self.events.now_s + incident.for_s, server.slow_down, 1.0)
        else:
            server.crash()
            if incident.for_s:
                self.events.at(self.events.now_s + incident.for_s, server.come_back)


class _Stage:
    """Sends what a stage asks for and collects the records."""

    def __init__(
        self,
        gateway: Gateway,
        events: Events,
        load: Load,
        calls: Iterator[Call],
        rng: random.Random,
        on_sent: Callable[[], None],
    ) -> None:
        """``on_sent`` is called when the last call of an open loop has been sent and none will follow."""
        self._gateway = gateway
        self._events = events
        self._load = load
        self._calls = calls
        self._start_s = events.now_s
        self._pending = 0
        """Calls that are due or under way."""
        self._sending = True
        self._follows = False
        self._on_sent = on_sent
        self._stopped = False
        self.records: list[Served] = []
        if load.concurrency:
            self._left = load.requests or -1
            self._fill(load.concurrency)
            self._sending = False
            return
        self._due = self._due_times(rng)
        self._arrive()

    @property
    def over(self) -> bool:
        return self._stopped or not (self._pending or self._sending)

    @property
    def sent(self) -> int:
        """Calls so far."""
        return len(self.records) + self._pending

    def stop(self) -> None:
        """What is under way is of no interest any more."""
        self._stopped = True

    def _due_times(self, rng: random.Random) -> Iterator[tuple[float, Call]]:
        load, start_s = self._load, self._start_s
        if load.rate is None:
            for call in islice(self._calls, load.requests):
                yield start_s + (call.at_s or 0.0), call
            return
        count = load.requests or max(1, round(load.rate * load.duration_s))
        due = due_times(load.arrivals, rng, load.rate, count)
        for at_s, call in zip(due, self._calls, strict=False):  # a trace ends
            yield start_s + at_s, call

    def _arrive(self) -> None:
        """Let the next call of the open loop be sent when it is due."""
        due = next(self._due, None)
        if due is None:
            self._sending = False
            return
        self._events.at(due[0], self._send_and_go_on, due[1])

    def _send_and_go_on(self, call: Call) -> None:
        self._arrive()
        self._send(call)
        self._follows = self._follows or call.then is not None
        if not (self._sending or self._follows):
            self._on_sent()

    def _send(self, call: Call) -> None:
        self._pending += 1
        self._gateway.send(call, self._ended)

    def _ended(self, call: Call, record: Served) -> None:
        self._pending -= 1
        self.records.append(record)
        if call.then is not None and not record.error:
            for think_s, following in call.then():
                self._pending += 1
                self._events.at(self._events.now_s + think_s, self._follow, following)
        if self._load.concurrency:
            self._fill(self._load.concurrency)

    def _follow(self, call: Call) -> None:
        self._pending -= 1
        self._send(call)

    def _fill(self, concurrency: int) -> None:
        """Closed loop: new calls take the places that are free. What follows from a call keeps its place."""
        over = self._events.now_s >= self._start_s + self._load.duration_s
        while self._pending < concurrency and self._left and not over:
            call = next(self._calls, None)
            if call is None:
                return
            self._left -= 1
            self._pending += 1
            self._events.at(self._events.now_s, self._follow, call)


def _counters(server: ModelServer) -> tuple[int, ...]:
    return (server.served_tokens, *server.counted, server.refused)
