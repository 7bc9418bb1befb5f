"""The demonstration: a simulated three-vendor fleet behind three ways of choosing an endpoint.

The fleet is one process of ours, the router another, the load generator is here. Each policy meets a fresh
fleet with empty caches and the same requests, due at the same simulated times, in whose seconds all figures
are.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec
import yaml

from pointsman.bench.busy import Watch
from pointsman.bench.client import Client, Target
from pointsman.bench.pace import Pace
from pointsman.bench.probe import Probe
from pointsman.bench.processes import Process, running
from pointsman.bench.report import Slo, Stage
from pointsman.bench.run import Bench, Load, Progress, check_room
from pointsman.bench.workload import SharedPrefix
from pointsman.sim.profiles import GRANITE, PARAMETERS
from pointsman.types import Clock

FLEET: Mapping[str, int] = MappingProxyType({"h100-nvl": 4, "mi325x": 8, "gaudi3": 8})
_READY_S = 30.0
_LAG_OF_STEP = 0.1
_BATCH, _CONTEXT_TOKENS = 40, 7700
"""Sequences an engine has at once in mid-run, and the tokens of each (6,000 + 1,200 + half of 1,000)."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated: the case study's pool, workload and rate, for fewer requests."""

    engines: Mapping[str, int] = FLEET
    workload: SharedPrefix = SharedPrefix(150, 5, 6000, 1200, 1000)
    warm_up: Load = Load(rate=15, duration_s=20)
    load: Load = Load(rate=85, duration_s=15)
    speed: float = 7.0
    """Simulated seconds in one of ours."""
    tokens_per_chunk: int = 50
    seed: int = 0
    slo: Slo = Slo(ttft_s=5.0, tpot_s=0.1)

    def step_s(self) -> float:
        """A decode step of the average engine in mid-run, in our seconds."""
        steps = [
            n * PARAMETERS[accelerator, GRANITE].step_s(_BATCH, _BATCH * _CONTEXT_TOKENS)
            for accelerator, n in self.engines.items()
        ]
        return sum(steps) / sum(self.engines.values()) / self.speed


class Policy(msgspec.Struct, frozen=True):
    """A way of choosing, and what the tables call it."""

    name: str
    preset: str = ""
    """Empty: what ``pointsman serve`` does by itself."""


POLICIES = (
    Policy("Kubernetes (random)", "random"),
    Policy("round robin", "round-robin"),
    Policy("Pointsman"),
)


class Lag(msgspec.Struct, frozen=True):
    """How late a process' event loop ran on average [our seconds], and its share of one core."""

    mean_s: float
    cpu_share: float


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One policy's run."""

    policy: str
    stage: Stage
    accelerators: Mapping[str, int]
    """Requests by accelerator."""
    lags: Mapping[str, Lag]
    """By process."""
    step_s: float

    def void(self) -> list[str]:
        """Why the figures must not be believed, if so: processes that did not keep up with simulated time."""
        return [
            f"{self.policy}: the {name} ran {lag.mean_s * 1000:.2f} ms late on average, more than a tenth of "
            f"a scaled step ({self.step_s * 1000:.1f} ms)"
            for name, lag in self.lags.items()
            if lag.mean_s > _LAG_OF_STEP * self.step_s
        ]


class Site(msgspec.Struct, frozen=True):
    """A fleet with a router in front of it, both running."""

    fleet: Process
    router: Process
    url: str
    admin_url: str
    engines: Mapping[str, str]
    """Accelerator of each engine by ``host:port``."""


@contextlib.asynccontextmanager
async def site(scenario: Scenario, policy: Policy, folder: Path) -> AsyncIterator[Site]:
    """Both processes for as long as the block lasts; ``folder`` is for their files."""
    async with contextlib.AsyncExitStack() as stack:
        items = [{"accelerator": name, "count": n} for name, n in scenario.engines.items()]
        file = folder / "fleet.yaml"
        file.write_text(yaml.safe_dump({"engines": items}))
        pace = ("--speed", str(scenario.speed), "--tokens-per-chunk", str(scenario.tokens_per_chunk))
        fleet = await stack.enter_async_context(running("fleet", ("engine", "--fleet", str(file), *pace)))
        engines = await _engines(fleet, scenario)
        settings = ["server.endpoint_header=true", "log.requests=false", "metrics.interval_s=0.05"]
        settings += [f"scheduling.seed={scenario.seed}"]
        settings += [f"scheduling.preset={policy.preset}"] if policy.preset else []
        urls = [f"http://{address}" for address in engines]
        router = await stack.enter_async_context(
            running(
                "router",
                (
                    *("serve", *urls, "--host", "127.0.0.1", "--port", "0", "--admin-port", "0"),
                    *(word for setting in settings for word in ("--set", setting)),
                ),
            )
        )
        url = (await router.says(r"^base URL: (\S+)/v1$", _READY_S))[1]
        admin_url = (await router.says(r"^admin:\s+(http://[^/\s]+)", _READY_S))[1]
        yield Site(fleet, router, url, admin_url, engines)


async def _engines(fleet: Process, scenario: Scenario) -> dict[str, str]:
    """Accelerator of each engine by ``host:port``, once the fleet has said where they are."""
    found = {}
    for accelerator, n in scenario.engines.items():
        for i in range(n):
            line = rf"\b{re.escape(accelerator)}-{i}\b.*?http://([\w.:]+)"
            found[(await fleet.says(line, _READY_S))[1]] = accelerator
    return found


async def measure(
    scenario: Scenario,
    policy: Policy,
    at: Site,
    clocks: tuple[Clock, Clock],
    on_progress: Callable[[Progress], None],
) -> Measured:
    """One policy under the scenario's load. ``clocks``: seconds, and CPU seconds of this process."""
    clock, cpu_clock = clocks
    check_room([scenario.load])
    pace = Pace(clock, scenario.speed)
    client = Client(Target(url=at.url), pace)
    others = {"fleet": at.fleet, "router": at.router}
    try:
        await client.find_model()
        bench = Bench(
            client, scenario.workload, pace, seed=scenario.seed, slo=scenario.slo, on_progress=on_progress
        )
        await bench.stage(scenario.warm_up)
        start_s, before = clock(), {name: process.cpu_s() for name, process in others.items()}
        async with (
            Watch(clock, cpu_clock) as watch,
            Probe(f"http://{next(iter(at.engines))}", "/health", clock) as fleet_probe,
            Probe(at.admin_url, "/healthz", clock) as router_probe,
        ):
            await bench.stage(scenario.load)
            busy = watch.busy()
        took_s = clock() - start_s
    finally:
        await client.close()
    waits_s = {"fleet": fleet_probe.lag_s(), "router": router_probe.lag_s()}
    lags = {
        name: Lag(waits_s[name], (process.cpu_s() - before[name]) / took_s)
        for name, process in others.items()
    }
    lags["load generator"] = Lag(min(waits_s.values()), busy.cpu_share)  # ours is in both
    stage = bench.stages[-1]
    accelerators = Counter(dict.fromkeys(scenario.engines, 0))
    for endpoint, requests in stage.endpoints.items():
        accelerators[at.engines[endpoint]] += requests
    return Measured(
        policy=policy.name,
        stage=stage,
        accelerators=dict(accelerators),
        lags=lags,
        step_s=scenario.step_s(),
    )
