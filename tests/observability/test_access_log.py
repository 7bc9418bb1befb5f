"""One line a request."""

from __future__ import annotations

import asyncio
import io

import pytest

from pointsman.observability.access_log import FLUSH_S, MAX_LINES, AccessLog
from pointsman.testing import fleet, request
from pointsman.types import Decision, Ending, Outcome, Usage

REFUSED = Outcome(ending=Ending.REFUSED, status=429, tries=0, reason="saturated")


def fields(line: str) -> dict[str, str]:
    """After the time stamp, every word is name=value."""
    _, *words = line.split()
    return dict(word.split("=", 1) for word in words)


def lines(*told: tuple[Decision | None, Outcome]) -> list[dict[str, str]]:
    out = io.StringIO()
    log = AccessLog(out)
    for decision, outcome in told:
        log(request(id="r7", path="/v1/completions"), decision, outcome)
    assert out.getvalue() == "", "written in batches"
    log.flush()
    return [fields(line) for line in out.getvalue().splitlines()]


def test_a_line_has_what_happened() -> None:
    endpoints = fleet(1)
    decision = Decision(
        request_id="r7",
        model="m",
        at_s=0.0,
        profile="default",
        candidates=endpoints,
        chosen=endpoints[0],
        matched_tokens=128,
    )
    outcome = Outcome(
        ending=Ending.OK,
        status=200,
        endpoint="e0",
        tries=2,
        ttft_s=0.25,
        duration_s=1.5,
        usage=Usage(prompt_tokens=200, output_tokens=30, cached_tokens=96),
    )
    (line,) = lines((decision, outcome))
    expected = {
        "id": "r7",
        "path": "/v1/completions",
        "model": "m",
        "endpoint": "e0",
        "status": "200",
        "ending": "ok",
        "tries": "2",
        "prompt_tokens": "200",
        "cached_tokens": "96",
        "output_tokens": "30",
        "matched_tokens": "128",
        "reason": "-",
    }
    assert expected.items() <= line.items()


def test_what_is_not_known_has_a_mark_of_its_own() -> None:
    (line,) = lines((None, REFUSED))
    assert (line["endpoint"], line["reason"], line["status"]) == ("-", "saturated", "429")
    assert "" not in line.values()


def test_many_lines_do_not_wait_for_the_timer() -> None:
    out = io.StringIO()
    log = AccessLog(out)
    for _ in range(MAX_LINES):
        log(request(), None, REFUSED)
    assert out.getvalue().count("\n") == MAX_LINES


@pytest.mark.looptime
async def test_it_is_written_soon_and_nothing_is_lost_at_the_end() -> None:
    out = io.StringIO()
    log = AccessLog(out)
    task = asyncio.create_task(log.run())
    log(request(), None, REFUSED)
    await asyncio.sleep(FLUSH_S * 1.5)
    assert out.getvalue().count("\n") == 1
    log(request(), None, REFUSED)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert out.getvalue().count("\n") == 2
