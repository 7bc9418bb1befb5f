"""After the first byte a request cannot move: how its client learns that the answer is not whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable

import pytest

from pointsman.testing.client import ASK, ASK_STREAM, RawClient, message
from pointsman.testing.serving import endings, endpoints, in_flight, serving
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

CHAT = message("POST", "/v1/chat/completions", {"model": "m", "messages": [], "stream": True})
MESSAGES = message("POST", "/v1/messages", {"model": "m", "max_tokens": 9, "messages": [], "stream": True})
RESPONSES = message("POST", "/v1/responses", {"model": "m", "input": "x", "stream": True})


def last_event(body: bytes) -> tuple[str, dict[str, object]]:
    """Name and data of a stream's last event."""
    lines = body.decode().rstrip("\n").split("\n\n")[-1].split("\n")
    name = next((line.removeprefix("event: ") for line in lines if line.startswith("event:")), "")
    return name, json.loads(next(line for line in lines if line.startswith("data:")).removeprefix("data: "))


@pytest.mark.parametrize("end", [End.CLOSE, End.RESET])
@pytest.mark.parametrize(
    ("ask", "name"), [(ASK_STREAM, ""), (CHAT, ""), (MESSAGES, "error"), (RESPONSES, "error")]
)
async def test_a_broken_stream_ends_with_an_error_event_of_its_api(ask: bytes, name: str, end: End) -> None:
    async with (
        FakeUpstream([SSE_HEAD, event({"n": 1}), event({"n": 2}), end]) as engine,
        serving(engine) as app,
    ):
        async with RawClient(app.port) as client:
            answer = await client.ask(ask)
            assert answer.complete
            assert answer.body.startswith(b'data: {"n": 1}\n\ndata: {"n": 2}\n\n')
            found, data = last_event(answer.body)
            assert (found, "error" in json.dumps(data)) == (name, True)
            assert "upstream_failed" in json.dumps(data) or name == "error"
        assert await in_flight(app) == 0
        assert await endings(app) == {"failed": 1}


async def test_a_stream_that_breaks_inside_an_event_gets_its_error_as_an_event_of_its_own() -> None:
    script = [SSE_HEAD, chunk(b'data: {"half": '), End.RESET]
    async with FakeUpstream(script) as engine, serving(engine) as app, RawClient(app.port) as client:
        answer = await client.ask(ASK_STREAM)
        assert answer.body.startswith(b'data: {"half": \n\n')
        assert "error" in last_event(answer.body)[1]


async def test_a_stream_that_breaks_inside_a_chunk_is_cut() -> None:
    script = [SSE_HEAD, event({"n": 1}), event({"n": 2})[:9], End.RESET]
    async with FakeUpstream(script) as engine, serving(engine) as app, RawClient(app.port) as client:
        answer = await client.ask(ASK_STREAM)
        assert (answer.status, answer.complete) == (200, False)
        assert await endings(app) == {"failed": 1}


