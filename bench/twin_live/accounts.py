"""The same requests one at a time, in the twin and over HTTP: every count must be equal.

Caches hold a few prompts only, so blocks are evicted; some prompts come often. Nothing depends on time, so
the engines may be fast.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import msgspec
from msgspec import structs

from pointsman.bench.client import Client, Record, Target
from pointsman.bench.pace import Pace
from pointsman.bench.run import Load
from pointsman.bench.site import site
from pointsman.sim.spec import FleetItem
from pointsman.twin.policies import policy
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import THREE_VENDORS, Scenario

from .cases import Case, prompts
from .live import CLOCKS, fleet_of, settings_of

REQUESTS = 150
CASE = Case(
    name="accounts",
    says="2 H100-NVL, 2 MI325X, 2 Gaudi3 with room for 40,960 tokens each, one request at a time",
    scenario=Scenario(
        engines=tuple(
            FleetItem(accelerator=item.accelerator, count=2, kv_tokens=40_960) for item in THREE_VENDORS
        ),
        workload=structs.replace(prompts(12, 5, 100), zipf=1.0),
        stages=(Load(concurrency=1, requests=REQUESTS, duration_s=1e6),),
        warm_up_stages=0,
    ),
    speed=100.0,
    policies=("round-robin",),
)


class Account(msgspec.Struct, frozen=True):
    """Of one request: where it went, and the tokens that were counted there."""

    endpoint: str
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None


class Accounts(msgspec.Struct, frozen=True, kw_only=True):
    """One a request, in the order in which they were sent."""

    twin: list[Account]
    live: list[Account]

    @property
    def differ(self) -> list[int]:
        """Requests that were counted differently, by index."""
        return [i for i, (a, b) in enumerate(zip(self.twin, self.live, strict=True)) if a != b]


def twin(seed: int) -> list[Account]:
    (stage,) = Simulation(CASE.scenario, policy(CASE.policies[0]), seed=seed).run()
    return [_account(record) for record in stage.records]


async def live(seed: int, folder: Path) -> list[Account]:
    pace = Pace(CLOCKS[0], CASE.speed)
    async with site(fleet_of(CASE), settings_of(CASE, CASE.policies[0], seed), folder) as at:
        client = Client(Target(url=at.url), pace)
        try:
            await client.find_model()
            calls = islice(CASE.scenario.workload.calls(seed), REQUESTS)
            return [_account(await client.send(call, pace.now())) for call in calls]
        finally:
            await client.close()


async def compare(seed: int, folder: Path) -> Accounts:
    return Accounts(twin=twin(seed), live=await live(seed, folder))


def _account(record: Record) -> Account:
    usage = record.usage
    return Account(record.endpoint, usage.prompt_tokens, usage.cached_tokens, usage.output_tokens)
