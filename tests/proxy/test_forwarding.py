"""What the gateway passes on, in both directions, and what it does not."""

from __future__ import annotations

import asyncio
import gzip

import pytest

from pointsman.testing.client import ASK, RawClient, message
from pointsman.testing.serving import endings, serving
from pointsman.testing.upstream import (
    LAST_CHUNK,
    SSE_HEAD,
    End,
    FakeUpstream,
    chunk,
    event,
    head,
    reply,
)

ODD_BODY = b'{ "prompt":"\xc3\xa9\\u00e9 \\/ ",\n\t"model" : "m", "extra": [1e400,  {}]}'
STEERING = (
    "x-llm-d-inference-fairness-id",
    "x-gateway-inference-fairness-id",
    "x-llm-d-inference-objective",
    "x-gateway-inference-objective",
    "x-llm-d-slo-ttft-ms",
    "x-slo-ttft-ms",
    "x-llm-d-slo-tpot-ms",
    "x-slo-tpot-ms",
    "x-llm-d-video-fps",
    "x-llm-d-video-duration-seconds",
    "x-llm-d-video-resolution",
    "x-gateway-destination-endpoint",
    "x-gateway-destination-endpoint-subset",
    "x-gateway-destination-endpoint-served",
    "x-llm-d-request-dropped-reason",
)


# -- connections


async def test_both_sides_keep_their_connection() -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        for _ in range(3):
            assert (await client.ask()).status == 200
        assert [request.connection for request in engine.requests] == [engine.requests[0].connection] * 3
        assert await endings(app) == {"ok": 3}


async def test_a_client_that_asks_to_close_is_obeyed() -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        answer = await client.ask(message("POST", "/v1/completions", {"model": "m"}, "connection: close"))
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await client.closed() == b""
        assert "connection" not in engine.requests[0].names


async def test_an_endpoint_that_closes_after_each_answer_serves_every_request() -> None:
    script = [reply(b"{}", 200, "connection: close"), End.CLOSE]
    async with FakeUpstream(script) as engine, serving(engine) as app, RawClient(app.port) as client:
        for _ in range(5):
            answer = await client.ask()
            assert (answer.status, answer.headers.get("connection")) == (200, None)
        assert len({request.connection for request in engine.requests}) == 5
        assert await endings(app) == {"ok": 5}


async def test_pipelined_requests_are_answered_in_order() -> None:
    gate = asyncio.Event()

    def script(request):
        if request.body.endswith(b"0}"):
            yield gate
        yield reply(request.body)

    async with FakeUpstream(script) as engine, serving(engine) as app, RawClient(app.port) as client:
        client.send(*(message(body={"model": "m", "prompt": "x", "n": n}) for n in range(10)))
        await engine.request(1)
        assert len(engine.requests) == 1  # the second waits for the first's answer
        gate.set()
        answers = [(await client.response()).body for _ in range(10)]
        assert [body[-2:] for body in answers] == [b"%d}" % n for n in range(10)]
        assert await endings(app) == {"ok": 10}


async def test_pipelined_bytes_that_arrive_with_the_answer_keep_their_order() -> None:
    """The rest of a request sent ahead comes in the very moment in which the answer before it ends."""
    ahead = message(body={"model": "m", "prompt": "second"})
    clients: list[RawClient] = []

    def script(request):
        if b"Hello" in request.body:
            clients[-1].send(ahead[40:])
        yield reply(request.body)

    async with FakeUpstream(script) as engine, serving(engine) as app:
        for _ in range(20):
            async with RawClient(app.port) as client:
                clients.append(client)
                await client.send_pieces(ASK, ahead[:40])
                assert (await client.response()).body in ASK
                assert (await client.response()).body in ahead
        assert await endings(app) == {"ok": 40}


async def test_empty_lines_before_a_request_are_ignored() -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        for pieces in ((b"\r\n\r\n" + ASK,), (b"\r\n", ASK), (b"\r", b"\n" + ASK)):
            await client.send_pieces(*pieces)
            assert (await client.response()).status == 200, pieces


