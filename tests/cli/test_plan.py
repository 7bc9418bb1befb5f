"""``pointsman plan`` as a user runs it, on traces of ``simulate`` and of a live gateway."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pointsman.cli.main import main
from pointsman.proxy.application import Application
from pointsman.sim.fleet import running_fleet
from pointsman.sim.spec import EngineSpec
from pointsman.testing.client import RawClient, message
from pointsman.testing.serving import settings

SMALL = """
engines:
  - {accelerator: h100-nvl, count: 2, price_per_hour: 3.0}
  - {accelerator: gaudi3, price_per_hour: 1.0}
workload:
  {kind: shared-prefix, groups: 6, prompts_per_group: 4, system_prompt_len: 1024, question_len: 64,
   output_len: 60}
stages: [{rate: 20, duration_s: 30}]
warm_up_stages: 0
"""
SLO = ("--slo-ttft-ms", "500", "--slo-tpot-ms", "50")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("trace")
    scenario, path = folder / "small.yaml", folder / "trace.jsonl"
    scenario.write_text(SMALL)
    with pytest.raises(SystemExit) as left:
        main(["simulate", str(scenario), "--policy", "default", "--seeds", "1", "--trace", str(path)])
    assert left.value.code == 0
    return str(path)


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["plan", "--jobs", "1", "--seeds", "1", *arguments])
        told = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, told.out, told.err

    return run


def names(out: str) -> list[str]:
    """The lines of the table of alternatives, by what comes before the policy."""
    table = out.split("\n\n")[3].splitlines()[1:]
    return [re.split(r"  +", row)[0] for row in table]


def test_its_own_error_comes_first_then_the_alternatives(plan: Run, trace: str) -> None:
    code, out, err = plan(trace, "--add", "gaudi3", "--remove", "h100-nvl-0", *SLO)
    assert (code, err) == (0, "")
    head, error, verdict, table, *_ = out.strip().split("\n\n")
    assert head.startswith("600 requests in ")
    assert "to 3 endpoints (2 h100-nvl, 1 gaudi3)" in head
    rows = [line.split("  ")[0] for line in error.splitlines()]
    assert rows == ["", "as it happened", "the same in the twin", "error"]
    assert verdict.startswith("The twin is near enough")
    assert names(out) == ["as recorded", "- h100-nvl-0 + gaudi3"]
    assert re.search(r"price/h +tokens/unit", table)
    assert re.search(r"as recorded +least-cost .* 7\.00 ", table)
    assert re.search(r"\+ gaudi3 +least-cost .* 5\.00 ", table)


def test_each_change_can_be_an_alternative_under_several_policies(plan: Run, trace: str) -> None:
    changes = ("--add", "2xgaudi3", "--replace", "h100-nvl=mi325x", "--each", "--scale", "2")
    _, out, _ = plan(trace, *changes, "--policy", "llm-d-blend", "--policy", "round-robin")
    same = ["as recorded", "2 x the load", "same fleet", "same fleet"]
    assert names(out) == [*same, *["h100-nvl=mi325x"] * 2, *["+ 2xgaudi3"] * 2]
    assert "no mi325x was recorded: its speed is that of the simulator's mi325x" in out
    assert "within SLO" not in out, "nobody gave limits"


def test_json_has_errors_alternatives_and_the_cheapest(plan: Run, trace: str) -> None:
    _, out, _ = plan(trace, "--cheapest", "--more", "1", "--json", *SLO)
    told: dict[str, Any] = json.loads(out)
    assert set(told) >= {
        "recorded",
        "extrapolated",
        "prediction_error",
        "believable",
        "alternatives",
        "cheapest",
    }
    assert [a["name"] for a in told["alternatives"]] == ["as recorded", "cheapest"]
    was, best = told["alternatives"]
    assert was["endpoints"] == {"h100-nvl": 2, "gaudi3": 1}
    assert was["price_per_hour"] == 7.0
    assert was["tokens_per_unit"] == pytest.approx(was["output_tok_s"] * 3600 / 7.0)
    assert best["within_slo"] >= 0.99
    assert best["price_per_hour"] == told["cheapest"]["price_per_hour"] < 7.0
    assert sum(best["requests_by_kind"].values()) == best["requests"]
    figures = {each["figure"]: each for each in told["prediction_error"]}
    assert abs(figures["output tok/s"]["error"]) < 0.05


def test_prices_given_count_for_more_than_recorded_ones(plan: Run, trace: str) -> None:
    dear = ("--price", "gaudi3=50", "--price", "mi325x=60")
    _, out, _ = plan(trace, "--cheapest", "--more", "0", "--json", *dear, *SLO)
    assert set(json.loads(out)["cheapest"]["endpoints"]) == {"h100-nvl"}


def test_what_is_not_modelled_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plan", "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "not modelled: the network" in out
    assert "extrapolated" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--add", "4xmi400"), "--add: 'mi400' is no kind of endpoint"),
        (("--remove", "h100-nvl", "--remove", "gaudi3"), "leaves no endpoint"),
        (("--policy", "best"), "policy: 'best' is not known"),
        (("--price", "gaudi3"), "--price: 'gaudi3': write KIND=NUMBER"),
        (("--price", "gaudi4=1"), "--price: 'gaudi4' is no kind of endpoint; did you mean gaudi3?"),
        (("--scale", "0"), "--scale: must be a number above 0"),
        (("--slo-ttft-ms", "-1"), "--slo-ttft-ms: must be a number above 0"),
        (("--seeds", "0"), "--seeds: must be at least 1"),
        (("--cheapest",), "--cheapest: give --slo-ttft-ms or --slo-tpot-ms"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    plan: Run, trace: str, arguments: tuple[str, ...], says: str
) -> None:
    code, out, err = plan(trace, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("pointsman plan: ")
    assert says in err
    assert err.count("\n") == 1


def test_a_file_that_is_no_trace_is_one_line_and_exit_code_2(plan: Run, tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 1, "output_length": 1}\n')
    for name, says in ((path, "is no trace of `pointsman serve`"), (tmp_path / "none", "No such file")):
        code, _, err = plan(str(name))
        assert code == 2
        assert says in err
        assert err.count("\n") == 1


def test_the_trace_of_several_runs_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main(["simulate", "--seeds", "2", "--trace", str(tmp_path / "t")])
    assert left.value.code == 2
    assert "--trace: of one run" in capsys.readouterr().err


SPEED = 20.0
SYSTEM = "You are a careful assistant. " * 40


async def test_a_live_gateway_writes_a_trace_that_can_be_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    specs = [EngineSpec(accelerator=name, name=name) for name in ("h100-nvl", "mi325x")]
    async with running_fleet(specs, speed=SPEED) as engines:
        listed = [{"url": e.url, "name": e.name, "labels": {"accelerator": e.name}} for e in engines]
        told = settings(*listed, scheduling={"preset": "least-cost"}, trace={"path": str(path)})
        app = Application(told, lambda: time.monotonic() * SPEED, out=None)
        async with app.running():

            async def client(number: int) -> None:
                async with RawClient(app.port) as raw:
                    for turn in range(5):
                        body = {
                            "model": "granite-4.1-8b",
                            "messages": [
                                {"role": "system", "content": SYSTEM},
                                {"role": "user", "content": f"secret {number} {turn}"},
                            ],
                            "stream": True,
                            "stream_options": {"include_usage": True},
                            "max_tokens": 50,
                        }
                        answer = await raw.ask(message("POST", "/v1/chat/completions", body))
                        assert answer.status == 200

            await asyncio.gather(*(client(number) for number in range(8)))
    content = path.read_text()
    assert "secret" not in content
    assert "careful" not in content
    lines = [json.loads(line) for line in content.splitlines()]
    assert [line[0] for line in lines[:2]] == ["pointsman-trace", "fleet"]
    assert [line[0] for line in lines[2:]] == ["r"] * 40 + ["fleet"]
    assert {e["name"] for e in lines[-1][2] if e["learned"]} == {"h100-nvl", "mi325x"}
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["plan", str(path), "--add", "mi325x", "--jobs", "1", "--json"])
    assert left.value.code == 0
    planned = json.loads(capsys.readouterr().out)
    assert [a["ok"] for a in planned["alternatives"]] == [a["requests"] for a in planned["alternatives"]]
    assert planned["alternatives"][1]["endpoints"] == {"h100-nvl": 1, "mi325x": 2}
    assert planned["recorded"]["ttft"]["count"] == planned["recorded"]["ok"] > 20
