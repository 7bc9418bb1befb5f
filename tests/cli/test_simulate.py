"""``pointsman simulate`` as a user runs it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pointsman.cli.main import main
from pointsman.scheduling.presets import PRESETS

SMALL = """
engines:
  - {accelerator: h100-nvl, count: 2}
  - {accelerator: gaudi3}
workload:
  kind: shared-prefix
  groups: 6
  prompts_per_group: 2
  system_prompt_len: 512
  question_len: 64
  output_len: 40
stages:
  - {rate: 5, duration_s: 4}
  - {rate: 20, duration_s: 5}
  - {rate: 40, duration_s: 5}
"""
Simulate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture
def simulate(capsys: pytest.CaptureFixture[str]) -> Simulate:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["simulate", *arguments])
        told = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, told.out, told.err

    return run


def objects(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.strip().split("\n")]


def test_a_table_has_a_line_for_each_policy_and_stage(simulate: Simulate, small: str) -> None:
    code, out, err = simulate(
        small, "--policy", "llm-d-blend", "--policy", "random", "--seeds", "2", "--jobs", "1"
    )
    assert (code, err) == (0, "")
    assert out.startswith("3 endpoints (2 h100-nvl, 1 gaudi3; granite-4.1-8b)\n")
    assert re.findall(r"^rate \d+: .*", out, re.M) == ["rate 20: 100 requests", "rate 40: 200 requests"]
    names = re.findall(r"^(llm-d-blend|random) ", out, re.M)
    assert names == ["llm-d-blend", "random"] * 4
    assert "means over 2 seeds; ± is the 95% confidence interval" in re.sub(r"\s+", " ", out)
    assert " ± " in out


def test_json_is_an_object_for_each_policy_seed_and_stage_and_a_summary(
    simulate: Simulate, small: str
) -> None:
    _, out, _ = simulate(small, "--policy", "round-robin", "--policy", "random", "--seeds", "2", "--json")
    *stages, last = objects(out)
    assert [(s["policy"], s["seed"], s["stage"], s["rate"]) for s in stages] == [
        (policy, seed, i, rate)
        for policy in ("round-robin", "random")
        for seed in (0, 1)
        for i, rate in enumerate((20, 40))
    ]
    for stage in stages:
        assert stage["output_tok_s"] == pytest.approx(stage["output_tokens"] / stage["makespan_s"])
        assert set(stage["accelerators"]) == {"h100-nvl", "gaudi3"}
        assert len(stage["parts"]) == 3
        assert "hdr" not in stage["ttft"]
    mean = next(s for s in last["summary"] if (s["policy"], s["rate"]) == ("random", 40))
    values = [s["output_tok_s"] for s in stages if (s["policy"], s["rate"]) == ("random", 40)]
    assert mean["figures"]["output_tok_s"]["mean"] == pytest.approx(sum(values) / 2)
    assert mean["figures"]["output_tok_s"]["ci95"] == pytest.approx(12.706 * abs(values[0] - values[1]) / 2)


def test_figures_do_not_depend_on_the_number_of_processes(simulate: Simulate, small: str) -> None:
    several = ("--policy", "random", "--policy", "llm-d-blend", "--seeds", "2", "--json")
    alone, together = (simulate(small, *several, "--jobs", jobs) for jobs in ("1", "3"))
    assert alone == together
    assert len(objects(alone[1])) == 9


def test_a_folder_gets_report_figures_and_charts(simulate: Simulate, small: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    _, out, _ = simulate(small, "--policy", "random", "--seeds", "1", "--output", str(folder))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(files) == {
        "stages.txt", "stages.jsonl", "policies.svg", "policies.png", "ladder.svg", "ladder.png",
    }  # fmt: skip
    assert out.startswith(files["stages.txt"].decode())
    assert all(name in out for name in files)
    assert len(objects(files["stages.jsonl"].decode())) == 3
    assert files["policies.png"].startswith(b"\x89PNG")
    assert b"random" in files["ladder.svg"] or b"<svg" in files["ladder.svg"]


def test_keys_of_the_scenario_can_be_set(simulate: Simulate, small: str) -> None:
    sets = ("--set", "engines.0.count=4", "--set", "stages.2.rate=10", "--set", "workload.output_len=20")
    _, out, _ = simulate(small, "--policy", "random", "--seeds", "1", "--json", *sets)
    first, last, _ = objects(out)
    assert (first["rate"], last["rate"], len(last["parts"])) == (20, 10, 5)
    assert last["output_tokens"] == 50 * 20


def test_a_picker_configuration_is_a_policy(simulate: Simulate, small: str, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        "apiVersion: inference.networking.x-k8s.io/v1alpha1\nkind: EndpointPickerConfig\n"
        "plugins: [{type: random-picker}]\n"
        "schedulingProfiles: [{name: default, plugins: [{pluginRef: random-picker}]}]\n"
    )
    code, out, err = simulate(small, "--policy", str(config), "--seeds", "1", "--json")
    assert (code, err) == (0, "")
    assert {s["policy"] for s in objects(out)[:-1]} == {"mine"}


DECISION_KEYS = {
    *("request_id", "model", "at_s", "profile", "candidates", "kept", "scores", "weights", "chosen"),
    *("fallbacks", "tried_before", "prompt_tokens", "matched_tokens", "matched_by", "predicted", "outcome"),
}


def test_decisions_are_equal_in_every_process_and_in_the_order_of_the_requests(
    small: str, tmp_path: Path
) -> None:
    digests = set()
    for hash_seed in ("0", "1", "4711"):
        path = tmp_path / hash_seed
        command = [sys.executable, "-m", "pointsman", "simulate", small, "--policy", "llm-d-blend"]
        subprocess.run(
            [*command, "--seeds", "1", "--seed", "5", "--decisions", str(path)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
        )
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1
    decisions = objects(path.read_text())
    assert [int(d["request_id"], 16) for d in decisions] == list(range(1, 321))
    for decision in decisions:
        assert set(decision) == DECISION_KEYS
        assert decision["outcome"]["ending"] == "ok"
        assert decision["chosen"] in decision["candidates"]
        assert set(decision["scores"]) == set(decision["candidates"])


def test_figures_of_every_preset_are_the_same_in_all_processes(small: str) -> None:
    """Whatever Python hashes strings to: nothing may hang on the order of a set."""
    policies = [word for name in PRESETS for word in ("--policy", name)]
    command = [sys.executable, "-m", "pointsman", "simulate", small, *policies, "--seeds", "1", "--json"]
    told = {
        subprocess.run(
            [*command, "--jobs", "1", "--set", "stages.2.rate=20"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
        ).stdout
        for hash_seed in ("0", "4711")
    }
    assert len(told) == 1
    assert len(objects(told.pop().decode())) == 2 * len(PRESETS) + 1


def test_figures_need_no_further_package_and_charts_name_theirs(small: str, tmp_path: Path) -> None:
    blocked = "import sys; sys.modules |= {'hdrh': None, 'matplotlib': None}; "
    start = f"{blocked}from pointsman.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", start, "simulate", small, "--policy", "random", "--seeds", "1"]
    plain = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "rate 40: 200 requests" in plain.stdout
    charts = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True)
    assert (charts.returncode, charts.stdout) == (2, "")
    assert "charts need the package matplotlib: pip install" in charts.stderr


def test_progress_is_shown_on_a_terminal_only(small: str) -> None:
    command = [sys.executable, "-m", "pointsman", "simulate", small, "--policy", "random", "--seeds", "2"]
    ours, theirs = pty.openpty()
    shown = b""
    with subprocess.Popen([*command, "--jobs", "1"], stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while part := os.read(ours, 4096):
                shown += part
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    assert [f"{n} of 2 runs".encode() in shown for n in (0, 1, 2)] == [True, True, True]
    assert shown.endswith(b"\r\x1b[K")
    assert b"of 2 runs" not in out


def test_capacity_is_told_for_each_policy_and_seed(simulate: Simulate, small: str, tmp_path: Path) -> None:
    options = ("--capacity", "--minutes", "0.5", "--set", "slo={ttft_s: 0.3, tpot_s: 0.02}")
    policies = ("--policy", "random", "--policy", "round-robin")
    code, out, err = simulate(small, *options, *policies, "--seeds", "2", "--output", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    assert "held for 0.5 virtual minutes with TTFT p99 ≤ 300 ms, TPOT p99 ≤ 20 ms" in out
    assert re.findall(r"^(random|round-robin) ", out, re.M) == ["random", "round-robin"]
    *found, last = objects((tmp_path / "out" / "capacity.jsonl").read_text())
    assert [(f["policy"], f["seed"]) for f in found] == [
        (policy, seed) for policy in ("random", "round-robin") for seed in (0, 1)
    ]
    for each in found:
        assert each["rate"] < each["failed_rate"] <= each["rate"] * 1.04
        assert each["at_rate"]["ttft"]["p99"] <= 0.3
        assert each["at_rate"]["tpot"]["p99"] <= 0.02
    assert last["summary"]["random"]["mean"] == pytest.approx(sum(f["rate"] for f in found[:2]) / 2)
    assert (tmp_path / "out" / "capacity.png").stat().st_size > 1000


def test_a_grid_is_ranked_over_scenarios_and_names_the_best(
    simulate: Simulate, small: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(SMALL.replace("groups: 6", "groups: 12"))
    folder = tmp_path / "out"
    code, out, err = simulate(
        *(small, str(other), "--policy", "llm-d-blend", "--seeds", "2", "--output", str(folder)),
        *("--grid", "prefix-cache-scorer.weight=0,3", "--grid", "queue-scorer.weight=1,9"),
        *("--objective", "ttft-p99"),
    )
    assert (code, err) == (0, "")
    *points, last = objects((folder / "grid.jsonl").read_text())
    assert len(points) == 5
    scores = [point["score"]["mean"] for point in points]
    assert scores == sorted(scores, reverse=True)
    assert set(points[0]["values"]) == {"small rate 20", "small rate 40", "other rate 20", "other rate 40"}
    best = last["summary"]["best"]
    assert best == points[0]["policy"]
    assert f"Best: --policy '{best}'" in out
    assert (folder / "grid.png").exists()
    value = points[0]["values"]["small rate 40"]["mean"]
    _, again, _ = simulate(small, "--policy", best, "--seeds", "2", "--json")
    ttfts = [o["ttft"]["p99"] for o in objects(again)[:-1] if o["rate"] == 40]
    assert sum(ttfts) / 2 == pytest.approx(value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--policy", "llmd-blend"), "policy: 'llmd-blend' is not known; did you mean llm-d-blend?"),
        (("--policy", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("--policy", "random", "--policy", "random"), "--policy: random is there twice"),
        (("--seeds", "0"), "--seeds: must be at least 1"),
        (("--jobs", "0"), "--jobs: must be at least 1"),
        (("--decisions", "x.jsonl"), "--decisions: of one run; give one --policy and --seeds 1"),
        (("--grid", "queue-scorer.weight=1,2"), "--grid: of which preset? Give its --policy"),
        (("--policy", "llm-d-blend", "--grid", "weight=1"), "--grid weight=1: write it as plugin.parameter="),
        (("--policy", "llm-d-blend", "--grid", "queue-scorer.wait=1"), "queue-scorer has no parameter wait"),
        (("--policy", "llm-d-blend:queue-scorer=1"), "'queue-scorer=1': write settings as plugin.parameter"),
        (("--policy", "llm-d-blend:queue.weight=1"), "it has no queue"),
        (("a.yaml", "b.yaml"), "a.yaml: cannot be read"),
        (("SMALL", "SMALL", "--grid", "a.b=1", "--policy", "random"), "SCENARIO: two files have the same"),
        (("--minutes", "0", "--capacity"), "--minutes: must be above 0"),
        (("--capacity", "--set", "slo={}", "--jobs", "2"), "slo: without a limit any rate is held"),
        (("--capacity", "--policy", "random", "--grid", "weight-scorer.weight=1"), "one at a time"),
        (("--decisions", "x", "--capacity", "--seeds", "1", "--policy", "random"), "--decisions: of one run"),
        (("--output", "/proc/nowhere"), "--output: /proc/nowhere"),
        (("--set", "stages"), "--set stages: write it as section.key=value"),
        (("--set", "timeout=3"), "scenario: timeout: no such setting; docs/reference/scenario.md lists"),
        (("--set", "stages.1.rate=-1"), "scenario: stages[1].rate: Expected `float` > 0.0"),
        (("--set", "stages.1.rte=1"), "scenario: stages[1].rte: no such setting"),
        (("--set", "stages.1.rate=null"), "stages[1]: give rate or concurrency"),
        (("--set", "stages.1.concurrency=3"), "stages[1]: rate and concurrency; leave one out"),
        (("--set", "stages=[]"), "stages: empty"),
        (("--set", "engines.0.accelerator=h200"), "accelerator: 'h200' is not known"),
        (("--set", "engines=[]"), "engines: empty"),
        (("--set", "workload.groups=0"), "scenario: workload.groups: Expected `int` >= 1"),
        (("--set", "incidents=[{at_s: 1, kind: leave, endpoint: x}]"), "incidents[0].endpoint: there is no"),
        (("no-such.yaml",), "no-such.yaml: cannot be read"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_code_2(
    simulate: Simulate, small: str, arguments: tuple[str, ...], says: str
) -> None:
    code, out, err = simulate(*(small if word == "SMALL" else word for word in arguments))
    assert (code, out) == (2, "")
    assert says in err
    assert err.startswith("pointsman simulate: ")
    assert err.count("\n") == 1