# -- requests


@pytest.mark.parametrize("size", [1, 16383, 16384, 70_000, 3_000_000])
async def test_a_body_by_length_is_forwarded_byte_for_byte(size: int) -> None:
    body = b'{"model": "m", "prompt": "' + bytes(b"abcdefg"[i % 7] for i in range(size)) + b'"}'
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        assert (await client.ask(message(body=body))).status == 200
        assert engine.requests[0].body == body
        assert engine.requests[0].headers["content-length"] == str(len(body))


async def test_an_odd_body_is_forwarded_as_the_client_wrote_it() -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        assert (await client.ask(message(body=ODD_BODY))).status == 200
        assert engine.requests[0].body == ODD_BODY


async def test_a_chunked_request_body_is_forwarded_by_its_length() -> None:
    chunks = [ODD_BODY[:1], ODD_BODY[1:30], ODD_BODY[30:]]
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        assert (await client.ask(message(chunks=chunks))).status == 200
        with_extras = message(chunks=chunks).replace(
            b"\r\n0\r\n\r\n", b"\r\n0;a=b\r\nTrailer-Field: x\r\n\r\n"
        )
        assert (await client.ask(with_extras)).status == 200
        for request in engine.requests:
            assert request.body == ODD_BODY
            assert request.headers["content-length"] == str(len(ODD_BODY))
            assert "transfer-encoding" not in request.names


async def test_expect_100_continue_is_answered_before_the_body_comes() -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        request = message("POST", "/v1/completions", ODD_BODY, "expect: 100-continue")
        client.send(request[: -len(ODD_BODY)])
        assert (await client.head()).status == 100
        client.send(ODD_BODY)
        assert (await client.response()).status == 200
        assert engine.requests[0].body == ODD_BODY
        assert "expect" not in engine.requests[0].names


async def test_a_compressed_request_body_passes_through_unread() -> None:
    packed = gzip.compress(b'{"model": "unknown here"}')
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        assert (
            await client.ask(message("POST", "/v1/completions", packed, "content-encoding: gzip"))
        ).status == 200
        assert engine.requests[0].body == packed
        assert engine.requests[0].headers["content-encoding"] == "gzip"


async def test_the_absolute_form_of_a_target_is_understood() -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        ask = message("POST", "http://elsewhere.test/v1/completions?a=b", {"model": "m", "prompt": "x"})
        assert (await client.ask(ask)).status == 200
        assert engine.requests[0].target == "/v1/completions?a=b"


async def test_query_and_path_prefix_of_the_endpoint_are_kept() -> None:
    async with (
        FakeUpstream() as engine,
        serving(engine.url + "/team/a/") as app,
        RawClient(app.port) as client,
    ):
        assert (await client.ask(message("POST", "/v1/completions?x=%20y", {"model": "m"}))).status == 200
        assert engine.requests[0].target == "/team/a/v1/completions?x=%20y"
        assert {probe.target for probe in engine.probes} == {"/team/a/v1/models", "/team/a/metrics"}


# -- headers


async def test_hop_by_hop_headers_are_not_forwarded() -> None:
    lines = (
        "connection: keep-alive, x-mine",
        "x-mine: 1",
        "keep-alive: timeout=5",
        "proxy-connection: keep-alive",
        "proxy-authorization: Basic abc",
        "te: trailers",
        "trailer: x",
        "expect: 100-continue",
        "x-kept: Value As Is ",
    )
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        assert (await client.ask(message("POST", "/v1/completions", {"model": "m"}, *lines))).status == 200
        request = engine.requests[0]
        dropped = {line.partition(":")[0] for line in lines} - {"x-kept"}
        assert not dropped & set(request.names)
        assert request.headers["x-kept"] == "Value As Is"
        assert request.headers["host"] == engine.name
        assert request.names.count("host") == request.names.count("content-length") == 1


