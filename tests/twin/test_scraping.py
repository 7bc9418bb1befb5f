"""Metrics are read as often as decisions need them."""

from __future__ import annotations

import pytest

from pointsman.bench.run import Load
from pointsman.bench.workloads import SharedPrefix
from pointsman.sim.spec import FleetItem
from pointsman.twin.gateway import RouterCost
from pointsman.twin.policies import policy
from pointsman.twin.run import Simulation, StageRun
from pointsman.twin.scenario import Scenario
from pointsman.twin.scraping import Scraping


class Counting(Scraping):
    """Scraping that counts."""

    reads = 0

    def read(self, name: str) -> None:
        self.reads += 1
        super().read(name)


def run(router: RouterCost) -> tuple[list[StageRun], int]:
    """Two stages that take long to drain, and how often metrics were read."""
    scenario = Scenario(
        engines=(FleetItem(accelerator="h100-nvl", count=2), FleetItem(accelerator="gaudi3")),
        workload=SharedPrefix(4, 2, 500, 100, 400),
        stages=(Load(rate=5, duration_s=2), Load(rate=10, duration_s=2)),
        warm_up_stages=0,
        router=router,
    )
    run = Simulation(scenario, policy("llm-d-blend"))
    run.scraping = counting = Counting(run.events, [run.pool], run.servers, scenario.metrics_interval_s)
    return run.run(), counting.reads


def test_a_stage_that_only_drains_is_read_seldom_and_nothing_comes_out_otherwise() -> None:
    """A router that takes a moment may still decide when all has been sent, so there nothing is saved."""
    seldom, few = run(RouterCost())
    often, many = run(RouterCost(delay_s=1e-9))
    assert few < 0.6 * many
    for one, other in zip(seldom, often, strict=True):
        assert [r.endpoint for r in one.records] == [r.endpoint for r in other.records]
        assert one.end_s == pytest.approx(other.end_s)
        for server, same in zip(one.servers, other.servers, strict=True):
            assert server.kv_usage_mean == pytest.approx(same.kv_usage_mean, rel=0.1)
