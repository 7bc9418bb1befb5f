"""What is learned of endpoints, against simulated engines whose constants are known."""

from __future__ import annotations

import pytest

from pointsman.bench.run import Load
from pointsman.bench.workloads import SharedPrefix
from pointsman.predictor.speed import Speeds
from pointsman.router import Flight
from pointsman.scheduling.pickers.least_cost import LeastCost
from pointsman.sim.profiles import GRANITE, PARAMETERS
from pointsman.sim.spec import FleetItem
from pointsman.testing import fleet, request
from pointsman.twin.policies import policy
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import Incident, Scenario
from pointsman.types import Decision

KINDS = ("h100-nvl", "mi325x", "gaudi3")
FLEET = tuple(FleetItem(accelerator=kind, name=kind) for kind in KINDS)


def speeds_of(simulation: Simulation) -> Speeds:
    (picker,) = [p for p in simulation.router._scheduler.plugins if isinstance(p, LeastCost)]
    return picker._costs.speeds


def run(**changes: object) -> Simulation:
    workload = SharedPrefix(12, 5, 6000, 200, 600)
    stages = (Load(rate=6, duration_s=60),)
    scenario = Scenario(engines=FLEET, workload=workload, stages=stages, warm_up_stages=0)
    fields = {f: getattr(scenario, f) for f in scenario.__struct_fields__} | changes
    simulation = Simulation(Scenario(**fields), policy("least-cost"))
    simulation.run()
    return simulation


def test_it_learns_how_long_steps_and_prompts_take() -> None:
    simulation = run()
    speeds = speeds_of(simulation)
    for member in simulation.pool.members.values():
        endpoint = member.endpoint
        true = PARAMETERS[endpoint.name, GRANITE]
        speed = speeds.by_slot[endpoint.slot]
        for n in (15, 40):
            assert speed.step_s(n, n * 6500) == pytest.approx(true.step_s(n, n * 6500), rel=0.25), (
                n,
                endpoint,
            )
        assert 1 / speeds.token_s(endpoint.slot) == pytest.approx(true.prefill_tokens_per_s, rel=0.5)


def test_names_do_not_matter() -> None:
    renamed = tuple(FleetItem(accelerator=kind, name=f"x{i}") for i, kind in enumerate(KINDS))
    by_slot = []
    for engines in (FLEET, renamed):
        simulation = run(engines=engines)
        by_slot.append({slot: s.step_s(30, 200_000) for slot, s in speeds_of(simulation).by_slot.items()})
    assert by_slot[0] == by_slot[1]


def test_siblings_share_what_is_learned_and_a_throttled_one_splits_off() -> None:
    engines = (FleetItem(accelerator="mi325x", name="a", count=4),)
    slow = Incident(at_s=20.0, kind="slow", endpoint="a-2", factor=2.0)
    simulation = run(engines=engines, incidents=(slow,))
    speeds = speeds_of(simulation)
    kinds = {id(speed.kind) for speed in speeds.by_slot.values()}
    assert len(kinds) == 1
    scales = {
        m.endpoint.name: speeds.by_slot[m.endpoint.slot].scale for m in simulation.pool.members.values()
    }
    usual = [scale for name, scale in scales.items() if name != "a-2"]
    assert max(usual) / min(usual) < 1.3
    assert scales["a-2"] / max(usual) > 1.3


def test_without_counters_of_the_engine_the_bytes_of_our_streams_tell() -> None:
    slow, fast = fleet(requests=[10, 10])
    speeds = Speeds()
    for tick in range(200):
        speeds.refresh([slow, fast], tick * 0.25, [10_000.0, 10_000.0])
        slow.load.received_bytes += 10 * 5 * 220  # five steps in a quarter of a second
        fast.load.received_bytes += 10 * 25 * 220
    assert speeds.by_slot[0].step_s(10, 10_000) == pytest.approx(0.05, rel=0.15)
    assert speeds.by_slot[1].step_s(10, 10_000) == pytest.approx(0.01, rel=0.15)


def test_answers_that_come_in_one_piece_say_nothing_of_prefill() -> None:
    (endpoint,) = fleet(1)
    decision = Decision("r", "m", 10.0, "p", [endpoint], endpoint, prompt_tokens=1000)
    for stream in (False, True):
        Flight(request(stream=stream), decision).first_output(12.0)
        assert endpoint.load.first_outputs == stream
    assert endpoint.load.first_wait_s == 2.0


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.name == "pointsman.predictor.drift"]


def test_an_endpoint_that_gets_slower_than_its_siblings_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    engines = (FleetItem(accelerator="mi325x", name="a", count=4),)
    slow = Incident(at_s=30.0, kind="slow", endpoint="a-2", factor=2.5)
    run(engines=engines, incidents=(slow,))
    (line,) = said(caplog)
    assert line.startswith("endpoint speed changed: a-2: a step takes ")
    assert line.endswith(" times as long as at 3 like it, was 1.00")


def test_a_fleet_that_stays_as_it_is_makes_no_event(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run()
    assert said(caplog) == []


def test_an_endpoint_of_its_kind_alone_is_compared_with_itself(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (endpoint,) = fleet(requests=[10])
    speeds = Speeds()
    for tick in range(1600):
        steps = 20 if tick < 800 else 4  # a second
        speeds.refresh([endpoint], tick * 0.25, [10_000.0])
        endpoint.load.received_bytes += 10 * steps * 55
    lines = said(caplog)
    assert lines
    assert all(line.startswith("endpoint speed changed: e0: a step takes ") for line in lines)
    assert all("as before" in line for line in lines)
    assert len(lines) <= 3  # the change takes some seconds to be seen whole


def test_engines_full_of_prefill_are_still_told_apart_when_their_speeds_are_swapped() -> None:
    """The one believed quick waits for its first tokens as a slow one does; so prefill is believed to take
    all its time, and that must not keep its progress from being looked at.
    """
    endpoints = fleet(requests=[20, 20], kv_blocks=[1000, 1000], block_tokens=[32, 32])
    speeds = Speeds()
    for tick in range(320):
        steps_s = (0.050, 0.015) if tick < 160 else (0.015, 0.050)
        for endpoint, step_s in zip(endpoints, steps_s, strict=True):
            load, steps = endpoint.load, 0.25 / step_s
            load.received_bytes += int(20 * steps * 220)
            load.ahead_tokens += int(350 * steps)
            load.first_outputs += int(steps)
            load.first_wait_s += int(steps) * 3 * step_s
        speeds.refresh(endpoints, tick * 0.25, [20_000.0, 20_000.0])
    quick, slow = (speeds.by_slot[i].step_s(20, 20_000) for i in range(2))
    assert slow > 1.5 * quick
