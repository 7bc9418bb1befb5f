"""KV events in virtual time: what routers come to know from servers' events, late and lost ones too."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from pointsman.bench.run import Load
from pointsman.bench.workloads import Adapters, Conversations, SharedPrefix, Tenants
from pointsman.errors import SettingsError
from pointsman.prefix.precise import PreciseIndex
from pointsman.sim.spec import FleetItem
from pointsman.twin.kv_events import KvEvents
from pointsman.twin.policies import policy
from pointsman.twin.run import Simulation, StageRun
from pointsman.twin.scenario import Incident, Scenario, load_scenario

SMALL = FleetItem(accelerator="h100-nvl", name="small", count=2, kv_tokens=20_000)
LARGE_BLOCKS = FleetItem(accelerator="gaudi3", name="large", count=2, kv_tokens=40_000)
GROUPS = SharedPrefix(groups=40, prompts_per_group=5, system_prompt_len=1500, question_len=200, output_len=20)
FEW = SharedPrefix(groups=6, prompts_per_group=4, system_prompt_len=800, question_len=100, output_len=10)
CHATS = Conversations(
    system_prompts=3, system_prompt_len=400, turns=6, question_len=80, output_len=60, think_s=0.5
)
BUSY = Load(rate=20, duration_s=20)


def scenario(**fields: Any) -> Scenario:
    told = {"kv_events": KvEvents(), "stages": (BUSY,), "warm_up_stages": 0, "workload": GROUPS}
    return Scenario(**({"engines": (SMALL, LARGE_BLOCKS)} | told | fields))


def run(simulation: Simulation) -> StageRun:
    """The last stage, with what is still on its way to the routers arrived."""
    stage = simulation.run()[-1]
    after_s = simulation.events.now_s + 60
    simulation.events.run_until(lambda: simulation.events.now_s >= after_s)
    return stage


def indexes(simulation: Simulation) -> list[PreciseIndex]:
    found = [replica.scheduler.services.precise for replica in simulation.replicas]
    assert all(index is not None for index in found)
    return [index for index in found if index is not None]


def indexed(simulation: Simulation) -> list[dict[str, int]]:
    """For each router, the blocks that it knows of by server."""
    return [
        {name: index.blocks(member.endpoint.slot) for name, member in replica.pool.members.items()}
        for index, replica in zip(indexes(simulation), simulation.replicas, strict=True)
    ]


def cached(simulation: Simulation) -> dict[str, int]:
    return {name: server.engine.kv.cached_blocks for name, server in simulation.servers.items()}


def errors(stage: StageRun) -> list[int]:
    """By how many tokens the router was wrong, for each answered request."""
    answered = [record for record in stage.records if not record.error]
    assert answered
    return [abs(r.matched_tokens - (r.usage.cached_tokens or 0)) for r in answered]


@pytest.mark.parametrize("workload", [GROUPS, CHATS])
def test_one_request_at_a_time_is_predicted_to_the_token_where_caches_are_small(workload: Any) -> None:
    one = Load(concurrency=1, requests=150, duration_s=1e6)
    stage = run(Simulation(scenario(workload=workload, stages=(one,)), policy("round-robin")))
    assert set(errors(stage)) == {0}
    hits = [record.usage.cached_tokens for record in stage.records]
    assert any(hits)
    assert not all(hits)
    guessed = scenario(workload=workload, stages=(one,), kv_events=None)
    if workload is GROUPS:
        assert max(errors(run(Simulation(guessed, policy("round-robin"))))) > 0


@pytest.mark.parametrize(
    "events",
    [KvEvents(), KvEvents(delay_s=1.5), KvEvents(loss=0.2), KvEvents(loss=0.2, delay_s=0.5)],
    ids=["prompt", "late", "lost", "both"],
)
def test_in_the_end_the_index_has_what_the_caches_have(events: KvEvents) -> None:
    simulation = Simulation(scenario(kv_events=events), policy("least-request"))
    stage = run(simulation)
    (known,) = indexed(simulation)
    held = cached(simulation)
    assert len(stage.records) == 400
    assert min(held.values()) > 100
    behind = {name: held[name] - blocks for name, blocks in known.items() if blocks != held[name]}
    if events.loss:  # the last messages may be lost, and no later one shows the gap
        assert len(behind) <= 2
    else:
        assert not behind


def test_late_events_are_worse_to_predict_by() -> None:
    wrong = {}
    for delay_s in (0.0, 5.0):
        events = KvEvents(delay_s=delay_s)
        wrong[delay_s] = sum(errors(run(Simulation(scenario(kv_events=events), policy("least-request")))))
    assert wrong[0.0] < wrong[5.0] / 3


def test_what_cannot_be_had_again_makes_the_router_forget_the_server() -> None:
    simulation = Simulation(scenario(kv_events=KvEvents(loss=0.2, replay=False)), policy("least-request"))
    run(simulation)
    (known,) = indexed(simulation)
    held = cached(simulation)
    assert sum(known.values()) < sum(held.values()) / 2
    assert all(known[name] <= held[name] for name in known)


def test_a_server_that_crashed_is_believed_to_be_empty_and_then_what_it_tells() -> None:
    crash = Incident(at_s=8, kind="crash", endpoint="small-0", for_s=3)
    simulation = Simulation(scenario(incidents=(crash,)), policy("least-request"))
    looked: list[dict[str, int]] = []
    simulation.events.at(10.9, lambda: looked.append(indexed(simulation)[0]))
    run(simulation)
    assert looked[0]["small-0"] == 0
    assert looked[0]["small-1"] > 0
    assert indexed(simulation) == [cached(simulation)]


def test_a_server_that_joins_later_is_followed_and_one_that_leaves_is_not() -> None:
    incidents = (
        Incident(at_s=5, kind="join", endpoint="small-0"),
        Incident(at_s=10, kind="leave", endpoint="small-1"),
    )
    simulation = Simulation(scenario(incidents=incidents), policy("least-request"))
    run(simulation)
    (known,) = indexed(simulation)
    assert known == {name: blocks for name, blocks in cached(simulation).items() if name in known}
    assert known["small-0"] > 0


def test_several_routers_each_know_everything() -> None:
    shared = structs.replace(Scenario().routers, replicas=3)
    simulation = Simulation(scenario(routers=shared), policy("least-request"))
    run(simulation)
    assert indexed(simulation) == [cached(simulation)] * 3


@pytest.mark.parametrize(
    "workload", [Adapters(adapters=("one", "two"), base_share=0.3, of=FEW), Tenants(tenants=3, of=FEW)]
)
def test_adapters_and_tenants_are_told_apart(workload: Any) -> None:
    engine = FleetItem(accelerator="h100-nvl", kv_tokens=8000, loras=("one", "two"))
    one = Load(concurrency=1, requests=120, duration_s=1e6)
    simulation = Simulation(
        scenario(engines=(engine,), workload=workload, stages=(one,)), policy("round-robin")
    )
    stage = run(simulation)
    wrong = errors(stage)
    assert not any(wrong[20:])
    assert len(wrong) - wrong.count(0) <= 2  # an adapter is known once an event has named it
    assert any(record.usage.cached_tokens for record in stage.records[20:])
    assert indexed(simulation) == [cached(simulation)]


def test_equal_runs_are_equal_and_another_seed_loses_others() -> None:
    lossy = scenario(kv_events=KvEvents(loss=0.3, replay=False))

    def matched(seed: int) -> list[tuple[float, int]]:
        stage = Simulation(lossy, policy("least-request"), seed=seed).run()[-1]
        return [(record.end_s, record.matched_tokens) for record in stage.records]

    assert matched(0) == matched(0)
    assert matched(0) != matched(1)


def test_without_events_no_tokens_are_made_and_nothing_is_published() -> None:
    simulation = Simulation(scenario(kv_events=None), policy("least-request"))
    assert [replica.scheduler.services.precise for replica in simulation.replicas] == [None]
    assert all(server.engine.journal is None for server in simulation.servers.values())


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(SettingsError, match="kv_events"):
        load_scenario(None, ["kv_events.loss=2"])
