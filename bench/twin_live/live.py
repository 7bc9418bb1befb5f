"""A case over HTTP: fleet, router and load generator are three processes."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import msgspec

from pointsman.bench.client import Client, Target
from pointsman.bench.pace import Pace
from pointsman.bench.report import Stage
from pointsman.bench.run import Bench
from pointsman.bench.site import Lag, site, watching
from pointsman.config import Log, MetricsSettings, Scheduling, Server, Settings
from pointsman.sim.spec import FleetFile
from pointsman.twin.policies import policy
from pointsman.twin.scraping import IDLE_INTERVAL_S

from .cases import Case

CLOCKS = time.perf_counter, time.process_time


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """The last stage as the clients saw it [engine seconds], and how late each process ran [our seconds]."""

    stage: Stage
    lags: dict[str, Lag]


def fleet_of(case: Case) -> FleetFile:
    return FleetFile(engines=case.scenario.engines, speed=case.speed, tokens_per_chunk=case.tokens_per_chunk)


def settings_of(case: Case, policy_name: str, seed: int) -> Settings:
    """The router's, whose clock runs in engine seconds, too."""
    return Settings(
        server=Server(endpoint_header=True),
        metrics=MetricsSettings(interval_s=case.scenario.metrics_interval_s, idle_interval_s=IDLE_INTERVAL_S),
        scheduling=Scheduling(preset=policy(policy_name).preset, seed=seed),
        log=Log(requests=False),
    )


async def run(case: Case, policy_name: str, seed: int, folder: Path) -> Live:
    """All stages one after the other; the load generator is this process."""
    scenario = case.scenario
    gc.collect()  # what simulations left behind: collected in mid-run it makes requests late
    gc.freeze()
    pace = Pace(CLOCKS[0], case.speed)
    async with site(fleet_of(case), settings_of(case, policy_name, seed), folder) as at:
        client = Client(Target(url=at.url, timeout_s=scenario.timeout_s), pace)
        try:
            await client.find_model()
            bench = Bench(client, scenario.workload, pace, seed=seed)
            *before, last = scenario.stages
            for load in before:
                await bench.stage(load)
            async with watching(at, CLOCKS) as lags:
                await bench.stage(last)
        finally:
            await client.close()
    return Live(stage=bench.stages[-1], lags=lags)