@pytest.mark.parametrize("name", [*STEERING, *(name.upper() for name in STEERING[:3])])
async def test_steering_headers_are_not_forwarded(name: str) -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        ask = message("POST", "/v1/completions", {"model": "m"}, f"{name}: 1", "x-other: 2")
        assert (await client.ask(ask)).status == 200
        assert name.lower() not in engine.requests[0].names
        assert "x-other" in engine.requests[0].names


async def test_a_clients_destination_header_is_ignored() -> None:
    async with FakeUpstream() as a, FakeUpstream() as b, serving(a, b) as app, RawClient(app.port) as client:
        for _ in range(4):
            lines = [
                f"x-gateway-destination-endpoint: {a.name}",
                "x-gateway-destination-endpoint: 203.0.113.9:1",
            ]
            assert (
                await client.ask(message("POST", "/v1/completions", {"model": "m"}, *lines))
            ).status == 200
        assert (len(a.requests), len(b.requests)) == (2, 2)


async def test_the_model_rewrite_header_changes_the_model() -> None:
    async with FakeUpstream(models=["m", "m-lora"]) as engine, serving(engine) as app:
        async with RawClient(app.port) as client:
            ask = message("POST", "/v1/completions", {"model": "alias"}, "x-llm-d-model-name-rewrite: m-lora")
            assert (await client.ask(ask)).status == 200
        assert engine.requests[0].body == b'{"model":"m-lora"}'
        assert "x-llm-d-model-name-rewrite" not in engine.requests[0].names


async def test_a_request_id_is_taken_forwarded_and_echoed() -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        answer = await client.ask(message("POST", "/v1/completions", {"model": "m"}, "X-Request-ID: abc-1"))
        assert answer.headers["x-request-id"] == "abc-1"
        assert engine.requests[0].headers["x-request-id"] == "abc-1"
        refused = await client.ask(message("POST", "/v1/completions", b"{", "X-Request-ID: abc-2"))
        assert (refused.status, refused.headers["x-request-id"]) == (400, "abc-2")


@pytest.mark.parametrize(
    "line", ["x-nothing: 1", "x-request-id: ", "x-request-id: a\tb", f"x-request-id: {'a' * 500}"]
)
async def test_a_request_id_is_made_where_there_is_no_sane_one(line: str) -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        ask = message("POST", "/v1/completions", {"model": "m"}, line)
        made = [(await client.ask(ask)).headers["x-request-id"] for _ in range(3)]
        assert len(set(made)) == 3
        assert [request.headers["x-request-id"] for request in engine.requests] == made
        assert all(request.names.count("x-request-id") == 1 for request in engine.requests)


async def test_the_endpoints_own_request_id_does_not_reach_the_client() -> None:
    async with (
        FakeUpstream([reply(b"{}", 200, "X-Request-Id: theirs")]) as engine,
        serving(engine) as app,
        RawClient(app.port) as client,
    ):
        answer = await client.ask()
        assert answer.names.count("x-request-id") == 1
        assert answer.headers["x-request-id"] == engine.requests[0].headers["x-request-id"] != "theirs"


async def test_the_clients_address_is_told_to_the_endpoint() -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        await client.ask()
        await client.ask(message("POST", "/v1/completions", {"model": "m"}, "x-forwarded-for: 203.0.113.7"))
        told = [request.headers["x-forwarded-for"] for request in engine.requests]
        assert told == ["127.0.0.1", "203.0.113.7, 127.0.0.1"]
        assert [request.headers["x-forwarded-proto"] for request in engine.requests] == ["http", "http"]


async def test_the_endpoint_is_named_only_when_the_settings_say_so() -> None:
    async with FakeUpstream() as engine:
        for names, expected in ((True, engine.name), (False, None)):
            async with (
                serving(engine, server={"endpoint_header": names}) as app,
                RawClient(app.port) as client,
            ):
                assert (await client.ask()).headers.get("x-pointsman-endpoint") == expected


# -- responses


