"""The demonstration: a simulated three-vendor fleet behind three ways of choosing an endpoint.

The fleet is one process of ours, the router another, the load generator is here. Each policy meets a fresh
fleet with empty caches and the same requests, due at the same simulated times, in whose seconds all figures
are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import MappingProxyType

import msgspec

from pointsman.bench.client import Client, Target
from pointsman.bench.pace import Pace
from pointsman.bench.report import Slo, Stage
from pointsman.bench.run import Bench, Load, Progress, check_room
from pointsman.bench.site import Lag, Site, site, watching
from pointsman.bench.workloads import SharedPrefix
from pointsman.config import Log, MetricsSettings, Scheduling, Server, Settings
from pointsman.scheduling.presets import DEFAULT
from pointsman.sim.profiles import GRANITE, PARAMETERS
from pointsman.sim.spec import FleetFile, FleetItem
from pointsman.types import Clock

FLEET: Mapping[str, int] = MappingProxyType({"h100-nvl": 4, "mi325x": 8, "gaudi3": 8})
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
    preset: str = DEFAULT


POLICIES = (
    Policy("Kubernetes (random)", "random"),
    Policy("round robin", "round-robin"),
    Policy("Pointsman"),
)


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


def site_of(scenario: Scenario, policy: Policy, folder: Path) -> AbstractAsyncContextManager[Site]:
    """The scenario's fleet with a router of that policy."""
    fleet = FleetFile(
        engines=tuple(FleetItem(accelerator=name, count=n) for name, n in scenario.engines.items()),
        speed=scenario.speed,
        tokens_per_chunk=scenario.tokens_per_chunk,
    )
    settings = Settings(
        server=Server(endpoint_header=True),
        metrics=MetricsSettings(interval_s=0.05),
        scheduling=Scheduling(preset=policy.preset, seed=scenario.seed),
        log=Log(requests=False),
    )
    return site(fleet, settings, folder)


async def measure(
    scenario: Scenario,
    policy: Policy,
    at: Site,
    clocks: tuple[Clock, Clock],
    on_progress: Callable[[Progress], None],
) -> Measured:
    """One policy under the scenario's load. ``clocks``: seconds, and CPU seconds of this process."""
    check_room([scenario.load])
    pace = Pace(clocks[0], scenario.speed)
    client = Client(Target(url=at.url), pace)
    try:
        await client.find_model()
        bench = Bench(
            client, scenario.workload, pace, seed=scenario.seed, slo=scenario.slo, on_progress=on_progress
        )
        await bench.stage(scenario.warm_up)
        async with watching(at, clocks) as lags:
            await bench.stage(scenario.load)
    finally:
        await client.close()
    stage = bench.stages[-1]
    accelerators = Counter(dict.fromkeys(scenario.engines, 0))
    for endpoint, requests in stage.endpoints.items():
        accelerators[endpoint.rpartition("-")[0]] += requests
    return Measured(
        policy=policy.name,
        stage=stage,
        accelerators=dict(accelerators),
        lags=lags,
        step_s=scenario.step_s(),
    )
