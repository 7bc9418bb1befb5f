"""One line a request."""

from __future__ import annotations

import asyncio
import io
import threading

from pointsman.observability.access_log import MAX_BATCHES, MAX_LINES, AccessLog
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


class Reader(io.StringIO):
    """Takes what is written while ``reads`` is set, and says when it has something."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = threading.Event()
        self.reads.set()
        self.has_more = threading.Event()

    def write(self, text: str) -> int:
        self.reads.wait(10)
        written = super().write(text)
        self.has_more.set()
        return written


async def test_lines_are_written_soon_and_nothing_is_lost_at_the_end() -> None:
    out = Reader()
    log = AccessLog(out)
    task = asyncio.create_task(log.run())
    log(request(), None, REFUSED)
    assert await asyncio.to_thread(out.has_more.wait, 10)
    assert out.getvalue().count("\n") == 1
    for _ in range(MAX_LINES + 1):
        log(request(), None, REFUSED)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert out.getvalue().count("\n") == MAX_LINES + 2


async def test_a_reader_that_stops_reading_stops_nobody_else() -> None:
    out = Reader()
    out.reads.clear()
    log = AccessLog(out)
    task = asyncio.create_task(log.run())
    await asyncio.sleep(0)
    for _ in range(MAX_LINES * (MAX_BATCHES + 10)):  # returns, though nobody reads
        log(request(), None, REFUSED)
    assert 0 < log.dropped <= MAX_LINES * 10
    out.reads.set()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert out.getvalue().count("\n") == MAX_LINES * (MAX_BATCHES + 10) - log.dropped


def test_a_clients_text_stays_one_word() -> None:
    log = AccessLog(out := io.StringIO())
    log(request(model="evil\n1 id=forged"), None, REFUSED)
    log.flush()
    assert len(out.getvalue().splitlines()) == 1
    assert "forged" not in fields(out.getvalue()).get("id", "")
