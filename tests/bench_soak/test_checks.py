"""Each check of a soak fails on what it is there to find."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from bench.soak import checks
from bench.soak.gateway import INDEX_BYTES, View, view_of
from bench.soak.load import Tally
from bench.soak.verdict import Verdict

PAGE = """\
# HELP pointsman_requests_total Requests by how they ended.
pointsman_requests_total{ending="ok",endpoint="a:1",model="m",reason="",status="200"} 90.0
pointsman_requests_total{ending="cancelled",endpoint="a:1",model="m",reason="client_left",status="200"} 4.0
pointsman_requests_total{ending="refused",endpoint="",model="",reason="bad_request",status="400"} 6.0
pointsman_retries_total{endpoint="a:1"} 3.0
pointsman_inflight_requests{endpoint="a:1"} 0.0
pointsman_inflight_uncached_tokens{endpoint="a:1"} 0.0
pointsman_prefix_index_bytes 1000.0
"""


def view(page: str = PAGE, requests: int = 0, breaker: str = "closed", *, reached: bool = True) -> View:
    view = view_of(page)
    in_flight = {"requests": requests, "uncached_prompt_tokens": 0}
    view.listed = {"a:1": {"in_flight": in_flight, "breaker": breaker, "reached": reached}}
    return view


def states(**changes: int) -> dict[str, dict[str, Any]]:
    return {"a:1": {"running": 0, "waiting": 0, "held": 0} | changes}


def tally(**changes: int) -> Tally:
    """100 requests: 89 surely answered, 6 refused, 5 left by the client."""
    endings = Counter({"ok": 89, "refused": 6, "": 5})
    return Tally(sent=changes.get("sent", 100), endings=endings, verdicts=Counter({Verdict.OK: 95}))


def failed(seen: View, engines: dict[str, dict[str, Any]], sent: Tally) -> list[str]:
    return [check.name for check in checks.when_quiet(seen, engines, sent) if not check.ok]


def test_nothing_is_wrong_when_all_is_quiet() -> None:
    assert failed(view(), states(), tally()) == []
    assert view().retries == 3


@pytest.mark.parametrize("gauge", ["requests", "uncached_tokens"])
@pytest.mark.parametrize("drift", ["1.0", "-1.0"])
def test_a_gauge_that_drifted_either_way_is_found(gauge: str, drift: str) -> None:
    line = f'pointsman_inflight_{gauge}{{endpoint="a:1"}} '
    assert failed(view(PAGE.replace(f"{line}0.0", line + drift)), states(), tally()) == [
        "in-flight gauges are zero"
    ]


def test_a_leak_on_the_endpoints_page_is_found() -> None:
    assert failed(view(requests=1), states(), tally()) == ["/endpoints agrees"]


@pytest.mark.parametrize("what", ["running", "waiting", "held"])
def test_an_engine_that_works_for_nobody_is_found(what: str) -> None:
    assert failed(view(), states(**{what: 1}), tally()) == ["engines run nothing"]


def test_a_request_counted_twice_or_not_at_all_is_found() -> None:
    assert failed(view(), states(), tally(sent=99)) == ["every request was counted once"]
    assert failed(view(), states(), tally(sent=101)) == ["every request was counted once"]


@pytest.mark.parametrize(
    ("ok", "refused", "cancelled"),
    [(88, 6, 6), (95, 5, 0), (91, 3, 6), (89, 5, 6)],
)
def test_an_ending_that_the_clients_did_not_see_is_found(ok: int, refused: int, cancelled: int) -> None:
    page = (
        PAGE.replace(" 90.0", f" {ok}.0").replace(" 4.0", f" {cancelled}.0").replace(" 6.0", f" {refused}.0")
    )
    assert failed(view(page), states(), tally()) == ["every request was counted once"]


def test_an_index_above_its_bound_or_empty_is_found() -> None:
    for size in (INDEX_BYTES + 1, 0):
        page = PAGE.replace("bytes 1000.0", f"bytes {size}.0")
        assert failed(view(page), states(), tally()) == ["prefix index is below its bound"]


def test_a_breaker_that_stays_open_is_found() -> None:
    assert checks.recovered(view()).ok
    assert not checks.recovered(view(breaker="open")).ok
    assert not checks.recovered(view(breaker="half-open")).ok
    assert not checks.recovered(view(reached=False)).ok
    assert not checks.recovered(View()).ok


def verdicts(**counts: int) -> list[bool]:
    return [
        c.ok for c in checks.answered(Tally(verdicts=Counter({Verdict[n]: k for n, k in counts.items()})))
    ]


def test_one_lost_request_is_too_many() -> None:
    assert verdicts(OK=10_000, CUT=100, LEFT=50) == [True, True]
    for bad in ("LOST", "CUT_NO_CAUSE", "SILENT", "NEVER", "WRONG"):
        assert verdicts(OK=10_000, **{bad: 1}) == [False, True]
    assert verdicts(LEFT=10) == [False, True]


def test_requests_that_met_bad_engines_only_have_to_be_rare() -> None:
    assert verdicts(OK=995, UNLUCKY=5) == [True, True]
    assert verdicts(OK=990, UNLUCKY=10) == [True, False]


def test_memory_that_grows_is_found_and_warming_up_is_not() -> None:
    def curve(end_bytes: int) -> list[tuple[float, int]]:
        warming = [(float(t), 20_000_000 + t * 200_000) for t in range(120)]
        growth = (end_bytes - 44_000_000) // 480
        return warming + [(120.0 + t, 44_000_000 + t * growth) for t in range(480)]

    assert checks.flat(curve(50_000_000), 120.0).ok
    assert not checks.flat(curve(70_000_000), 120.0).ok
    assert "not judged" in checks.flat(curve(70_000_000)[:150], 120.0).detail


def test_files_may_grow_by_a_scrape_connection_an_engine() -> None:
    assert checks.files(20, 28, engines=8).ok
    assert not checks.files(20, 29, engines=8).ok
