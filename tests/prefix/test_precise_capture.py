"""A real engine's events and requests, replayed: what the index says beforehand is what the engine
reported.
"""

from __future__ import annotations

import base64
import gzip
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pointsman.prefix.blocks_schemes import Sha256Cbor
from pointsman.prefix.kv_wire import Cleared, Event, decode
from pointsman.prefix.precise import PreciseIndex
from pointsman.testing import request
from pointsman.types import InferenceRequest, Tokenized

CAPTURE = Path(__file__).parent / "capture"
SLOT = 3
ADAPTERS = ("lora-a", "lora-b")
"""As the engine lists them at /v1/models."""


def lines(name: str) -> list[dict[str, Any]]:
    with gzip.open(CAPTURE / f"{name}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def frames() -> Iterator[tuple[float, list[Event]]]:
    """When the engine sent each message, and what it says."""
    for line in lines("frames"):
        batch = decode(base64.b64decode(line["frames_b64"][2]))
        assert not batch.skipped
        yield batch.ts, batch.events


def asked(line: dict[str, Any]) -> InferenceRequest:
    ids = array("I", line["prompt_token_ids"]).tobytes()
    body = line["body"]
    return request(model=body["model"], cache_salt=body.get("cache_salt", ""), tokenized=(Tokenized(ids),))


def replay(index: PreciseIndex, slots: Sequence[int]) -> Iterator[tuple[InferenceRequest, dict[str, Any]]]:
    """Every answered request with the index as it was when the request was sent."""
    events = list(frames())
    for line in lines("requests"):
        while events and events[0][0] < line["t_start"]:
            ts, batch = events.pop(0)
            for slot in slots:
                index.apply(slot, batch, ts)
        if line["path"] == "/reset_prefix_cache":
            for slot in slots:  # the event comes with the next request only
                index.clear(slot)
        if line["status"] == 200 and line["usage"]:
            yield asked(line), line
    for ts, batch in events:  # of the last requests, which came all at once
        for slot in slots:
            index.apply(slot, batch, ts)


def test_predicts_what_the_engine_reports_for_every_request_that_came_alone() -> None:
    index = PreciseIndex()
    index.add(SLOT)
    index.name_adapters(ADAPTERS)
    exact: Counter[str] = Counter()
    hits = 0
    for one, line in replay(index, [SLOT]):
        if line["scenario"].startswith("concurrent"):
            continue
        match = index.match(one, line["t_start"])
        cached = line["usage"]["prompt_tokens_details"]["cached_tokens"]
        exact["exact" if match.tokens(SLOT) == cached else line["scenario"]] += 1
        hits += cached > 0
    assert exact == {"exact": 178}
    assert hits > 70
    assert index.unknown == index.skipped == index.evicted == 0


def test_an_engines_own_hashes_as_keys_find_the_same() -> None:
    index = PreciseIndex(scheme=Sha256Cbor())
    index.add(SLOT)
    index.name_adapters(ADAPTERS)
    exact: Counter[str] = Counter()
    for one, line in replay(index, [SLOT]):
        if not line["scenario"].startswith("concurrent") and line["body"]["model"] not in ADAPTERS:
            cached = line["usage"]["prompt_tokens_details"]["cached_tokens"]
            exact[
                "exact" if index.match(one, line["t_start"]).tokens(SLOT) == cached else line["scenario"]
            ] += 1
    assert exact == {"exact": 174}


def test_what_was_just_sent_covers_requests_that_overlap() -> None:
    """Six at once with the same prompt: by events alone the index would know nothing of it."""
    index = PreciseIndex()
    index.add(SLOT)
    found = []
    for one, line in replay(index, [SLOT]):
        match = index.match(one, line["t_start"])
        if line["scenario"] == "concurrent-same":
            found.append(match.tokens(SLOT) // 32)
        index.sent(SLOT, one, line["t_start"], match)
    whole = (len(one_prompt()) // 4 - 1) // 32
    assert found[1:] == [whole] * 5
    assert found[0] < whole


def one_prompt() -> bytes:
    line = next(line for line in lines("requests") if line["scenario"] == "concurrent-same")
    return asked(line).tokenized[0].ids


def test_told_a_second_time_nothing_changes() -> None:
    """Messages that come again, as a replay after a reconnect sends them, leave what they left the first
    time.
    """
    index = PreciseIndex()
    index.add(SLOT)
    events = list(frames())
    for ts, batch in events:
        index.apply(SLOT, batch, ts)
    once = index.blocks(SLOT)
    cleared = next(n for n in range(len(events) - 1, -1, -1) if Cleared() in events[n][1])
    for ts, batch in events[cleared:]:
        index.apply(SLOT, batch, ts)
    assert index.blocks(SLOT) == once > 100
