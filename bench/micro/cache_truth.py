"""What cache truth costs: comparing a request, looking at an endpoint, and asking streams for usage.

python bench/micro/cache_truth.py      CPU time of one, microseconds: median and p99 of the rounds
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence

from pointsman import api
from pointsman.config import Endpoint as EndpointSettings
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.target import targets_of
from pointsman.prefix.kv_source import KvEventSource
from pointsman.prefix.precise import PreciseIndex
from pointsman.proxy.cache_truth.counts import RECENT
from pointsman.proxy.cache_truth.observer import CacheTruth
from pointsman.proxy.usage_filter import UsageFilter, asking
from pointsman.testing import request
from pointsman.types import Decision, Ending, Outcome, Usage

ROUNDS, TIMES = 50, 2000
ENDPOINTS = 100


def measure(name: str, work: Callable[[], object], each: int = 1, times: int = TIMES) -> None:
    """``work`` does ``each`` of what is measured."""
    found = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(times):
            work()
        found.append((time.process_time() - began) / times / each * 1e6)
    found.sort()
    print(f"{name:44} {statistics.median(found):6.2f} {found[int(0.99 * len(found))]:6.2f}")


def compared() -> None:
    pool, precise = Pool(time.monotonic), PreciseIndex()
    sources: Sequence[KvEventSource] = ()
    truth = CacheTruth(pool, precise, lambda: sources, time.monotonic)
    members = [
        pool.add(targets_of(EndpointSettings(url=f"http://10.0.0.{i}:8000"))[0], "bench")
        for i in range(ENDPOINTS)
    ]
    zeros = ("frames", "events", "blocks", "gaps", "replays", "replays_failed", "restarts", "cleared")
    sources = [
        KvEventSource(
            endpoint=member.endpoint.name,
            rank=0,
            address="",
            replay="",
            connected=True,
            live=True,
            last_event_s=time.monotonic(),
            malformed=0,
            skipped=0,
            **dict.fromkeys(zeros, 0),
        )
        for member in members
    ]
    chosen = members[0].endpoint
    decision = Decision("r", "m", time.monotonic(), "p", [chosen], chosen, matched_tokens=960)
    decision.prompt_tokens, decision.sent_tokens, decision.by_events = 1000, 900, True
    asked = request("x")
    told, untold = (
        Outcome(ending=Ending.OK, status=200, endpoint=chosen.name, usage=Usage(1000, 1, cached))
        for cached in (960, None)
    )
    for member in members:
        decision.chosen = member.endpoint
        for _ in range(RECENT):
            truth(asked, decision, told)
    truth.check()
    decision.chosen = chosen
    measure("a request whose answer tells", lambda: truth(asked, decision, told))
    measure("a request whose answer does not", lambda: truth(asked, decision, untold))
    measure(f"an endpoint looked at, one of {ENDPOINTS}", truth.check, ENDPOINTS, 20)


def streams() -> None:
    choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None, "stop_reason": None}
    body = {"id": "cmpl-1", "object": "text_completion", "created": 1790000000, "model": "granite-4.1-8b"}
    event = f"data: {json.dumps(body | {'choices': [choice]}, separators=(',', ':'))}\n\n".encode()
    chunk = b"%x\r\n%b\r\n" % (len(event), event)
    written: list[bytes] = []

    def write(data: bytes) -> None:
        written[:] = (data,)

    whole = UsageFilter(write, chunked=True)
    measure("a read of one event", lambda: whole.write(chunk))
    measure("a read of sixteen events", lambda: whole.write(chunk * 16))
    cut = UsageFilter(write, chunked=True)
    cut.write(chunk[:50])

    def two() -> None:
        cut.write(chunk[50:])
        cut.write(chunk[:50])

    measure("an event in two reads", two)
    for size in (500, 32_000):
        text = json.dumps({"model": "m", "stream": True, "prompt": "x" * size}).encode()
        parsed = api.find("/v1/completions").parse("r", "/v1/completions", {}, text)
        measure(f"to ask in a body of {size / 1000:g} KB", lambda parsed=parsed: asking(parsed))


if __name__ == "__main__":
    print(f"{'us':44} {'median':>6} {'p99':>6}")
    compared()
    streams()
