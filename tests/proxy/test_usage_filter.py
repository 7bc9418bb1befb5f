"""Usage that the gateway asks for in the client's place, and takes out of the stream again."""

from __future__ import annotations

import asyncio
import json
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman import api
from pointsman.proxy.application import Application
from pointsman.proxy.framing import ChunkFraming
from pointsman.proxy.usage_filter import MAX_EVENT_BYTES, UsageFilter, asking, tells_usage
from pointsman.sim.fleet import running_fleet
from pointsman.testing.client import RawClient, Response, message
from pointsman.testing.serving import admin, serving
from pointsman.testing.upstream import LAST_CHUNK, SSE_HEAD, End, FakeUpstream, chunk, head

USAGE = (
    b'data: {"id":"c","object":"text_completion","choices":[],"usage":{"prompt_tokens":9,'
    b'"completion_tokens":2,"total_tokens":11,"prompt_tokens_details":{"cached_tokens":8}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
TEXT = b'data: {"id":"c","choices":[{"index":0,"text":" a"}]}\n\n'
OTHERS = (
    TEXT,
    b": waiting\n\n",
    b'data: {"choices":[],"prompt_filter_results":[]}\n\n',  # Azure's first event
    b'data: {"choices":[],"usage":null}\n\n',
    b'data: {"choices":[{"text":"\\"choices\\":[] \\"usage\\":{}"}],"usage":{"prompt_tokens":1}}\n\n',
    b'event: other\ndata: {"choices":[],"usage":{"prompt_tokens":1}}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tok\n\n',
    b'data: {"choices":[],\ndata: "usage":{"prompt_tokens":1}}\n\n',
    b"data:\n\n",
    b"\n\n",
    DONE,
)
"""Events that are to go on."""


def unchunked(data: bytes) -> bytes:
    """The payload; the framing must be right, and end where the data does."""
    framing = ChunkFraming(strict=True, pieces=[])
    assert framing.feed(data) == len(data)
    assert framing.pieces is not None
    return b"".join(framing.pieces)


@st.composite
def cuts(draw: st.DrawFn, data: bytes, most: int = 12) -> list[bytes]:
    """The data in pieces."""
    at = sorted(draw(st.sets(st.integers(1, len(data) - 1), max_size=most))) if len(data) > 1 else []
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True) if a < b]


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[bytes], bool]:
    """Events in order, the usage among them, and whether lines end as some servers end them."""
    events = draw(st.lists(st.sampled_from(OTHERS), max_size=6))
    usage = draw(st.booleans())
    if usage:
        events.insert(draw(st.integers(0, len(events))), USAGE)
    return events, draw(st.booleans())


def lines(events: list[bytes], crlf: bool) -> bytes:
    whole = b"".join(events)
    return whole.replace(b"\n", b"\r\n") if crlf else whole


class TestFilter:
    @given(st.data())
    def test_any_split_of_a_chunked_stream_gives_what_it_is_without_the_event(
        self, data: st.DataObject
    ) -> None:
        events, crlf = data.draw(streams())
        chunks = data.draw(cuts(lines(events, crlf)))
        reads = data.draw(cuts(b"".join(map(chunk, chunks)) + LAST_CHUNK, 40))
        written: list[bytes] = []
        found = UsageFilter(written.append, chunked=True)
        for each in reads:
            found.write(each)
        assert unchunked(b"".join(written)) == lines([e for e in events if e is not USAGE], crlf)

    @given(st.data())
    def test_so_does_any_split_of_one_that_its_connection_ends(self, data: st.DataObject) -> None:
        events, crlf = data.draw(streams())
        written: list[bytes] = []
        found = UsageFilter(written.append, chunked=False)
        for each in data.draw(cuts(lines(events, crlf), 40)):
            found.write(each)
        found.flush()
        assert b"".join(written) == lines([e for e in events if e is not USAGE], crlf)

    @given(st.data())
    def test_of_what_breaks_off_whole_events_have_gone_on(self, data: st.DataObject) -> None:
        events, crlf = data.draw(streams())
        events.append(TEXT)
        chunks = data.draw(cuts(lines(events, crlf)))
        came = data.draw(st.integers(0, len(chunks)))
        written: list[bytes] = []
        found = UsageFilter(written.append, chunked=True)
        for each in chunks[:came]:
            found.write(chunk(each))
        size = len(b"".join(chunks[:came]))
        ends = list(accumulate(len(lines([e], crlf)) for e in events))
        whole = [e for e, end in zip(events, ends, strict=True) if end <= size and e is not USAGE]
        payload = unchunked(b"".join(written) + LAST_CHUNK)
        assert payload.startswith(lines(whole, crlf))
        assert len(payload) < len(lines(whole, crlf)) + 2  # an event may end with the first of two line feeds

    def test_whole_events_go_on_byte_for_byte(self) -> None:
        written: list[bytes] = []
        found = UsageFilter(written.append, chunked=True)
        reads = [chunk(TEXT), b"00" + chunk(TEXT + TEXT), chunk(USAGE), chunk(DONE) + LAST_CHUNK]
        for each in reads:
            found.write(each)
        assert written == [reads[0], reads[1], reads[3]]

    def test_an_event_goes_on_when_it_is_complete_and_not_later(self) -> None:
        written: list[bytes] = []
        found = UsageFilter(written.append, chunked=True)
        found.write(chunk(TEXT[:10]))
        assert written == []
        found.write(chunk(TEXT[10:] + TEXT[:5]))
        assert written == [chunk(TEXT)]

    def test_a_long_event_is_not_held_until_its_end(self) -> None:
        written: list[bytes] = []
        found = UsageFilter(written.append, chunked=False)
        found.write(b"data: " + b"x" * MAX_EVENT_BYTES)
        assert len(written[0]) == MAX_EVENT_BYTES + 6
        found.write(b"x\n\n" + USAGE + DONE)
        assert written[1:] == [b"x\n\n" + DONE]

    @pytest.mark.parametrize("other", OTHERS)
    def test_only_usage_is_usage(self, other: bytes) -> None:
        assert tells_usage(USAGE)
        assert tells_usage(USAGE.replace(b'"choices":[]', b'"choices": [ ]'))
        assert not tells_usage(other)


