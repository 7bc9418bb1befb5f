"""The case study's rows as read from the file that comes with the package, and from a user's own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pointsman.errors import SettingsError
from pointsman.sim.profiles import PARAMETERS
from pointsman.twin.study import find_runs, load_study

HEADER = (
    "experiment,run_id,n_nv,n_amd,n_gaudi,model,router,num_groups,prompts_per_group,system_prompt_len,"
    "question_len,output_len,stage,target_rate,stage_duration_s,send_duration_s,makespan_s,n_requests,n_success,n_failures,"
    "output_tok_s,ttft_mean_s,ttft_median_s,ttft_p90_s,ttft_p99_s,tpot_mean_s,tpot_median_s,e2e_mean_s,"
    "e2e_p99_s,prompt_len_mean,output_len_median,fail_latency_median_s"
)
LINE = (
    "mine,7,2,0,1,granite-4.1-8b,k8s,4,2,100,20,50,{stage},5,10,9.8,12.5,50,{ok},{failed},190,"
    "1,1,1,1,0.1,0.1,5,6,120,50,{fail}"
)


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join([HEADER, *lines]))
    return str(path)


def test_the_study_has_its_137_stages_in_16_runs_each_in_order_from_the_warm_up() -> None:
    runs = load_study()
    assert (len(runs), sum(len(run.rows) for run in runs)) == (16, 137)
    for run in runs:
        assert [row.stage for row in run.rows] == list(range(len(run.rows)))


def test_every_run_is_of_engines_whose_constants_are_known() -> None:
    for run in load_study():
        assert run.fleet
        assert all((accelerator, run.model) in PARAMETERS for accelerator, _ in run.fleet)


def test_pools_are_named_by_their_kinds_and_two_runs_are_of_all_three() -> None:
    runs = load_study()
    assert {run.pool for run in runs} == {"3vendor", "amd", "gaudi", "nv"}
    mixed = find_runs(runs, "3vendor")
    assert [run.router for run in mixed] == ["llmd", "k8s"]
    assert all(run.fleet == (("h100-nvl", 4), ("mi325x", 8), ("gaudi3", 8)) for run in mixed)
    assert all(run.endpoints == 20 and not run.single_vendor for run in mixed)


def test_runs_are_found_by_pool_experiment_and_model() -> None:
    runs = load_study()
    assert {run.experiment for run in find_runs(runs, "amd")} == {
        "amd_granite",
        "amd_granite_fresh",
        "amd_sarvam",
    }
    assert len(find_runs(runs, "amd_granite")) == 2
    assert [run.run_id for run in find_runs(runs, "1778767091,1778686453")] == ["1778767091", "1778686453"]
    assert {run.pool for run in find_runs(runs, model="sarvam-30b")} == {"amd", "nv"}
    with pytest.raises(SettingsError, match=r"no run of tpu .*amd \(granite"):
        find_runs(runs, "tpu")


def test_at_85_a_second_llm_d_refused_and_the_service_timed_out() -> None:
    llmd, k8s = (run.rows[7] for run in find_runs(load_study(), "3vendor"))
    assert (llmd.target_rate, llmd.n_failures, llmd.failure) == (85, 415, "refused")
    assert (k8s.target_rate, k8s.n_failures, k8s.failure) == (85, 49, "timed out")


def test_no_answer_is_as_long_as_the_longest_count_says() -> None:
    """What ``answered_tok_s`` corrects: such an answer would have to take far longer than the slowest one."""
    row = find_runs(load_study(), "3vendor")[0].rows[1]
    assert row.output_len_max is not None
    assert row.output_len_max * row.tpot_median_s > 4 * row.e2e_p99_s
    assert math.isclose(row.output_len_max - row.output_len, row.prompt_len_mean, rel_tol=0.01)
    assert math.isclose(row.answered_tok_s, row.n_success * 1000 / row.makespan_s)
    assert row.output_tok_s > 1.1 * row.answered_tok_s


def test_a_file_of_ones_own_needs_the_same_columns_and_may_leave_cells_empty(tmp_path: Path) -> None:
    lines = [
        LINE.format(stage=1, ok=40, failed=10, fail=45),
        LINE.format(stage=0, ok=50, failed=0, fail=""),
        LINE.format(stage=2, ok=49, failed=1, fail=""),
    ]
    (run,) = load_study(write(tmp_path / "s.csv", *lines))
    assert (run.pool, run.endpoints) == ("nv+gaudi", 3)
    assert [row.failure for row in run.rows] == ["", "failed", "failed"]
    assert run.rows[0].answered_tok_s == 200


def test_a_wrong_file_is_a_users_mistake_that_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read"):
        load_study(str(tmp_path / "none.csv"))
    good = LINE.format(stage=0, ok=50, failed=0, fail="")
    with pytest.raises(SettingsError, match=r"line 3: .*router"):
        load_study(write(tmp_path / "s.csv", good, good.replace("k8s", "istio")))
    with pytest.raises(SettingsError, match="no rows"):
        load_study(write(tmp_path / "s.csv"))
