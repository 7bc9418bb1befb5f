"""What the data port refuses: too much, too slow, malformed, or none of a client's business."""

from __future__ import annotations

import asyncio
import json

import pytest

from pointsman.testing.client import ASK, RawClient, message
from pointsman.testing.serving import endings, serving
from pointsman.testing.upstream import LAST_CHUNK, FakeUpstream, chunk

HOST = b"host: gateway.test\r\n"
START = b"POST /v1/completions HTTP/1.1\r\n" + HOST
BODY = b'{"model":"m"}'
LENGTH = b"content-length: 13\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
CHUNKS = b"d\r\n" + BODY + b"\r\n0\r\n\r\n"

SMUGGLING = {
    "length and chunked": START + LENGTH + CHUNKED + b"\r\n" + CHUNKS,
    "chunked and length": START + CHUNKED + LENGTH + b"\r\n" + CHUNKS,
    "two lengths": START + LENGTH + b"content-length: 5\r\n\r\n" + BODY,
    "the same length twice": START + LENGTH + LENGTH + b"\r\n" + BODY,
    "a list of lengths": START + b"content-length: 13, 13\r\n\r\n" + BODY,
    "a signed length": START + b"content-length: +13\r\n\r\n" + BODY,
    "a negative length": START + b"content-length: -1\r\n\r\n",
    "a hexadecimal length": START + b"content-length: 0xd\r\n\r\n" + BODY,
    "a length with an underscore": START + b"content-length: 1_3\r\n\r\n" + BODY,
    "a length that is no number": START + b"content-length: many\r\n\r\n",
    "an empty length": START + b"content-length: \r\n\r\n",
    "a length beyond 64 bits": START + b"content-length: 18446744073709551629\r\n\r\n" + BODY,
    "a length of 5,000 digits": START + b"content-length: " + b"1" * 5000 + b"\r\n\r\n",
    "a space before the colon": START + b"content-length : 13\r\n\r\n" + BODY,
    "a folded line": START + LENGTH + b"x-folded: a\r\n b\r\n\r\n" + BODY,
    "a folded length": START + b"content-length:\r\n 13\r\n\r\n" + BODY,
    "a folded first line": b"POST /v1/completions HTTP/1.1\r\n " + HOST + LENGTH + b"\r\n" + BODY,
    "a bare line feed after a header": START + b"x-a: 1\n" + LENGTH + b"\r\n" + BODY,
    "a bare line feed in a value": START + b"x-a: 1\nx-b: 2\r\n" + LENGTH + b"\r\n" + BODY,
    "a bare carriage return in a value": START + b"x-a: 1\rcontent-length: 2\r\n" + LENGTH + b"\r\n" + BODY,
    "a bare line feed after the first line": b"POST /v1/completions HTTP/1.1\n"
    + HOST
    + LENGTH
    + b"\r\n"
    + BODY,
    "a zero byte in a value": START + b"x-a: \0\r\n" + LENGTH + b"\r\n" + BODY,
    "a zero byte in a name": START + b"x\0a: 1\r\n" + LENGTH + b"\r\n" + BODY,
    "a line without a colon": START + b"nonsense\r\n" + LENGTH + b"\r\n" + BODY,
    "an empty header name": START + b": 1\r\n" + LENGTH + b"\r\n" + BODY,
    "chunked, then gzip": START + b"transfer-encoding: chunked, gzip\r\n\r\n" + CHUNKS,
    "gzip, then chunked": START + b"transfer-encoding: gzip, chunked\r\n\r\n" + CHUNKS,
    "chunked twice in one line": START + b"transfer-encoding: chunked, chunked\r\n\r\n" + CHUNKS,
    "chunked in two lines": START + CHUNKED + CHUNKED + b"\r\n" + CHUNKS,
    "gzip and chunked in two lines": START + b"transfer-encoding: gzip\r\n" + CHUNKED + b"\r\n" + CHUNKS,
    "chunked and identity in two lines": START
    + b"transfer-encoding: identity\r\n"
    + CHUNKED
    + b"\r\n"
    + CHUNKS,
    "identity": START + b"transfer-encoding: identity\r\n" + b"\r\n" + BODY,
    "xchunked": START + b"transfer-encoding: xchunked\r\n\r\n" + CHUNKS,
    "chunked behind a vertical tab": START + b"transfer-encoding: \x0bchunked\r\n\r\n" + CHUNKS,
    "chunked with a space before the colon": START + b"transfer-encoding : chunked\r\n\r\n" + CHUNKS,
    "chunked in HTTP/1.0": START.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + CHUNKS,
    "another protocol": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/1.2": START.replace(b"1.1", b"1.2") + LENGTH + b"\r\n" + BODY,
    "HTTP/0.9": b"GET /v1/models\r\n\r\n",
    "no protocol": b"POST /v1/completions\r\n" + HOST + b"\r\n",
    "an unknown protocol": START.replace(b"HTTP", b"HTCP") + LENGTH + b"\r\n" + BODY,
    "a space in the target": START.replace(b"completions", b"comple tions") + LENGTH + b"\r\n" + BODY,
    "an unknown method": START.replace(b"POST", b"P0ST") + LENGTH + b"\r\n" + BODY,
    "a target that is no path": START.replace(b"/v1/completions", b"v1/completions")
    + LENGTH
    + b"\r\n"
    + BODY,
    "CONNECT": b"CONNECT gateway.test:443 HTTP/1.1\r\n" + HOST + b"\r\n",
    "TLS on a port without it": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}

