"""A soak in ten seconds: the real router and engines, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from bench.soak import report
from bench.soak.run import Pause, Plan, Result, soak
from bench.soak.verdict import Verdict

QUICK = ("breaker.max_open_s=2", "upstream.idle_s=1")


async def run(plan: Plan, out: Path) -> Result:
    lines: list[str] = []

    def say(result: Result, pause: Pause) -> None:
        lines.append(report.line(result, pause))

    result = await soak(plan, out, say)
    assert len(lines) == len(result.pauses)
    return result


async def test_nothing_is_lost_and_nothing_drifts_while_engines_fail(tmp_path: Path) -> None:
    plan = Plan(seconds=10.0, round_s=5.0, calm_s=1.0, rate=50.0, seed=3, settings=QUICK)
    result = await run(plan, tmp_path)
    if result.failed and result.starved:
        pytest.skip(f"the machine was too busy for time-outs of 2 s: {result.lags_s}")
    assert result.failed == [], result.tally.stories
    assert len(result.pauses) == 3
    assert sum(result.faults.values()) >= 5
    assert result.retries > 0
    assert result.tally.verdicts[Verdict.OK] > 250
    assert {"stream", "plain", "leave", "slow"} <= result.tally.by_kind.keys()
    told = msgspec.json.decode(report.to_json(result))
    assert told["passed"]
    assert told["verdicts"]["ok"] == result.tally.verdicts[Verdict.OK]
    assert "**NO**" not in report.markdown(result)


async def test_a_router_that_does_not_try_elsewhere_fails_the_soak(tmp_path: Path) -> None:
    """Proof that losses are seen: with one try, engines that refuse or die lose requests."""
    plan = Plan(
        seconds=3.0, round_s=3.0, calm_s=0.5, rate=50.0, engines=4, settings=(*QUICK, "upstream.tries=1")
    )
    result = await run(plan, tmp_path)
    assert result.tally.verdicts[Verdict.LOST] > 0
    assert "no request was lost or wrong" in {check.name for check in result.failed}
    assert "**NO**" in report.markdown(result)
