"""Constants found again that were put in: from simulated runs, and from a simulated engine over HTTP."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Literal

import pytest
import uvloop
import yaml
from msgspec import structs

from pointsman.bench.client import Client, Target
from pointsman.bench.pace import Pace
from pointsman.errors import SettingsError
from pointsman.sim.fleet import running_fleet
from pointsman.sim.profiles import GRANITE, PARAMETERS, EngineParameters
from pointsman.sim.spec import EngineSpec
from pointsman.twin import calibrate_tables as tables
from pointsman.twin import router_delay
from pointsman.twin.calibrate import FIELDS, Error, fit, moved, ranges, single_kind, trades
from pointsman.twin.compare import Task, simulate
from pointsman.twin.constants import dump_constants, load_constants
from pointsman.twin.fidelity import POLICIES
from pointsman.twin.gateway import RouterCost
from pointsman.twin.inference_perf import read_results
from pointsman.twin.policies import policy
from pointsman.twin.probe import Settings, fitted, kv_cache_of, probe
from pointsman.twin.replay import NO_COST, as_sent, scenario_of
from pointsman.twin.study import Run, find_runs, load_study

TRUE = structs.replace(PARAMETERS["h100-nvl", GRANITE], kv_tokens=60_000)
KIND = ("h100-nvl", GRANITE)


def measured(
    parameters: EngineParameters, *, router: Literal["k8s", "llmd"] = "k8s", cost: RouterCost = NO_COST
) -> Run:
    """A run of two servers with these constants, "measured" in the twin itself."""
    row = find_runs(load_study(), "nv", GRANITE)[1].rows[0]
    row = structs.replace(
        row,
        run_id="made up",
        router=router,
        num_groups=12,
        prompts_per_group=2,
        system_prompt_len=3000,
        question_len=500,
        prompt_len_mean=3500.0,
        output_len=150,
        n_failures=0,
    )
    rows = tuple(
        structs.replace(
            row, stage=i, target_rate=rate, n_requests=n, stage_duration_s=n / rate, send_duration_s=n / rate
        )
        for i, (rate, n) in enumerate([(4.0, 24), (1.0, 10), (12.0, 60)])
    )
    run = Run(rows, ((KIND[0], 2),))
    scenario = scenario_of(run, as_sent(rows, 0), constants={KIND: parameters}, router=cost)
    stages = simulate(Task(scenario=scenario, policy=policy(POLICIES[router][0]), seed=0)).stages
    found = []
    for row, stage in zip(rows, stages, strict=True):
        assert stage.ttft is not None
        assert stage.tpot is not None
        found.append(
            structs.replace(
                row,
                n_success=stage.ok,
                makespan_s=stage.makespan_s,
                ttft_mean_s=stage.ttft.mean,
                tpot_mean_s=stage.tpot.mean,
            )
        )
    return Run(tuple(found), run.fleet)


def test_the_error_of_the_true_constants_is_nothing_and_any_other_has_one() -> None:
    error = Error([measured(TRUE)])
    assert error(TRUE) == pytest.approx(0, abs=1e-9)
    for field in FIELDS:
        assert error(moved(TRUE, field, 0.5)) > 0
    assert error.evaluations == 7


def test_a_fit_finds_constants_that_were_put_in_and_says_how_good_it_is() -> None:
    start = moved(moved(TRUE, "context_token_s", 1.6), "prefill_tokens_per_s", 0.6)
    found, error = fit(
        [measured(TRUE)], start, fields=("context_token_s", "prefill_tokens_per_s"), evaluations=40
    )
    assert found.error < 0.1 * found.start_error
    assert found.other_seed_error[1] < 0.7 * found.other_seed_error[0]
    assert found.found.prefill_tokens_per_s == pytest.approx(TRUE.prefill_tokens_per_s, rel=0.1)
    assert found.found.context_token_s == pytest.approx(TRUE.context_token_s, rel=0.2)
    assert found.found.kv_tokens == TRUE.kv_tokens
    assert found.evaluations == error.evaluations
    assert "prefill tok/s" in tables.fitted(found, ranges(error, found.found, ("base_s",)), [])


def test_what_the_runs_do_not_tell_has_no_range_and_what_they_tell_a_small_one() -> None:
    """With KV for everybody its size does not matter, base and prefill time do."""
    ample = structs.replace(TRUE, kv_tokens=10_000_000)
    error = Error([measured(ample)])
    kv, base, prefill = ranges(error, ample, ("kv_tokens", "base_s", "prefill_tokens_per_s"))
    assert (kv.down, kv.up) == (None, None)
    for known in (base, prefill):
        assert known.up is not None
        assert 1 < known.up < 1.5


def test_a_trade_off_shows_how_one_constant_makes_up_for_another() -> None:
    error = Error([measured(TRUE)])
    found = trades(error, TRUE, [("prefill_tokens_per_s", "prefill_step_s")])
    assert [trade.by for trade in found] == [0.8, 1.25]
    for trade in found:
        assert trade.growth_made_up <= trade.growth
    slower, faster = found
    assert slower.other_by < 1 or faster.other_by > 1


def test_a_router_cost_that_was_put_in_is_found_again() -> None:
    run = measured(TRUE, router="llmd", cost=RouterCost(delay_s=0.2, stream_s=0.02))
    start = RouterCost(delay_s=0.1, stream_s=0.01)
    tried: list[float] = []
    found, factor = router_delay.fit([run], start=start, rounds=5, on_try=lambda _, f: tried.append(f))
    assert factor == min(tried) < 1.15 < tried[0]
    assert found.delay_s > start.delay_s
    with pytest.raises(SettingsError, match="no single-vendor run behind llm-d"):
        router_delay.fit([measured(TRUE)])


def test_only_runs_of_one_kind_are_fitted() -> None:
    kinds = single_kind(load_study())
    assert sorted(kinds) == sorted(PARAMETERS)
    assert all(run.single_vendor for runs in kinds.values() for run in runs)
    assert single_kind(find_runs(load_study(), "3vendor")) == {}


def test_constants_survive_a_file(tmp_path: Path) -> None:
    constants = {KIND: TRUE, ("my-card", "my-model"): moved(TRUE, "sequence_s", 1e-3)}
    path = tmp_path / "constants.yaml"
    path.write_text(dump_constants(constants))
    assert load_constants(path) == constants
    path.write_text(path.read_text().replace("base_s", "bass_s"))
    with pytest.raises(SettingsError, match="base_s"):
        load_constants(path)


def test_the_studys_own_fit_comes_with_the_package() -> None:
    found = load_constants("refitted")
    assert set(found) == {(accelerator, GRANITE) for accelerator in ("h100-nvl", "mi325x", "gaudi3")}
    for kind, parameters in found.items():
        assert parameters.block_tokens == PARAMETERS[kind].block_tokens
        assert parameters.kv_tokens == pytest.approx(PARAMETERS[kind].kv_tokens, rel=0.15)


def test_points_on_a_plane_give_its_constants_and_no_error() -> None:
    prefill = [(n, 0.012 + n / 10_000) for n in (100.0, 1000.0, 4000.0)]
    decode = [
        (n, n * x, 0.008 + 2e-5 * n + 5e-8 * n * x) for n, x in ((1, 100), (8, 1000), (32, 100), (32, 4000))
    ]
    settings = Settings(kv_tokens=1000, block_tokens=16, max_sequences=7, step_tokens=99)
    found = fitted(prefill, decode, settings)
    p = found.parameters
    assert (p.base_s, p.sequence_s, p.context_token_s) == pytest.approx((0.008, 2e-5, 5e-8))
    assert (p.prefill_tokens_per_s, p.prefill_step_s) == pytest.approx((10_000, 0.004))
    assert (p.kv_tokens, p.block_tokens, p.max_sequences, p.step_tokens) == (1000, 16, 7, 99)
    assert all(constant.error < 1e-6 * constant.value for constant in found.constants)
    assert "ns a context token" in tables.probed(found)


def test_times_that_do_not_grow_with_the_work_are_no_measurement() -> None:
    settings = Settings(kv_tokens=1000, block_tokens=16, max_sequences=7, step_tokens=99)
    decode = [(1, 100, 0.01), (8, 1000, 0.01), (8, 8000, 0.01)]
    with pytest.raises(SettingsError, match="busy with others"):
        fitted([(100.0, 0.5), (1000.0, 0.4)], decode, settings)


def probed(spec: EngineSpec, *, speed: float, broken: bool = False) -> EngineParameters:
    """What a probe finds of a simulated engine behind a port of its own."""

    async def found() -> EngineParameters:
        async with running_fleet([spec], speed=speed, tokens_per_chunk=16) as (engine,):
            if broken:
                engine.fault("status", status=503, count=50)
            pace = Pace(time.perf_counter, speed)
            client = Client(Target(url=engine.url, model=GRANITE), pace)
            settings = Settings(kv_tokens=1, block_tokens=16, max_sequences=1, step_tokens=1)
            try:
                return (await probe(client, pace, settings)).parameters
            finally:
                await client.close()

    return uvloop.run(found())


def test_a_probe_finds_the_constants_of_a_live_server() -> None:
    true = PARAMETERS["mi325x", GRANITE]
    found = probed(EngineSpec(accelerator="mi325x"), speed=2)
    assert found.base_s == pytest.approx(true.base_s, rel=0.1)
    assert found.prefill_tokens_per_s == pytest.approx(true.prefill_tokens_per_s, rel=0.15)
    assert found.context_token_s == pytest.approx(true.context_token_s, rel=0.25)
    assert found.prefill_step_s < 5 * true.prefill_step_s


def test_a_probe_of_a_server_that_refuses_says_so() -> None:
    with pytest.raises(SettingsError, match="status 503"):
        probed(EngineSpec(), speed=1, broken=True)


def test_a_server_without_metrics_tells_no_kv_cache() -> None:
    assert kv_cache_of("http://127.0.0.1:1/v1") == (0, 0)


def spread(mean: float) -> dict[str, float]:
    return {"mean": mean, "min": 0.0, "median": mean, "p90": mean, "p99": mean, "max": 2 * mean}


def report(folder: Path) -> None:
    """A folder as inference-perf leaves it: one stage, ten requests, one of them failed."""
    config = {
        "api": {"type": "completion", "streaming": True},
        "data": {
            "type": "shared_prefix",
            "shared_prefix": {
                "num_unique_system_prompts": 3,
                "num_users_per_system_prompt": 2,
                "system_prompt_len": 100,
                "question_len": 20,
                "output_len": 50,
            },
        },
        "load": {"stages": [{"rate": 5.0, "duration": 2}]},
        "server": {"model_name": "org/my-model"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    latency = ("request_latency", "time_per_output_token", "time_to_first_token", "inter_token_latency")
    stage = {
        "load_summary": {"count": 10, "send_duration": 1.9, "requested_rate": 5.0, "achieved_rate": 5.2},
        "successes": {
            "count": 9,
            "latency": {name: spread(0.1 * i) for i, name in enumerate(latency, 1)},
            "throughput": {"output_tokens_per_sec": 150.0, "requests_per_sec": 3.0},
            "prompt_len": spread(126.0),
            "output_len": spread(50.0),
        },
        "failures": {"count": 1, "request_latency": spread(300.4), "prompt_len": spread(126.0)},
    }
    (folder / "stage_0_lifecycle_metrics.json").write_text(json.dumps(stage))


def test_a_report_of_inference_perf_is_a_run(tmp_path: Path) -> None:
    report(tmp_path)
    run = read_results(str(tmp_path), "my-card", 4, router="k8s")
    (row,) = run.rows
    assert (run.fleet, run.model, run.pool) == ((("my-card", 4),), "my-model", "my-card")
    assert (row.num_groups, row.prompts_per_group, row.output_len) == (3, 2, 50)
    assert (row.makespan_s, row.stage_duration_s, row.failure) == (3.0, 2.0, "timed out")
    assert (row.tpot_mean_s, row.ttft_mean_s) == pytest.approx((0.2, 0.3))
    assert list(single_kind([run])) == [("my-card", "my-model")]


def test_a_report_without_what_is_needed_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"config\.yaml"):
        read_results(str(tmp_path), "my-card", 4, router="k8s")
    report(tmp_path)
    (tmp_path / "stage_0_lifecycle_metrics.json").rename(tmp_path / "stage_0.json")
    with pytest.raises(SettingsError, match="no stage_0_lifecycle_metrics"):
        read_results(str(tmp_path), "my-card", 4, router="k8s")