BAD_CHUNKS = {
    "no number": b"x\r\n",
    "no size": b"\r\n",
    "only an extension": b";a=b\r\n",
    "a hexadecimal mark": b"0xd\r\n" + BODY + b"\r\n" + LAST_CHUNK,
    "a sign": b"+d\r\n" + BODY + b"\r\n" + LAST_CHUNK,
    "a minus": b"-1\r\n",
    "an underscore": b"0_d\r\n" + BODY + b"\r\n" + LAST_CHUNK,
    "a space in front": b" d\r\n" + BODY + b"\r\n" + LAST_CHUNK,
    "a space behind": b"d \r\n" + BODY + b"\r\n" + LAST_CHUNK,
    "more than 64 bits": b"1000000000000000d\r\n" + BODY + b"\r\n" + LAST_CHUNK,
    "a carriage return in the extension": b"d;a\rb\r\n" + BODY + b"\r\n" + LAST_CHUNK,
    "a bare line feed after the size": b"d\n" + BODY + b"\r\n" + LAST_CHUNK,
    "a bare line feed after an extension": b"d;a\n" + BODY + b"\r\n" + LAST_CHUNK,
    "a bare line feed after the data": b"d\r\n" + BODY + b"\n" + LAST_CHUNK,
    "a carriage return alone after the data": b"d\r\n" + BODY + b"\rx" + LAST_CHUNK,
    "a wrong byte before the line feed": b"d\r\n" + BODY + b"x\n" + LAST_CHUNK,
    "data longer than the size": b"c\r\n" + BODY + b"\r\n" + LAST_CHUNK,
    "a bare line feed at the end": b"d\r\n" + BODY + b"\r\n0\r\n\n",
    "a bare line feed after the last size": b"d\r\n" + BODY + b"\r\n0\n\r\n",
    "a bare line feed in the trailer": b"d\r\n" + BODY + b"\r\n0\r\na: b\n\r\n",
}


async def refused(sent: bytes) -> tuple[int, bytes]:
    """Status of the answer to ``sent`` and what follows it until the connection's end; nothing was
    forwarded."""
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        client.send(sent, ASK)
        answer = await client.response()
        rest = await client.closed()
        assert not engine.requests
        assert await endings(app) == {"refused": 1}
        assert answer.headers["connection"] == "close"
        assert json.loads(answer.body)["error"]["message"]
        return answer.status, rest


@pytest.mark.parametrize("case", SMUGGLING)
async def test_a_request_that_two_servers_could_read_differently_is_refused(case: str) -> None:
    assert await refused(SMUGGLING[case]) == (400, b"")


@pytest.mark.parametrize("case", BAD_CHUNKS)
async def test_a_malformed_chunk_is_refused(case: str) -> None:
    assert await refused(START + CHUNKED + b"\r\n" + BAD_CHUNKS[case]) == (400, b"")


@pytest.mark.parametrize("case", BAD_CHUNKS)
async def test_a_malformed_chunk_is_refused_also_byte_by_byte(case: str) -> None:
    sent = START + CHUNKED + b"\r\n" + BAD_CHUNKS[case]
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        await client.send_pieces(*(sent[i : i + 1] for i in range(len(sent))), ASK)
        assert (await client.response()).status == 400
        assert await client.closed() == b""
        assert not engine.requests


