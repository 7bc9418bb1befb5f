"""A measured run put into the twin: prompts as long as its servers saw them, requests sent when they were."""

from __future__ import annotations

import random

import pytest
from msgspec import structs

from pointsman.bench.pace import ARRIVALS
from pointsman.sim.profiles import GRANITE, PARAMETERS
from pointsman.twin.compare import Task, simulate
from pointsman.twin.gateway import RouterCost
from pointsman.twin.policies import policy
from pointsman.twin.replay import (
    as_planned,
    as_sent,
    demand_of,
    fleet_of,
    output_tok_s,
    prompts_of,
    scenario_of,
)
from pointsman.twin.report import Figures
from pointsman.twin.study import Run, find_runs, load_study

H100 = PARAMETERS["h100-nvl", GRANITE]


def small_run(**changes: object) -> Run:
    """Two H100, 6 requests to warm up and 12 to count."""
    row = find_runs(load_study(), "nv", GRANITE)[1].rows[0]
    fields: dict[str, object] = {
        "num_groups": 3,
        "prompts_per_group": 2,
        "system_prompt_len": 1000,
        "question_len": 100,
        "prompt_len_mean": 1210.0,
        "output_len": 50,
        "stage_duration_s": 3.0,
        "send_duration_s": 2.5,
    }
    warm_up = structs.replace(row, **fields | {"target_rate": 2.0, "n_requests": 6} | changes)
    return Run(
        (warm_up, structs.replace(warm_up, stage=1, target_rate=4.0, n_requests=12)), (("h100-nvl", 2),)
    )


def test_prompts_are_as_long_as_the_servers_counted_them_and_question_and_prefix_grew_alike() -> None:
    row = find_runs(load_study(), "3vendor")[0].rows[7]
    prompts, demand = prompts_of(row), demand_of(row)
    assert (prompts.system_prompt_len, prompts.question_len) == (6287, 1257)
    assert (demand.prompt_tokens, demand.prefix_tokens, demand.requests) == (7544, 6287, 2550)


def test_stages_as_sent_take_as_long_as_they_took_whatever_the_seed() -> None:
    rows = find_runs(load_study(), "nv", GRANITE)[0].rows[1:3]
    for seed in range(3):
        rng = random.Random(f"arrivals {seed}")
        for row, load in zip(rows, as_sent(rows, seed), strict=True):
            assert load.rate is not None
            assert load.requests == row.n_requests
            due = list(ARRIVALS["poisson"](rng, load.rate, load.requests))
            assert due[-1] == pytest.approx(row.send_duration_s)


def test_a_fleet_has_the_studys_constants_unless_others_are_given() -> None:
    run = small_run()
    (item,) = fleet_of(run, {})
    assert (item.count, item.parameters()) == (2, H100)
    mine = structs.replace(H100, base_s=1.0)
    (item,) = fleet_of(run, {("h100-nvl", GRANITE): mine, ("mi325x", GRANITE): H100})
    assert item.parameters() == mine


def test_servers_that_were_set_up_otherwise_are_so_in_the_twin() -> None:
    found = {
        run.run_id: fleet_of(run, {})[0].parameters().max_sequences
        for run in find_runs(load_study(), "gaudi")
    }
    assert found == {"1778767091": 64, "1778771586": 64, "1778808153": 256, "1778814623": 64}


def replayed(run: Run, policy_name: str, **changes: object) -> tuple[Figures, ...]:
    scenario = scenario_of(run, as_planned(run.rows), **changes)
    return simulate(Task(scenario=scenario, policy=policy(policy_name), seed=0)).stages


def test_stages_run_one_after_the_other_on_warm_caches() -> None:
    warm_up, stage = replayed(small_run(), "llm-d-blend")
    assert (warm_up.requests, stage.requests, stage.ok) == (6, 12, 12)
    assert warm_up.prefix_hit_rate is not None
    assert stage.prefix_hit_rate is not None
    assert warm_up.prefix_hit_rate < 0.6 < stage.prefix_hit_rate
    assert stage.output_tokens == 12 * 50


def test_a_router_short_of_cpu_takes_longer_for_every_stream_that_runs() -> None:
    delayed = []
    for cost in (RouterCost(), RouterCost(delay_s=0.5), RouterCost(delay_s=0.5, stream_s=0.2)):
        stage = replayed(small_run(), "k8s-random", router=cost)[1]
        assert stage.ttft is not None
        delayed.append(stage.ttft.mean)
    free, later, latest = delayed
    assert later == pytest.approx(free + 0.5, abs=0.05)
    assert latest > later + 0.1


def test_a_longer_time_than_the_clients_have_is_a_failure() -> None:
    """Ten seconds a step: no answer is done within 300 s, and there is nothing to be divided by."""
    slow = structs.replace(H100, base_s=10.0)
    stage = replayed(small_run(), "k8s-random", constants={("h100-nvl", GRANITE): slow})[1]
    assert (stage.requests, stage.ok, stage.output_tok_s, stage.timeouts) == (12, 0, 0.0, 12)


def test_throughput_counts_until_the_last_client_has_given_up() -> None:
    """An answer takes 250 s, three at once: who has to wait gives up."""
    slow = structs.replace(H100, base_s=5.0, max_sequences=3)
    stage = replayed(small_run(), "k8s-random", constants={("h100-nvl", GRANITE): slow})[1]
    assert 0 < stage.timeouts < 12
    assert output_tok_s(stage) == pytest.approx(stage.output_tokens / (stage.send_s + 300))
    assert output_tok_s(stage) < stage.output_tok_s