async def test_a_chunked_response_is_relayed_with_its_framing() -> None:
    body = b"5;name=value\r\nhello\r\n" + b"0A\r\n0123456789\r\n" + b"0\r\nx-trailer: 1\r\n\r\n"
    async with (
        FakeUpstream([head("content-type: text/plain") + body]) as engine,
        serving(engine) as app,
        RawClient(app.port) as client,
    ):
        client.send(ASK)
        await client.head()
        assert await client.read(len(body)) == body
        client.send(ASK)
        assert (await client.head()).status == 200


async def test_answers_that_differ_in_length_alone_come_through_whole_and_in_pieces() -> None:
    bodies = [b"[%b]" % (b"1" * size) for size in (1, 2, 120, 5)] + [b"", b"[2]", b"[%b]" % (b"3" * 3000)]
    gate = asyncio.Event()
    last = reply(bodies[-1])
    answers = iter([*([reply(body)] for body in bodies[:-1]), [last[:-10], gate, last[-10:]]])
    async with (
        FakeUpstream(lambda request: next(answers)) as engine,
        serving(engine) as app,
        RawClient(app.port) as client,
    ):
        for body in bodies[:-1]:
            answer = await client.ask()
            assert (answer.body, answer.headers["content-length"]) == (body, str(len(body)))
            assert answer.names == ["content-length", "x-request-id"]
        client.send(ASK)
        assert (await client.head()).headers["content-length"] == str(len(bodies[-1]))
        assert await client.read(len(bodies[-1]) - 10) == bodies[-1][:-10]
        gate.set()
        assert await client.read(10) == bodies[-1][-10:]
        assert {request.connection for request in engine.requests} == {engine.requests[0].connection}
        assert await endings(app) == {"ok": len(bodies)}


async def test_a_streams_chunks_arrive_one_by_one() -> None:
    gates = [asyncio.Event() for _ in range(3)]
    steps = [SSE_HEAD]
    for i, gate in enumerate(gates):
        steps += [event({"n": i}), gate]
    async with (
        FakeUpstream([*steps, LAST_CHUNK]) as engine,
        serving(engine) as app,
        RawClient(app.port) as client,
    ):
        client.send(ASK)
        await client.head()
        for i, gate in enumerate(gates):
            assert await client.read(len(event({"n": i}))) == event({"n": i})
            gate.set()
        assert await client.read(len(LAST_CHUNK)) == LAST_CHUNK


async def test_head_lines_of_a_response_are_relayed_but_for_the_connections_own() -> None:
    script = [
        reply(b"{}", 203, "X-Odd:  a , b", "Set-Cookie: a=1", "Set-Cookie: b=2", "Keep-Alive: timeout=5")
    ]
    async with FakeUpstream(script) as engine, serving(engine) as app, RawClient(app.port) as client:
        answer = await client.ask()
        assert answer.raw_head.startswith(b"HTTP/1.1 203 Said\r\n")
        assert b"\r\nX-Odd:  a , b\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n" in answer.raw_head
        assert "keep-alive" not in answer.names


async def test_an_interim_response_of_the_endpoint_is_not_taken_for_the_response() -> None:
    script = [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + reply(b"[1]"),
    ]
    async with FakeUpstream(script) as engine, serving(engine) as app, RawClient(app.port) as client:
        answer = await client.ask()
        assert (answer.status, answer.body) == (200, b"[1]")


async def test_a_compressed_response_passes_through() -> None:
    packed = gzip.compress(b"answer" * 100)
    script = [reply(packed, 200, "content-encoding: gzip")]
    async with FakeUpstream(script) as engine, serving(engine) as app, RawClient(app.port) as client:
        answer = await client.ask(message("POST", "/v1/completions", {"model": "m"}, "accept-encoding: gzip"))
        assert (answer.body, answer.headers["content-encoding"]) == (packed, "gzip")
        assert engine.requests[0].headers["accept-encoding"] == "gzip"