async def test_the_rest_of_a_connection_is_not_read_after_a_malformed_request() -> None:
    """What follows could be somebody else's request: it gets no answer."""
    status, rest = await refused(SMUGGLING["length and chunked"])
    assert (status, rest) == (400, b"")


# -- size


async def test_a_body_announced_larger_than_allowed_is_413_before_it_is_sent() -> None:
    async with FakeUpstream() as engine, serving(engine, server={"body_bytes": 1000}) as app:
        async with RawClient(app.port) as client:
            client.send(START + b"content-length: 1001\r\nexpect: 100-continue\r\n\r\n")
            answer = await client.response()
            assert (answer.status, answer.headers["connection"]) == (413, "close")
            assert answer.error()["code"] == "body_too_large"
            assert "server.body_bytes" in str(answer.error()["message"])
        assert not engine.requests


async def test_a_body_as_large_as_allowed_passes() -> None:
    body = BODY + b" " * (1000 - len(BODY))
    async with FakeUpstream() as engine, serving(engine, server={"body_bytes": 1000}) as app:
        async with RawClient(app.port) as client:
            assert (await client.ask(message(body=body))).status == 200
            assert (await client.ask(message(chunks=[body[:400], body[400:]]))).status == 200
        assert [request.body for request in engine.requests] == [body, body]


async def test_a_chunked_body_is_413_as_soon_as_it_is_larger_than_allowed() -> None:
    async with FakeUpstream() as engine, serving(engine, server={"body_bytes": 1000}) as app:
        async with RawClient(app.port) as client:
            client.send(START + CHUNKED + b"\r\n")
            await client.send_pieces(*[chunk(b" " * 100)] * 11)
            assert (await client.response()).status == 413
        assert not engine.requests
        assert await endings(app) == {"refused": 1}


async def test_a_client_that_sends_its_whole_oversized_body_still_reads_the_413() -> None:
    async with FakeUpstream() as engine, serving(engine, server={"body_bytes": 1000}) as app:
        for _ in range(5):
            async with RawClient(app.port) as client:
                client.send(START + b"content-length: 300000\r\n\r\n", b" " * 300_000)
                assert (await client.response()).status == 413


@pytest.mark.parametrize("shape", ["one long header", "many headers", "a long target"])
async def test_a_head_larger_than_allowed_is_431(shape: str) -> None:
    long = {
        "one long header": START + b"x: " + b"a" * 9000,
        "many headers": START + b"x: a\r\n" * 1600,
        "a long target": b"GET /v1/" + b"a" * 9000,
    }[shape]
    async with FakeUpstream() as engine, serving(engine, server={"head_bytes": 8192}) as app:
        for pieces in ((long,), (long, b"\r\n\r\n"), (long + b"\r\n\r\n",)):
            async with RawClient(app.port) as client:
                await client.send_pieces(*pieces)
                answer = await client.response()
                assert (answer.status, answer.error()["code"]) == (431, "head_too_large")
                assert "server.head_bytes" in str(answer.error()["message"])
                assert await client.closed() == b""
        assert not engine.requests


async def test_a_head_of_exactly_the_limit_passes_however_it_is_split() -> None:
    start = START + LENGTH + b"x: "
    limit = 8192
    whole = start + b"a" * (limit - len(start)) + b"\r\n\r\n" + BODY
    async with FakeUpstream() as engine, serving(engine, server={"head_bytes": limit}) as app:
        for split in (len(whole), limit, limit + 1, limit + 2, limit + 3, limit + 4):
            async with RawClient(app.port) as client:
                await client.send_pieces(whole[:split], *([whole[split:]] if whole[split:] else []))
                assert (await client.response()).status == 200, split
        async with RawClient(app.port) as client:
            assert (await client.ask(whole.replace(b"x: ", b"x: a"))).status == 431


# -- time


async def test_a_slow_head_is_408() -> None:
    async with FakeUpstream() as engine, serving(engine, server={"head_timeout_s": 0.3}) as app:
        async with RawClient(app.port) as client:
            client.send(START)
            answer = await client.response()
            assert (answer.status, answer.error()["code"]) == (408, "request_timeout")
            assert await client.closed() == b""
        assert await endings(app) == {"refused": 1}


