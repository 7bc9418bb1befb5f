"""The demonstration: a simulated three-vendor fleet behind four ways of choosing an endpoint.

The fleet is one process of ours, the router another, the load generator is here. Each policy meets a fresh
fleet with empty caches and the same requests, due at the same simulated times, in whose seconds all figures
are; the router's clock counts them, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import MappingProxyType

import msgspec

from pointsman.bench.client import Client, Target
from pointsman.bench.connection import Connections
from pointsman.bench.pace import Pace
from pointsman.bench.report import Slo, Stage
from pointsman.bench.run import Bench, Load, Progress, check_room
from pointsman.bench.site import Lag, Site, site, watching
from pointsman.bench.workloads import SharedPrefix
from pointsman.config import Log, MetricsSettings, Scheduling, Server, Settings, split_url
from pointsman.predictor.learned import Learned
from pointsman.scheduling.presets import DEFAULT
from pointsman.sim.profiles import GRANITE, PARAMETERS
from pointsman.sim.spec import FleetFile, FleetItem
from pointsman.types import Clock

FLEET: Mapping[str, int] = MappingProxyType({"h100-nvl": 4, "mi325x": 8, "gaudi3": 8})
_LAG_OF_STEP = 0.1
_METRICS_S = 0.05
"""Between two looks at an engine's metrics, in our seconds."""
BATCH = 40
"""Sequences an engine has at once in mid-run."""
CONTEXT_TOKENS = BATCH * 7700
"""And their tokens: each 6,000 + 1,200 + half of 1,000."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated: the case study's pool, workload and rate, for fewer requests."""

    engines: Mapping[str, int] = FLEET
    workload: SharedPrefix = SharedPrefix(150, 5, 6000, 1200, 1000)
    warm_up: Load = Load(rate=15, duration_s=30)
    load: Load = Load(rate=85, duration_s=10)
    speed: float = 7.0
    """Simulated seconds in one of ours."""
    tokens_per_chunk: int = 50
    seed: int = 0
    slo: Slo = Slo(ttft_s=5.0, tpot_s=0.1)

    def steps_s(self) -> Mapping[str, float]:
        """A decode step in mid-run by accelerator, in simulated seconds."""
        return {name: PARAMETERS[name, GRANITE].step_s(BATCH, CONTEXT_TOKENS) for name in self.engines}

    def step_s(self) -> float:
        """A decode step of the average engine in mid-run, in our seconds."""
        steps = [n * self.steps_s()[accelerator] for accelerator, n in self.engines.items()]
        return sum(steps) / sum(self.engines.values()) / self.speed


class Policy(msgspec.Struct, frozen=True):
    """A way of choosing, and what the tables call it."""

    name: str
    preset: str = DEFAULT


POLICIES = (
    Policy("Kubernetes (random)", "random"),
    Policy("round robin", "round-robin"),
    Policy("llm-d's blend", "llm-d-blend"),
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
    learned: Mapping[str, float] = {}
    """A decode step in mid-run by accelerator, as the policy believes it to be; empty where it learns nothing
    [simulated seconds].
    """

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
        metrics=MetricsSettings(interval_s=_METRICS_S * scenario.speed),
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
        learned = await _learned(at)
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
        learned=learned,
    )


async def _learned(at: Site) -> dict[str, float]:
    """What the router's admin API says, a mean for each accelerator."""
    address = split_url(at.admin_url, "admin")
    connections = Connections(address, None)
    pieces: list[bytes] = []
    request = f"GET /endpoints HTTP/1.1\r\nHost: {address.authority}\r\n\r\n".encode()
    try:
        await connections.exchange(request, pieces.append)
    finally:
        await connections.close()
    steps_s: dict[str, list[float]] = {}
    for endpoint in msgspec.json.decode(b"".join(pieces), type=_Endpoints).endpoints:
        if endpoint.learned:
            step_s = endpoint.learned.step_at_s(BATCH, CONTEXT_TOKENS)
            steps_s.setdefault(endpoint.name.rpartition("-")[0], []).append(step_s)
    return {accelerator: sum(found) / len(found) for accelerator, found in steps_s.items()}


class _Endpoint(msgspec.Struct):
    name: str
    learned: Learned | None


class _Endpoints(msgspec.Struct):
    endpoints: list[_Endpoint]
