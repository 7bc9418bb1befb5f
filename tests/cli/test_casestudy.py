"""``pointsman casestudy`` and ``pointsman calibrate`` as a user runs them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from pointsman.cli.main import main
from pointsman.twin.constants import load_constants

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        told = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, told.out, told.err

    return run


@pytest.fixture
def small(tmp_path: Path) -> str:
    """Two measured runs of four H100, with a tenth of the requests and short answers."""
    text = resources.files("pointsman.twin").joinpath("data/stages.csv").read_text(encoding="utf-8")
    rows = [r for r in csv.DictReader(text.splitlines()) if r["experiment"] == "nv_granite_approx"]
    path = tmp_path / "small.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            if int(row["stage"]) < 3:
                fewer = {
                    "target_rate": float(row["target_rate"]) / 10,
                    "n_requests": int(row["n_requests"]) // 10,
                }
                writer.writerow(
                    row | fewer | {"output_len": 100, "n_failures": 0, "fail_latency_median_s": ""}
                )
    return str(path)


def objects(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_a_pool_at_one_rate_is_a_json_object_a_policy_and_seed(command: Command) -> None:
    code, out, err = command(
        *("casestudy", "--pool", "3vendor", "--rate", "5", "--json", "--seeds", "2", "--jobs", "1"),
        *("--policy", "k8s-random", "--policy", "default"),
    )
    assert (code, err) == (0, "")
    rows = objects(out)
    assert [(row["policy"], row["seed"]) for row in rows] == [
        ("k8s-random", 0),
        ("k8s-random", 1),
        ("default", 0),
        ("default", 1),
    ]
    wanted = {
        *("pool", "model", "policy", "rate", "seed", "output_tok_s", "bound_tok_s", "ttft_p50_s"),
        *("ttft_p99_s", "tpot_mean_s", "measured_output_tok_s"),
    }
    for row in rows:
        assert wanted <= row.keys()
        assert (row["pool"], row["model"], row["rate"]) == ("3vendor", "granite-4.1-8b", 5.0)
    assert [row["measured_output_tok_s"] for row in rows] == [3735.44, 3735.44, None, None]
    assert rows[0] != rows[1]


def test_a_study_of_ones_own_is_compared_and_drawn(command: Command, small: str, tmp_path: Path) -> None:
    chart = tmp_path / "chart.svg"
    code, out, _ = command(
        *("casestudy", "--stages", small, "--seeds", "2", "--jobs", "1", "--policy", "llm-d-blend"),
        *("--policy", "k8s-random", "--plot", str(chart)),
    )
    assert code == 0
    assert out.startswith("nv granite-4.1-8b\nrate ")
    assert out.count("fluid bound with KV") == 2
    assert out.count("llm-d-blend") == out.count("k8s-random") == 2
    assert chart.read_text().startswith("<?xml")


def test_fidelity_ends_in_typical_factors(command: Command, small: str) -> None:
    code, out, _ = command("casestudy", "--stages", small, "--fidelity", "--seeds", "1", "--jobs", "1")
    assert code == 0
    assert out.count("nv_granite_approx") == 6
    assert "single vendor, k8s, without failures" in out.rpartition("typical factor")[2]


def test_constants_are_fitted_written_and_used(command: Command, small: str, tmp_path: Path) -> None:
    path = tmp_path / "constants.yaml"
    fit = ("calibrate", "--stages", small, "--evaluations", "4", "--no-sensitivity", "--jobs", "1")
    code, out, _ = command(*fit, "--output", str(path))
    assert code == 0
    assert "h100-nvl granite-4.1-8b: 6 stages" in out
    ((accelerator, _),) = load_constants(path)
    assert accelerator == "h100-nvl"
    run = ("casestudy", "--stages", small, "--policy", "k8s-random", "--seeds", "1", "--jobs", "1", "--json")
    before, after = (objects(command(*run, *more)[1]) for more in ((), ("--constants", str(path))))
    assert len(before) == len(after) == 2
    assert before != after


def test_a_given_size_of_the_kv_cache_is_not_fitted(command: Command, small: str) -> None:
    code, out, _ = command(
        *("calibrate", "--stages", small, "--evaluations", "3", "--no-sensitivity", "--jobs", "1", "--json"),
        *("--kv-tokens", "200000"),
    )
    assert code == 0
    (found,) = objects(out)
    assert found["fit"]["start"]["kv_tokens"] == found["fit"]["found"]["kv_tokens"] == 200_000


def test_the_routers_cost_is_fitted_on_the_runs_behind_it(command: Command, small: str) -> None:
    code, out, _ = command("calibrate", "--stages", small, "--router-cost", "--json")
    assert code == 0
    (found,) = objects(out)
    assert found["router"]["stream_s"] > 0
    assert found["ttft_factor"] > 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("casestudy", "--pool", "tpu"), "no run of tpu"),
        (("casestudy", "--pool", "3vendor", "--rate", "86"), "was measured at 5, 15"),
        (("casestudy", "--rate", "fast"), "numbers with commas"),
        (("casestudy", "--policy", "luck"), "'luck' is not known"),
        (("casestudy", "--seeds", "0"), "--seeds: must be at least 1"),
        (("casestudy", "--scaling", "--plot", "x.svg"), "leave out --fidelity or --scaling"),
        (("casestudy", "--constants", "none.yaml"), "none.yaml"),
        (("calibrate", "--pool", "3vendor"), "no run of one kind of server alone"),
        (("calibrate", "--pool", "3vendor", "--router-cost"), "no single-vendor run behind llm-d"),
        (("calibrate", "--results", "somewhere"), "--accelerator: give the servers a name"),
        (("calibrate", "--url", "http://127.0.0.1:1"), "--kv-tokens: the server's metrics do not tell"),
    ],
)
def test_a_users_mistake_is_one_line_and_code_2(
    command: Command, arguments: tuple[str, ...], told: str
) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert told in err
