"""What a scenario file may say, and what of it is the user's mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pointsman.bench.report import Slo
from pointsman.bench.workloads import Agents, SharedPrefix
from pointsman.errors import SettingsError
from pointsman.twin.policies import policy
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import Scenario, load_scenario


def write(folder: Path, text: str) -> str:
    path = folder / "scenario.yaml"
    path.write_text(text)
    return str(path)


def trace(folder: Path, requests: int) -> str:
    """A request a second, of 100 tokens in and 10 out."""
    path = folder / "trace.jsonl"
    lines = [{"timestamp": 1000 * i, "input_length": 100, "output_length": 10} for i in range(requests)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_without_a_file_it_is_the_case_study() -> None:
    assert load_scenario() == Scenario()
    assert len(load_scenario().specs()) == 20


def test_a_file_says_what_differs_and_overrides_reach_into_it(tmp_path: Path) -> None:
    path = write(tmp_path, "engines: [{accelerator: gaudi3, count: 3}]\nslo: {ttft_s: 1}\n")
    found = load_scenario(path, ["engines.0.count=5", "workload.groups=7", "slo.tpot_s=0.2"])
    assert [spec.accelerator for spec in found.specs()] == ["gaudi3"] * 5
    assert found.workload == Scenario().workload.__class__(7, 5, 6000, 1200, 1000)
    assert found.slo == Slo(1.0, 0.2)
    assert found.stages == Scenario().stages


def test_a_trace_has_its_own_times_and_may_be_sent_at_a_rate(tmp_path: Path) -> None:
    workload = f"engines: [{{}}]\nwarm_up_stages: 0\nworkload: {{kind: trace, path: {trace(tmp_path, 5)}}}\n"
    recorded = load_scenario(write(tmp_path, workload + "stages: [{}]"))
    (stage,) = Simulation(recorded, policy("random")).run()
    assert [round(record.sent_s) for record in stage.records] == [0, 1, 2, 3, 4]
    quick = load_scenario(write(tmp_path, workload + "stages: [{rate: 100, requests: 20}]"))
    (stage,) = Simulation(quick, policy("random")).run()
    assert len(stage.records) == 5
    assert max(record.sent_s for record in stage.records) < 1


def test_a_trace_goes_on_in_the_next_stage_and_a_stage_without_calls_is_a_mistake(tmp_path: Path) -> None:
    workload = f"engines: [{{}}]\nwarm_up_stages: 0\nworkload: {{kind: trace, path: {trace(tmp_path, 5)}}}\n"
    stages = "stages: [{rate: 100, requests: 2}, {rate: 100, requests: 9}"
    two = load_scenario(write(tmp_path, workload + stages + "]"))
    assert [len(stage.records) for stage in Simulation(two, policy("random")).run()] == [2, 3]
    three = load_scenario(write(tmp_path, workload + stages + ", {rate: 7}]"))
    with pytest.raises(SettingsError, match="rate 7: the workload had no calls left"):
        Simulation(three, policy("random")).run()


def test_classes_of_the_workload_have_the_limits_it_promises_unless_the_file_says_otherwise() -> None:
    found = load_scenario(None, ["workload={kind: slo-classes}", "classes={batch: {ttft_s: 9}}"])
    assert found.slo_of("interactive") == Slo(1.0, 0.1)
    assert found.slo_of("batch") == Slo(9.0)
    assert found.slo_of("") == found.slo


def test_another_kind_of_workload_takes_the_place_of_the_usual_one(tmp_path: Path) -> None:
    found = load_scenario(None, ["workload.kind=agents", "workload.branches=3"])
    assert isinstance(found.workload, Agents)
    assert found.workload.branches == 3
    path = tmp_path / "s.yaml"
    path.write_text("workload: {groups: 9}")
    usual = load_scenario(path).workload
    assert isinstance(usual, SharedPrefix)
    assert usual.groups == 9
