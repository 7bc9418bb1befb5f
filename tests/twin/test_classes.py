"""Classes and objectives in the twin: promises that class-blind routing breaks are kept, and money is
saved.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from msgspec import structs

from pointsman.bench.run import Load
from pointsman.bench.workloads import SloClasses
from pointsman.sim.spec import FleetItem
from pointsman.twin.compare import Task, simulate
from pointsman.twin.policies import Policy, policy
from pointsman.twin.report import Figures
from pointsman.twin.scenario import Scenario, load_scenario

EXAMPLE = Path(__file__).parents[2] / "examples" / "twin" / "classes.yaml"
BLIND = "least-cost"
TOLD = 'least-cost:least-cost-picker.classes={"background":{"background":true}}'


def last(scenario: Scenario, how: Policy) -> Figures:
    return simulate(Task(scenario=scenario, policy=how, seed=0)).stages[-1]


@cache
def example(name: str) -> Figures:
    scenario = load_scenario(EXAMPLE)
    first, second = scenario.stages
    return last(
        structs.replace(scenario, stages=(structs.replace(first, duration_s=40), second)), policy(name)
    )


def test_a_promise_that_class_blind_routing_breaks_is_kept() -> None:
    assert example(BLIND).classes["interactive"].within_slo < 0.5
    assert example(TOLD).classes["interactive"].within_slo >= 0.99


def test_background_work_gets_about_as_much_done() -> None:
    blind, told = example(BLIND), example(TOLD)
    assert told.ok == told.requests
    assert told.classes["background"].output_tok_s >= 0.96 * blind.classes["background"].output_tok_s


def test_background_work_takes_the_slow_accelerators_and_leaves_the_quick_ones() -> None:
    blind, told = example(BLIND).classes, example(TOLD).classes
    assert told["interactive"].request_shares["gaudi3"] < 0.05
    assert told["background"].request_shares["gaudi3"] > 1.2 * blind["background"].request_shares["gaudi3"]


@cache
def priced(objective: str) -> Figures:
    engines = (
        FleetItem(accelerator="mi325x", count=2, price_per_hour=4.0, watts=1000),
        FleetItem(accelerator="gaudi3", count=2, price_per_hour=1.0, watts=900),
    )
    stages = (Load(rate=4, duration_s=30), Load(rate=4, duration_s=40))
    workload = SloClasses(parts=(structs.replace(SloClasses().used[0], ttft_s=2.0, tpot_s=0.06),))
    how = policy(f'least-cost:least-cost-picker.objective="{objective}"')
    return last(Scenario(engines=engines, workload=workload, stages=stages), how)


@pytest.mark.parametrize(
    ("objective", "figure"), [("price", "working_tokens_per_unit"), ("energy", "working_tokens_per_kwh")]
)
def test_tokens_cost_less_where_that_is_the_objective_and_promises_are_kept(
    objective: str, figure: str
) -> None:
    by_seconds, by_it = priced("seconds"), priced(objective)
    assert getattr(by_it, figure) > 1.2 * getattr(by_seconds, figure)
    assert by_it.within_slo is not None
    assert by_it.within_slo >= 0.98
