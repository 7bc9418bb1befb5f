"""Endpoints that become slow and recover while everybody is busy."""

from __future__ import annotations

import logging

import pytest

from pointsman.bench.run import Load
from pointsman.bench.workloads import SharedPrefix
from pointsman.sim.spec import FleetItem
from pointsman.twin.policies import policy
from pointsman.twin.run import Simulation, StageRun
from pointsman.twin.scenario import Incident, Scenario

SIBLINGS = (FleetItem(accelerator="mi325x", name="m", count=4),)
KINDS = (
    FleetItem(accelerator="mi325x", name="m"),
    FleetItem(accelerator="h100-nvl", name="h", count=2),
    FleetItem(accelerator="gaudi3", name="g", count=2),
)


def run(engines: tuple[FleetItem, ...], incident: Incident, load: Load, output_tokens: int) -> StageRun:
    scenario = Scenario(
        engines=engines,
        workload=SharedPrefix(24, 5, 3000, 300, output_tokens),
        stages=(load,),
        warm_up_stages=0,
        incidents=(incident,),
    )
    (stage,) = Simulation(scenario, policy("least-cost")).run()
    return stage


def share(stage: StageRun, name: str, from_s: float, to_s: float) -> float:
    """Of the requests that were sent in this time."""
    sent = [record.endpoint for record in stage.records if from_s <= record.sent_s < to_s]
    assert len(sent) > 30
    return sent.count(name) / len(sent)


@pytest.mark.parametrize(
    ("engines", "name", "rate"), [(SIBLINGS, "m-0", 20.0), (KINDS, "m", 15.0)], ids=["siblings", "alone"]
)
def test_an_endpoint_that_was_throttled_gets_its_share_back(
    engines: tuple[FleetItem, ...], name: str, rate: float
) -> None:
    incident = Incident(at_s=60, kind="slow", endpoint=name, factor=5, for_s=40)
    stage = run(engines, incident, Load(rate=rate, duration_s=180), 200)
    before = share(stage, name, 30, 60)
    assert before > 0.2
    assert share(stage, name, 70, 100) < 0.05, "it is left alone, but for those that try it"
    assert share(stage, name, 160, 180) > 0.7 * before


def test_a_throttle_is_noticed_while_long_answers_run(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pointsman.predictor.drift")
    logged_s: list[float] = []
    incident = Incident(at_s=100, kind="slow", endpoint="m-0", factor=2)
    scenario = Scenario(
        engines=SIBLINGS,
        workload=SharedPrefix(24, 5, 3000, 300, 4000),
        stages=(Load(rate=4, duration_s=125),),
        warm_up_stages=0,
        incidents=(incident,),
    )
    simulation = Simulation(scenario, policy("least-cost"))

    def look() -> None:
        if not logged_s and any("m-0" in record.getMessage() for record in caplog.records):
            logged_s.append(simulation.events.now_s)
        simulation.events.at(simulation.events.now_s + 0.5, look)

    simulation.events.at(0.5, look)
    (stage,) = simulation.run()
    assert 100 < logged_s[0] <= 115
    assert share(stage, "m-0", 70, 100) > 0.15
    assert share(stage, "m-0", 115, 125) < 0.05