@pytest.mark.parametrize("head", [START + LENGTH + b"\r\n{", START + CHUNKED + b"\r\n1\r\n{\r\n"])
async def test_a_stalled_body_is_408(head: bytes) -> None:
    async with FakeUpstream() as engine, serving(engine, server={"body_timeout_s": 0.3}) as app:
        async with RawClient(app.port) as client:
            client.send(head)
            answer = await client.response()
            assert answer.status == 408
            assert "server.body_timeout_s" in str(answer.error()["message"])
            assert await client.closed() == b""
        assert not engine.requests
        assert await endings(app) == {"refused": 1}


async def test_an_idle_connection_is_closed_without_a_word() -> None:
    async with FakeUpstream() as engine, serving(engine, server={"idle_timeout_s": 0.3}) as app:
        async with RawClient(app.port) as client:
            assert (await client.ask()).status == 200
            assert await client.closed() == b""
        assert await endings(app) == {"ok": 1}


# -- content


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"model": "m", "prompt": "x"', "line 1"),
        (b'{"model": "m",\n "prompt": nonsense}', "line 2"),
        (b"", "JSON"),
        (b"[]", "object"),
        (b'{"prompt": "x"}', "model"),
        (b'{"model": 7}', "model"),
    ],
)
async def test_a_body_that_cannot_be_read_is_400_and_says_where(body: bytes, says: str) -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        answer = await client.ask(message(body=body))
        assert answer.status == 400
        assert says in str(answer.error()["message"])
        assert answer.error()["type"] == "invalid_request_error"
        assert not engine.requests
        assert (await client.ask()).status == 200  # the connection is still good
        assert await endings(app) == {"refused": 1, "ok": 1}


ADMINISTRATION = (
    "/sleep", "/wake_up", "/is_sleeping", "/reset_prefix_cache", "/reset_mm_cache", "/collective_rpc",
    "/pause", "/resume", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/inference/v1/abort_requests",
    "/start_profile", "/flush_cache", "/update_weights_from_disk", "/shutdown_server", "/server_info",
    "/metrics", "/docs", "/openapi.json", "/slots", "/props", "/", "/v2/repository/models/m/load",
)  # fmt: skip


@pytest.mark.parametrize("path", ADMINISTRATION)
async def test_administration_of_engines_is_not_found_on_the_data_port(path: str) -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        for target in (path, path + "/", path + "?a=b"):
            answer = await client.ask(message("POST", target, {"lora_name": "x"}))
            assert (answer.status, answer.error()["code"]) == (404, "path_not_found")
        assert not engine.requests


@pytest.mark.parametrize(
    "target",
    [
        "/v1/%6coad_lora_adapter",
        "/v1/load%5flora_adapter",
        "/v1%2fload_lora_adapter",
        "//sleep",
        "/v1//../sleep",
        "/v1/../sleep",
        "/v1/./load_lora_adapter",
        "/v1/..%2fsleep",
        "/v1/\\..\\sleep",
        "/v1/completions/../load_lora_adapter",
        "/v1//load_lora_adapter",
        "/%73leep",
        "http://x/sleep",
        "http://x/v1/load_lora_adapter",
        "http://x//sleep",
        "http://x",
    ],
)
async def test_a_path_in_disguise_does_not_pass(target: str) -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        client.send(message("POST", target, {"model": "m"}))
        assert (await client.response()).status in (400, 404)
        assert not engine.requests


async def test_paths_that_the_settings_allow_pass() -> None:
    allowed = {"allow_paths": ["/sleep", "/profile/*"]}
    async with (
        FakeUpstream() as engine,
        serving(engine, server=allowed) as app,
        RawClient(app.port) as client,
    ):
        for target in ("/sleep?level=1", "/profile/start"):
            assert (await client.ask(message("POST", target))).status == 200
        assert (await client.ask(message("POST", "/wake_up"))).status == 404
        assert [request.target for request in engine.requests] == ["/sleep?level=1", "/profile/start"]


async def test_refusals_while_a_body_is_on_its_way_leave_no_request_behind() -> None:
    async with FakeUpstream() as engine, serving(engine) as app:
        async with RawClient(app.port) as client:
            client.send(START + LENGTH + b"\r\n{")
            await asyncio.sleep(0)
        async with RawClient(app.port) as client:
            assert (await client.ask()).status == 200
        assert await endings(app) == {"ok": 1}
