"""Laws of the data plane: splitting a byte stream anywhere changes nothing, and whatever happens, each
request ends exactly once and gives its load back.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointsman.proxy.application import Application
from pointsman.testing.client import ASK, ASK_STREAM, RawClient, message
from pointsman.testing.serving import admin, endings, in_flight, serving, until
from pointsman.testing.upstream import (
    LAST_CHUNK,
    SSE_HEAD,
    End,
    FakeUpstream,
    Received,
    Step,
    chunk,
    event,
    head,
    reply,
)

T = TypeVar("T")
cheap = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


class Stage:
    """One gateway before two engines, for all examples of this module."""

    def __init__(self, runner: asyncio.Runner, app: Application, a: FakeUpstream, b: FakeUpstream) -> None:
        self.app, self.a, self.b = app, a, b
        self._runner = runner

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run an example and wait until all its connections are closed."""
        return self._runner.run(self._alone(work))

    async def _alone(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        finally:
            await self.a.drop()
            await self.b.drop()
            await endings(self.app)  # a turn for everybody

    def script(self, script: Any) -> None:
        self.a.script = self.b.script = script
        self.a.requests.clear()
        self.b.requests.clear()

    @property
    def requests(self) -> list[Received]:
        return [*self.a.requests, *self.b.requests]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    async def enter() -> tuple[Application, FakeUpstream, FakeUpstream]:
        a = await stack.enter_async_context(FakeUpstream())
        b = await stack.enter_async_context(FakeUpstream())
        limits = {"first_byte_timeout_s": 0.3, "between_bytes_timeout_s": 0.3}
        seldom = {"interval_s": 60.0, "idle_interval_s": 60.0}
        app = serving(a, b, upstream=limits, breaker={"faults": 1000}, metrics=seldom)
        return await stack.enter_async_context(app), a, b

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = AsyncExitStack()
        yield Stage(runner, *runner.run(enter()))
        runner.run(stack.aclose())


def split(data: bytes, cuts: list[float]) -> list[bytes]:
    """``data`` cut at these shares of its length."""
    at = sorted({round(cut * len(data)) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(at)]


cuts = st.lists(st.floats(0, 1), max_size=12)
BODY = b'{"model": "m", "prompt": "' + bytes(97 + i % 26 for i in range(700)) + b'"}'
CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
REQUESTS = {
    "by length": message(body=BODY),
    "chunked": message(chunks=[BODY[:3], BODY[3:400], BODY[400:]]),
    "chunked with extensions": CHUNKED
    + b'2c4;a="b"\r\n%b\r\n%x\r\n%b\r\n' % (BODY[:0x2C4], len(BODY) - 0x2C4, BODY[0x2C4:])
    + b"000\r\nx: y\r\n\r\n",
    "after empty lines": b"\r\n\r\n" + message(body=BODY),
}


@cheap
@given(kind=st.sampled_from(sorted(REQUESTS)), cuts=cuts, pipelined=st.integers(1, 3))
def test_any_split_of_the_request_stream_gives_the_same(
    stage: Stage, kind: str, cuts: list[float], pipelined: int
) -> None:
    stage.script([reply(b'{"ok": 1}')])

    async def ask() -> None:
        async with RawClient(stage.app.port) as client:
            await client.send_pieces(*split(REQUESTS[kind] * pipelined, cuts))
            for _ in range(pipelined):
                answer = await client.response()
                assert (answer.status, answer.body) == (200, b'{"ok": 1}')
        assert [request.body for request in stage.requests] == [BODY] * pipelined
        assert {request.headers["content-length"] for request in stage.requests} == {str(len(BODY))}

    stage.run(ask())


@pytest.mark.parametrize("kind", sorted(REQUESTS))
def test_a_request_byte_by_byte_gives_the_same(stage: Stage, kind: str) -> None:
    stage.script([reply(b'{"ok": 1}')])
    data = REQUESTS[kind]

    async def ask() -> None:
        async with RawClient(stage.app.port) as client:
            await client.send_pieces(*(data[i : i + 1] for i in range(len(data))))
            assert (await client.response()).status == 200
        assert [request.body for request in stage.requests] == [BODY]

    stage.run(ask())


USAGE = {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}}
STREAM = b"".join(event({"choices": [{"text": f" {n}"}]}) for n in range(3)) + event(USAGE) + event("[DONE]")
JSON = json.dumps({"id": "x", "choices": [{"text": "abc " * 100}], "usage": USAGE["usage"]}).encode()
RESPONSES = {
    "by length": (reply(JSON, 200, "content-type: application/json"), JSON),
    "chunked": (head() + chunk(JSON[:100]) + chunk(JSON[100:]) + b"0\r\nx: y\r\n\r\n", JSON),
    "a stream": (SSE_HEAD + STREAM + LAST_CHUNK, None),
    "after an interim response": (b"HTTP/1.1 103 Early\r\nlink: a\r\n\r\n" + reply(JSON), JSON),
    "an error": (reply(JSON, 400), JSON),
    "a refusal": (reply(JSON, 429, "retry-after: 9"), JSON),
    "an empty one": (reply(b""), b""),
    "none at all": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
}


@cheap
@given(kind=st.sampled_from(sorted(RESPONSES)), cuts=cuts, stream=st.booleans())
def test_any_split_of_the_response_stream_gives_the_same(
    stage: Stage, kind: str, cuts: list[float], stream: bool
) -> None:
    response, body = RESPONSES[kind]

    async def ask() -> tuple[int, bytes, bytes]:
        async with RawClient(stage.app.port) as client:
            answer = await client.ask(ASK_STREAM if stream else ASK)
            assert answer.complete
            assert (await client.ask()).complete  # and the connections are where they should be
            return answer.status, answer.raw, answer.body

    stage.script([response])
    whole = stage.run(ask())
    stage.script(split(response, cuts))
    assert stage.run(ask()) == whole
    assert body is None or whole[2] == body


EVENTS = [SSE_HEAD, *(line + b"\n\n\r\n" for line in STREAM.split(b"\n\n\r\n")[:-1]), LAST_CHUNK]


@cheap
@given(at=st.floats(0, 1))
def test_token_counts_are_read_wherever_a_streams_events_are_cut(stage: Stage, at: float) -> None:
    """Events come as engines write them, one by one, and one of them in two reads."""

    async def ask() -> dict[str, Any]:
        async with RawClient(stage.app.port) as client:
            await client.ask(ASK_STREAM)
        page = (await admin(stage.app, "/decisions?limit=1")).body
        usage: dict[str, Any] = json.loads(page)["decisions"][0]["outcome"]["usage"]
        return usage

    which, within = divmod(at * (len(EVENTS) - 1), 1)
    cut = int(which)
    stage.script([*EVENTS[:cut], *split(EVENTS[cut], [within]), *EVENTS[cut + 1 :]])
    assert stage.run(ask()) == {"prompt_tokens": 11, "output_tokens": 3, "cached_tokens": None}


# -- each request ends exactly once

FATES: dict[str, list[Step]] = {
    "answer": [reply(JSON)],
    "stream": [SSE_HEAD + STREAM + LAST_CHUNK],
    "in pieces": split(SSE_HEAD + STREAM + LAST_CHUNK, [0.1, 0.3, 0.5, 0.9]),
    "client error": [reply(b"{}", 400)],
    "fault": [reply(b"{}", 500)],
    "busy": [reply(b"{}", 503)],
    "crash": [End.RESET],
    "crash after the head": [SSE_HEAD, End.RESET],
    "crash in the middle": [SSE_HEAD, event("x"), End.RESET],
    "close in the middle": [b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nhalf", End.CLOSE],
    "nonsense": [b"nonsense\r\n\r\n"],
    "until the close": [b"HTTP/1.1 200 OK\r\n\r\nall", End.CLOSE],
    "goodbye": [reply(b"{}", 200, "connection: close"), End.CLOSE],
    "hang": [asyncio.Event()],
    "stall": [SSE_HEAD, event("x"), asyncio.Event()],
}
CLIENTS = (
    "patient",
    "leaves at once",
    "leaves after the head",
    "resets",
    "HTTP/1.0",
    "bad JSON",
    "bad model",
)


async def behave(stage: Stage, client_kind: str, turns: int) -> None:
    async with RawClient(stage.app.port) as client:
        match client_kind:
            case "bad JSON":
                client.send(message(body=b"{"))
            case "bad model":
                client.send(message(body={"model": "x"}))
            case "HTTP/1.0":
                client.send(message(body={"model": "m"}, version="1.0"))
            case _:
                client.send(ASK_STREAM)
        if client_kind in ("leaves at once", "resets"):
            for _ in range(turns):
                await asyncio.sleep(0)
            client.reset() if client_kind == "resets" else client.leave()
        elif client_kind == "leaves after the head":
            await client.head()
        else:
            await client.response()


@settings(cheap, max_examples=40)
@given(
    fates=st.lists(st.sampled_from(sorted(FATES)), min_size=1, max_size=6),
    clients=st.lists(st.tuples(st.sampled_from(CLIENTS), st.integers(2, 40)), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
)
def test_whatever_happens_each_request_ends_once_and_no_load_stays(
    stage: Stage, fates: list[str], clients: list[tuple[str, int]], seed: int
) -> None:
    draw = random.Random(seed)

    def script(request: Received) -> Iterable[Step]:
        return FATES[draw.choice(fates)]

    before = stage.run(endings(stage.app))

    async def quiet() -> bool:
        return await in_flight(stage.app) == 0

    async def counted() -> bool:
        return sum((await endings(stage.app) - before).values()) >= len(clients)

    async def play() -> None:
        await asyncio.gather(*(behave(stage, *client) for client in clients))
        await until(quiet)
        await until(counted)
        assert sum((await endings(stage.app) - before).values()) == len(clients)
        assert await in_flight(stage.app) == 0
        stage.script([reply(b"{}")])
        async with RawClient(stage.app.port) as client:
            assert (await client.ask()).status == 200

    stage.script(script)
    stage.run(play())
