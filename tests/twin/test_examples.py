"""The scenarios in examples/twin can be run, each shortened here, and do what their first line says."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs

from pointsman.twin.compare import Task, simulate
from pointsman.twin.policies import policy
from pointsman.twin.report import Figures
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import Scenario, load_scenario

FOLDER = Path(__file__).parents[2] / "examples" / "twin"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Scenario:
    return load_scenario(FOLDER / f"{name}.yaml")


def last_stage(scenario: Scenario) -> Figures:
    return simulate(Task(scenario=scenario, policy=policy("llm-d-blend"), seed=0)).stages[-1]


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs_and_says_what_it_is(name: str) -> None:
    scenario = load(name)
    short = tuple(structs.replace(load, duration_s=min(load.duration_s, 3.0)) for load in scenario.stages)
    found = last_stage(structs.replace(scenario, stages=short, incidents=()))
    assert found.ok == found.requests > 0
    assert (FOLDER / f"{name}.yaml").read_text().startswith("# ")


def test_the_folder_is_not_empty() -> None:
    assert len(EXAMPLES) >= 5


def test_the_bad_day_is_bad_while_it_lasts() -> None:
    (stage,) = Simulation(load("a-bad-day"), policy("least-request")).run()
    lost = [record for record in stage.records if record.error]
    assert {record.endpoint for record in lost} == {"h100-nvl-1"}
    assert min(record.sent_s for record in stage.records if record.endpoint == "spare") >= 60
    assert max(record.end_s for record in lost) == 40


def test_wrong_constants_are_wrong() -> None:
    parameters = {spec.accelerator: spec.parameters() for spec in load("wrong-constants").specs()}
    assert parameters["h100-nvl"].kv_tokens == round(363_000 * 0.7)
    assert all(each.variants is not None for each in parameters.values())


def test_each_class_has_its_own_limits() -> None:
    scenario = load("slo-classes")
    assert len({scenario.slo_of(name) for name in ("interactive", "standard", "batch")}) == 3
