"""Pools of the study under policies: what is compared with what, and that it comes out the same."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from msgspec import structs

from pointsman.errors import SettingsError
from pointsman.scheduling.presets import PRESETS
from pointsman.twin import casestudy_tables as tables
from pointsman.twin import fidelity, scaling
from pointsman.twin.casestudy import (
    COMPARED,
    ROUTERS,
    CaseRow,
    at_rates,
    cases_of,
    compare,
    every_policy,
    summarise,
)
from pointsman.twin.casestudy_plot import plot
from pointsman.twin.policies import policy
from pointsman.twin.study import Run, find_runs, load_study


def small_pair() -> list[Run]:
    """The 20-endpoint runs with a tenth of the requests, and short ones."""
    return [
        Run(
            tuple(
                structs.replace(
                    row, target_rate=row.target_rate / 10, n_requests=row.n_requests // 10, output_len=100
                )
                for row in run.rows[:3]
            ),
            run.fleet,
        )
        for run in find_runs(load_study(), "3vendor")
    ]


@pytest.fixture(scope="module")
def rows() -> list[CaseRow]:
    return compare(cases_of(small_pair()), ("k8s-random", "llm-d-blend", "round-robin"), range(2))


def test_runs_of_one_pool_model_and_prompts_are_one_case_with_every_stage_once() -> None:
    cases = cases_of(load_study())
    names = [(case.run.pool, case.run.model) for case in cases]
    assert len(names) == len(set(names)) == 6
    assert sum(len(case.measured) for case in cases) == 16
    amd = cases[names.index(("amd", "granite-4.1-8b"))]
    assert [row.stage for row in amd.rows[:2]] == [0, 1]
    assert [row.target_rate for row in amd.rows[1:]] == [3, 10, 15, 20, 25, 30, 40, 50, 60]


def test_chosen_rates_keep_the_warm_up() -> None:
    (case,) = cases_of(find_runs(load_study(), "3vendor"))
    assert [(row.stage, row.target_rate) for row in at_rates(case, [85]).rows] == [(0, 30), (7, 85)]
    with pytest.raises(SettingsError, match=r"--rate: 3vendor .* measured at 5, 15, 25"):
        at_rates(case, [86])


def test_every_named_policy_is_compared_once_and_two_of_them_were_measured() -> None:
    names = every_policy()
    assert {"default", "llm-d-blend", "round-robin", "k8s-random"} <= set(names)
    assert {policy(name).preset for name in names} >= set(PRESETS)
    assert len(names) == len({policy(name).preset for name in names})
    assert set(ROUTERS) <= set(COMPARED) <= set(names)


def test_rows_come_case_by_case_policy_by_policy_seed_by_seed(rows: list[CaseRow]) -> None:
    assert [(row.policy, row.seed, row.rate) for row in rows] == [
        (name, seed, rate)
        for name in ("k8s-random", "llm-d-blend", "round-robin")
        for seed in (0, 1)
        for rate in (0.5, 1.5)
    ]


def test_a_row_has_what_was_measured_under_its_policy_and_the_bound(rows: list[CaseRow]) -> None:
    llmd, k8s = (run.rows[1] for run in find_runs(load_study(), "3vendor"))
    measured = {row.policy: row.measured_output_tok_s for row in rows if row.rate == 0.5}
    assert measured == {"k8s-random": k8s.output_tok_s, "llm-d-blend": llmd.output_tok_s, "round-robin": None}
    for row in rows:
        assert 0 < row.output_tok_s < 1.3 * row.bound_kv_tok_s <= 1.3 * 1.001 * row.bound_tok_s
        assert sum(row.shares.values()) == pytest.approx(1)


def test_several_processes_find_the_same_as_one(rows: list[CaseRow]) -> None:
    again = compare(cases_of(small_pair()), ("k8s-random", "llm-d-blend", "round-robin"), range(2), jobs=2)
    assert msgspec.json.encode(again) == msgspec.json.encode(rows)


def test_a_wrong_policy_is_named_before_anything_is_simulated() -> None:
    with pytest.raises(SettingsError, match="least-reqest"):
        compare(cases_of(load_study()), ("default", "least-reqest"), range(5))


def test_summaries_compare_with_llm_d_and_kubernetes_over_all_seeds(rows: list[CaseRow]) -> None:
    found = {(row.policy, row.rate): row for row in summarise(rows)}
    assert len(found) == 6
    blend, random = found["llm-d-blend", 1.5], found["k8s-random", 1.5]
    assert blend.to_llm_d == random.to_kubernetes == 1.0
    assert blend.to_kubernetes == pytest.approx(blend.output_tok_s.mean / random.output_tok_s.mean)
    assert blend.of_bound == pytest.approx(blend.output_tok_s.mean / blend.bound_tok_s)
    assert blend.prefix_hit_rate > random.prefix_hit_rate
    assert "llm-d-blend" in tables.comparison(list(found.values()))


def test_a_chart_shows_every_pool(rows: list[CaseRow], tmp_path: Path) -> None:
    plot(summarise(rows), str(tmp_path / "case.svg"))
    text = (tmp_path / "case.svg").read_text()
    assert text.startswith("<?xml")
    assert "matplotlib" in text


def test_fidelity_puts_each_stage_beside_its_measurement_and_failures_apart() -> None:
    found = fidelity.replay(small_pair(), range(2))
    assert [(row.router, row.stage) for row in found] == [
        (router, stage) for router in ("llmd", "k8s") for stage in range(3)
    ]
    groups = {factors.group: factors for factors in fidelity.factors_of(found)}
    assert groups["3vendor, 20 endpoints, llmd, with failures"].stages == 1
    assert groups["3vendor, 20 endpoints, llmd, without failures"].stages == 2
    assert groups["3vendor, 20 endpoints, both routers, all stages"].stages == 6
    assert "3vendor_v0.7gaudi" in tables.fidelity(found)
    assert "with failures" in tables.factors(list(groups.values()))


def test_a_typical_factor_does_not_let_errors_cancel_out() -> None:
    assert fidelity.typical_factor([(1.2, 1.0), (1.0, 1.2)]) == pytest.approx(1.2)
    assert fidelity.typical_factor([(3.0, 3.0)]) == 1.0
    assert fidelity.typical_factor([(None, 3.0), (0.0, 2.0)]) == pytest.approx(10.0)


def test_pools_of_every_size_and_number_of_kinds_are_loaded_alike() -> None:
    pools = scaling.pools()
    assert {(pool.kinds, pool.endpoints) for pool in pools} == {
        (kinds, size) for kinds in (1, 2, 3, 4) for size in (4, 8, 20, 40, 100)
    }
    fleet = {item.accelerator: item.count for item in scaling.Pool(3, 20, 150).fleet()}
    assert fleet == {"mi325x": 6, "h100-nvl": 7, "gaudi3": 7}
    assert {pool.groups for pool in pools if pool.endpoints == 20} == {150}
    one, two = (scaling.scale([scaling.Pool(2, size, 15)], ["k8s-random"], [0])[0] for size in (2, 4))
    assert two.rate == pytest.approx(2 * one.rate, rel=0.01)
    assert "15" in tables.scaling([one, two], "k8s-random")
