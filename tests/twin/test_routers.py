"""Routers that see less: whose responses go past them, and several that share a fleet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pointsman.bench.run import Load
from pointsman.bench.workloads import SharedPrefix
from pointsman.router import Observer
from pointsman.scheduling.pickers.least_cost import LeastCost
from pointsman.sim.spec import FleetItem
from pointsman.twin.policies import policy
from pointsman.twin.routers import Routers
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import Scenario
from pointsman.types import Outcome

FLEET = tuple(FleetItem(accelerator=kind, name=kind) for kind in ("h100-nvl", "mi325x", "gaudi3"))
WORKLOAD = SharedPrefix(12, 5, 6000, 200, 600)


def simulation(
    routers: Routers,
    *,
    name: str = "least-cost",
    duration_s: float = 60.0,
    observers: tuple[Observer, ...] = (),
) -> Simulation:
    scenario = Scenario(
        engines=FLEET,
        workload=WORKLOAD,
        stages=(Load(rate=6, duration_s=duration_s),),
        warm_up_stages=0,
        routers=routers,
    )
    return Simulation(scenario, policy(name), observers=observers)


def pickers(simulation: Simulation) -> Iterator[LeastCost]:
    for replica in simulation.replicas:
        yield from (p for p in replica.router._scheduler.plugins if isinstance(p, LeastCost))


def output_tok_s(simulation: Simulation) -> float:
    (stage,) = simulation.run()
    assert all(not record.error for record in stage.records)
    return sum(record.events for record in stage.records) / (stage.end_s - stage.start_s)


def test_a_picker_learns_from_counters_what_others_learn_from_responses() -> None:
    full, picker = simulation(Routers()), simulation(Routers(evidence="picker"))
    seen, unseen = output_tok_s(full), output_tok_s(picker)
    assert unseen > 0.95 * seen
    (of_full,), (of_picker,) = pickers(full), pickers(picker)
    assert of_picker._costs.lengths.pool.mean == pytest.approx(of_full._costs.lengths.pool.mean, rel=0.05)
    for member in picker.pool.members.values():
        slot = member.endpoint.slot
        ratio = of_picker._costs.speeds.token_s(slot) / of_full._costs.speeds.token_s(slot)
        assert 0.7 < ratio < 1.4, member.endpoint.name


def test_a_picker_is_told_of_ends_alone() -> None:
    outcomes: list[Outcome] = []
    run = simulation(
        Routers(evidence="picker"),
        duration_s=10.0,
        observers=(lambda _, __, outcome: outcomes.append(outcome),),
    )
    (stage,) = run.run()
    assert len(outcomes) == len(stage.records) == 60
    for outcome in outcomes:
        assert (outcome.ttft_s, outcome.chunks, outcome.usage.output_tokens) == (None, 0, None)
    likely = [outcome.likely_tokens for outcome in outcomes if outcome.likely_tokens]
    assert len(likely) > 50
    assert sum(likely) / len(likely) == pytest.approx(600, rel=0.05)
    for member in run.pool.members.values():
        assert (member.endpoint.load.requests, member.endpoint.load.tokens) == (0, 0)
        assert not member.endpoint.load.before_first


def test_ends_come_as_late_as_told() -> None:
    closed: list[float] = []

    def note(*_: object) -> None:
        closed.append(run.events.now_s)

    late = Routers(evidence="picker", completion_delay_s=2.0)
    run = simulation(late, duration_s=5.0, observers=(note,))
    (stage,) = run.run()
    ended = sorted(record.end_s for record in stage.records)
    assert closed == [pytest.approx(at_s + 2.0) for at_s in ended if at_s + 2.0 <= run.events.now_s]
    assert len(closed) > 5


def test_replicas_share_the_requests_and_count_those_of_each_other() -> None:
    run = simulation(Routers(replicas=4, view_s=0.05), name="round-robin", duration_s=20.0)
    seen: list[bool] = []

    def look() -> None:
        for server in run.servers.values():
            views = [replica.pool.members[server.name].endpoint for replica in run.replicas]
            own = sum(view.load.requests for view in views)
            assert own == len(server.engine.running) + len(server.engine.waiting)
            seen.extend(abs(view.load.others + view.load.requests - own) <= 2 for view in views)
        run.events.at(run.events.now_s + 0.5, look)

    run.events.at(5.0, look)
    run.run()
    for replica in run.replicas:
        assert sum(member.endpoint.load.sent - 1 for member in replica.pool.members.values()) > 10
    assert len(seen) > 100
    assert sum(seen) > 0.95 * len(seen)


def test_views_are_as_old_as_told() -> None:
    ages: list[float] = []
    run = simulation(Routers(replicas=2, view_s=0.5), duration_s=5.0)

    def look() -> None:
        for replica in run.replicas:
            endpoint = replica.pool.members["h100-nvl"].endpoint
            if endpoint.load.requests:
                ages.append(run.events.now_s - endpoint.metrics.at_s)
        if run.events.now_s < 5:
            run.events.at(run.events.now_s + 0.1, look)

    run.events.at(2.0, look)
    run.run()
    assert len(ages) > 20
    assert min(ages) >= 0.5
    assert max(ages) < 0.6