CUT = {
    "by length": [b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n", b"half"],
    "chunked": [head("content-type: application/json"), chunk(b'{"half": ')],
    "until the close": [b"HTTP/1.1 200 OK\r\n\r\n", b"half"],
}


@pytest.mark.parametrize("case", CUT)
async def test_an_answer_that_breaks_is_cut_so_that_its_client_notices(case: str) -> None:
    async with FakeUpstream([*CUT[case], End.RESET]) as engine, serving(engine) as app:
        async with RawClient(app.port) as client:
            answer = await client.ask()
            assert (answer.status, answer.complete) == (200, False)
        assert await in_flight(app) == 0
        assert await endings(app) == {"failed": 1}


async def test_an_http_1_0_client_notices_a_cut_answer() -> None:
    script = [SSE_HEAD, event({"n": 1}), End.RESET]
    async with FakeUpstream(script) as engine, serving(engine) as app, RawClient(app.port) as client:
        answer = await client.ask(message("POST", "/v1/completions", {"model": "m"}, version="1.0"))
        assert (answer.status, answer.complete) == (200, False)


async def test_a_broken_stream_is_not_sent_to_another_endpoint() -> None:
    script = [SSE_HEAD, event({"n": 1}), End.RESET]
    async with FakeUpstream(script) as a, FakeUpstream(script) as b, serving(a, b) as app:
        async with RawClient(app.port) as client:
            assert (await client.ask(ASK_STREAM)).status == 200
        assert len(a.requests) + len(b.requests) == 1


async def test_silence_inside_a_stream_has_a_timeout_of_its_own() -> None:
    limits = {"between_bytes_timeout_s": 0.4, "first_byte_timeout_s": 60.0}
    async with (
        FakeUpstream([SSE_HEAD, event({"n": 1}), asyncio.Event()]) as engine,
        serving(engine, upstream=limits, breaker={"faults": 1}) as app,
    ):
        async with RawClient(app.port) as client:
            answer = await client.ask(ASK_STREAM)
            assert "upstream_timeout" in json.dumps(last_event(answer.body)[1])
        await asyncio.wait_for(engine.requests[0].gone.wait(), 5)
        assert (await endpoints(app))[engine.name]["breaker"] != "closed"
        assert await endings(app) == {"failed": 1}


async def test_a_stream_that_goes_on_outlives_the_timeouts() -> None:
    """Between bytes means between bytes, not in all."""

    def script(request: Received) -> Iterable[Step]:
        yield SSE_HEAD
        for n in range(8):
            later = asyncio.Event()
            asyncio.get_running_loop().call_later(0.15, later.set)
            yield later
            yield event({"n": n})
        yield LAST_CHUNK

    limits = {"between_bytes_timeout_s": 0.6, "first_byte_timeout_s": 0.6}
    async with (
        FakeUpstream(script) as engine,
        serving(engine, upstream=limits) as app,
        RawClient(app.port) as client,
    ):
        answer = await client.ask(ASK_STREAM)
        assert (answer.complete, answer.body.count(b"data:")) == (True, 8)
        assert b"error" not in answer.body


# -- comments that keep a waiting stream alive


async def test_comments_keep_a_waiting_stream_alive() -> None:
    gate = asyncio.Event()
    async with (
        FakeUpstream([gate, SSE_HEAD, event("one"), LAST_CHUNK]) as engine,
        serving(engine, upstream={"sse_comment_s": 0.1}) as app,
        RawClient(app.port) as client,
    ):
        client.send(ASK_STREAM)
        answer = await client.head()
        assert (answer.status, answer.headers["content-type"].split(";")[0]) == (200, "text/event-stream")
        assert "x-request-id" in answer.headers
        waiting = chunk(b": waiting\n\n")
        for _ in range(2):
            assert await client.read(len(waiting)) == waiting
        gate.set()
        rest = await client.line(LAST_CHUNK)
        assert rest.replace(waiting, b"") == event("one") + LAST_CHUNK
        assert (await client.ask()).status == 200
        assert await endings(app) == {"ok": 2}


async def test_no_comments_for_those_who_do_not_stream() -> None:
    gate = asyncio.Event()
    asyncio.get_running_loop().call_later(0.7, gate.set)
    async with (
        FakeUpstream([gate, reply(b"[1]")]) as engine,
        serving(engine, upstream={"sse_comment_s": 0.1}) as app,
        RawClient(app.port) as client,
    ):
        assert (await client.ask(ASK)).body == b"[1]"


async def test_a_failure_after_comments_moves_to_another_endpoint_in_the_same_stream() -> None:
    gate = asyncio.Event()
    asked: list[Received] = []

    def script(request: Received) -> Iterable[Step]:
        asked.append(request)
        return [gate, End.RESET] if len(asked) == 1 else [SSE_HEAD, event("good"), LAST_CHUNK]

    async with (
        FakeUpstream(script) as a,
        FakeUpstream(script) as b,
        serving(a, b, upstream={"sse_comment_s": 0.1}) as app,
        RawClient(app.port) as client,
    ):
        client.send(ASK_STREAM)
        await client.line(b": waiting\n\n\r\n")
        gate.set()
        assert (await client.line(LAST_CHUNK)).endswith(event("good") + LAST_CHUNK)
        assert await endings(app) == {"ok": 1}


@pytest.mark.parametrize(("ask", "name"), [(CHAT, ""), (MESSAGES, "error"), (RESPONSES, "error")])
@pytest.mark.parametrize("how", ["status", "reset"])
async def test_an_error_after_comments_is_an_error_event(ask: bytes, name: str, how: str) -> None:
    """The status line is gone by then; the client must hear of it as its API tells errors in a stream."""
    gate = asyncio.Event()
    said = b'{"type": "error", "error": {"type": "api_error",\n "message": "out of memory"}}'
    script = [gate, reply(said, 500) if how == "status" else End.RESET]
    async with FakeUpstream(script) as engine, serving(engine, upstream={"sse_comment_s": 0.1}) as app:
        async with RawClient(app.port) as client:
            client.send(ask)
            await client.line(b": waiting\n\n\r\n")
            gate.set()
            body = (await client.line(LAST_CHUNK)).replace(b"\r\n", b"\n")
            event_lines = body[body.rfind(b"\n\n", 0, body.rfind(b"}")) + 2 :].decode().split("\n")
            assert any(line == f"event: {name}" for line in event_lines) or not name
            assert any(line.startswith("data: {") and '"error"' in line for line in event_lines)
            if how == "status":
                assert b"out of memory" in body
        assert await endings(app) == ({"error": 1} if how == "status" else {"failed": 1})
        assert await in_flight(app) == 0
