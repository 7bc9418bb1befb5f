"""When a run over HTTP counts, and what is said of it."""

from __future__ import annotations

import msgspec
import pytest
from bench.twin_live import report
from bench.twin_live.accounts import Account, Accounts
from bench.twin_live.compare import Row
from bench.twin_live.live import Live
from bench.twin_live.twin import Range, Spread

from pointsman.bench.client import Record
from pointsman.bench.report import Stage, summarise
from pointsman.bench.site import Lag
from pointsman.bench.stream import Gaps
from pointsman.types import Usage

STEADY = Spread(output_tok_s=Range(99, 101), ttft_p50_s=Range(0.1, 0.102))
PROCESSES = ("fleet", "router", "load generator")


def stage(ttft_s: float = 0.1, end_s: float = 10.0, late_s: float = 0.0) -> Stage:
    record = Record(
        due_s=0.0,
        sent_s=late_s,
        first_s=ttft_s,
        last_s=end_s,
        end_s=end_s,
        events=10,
        usage=Usage(7200, 1000, 6000),
    )
    return summarise("rate 1", [record], Gaps(), rate=1.0)


def row(
    live: Stage, spread: Spread = STEADY, lags_s: tuple[float, ...] = (0.0, 0.0, 0.0), speed: float = 1.0
) -> Row:
    lags = {name: Lag(lag_s, 0.1) for name, lag_s in zip(PROCESSES, lags_s, strict=True)}
    measured = Live(stage=live, lags=lags)
    return Row(
        case="one", policy="round-robin", seed=0, speed=speed, twin=stage(), spread=spread, live=measured
    )


def test_figures_within_ten_percent_agree() -> None:
    assert row(stage()).verdict == "agrees"
    assert row(stage(ttft_s=0.109, end_s=10.9)).verdict == "agrees"
    near = row(stage(ttft_s=0.109, end_s=9.2))
    assert (near.tok_s_ratio, near.ttft_ratio) == (pytest.approx(10 / 9.2), pytest.approx(1.09))


@pytest.mark.parametrize(
    "live", [stage(ttft_s=0.111), stage(ttft_s=0.089), stage(end_s=11.2), stage(end_s=9)]
)
def test_one_figure_further_off_differs(live: Stage) -> None:
    assert row(live).verdict == "differs"


def test_figures_the_twin_itself_does_not_hold_to_are_chaotic() -> None:
    wide = Spread(output_tok_s=Range(80, 100), ttft_p50_s=Range(0.1, 0.1))
    assert wide.width == pytest.approx(2 * 20 / 180)
    assert row(stage(end_s=12), wide).verdict == "chaotic"
    assert row(stage(end_s=10), wide).verdict == "agrees"


@pytest.mark.parametrize("process", [0, 1, 2])
def test_a_process_that_lagged_makes_the_run_void_however_well_the_figures_agree(process: int) -> None:
    lags_s = tuple(0.0011 if i == process else 0.0009 for i in range(3))
    (reason,) = row(stage(), lags_s=lags_s).void
    assert reason == (
        f"the {PROCESSES[process]} ran 1.10 ms late on average, more than 1% of the TTFT (100 ms of our time)"
    )
    assert row(stage(), lags_s=lags_s).verdict == "void"


def test_lag_is_measured_against_the_time_that_a_token_takes_here() -> None:
    lags_s = (0.0009, 0.0, 0.0)
    assert row(stage(), lags_s=lags_s, speed=1.0).void == []
    assert len(row(stage(), lags_s=lags_s, speed=2.0).void) == 1


def test_requests_that_were_sent_late_make_the_run_void() -> None:
    assert row(stage(late_s=0.009)).void == []
    (reason,) = row(stage(late_s=0.012)).void
    assert reason.startswith("the load generator sent requests up to 12.0 ms late (p99)")


def test_requests_counted_differently_are_found() -> None:
    one, other = Account("a", 100, 64, 10), Account("a", 100, 48, 10)
    assert Accounts(twin=[one, one], live=[one, one]).differ == []
    assert Accounts(twin=[one, one], live=[one, other]).differ == [1]


def test_the_report_has_a_line_a_row_and_every_reason() -> None:
    rows = [row(stage()), row(stage(ttft_s=0.2), lags_s=(0.005, 0.0, 0.0))]
    accounts = Accounts(twin=[Account("a", 100, 64, 10)], live=[Account("a", 100, 64, 10)])
    text = report.markdown(rows, accounts)
    assert (
        "| one | round-robin | 0 | 100 | 100 | 1.000 | 100 ms | 100 ms | 1.000 | 99 to 101 | 100 to 102 ms |"
        in text
    )
    assert "- void: one, round-robin, seed 0: the fleet ran 5.00 ms late" in text
    assert "| live | 100 | 64 | 10 |" in text
    told = msgspec.json.decode(report.to_json(rows, accounts))
    assert [r["verdict"] for r in told["rows"]] == ["agrees", "void"]
    assert told["accounts"] == {"requests": 1, "differ": []}