async def test_a_response_without_length_lasts_until_the_endpoint_closes() -> None:
    script = [b"HTTP/1.1 200 OK\r\n\r\n", b"one ", b"two", End.CLOSE]
    async with FakeUpstream(script) as engine, serving(engine) as app, RawClient(app.port) as client:
        answer = await client.ask()
        assert (answer.body, answer.headers["connection"]) == (b"one two", "close")
        assert await endings(app) == {"ok": 1}


async def test_an_http_1_0_endpoint_is_understood() -> None:
    script = [b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n", b"{}", End.CLOSE]
    async with FakeUpstream(script) as engine, serving(engine) as app, RawClient(app.port) as client:
        for _ in range(2):
            answer = await client.ask()
            assert (answer.version, answer.body) == ("HTTP/1.1", b"{}")
        assert engine.requests[0].connection != engine.requests[1].connection


async def test_bytes_behind_a_response_are_not_the_next_response() -> None:
    forged = reply(b"[666]")
    script = [reply(b"[1]") + forged]
    async with FakeUpstream(script) as engine, serving(engine) as app, RawClient(app.port) as client:
        for _ in range(3):
            assert (await client.ask()).body == b"[1]"
        assert len({request.connection for request in engine.requests}) == 3


@pytest.mark.parametrize("status", [204, 304])
async def test_a_response_that_cannot_have_a_body_ends_with_its_head(status: int) -> None:
    async with (
        FakeUpstream([f"HTTP/1.1 {status} X\r\netag: a\r\n\r\n".encode()]) as engine,
        serving(engine) as app,
    ):
        async with RawClient(app.port) as client:
            for _ in range(2):
                answer = await client.ask()
                assert (answer.status, answer.headers["etag"]) == (status, "a")
                assert "connection" not in answer.headers
        assert engine.requests[0].connection == engine.requests[1].connection


async def test_head_gets_the_head_alone() -> None:
    script = [b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n"]
    async with FakeUpstream(script) as engine, serving(engine) as app, RawClient(app.port) as client:
        for _ in range(2):
            client.send(message("HEAD", "/v1/files/x"))
            answer = await client.response(bodyless=True)
            assert (answer.status, answer.headers["content-length"]) == (200, "100")
        assert {request.method for request in engine.requests} == {"HEAD"}


async def test_head_gets_no_body_of_an_error_of_ours_either() -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        client.send(message("HEAD", "/sleep"))
        assert (await client.response(bodyless=True)).status == 404
        assert (await client.ask()).status == 200


# -- HTTP/1.0 clients


@pytest.mark.parametrize("lines", [(), ("connection: keep-alive",)])
async def test_an_http_1_0_client_gets_chunks_unpacked_until_the_close(lines: tuple[str, ...]) -> None:
    script = [SSE_HEAD, event("one"), event("two")[:9], event("two")[9:], LAST_CHUNK]
    async with FakeUpstream(script) as engine, serving(engine) as app, RawClient(app.port) as client:
        answer = await client.ask(message("POST", "/v1/completions", {"model": "m"}, *lines, version="1.0"))
        assert answer.body == b"data: one\n\ndata: two\n\n"
        assert "transfer-encoding" not in answer.names
        assert answer.headers["connection"] == "close"
        assert engine.requests[0].version == "HTTP/1.1"


async def test_an_http_1_0_client_gets_an_answer_by_length_and_the_close() -> None:
    async with FakeUpstream([reply(b"[1]")]) as engine, serving(engine) as app, RawClient(app.port) as client:
        answer = await client.ask(message("POST", "/v1/completions", {"model": "m"}, version="1.0"))
        assert (answer.body, answer.headers["content-length"]) == (b"[1]", "3")
        assert await client.closed() == b""


async def test_chunk_sizes_are_relayed_whatever_their_case_and_zeros() -> None:
    payload = bytes(range(256)) * 2
    body = b"0000000000000200\r\n" + payload + b"\r\n" + chunk(b"x") + LAST_CHUNK
    async with FakeUpstream([head() + body]) as engine, serving(engine) as app, RawClient(app.port) as client:
        answer = await client.ask()
        assert (answer.raw, answer.body) == (body, payload + b"x")