def parsed(path: str = "/v1/completions", raw: bytes | None = None, **body: Any) -> Any:
    whole = raw or json.dumps({"model": "m", "prompt": "x", "stream": True, **body}).encode()
    return api.find(path).parse("r", path, {}, whole)


class TestAsking:
    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/openai/v1/completions"])
    @pytest.mark.parametrize("raw", [b'{"model":"m","stream":true}', b'{"model":"m","stream":true} \r\n '])
    def test_streams_of_completions_are_asked(self, path: str, raw: bytes) -> None:
        asked = asking(parsed(path, raw))
        assert json.loads(asked.body) == {
            "model": "m",
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def test_a_prompt_that_speaks_of_it_is_a_prompt(self) -> None:
        text = '{"stream_options": {"include_usage": true}}'
        asked = json.loads(asking(parsed(prompt=text)).body)
        assert (asked["prompt"], asked["stream_options"]) == (text, {"include_usage": True})

    @pytest.mark.parametrize(
        "request_",
        [
            parsed(stream=False),
            parsed(stream_options={"include_usage": True}),
            parsed(stream_options={"include_usage": False}),
            parsed(stream_options=None),
            parsed("/v1/completions/render"),
            parsed("/v1/embeddings", input="x"),
            parsed("/v1/responses", input="x"),
            parsed("/v1/messages", messages=[{"role": "user", "content": "x"}], max_tokens=1),
            parsed("/generate", text="x"),
            parsed("/something/else"),
        ],
        ids=lambda r: f"{r.path} {len(r.body)}",
    )
    def test_nobody_else_is(self, request_: Any) -> None:
        assert asking(request_) is request_


ASKS = {"upstream": {"ask_usage": True}}
STREAM = {"model": "m", "prompt": "x", "stream": True}
EVENTS = [chunk(TEXT), chunk(USAGE), chunk(DONE) + LAST_CHUNK]


async def stream(app: Application, *lines: str, **body: Any) -> Response:
    async with RawClient(app.port) as client:
        return await client.ask(message("POST", "/v1/completions", STREAM | body, *lines))


async def last_usage(app: Application) -> dict[str, Any]:
    [record] = json.loads((await admin(app, "/decisions?limit=1")).body)["decisions"]
    usage = record["outcome"]["usage"]
    assert isinstance(usage, dict)
    return usage


class TestGateway:
    async def test_the_client_gets_its_stream_and_we_the_usage(self) -> None:
        async with FakeUpstream([SSE_HEAD, *EVENTS]) as engine, serving(engine, **ASKS) as app:
            answer = await stream(app, "accept-encoding: gzip, br")
            assert (answer.body, answer.complete) == (TEXT + DONE, True)
            received = await engine.request()
            assert json.loads(received.body) == STREAM | {"stream_options": {"include_usage": True}}
            assert received.headers["accept-encoding"] == "identity"
            assert int(received.headers["content-length"]) == len(received.body)
            assert (await last_usage(app))["cached_tokens"] == 8

    async def test_nothing_is_changed_unless_it_is_set(self) -> None:
        async with FakeUpstream([SSE_HEAD, *EVENTS]) as engine, serving(engine) as app:
            answer = await stream(app, "accept-encoding: gzip, br")
            assert answer.body == TEXT + USAGE + DONE
            received = await engine.request()
            assert json.loads(received.body) == STREAM
            assert received.headers["accept-encoding"] == "gzip, br"

    async def test_a_client_that_asked_gets_what_it_asked_for_and_so_does_the_next_that_did_not(self) -> None:
        async with (
            FakeUpstream([SSE_HEAD, *EVENTS]) as engine,
            serving(engine, **ASKS) as app,
            RawClient(app.port) as client,
        ):
            for options in ({"include_usage": True}, None, {"include_usage": True}):
                body = STREAM | ({"stream_options": options} if options else {})
                answer = await client.ask(message("POST", "/v1/completions", body, "accept-encoding: gzip"))
                assert answer.body == (TEXT + USAGE + DONE if options else TEXT + DONE)
            encodings = [r.headers["accept-encoding"] for r in engine.requests]
            assert encodings == ["gzip", "identity", "gzip"]

    async def test_an_answer_that_is_compressed_all_the_same_is_let_be(self) -> None:
        packed = head("content-type: text/event-stream", "content-encoding: gzip")
        async with FakeUpstream([packed, *EVENTS]) as engine, serving(engine, **ASKS) as app:
            assert (await stream(app)).body == TEXT + USAGE + DONE

    async def test_an_error_is_told_as_it_is(self) -> None:
        body = b'{"error":{"message":"no"}}'
        refusal = b"HTTP/1.1 400 No\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        async with FakeUpstream([refusal]) as engine, serving(engine, **ASKS) as app:
            answer = await stream(app)
            assert (answer.status, answer.body) == (400, body)

    async def test_clients_of_http_1_0_are_left_alone(self) -> None:
        async with FakeUpstream([SSE_HEAD, *EVENTS]) as engine, serving(engine, **ASKS) as app:
            async with RawClient(app.port) as client:
                answer = await client.ask(
                    message("POST", "/v1/completions", STREAM).replace(b"/1.1", b"/1.0", 1)
                )
            assert answer.body == TEXT + USAGE + DONE
            assert json.loads((await engine.request()).body) == STREAM

    async def test_a_stream_that_its_connection_ends_is_read_as_well(self) -> None:
        plain = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
        script = [plain, TEXT + USAGE[:20], USAGE[20:], DONE, End.CLOSE]
        async with FakeUpstream(script) as engine, serving(engine, **ASKS) as app:
            assert (await stream(app)).body == TEXT + DONE

    async def test_a_stream_that_breaks_off_ends_with_an_error_behind_what_came(self) -> None:
        script = [SSE_HEAD, chunk(TEXT), chunk(TEXT[:9]), End.RESET]
        async with FakeUpstream(script) as engine, serving(engine, **ASKS) as app:
            answer = await stream(app)
            assert answer.complete
            assert answer.body.startswith(TEXT + b"\n\ndata: ")
            assert b'"error"' in answer.body

    async def test_one_that_we_have_begun_ourselves_is_filtered_too(self) -> None:
        settings = {"upstream": {"ask_usage": True, "sse_comment_s": 0.01}}
        async with FakeUpstream() as engine, serving(engine, **settings) as app:
            gate = asyncio.Event()
            engine.script = [gate, SSE_HEAD, *EVENTS]
            async with RawClient(app.port) as client:
                client.send(message("POST", "/v1/completions", STREAM))
                answer = await client.head()
                assert await client.line(b": waiting\n\n\r\n")
                gate.set()
                answer.body = await client.line(LAST_CHUNK)
            assert TEXT in answer.body
            assert USAGE not in answer.body
            assert answer.body.endswith(chunk(DONE) + LAST_CHUNK)

    async def test_another_endpoint_is_asked_the_same(self) -> None:
        async with (
            FakeUpstream([b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n"]) as busy,
            FakeUpstream([SSE_HEAD, *EVENTS]) as free,
            serving(busy, free, **ASKS) as app,
        ):
            for _ in range(2):
                assert (await stream(app)).body == TEXT + DONE
            assert busy.requests
            assert all(b"include_usage" in r.body for r in (*busy.requests, *free.requests))

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
    async def test_streams_of_an_engine_tell_what_was_cached(self, path: str) -> None:
        async with running_fleet(1, speed=50) as (engine,), serving(engine.url, **ASKS) as app:
            body: dict[str, Any] = {"model": app.pool.models()[0], "stream": True, "max_tokens": 3}
            text = "Why do trains stay on their rails? " * 40
            said = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
            answers = []
            for port in (engine.port, app.port, app.port):
                async with RawClient(port) as client:
                    answers.append(await client.ask(message("POST", path, body | said, "x-request-id: same")))
            assert [a.body.count(b"\n\n") for a in answers[1:]] == [answers[0].body.count(b"\n\n")] * 2
            assert answers[1].body == answers[2].body
            assert b"usage" not in answers[1].body
            assert (await last_usage(app))["cached_tokens"] >= 320
            [found] = json.loads((await admin(app, "/cache")).body)["endpoints"]
            assert found["compared"]["sent"]["answers"]["requests"] == 2
