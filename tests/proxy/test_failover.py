"""Before the first byte of an answer a request may move; which failures move it, how often, and what is said
when nobody could answer."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator

import pytest

from pointsman.testing.client import ASK, RawClient, message
from pointsman.testing.serving import admin, endings, endpoints, in_flight, serving
from pointsman.testing.upstream import (
    SSE_HEAD,
    End,
    FakeUpstream,
    Received,
    Step,
    reply,
)

GOOD = reply(b'{"good": true}')
NEVER = asyncio.Event
SELDOM = {"interval_s": 60.0, "idle_interval_s": 60.0}


def first(*steps: Step | Callable[[], Step]) -> Callable[[Received], Iterable[Step]]:
    """A script for several endpoints: the first request of all gets ``steps``, later ones are answered."""
    asked: list[Received] = []

    def script(request: Received) -> Iterable[Step]:
        asked.append(request)
        return [step() if callable(step) else step for step in steps] if len(asked) == 1 else [GOOD]

    return script


FAILURES = {
    "reset after the request": (End.RESET,),
    "close after the request": (End.CLOSE,),
    "silence": (NEVER,),
    "a head, then a reset": (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", End.RESET),
    "a stream's head, then a close": (SSE_HEAD, End.CLOSE),
    "half a head, then a close": (b"HTTP/1.1 200 OK\r\ncontent-le", End.CLOSE),
    "a head, then silence": (SSE_HEAD, NEVER),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n",),
    "no status": (b"HTTP/1.1 abc OK\r\n\r\n",),
    "a broken chunk": (SSE_HEAD + b"zz\r\n",),
    "a broken length": (b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",),
    "an endless head": (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 50_000,),
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_a_failure_before_the_first_byte_moves_to_the_other_endpoint(failure: str) -> None:
    script = first(*FAILURES[failure])
    limits = {"first_byte_timeout_s": 0.3}
    async with FakeUpstream(script) as a, FakeUpstream(script) as b, serving(a, b, upstream=limits) as app:
        async with RawClient(app.port) as client:
            answer = await client.ask()
            assert (answer.status, answer.body) == (200, b'{"good": true}')
        assert (len(a.requests), len(b.requests)) == (1, 1)
        assert a.requests[0].body == b.requests[0].body
        assert await in_flight(app) == 0
        assert await endings(app) == {"ok": 1}
        assert 'pointsman_retries_total{endpoint="' in (await admin(app, "/metrics")).body.decode()


async def test_a_refused_connection_moves_to_the_other_endpoint() -> None:
    async with FakeUpstream() as a, FakeUpstream() as b, serving(a, b) as app, RawClient(app.port) as client:
        await a.stop()
        for _ in range(4):
            assert (await client.ask()).status == 200
        assert len(b.requests) == 4
        assert not (await endpoints(app))[a.name]["reached"]
        assert await endings(app) == {"ok": 4}


async def test_refused_connections_do_not_count_as_tries() -> None:
    """Nothing was sent there; a request is served while anybody is there to serve it."""
    down = [FakeUpstream() for _ in range(6)]
    for engine in down:
        await engine.start()
    async with FakeUpstream() as up, serving(*down, up, upstream={"tries": 1}) as app:
        for engine in down:
            await engine.stop()
        async with RawClient(app.port) as client:
            for _ in range(7):
                assert (await client.ask()).status == 200
        assert len(up.requests) == 7
        assert await endings(app) == {"ok": 7}


@pytest.fixture
def deaf() -> Iterator[str]:
    """URL of a port whose queue of connections is full: connecting takes forever."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for sock in waiting:
            sock.close()


async def test_the_connect_timeout_is_a_setting_of_its_own(deaf: str) -> None:
    quick = {"metrics": {"timeout_s": 0.1}, "upstream": {"connect_timeout_s": 0.2}}
    for_anybody = message("POST", "/tokenize", {"prompt": "x"})
    async with FakeUpstream() as good, serving(deaf, good, **quick) as app, RawClient(app.port) as client:
        started = time.monotonic()
        for _ in range(2):
            assert (await client.ask(for_anybody)).status == 200
        assert 0.2 <= time.monotonic() - started < 2
        assert await endings(app) == {"ok": 2}
    async with serving(deaf, **quick) as app, RawClient(app.port) as client:
        answer = await client.ask()
        assert (answer.status, answer.error()["code"]) == (502, "upstream_failed")


async def test_the_first_byte_timeout_says_so() -> None:
    async with (
        FakeUpstream([asyncio.Event()]) as engine,
        serving(engine, upstream={"first_byte_timeout_s": 0.3}) as app,
        RawClient(app.port) as client,
    ):
        answer = await client.ask()
        assert (answer.status, answer.error()["code"]) == (504, "upstream_timeout")
        assert engine.name in str(answer.error()["message"])
        await asyncio.wait_for(engine.requests[0].gone.wait(), 5)
        assert (await client.ask()).status == 504  # the client's connection is still good
        assert await endings(app) == {"failed": 2}


async def test_a_kept_connection_that_the_endpoint_closed_is_replaced_without_harm() -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        for _ in range(3):
            assert (await client.ask()).status == 200
            await engine.drop()
        assert (await endpoints(app))[engine.name]["breaker"] == "closed"
        assert await endings(app) == {"ok": 3}


async def test_a_kept_connection_closed_upon_the_next_request_is_no_fault_of_the_endpoint() -> None:
    """The race every proxy loses now and then: the endpoint closes just when the next request is sent."""

    def script(request: Received) -> Iterable[Step]:
        ours = [seen for seen in engine.requests if seen.connection == request.connection]
        return [GOOD] if len(ours) == 1 else [End.CLOSE]

    async with FakeUpstream(script) as engine, serving(engine, breaker={"faults": 1}) as app:
        async with RawClient(app.port) as client:
            for _ in range(4):
                assert (await client.ask()).status == 200
        assert (await endpoints(app))[engine.name]["breaker"] == "closed"
        assert await endings(app) == {"ok": 4}


async def test_no_endpoint_is_asked_twice_and_tries_are_bounded() -> None:
    upstreams = [FakeUpstream([End.RESET]) for _ in range(5)]
    for upstream in upstreams:
        await upstream.start()
    try:
        async with serving(*upstreams, upstream={"tries": 3}) as app, RawClient(app.port) as client:
            answer = await client.ask()
            assert (answer.status, answer.error()["code"]) == (502, "upstream_failed")
            assert sorted(len(upstream.requests) for upstream in upstreams) == [0, 0, 1, 1, 1]
            assert await in_flight(app) == 0
            assert await endings(app) == {"failed": 1}
            decision = json.loads((await admin(app, "/decisions")).body)["decisions"][0]
            assert (len(decision["tried_before"]), decision["outcome"]["tries"]) == (2, 3)
    finally:
        for upstream in upstreams:
            await upstream.stop()


async def test_fewer_endpoints_than_tries_are_asked_once_each() -> None:
    async with FakeUpstream([End.CLOSE]) as a, FakeUpstream([End.CLOSE]) as b:
        async with serving(a, b, upstream={"tries": 9}) as app, RawClient(app.port) as client:
            assert (await client.ask()).status == 502
        assert (len(a.requests), len(b.requests)) == (1, 1)


# -- an engine that is busy


BUSY = [reply(b'{"busy": 1}', 429, "retry-after: 7"), reply(b'{"busy": 2}', 503, "retry-after: 8")]


@pytest.mark.parametrize("busy", BUSY)
async def test_a_busy_engine_means_another_is_asked(busy: bytes) -> None:
    script = first(busy)
    async with FakeUpstream(script) as a, FakeUpstream(script) as b, serving(a, b) as app:
        async with RawClient(app.port) as client:
            assert (await client.ask()).body == b'{"good": true}'
        assert (len(a.requests), len(b.requests)) == (1, 1)
        assert await endings(app) == {"ok": 1}


@pytest.mark.parametrize("busy", BUSY)
async def test_when_all_are_busy_the_last_answer_reaches_the_client_and_nobody_is_blamed(busy: bytes) -> None:
    async with (
        FakeUpstream([busy]) as a,
        FakeUpstream([busy]) as b,
        serving(a, b, breaker={"faults": 1}) as app,
        RawClient(app.port) as client,
    ):
        for _ in range(5):
            answer = await client.ask()
            assert busy.endswith(answer.body)
            assert busy.startswith(f"HTTP/1.1 {answer.status}".encode())
            assert answer.headers["retry-after"] in ("7", "8")
        assert {e["breaker"] for e in (await endpoints(app)).values()} == {"closed"}
        assert (len(a.requests), len(b.requests)) == (5, 5)
        assert await in_flight(app) == 0
        assert await endings(app) == {"error": 5}


async def test_the_last_refusal_is_told_when_the_next_endpoint_breaks() -> None:
    script = first(reply(b"busy", 429, "retry-after: 7"))

    def broken(request: Received) -> Iterable[Step]:
        return [End.RESET if step is GOOD else step for step in script(request)]

    async with (
        FakeUpstream(broken) as a,
        FakeUpstream(broken) as b,
        serving(a, b) as app,
        RawClient(app.port) as client,
    ):
        answer = await client.ask()
        assert (answer.status, answer.body, answer.headers["retry-after"]) == (429, b"busy", "7")


async def test_an_endpoint_that_breaks_in_the_middle_of_its_refusal_leaves_no_trace_in_the_next_answer() -> (
    None
):
    half = b"HTTP/1.1 503 Busy\r\ncontent-length: 100\r\n\r\nbusy"
    script = first(half, End.RESET)
    async with (
        FakeUpstream(script) as a,
        FakeUpstream(script) as b,
        serving(a, b) as app,
        RawClient(app.port) as client,
    ):
        answer = await client.ask()
        assert (answer.status, answer.body) == (200, b'{"good": true}')
        assert await in_flight(app) == 0


async def test_a_refusal_in_chunks_or_larger_than_we_hold_reaches_the_client_whole() -> None:
    chunked = b"HTTP/1.1 503 Busy\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbusy\r\n0\r\n\r\n"
    large = reply(b"x" * 3_000_000, 429)
    for refusal, body in ((chunked, b"busy"), (large, b"x" * 3_000_000)):
        async with FakeUpstream([refusal]) as engine, serving(engine) as app, RawClient(app.port) as client:
            for _ in range(2):
                answer = await client.ask()
                assert (answer.complete, answer.body) == (True, body)
            assert await endings(app) == {"error": 2}


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500, 501])
async def test_other_answers_go_to_the_client_at_once(status: int) -> None:
    script = [reply(b'{"error": {"message": "no"}}', status)]
    async with FakeUpstream(script) as a, FakeUpstream(script) as b, serving(a, b) as app:
        async with RawClient(app.port) as client:
            answer = await client.ask()
            assert (answer.status, answer.body) == (status, b'{"error": {"message": "no"}}')
        assert len(a.requests) + len(b.requests) == 1
        assert await endings(app) == {"error": 1}


# -- the breaker


async def test_client_errors_do_not_open_the_breaker() -> None:
    async with (
        FakeUpstream([reply(b"{}", 400)]) as a,
        FakeUpstream([reply(b"{}", 422)]) as b,
        serving(a, b, breaker={"faults": 1}) as app,
        RawClient(app.port) as client,
    ):
        for _ in range(6):
            await client.ask()
        assert {e["breaker"] for e in (await endpoints(app)).values()} == {"closed"}
        assert (len(a.requests), len(b.requests)) == (3, 3)


@pytest.mark.parametrize("fault", [End.RESET, reply(b"{}", 500), reply(b"{}", 502)])
async def test_faults_in_a_row_open_the_breaker_and_one_probe_closes_it(fault: Step) -> None:
    gate = asyncio.Event()
    settings = {
        "breaker": {"faults": 2, "open_s": 0.3},
        "metrics": {"interval_s": 60.0, "idle_interval_s": 60.0},
    }
    async with (
        FakeUpstream([fault]) as bad,
        FakeUpstream([GOOD]) as good,
        serving(bad, good, **settings) as app,
    ):

        async def state() -> str:
            found: str = (await endpoints(app))[bad.name]["breaker"]
            return found

        async with RawClient(app.port) as client:
            while len(bad.requests) < 2:
                await client.ask()
            assert await state() == "open"
            for _ in range(6):
                assert (await client.ask()).status == 200
            assert len(bad.requests) == 2  # it is left alone
            bad.script = [gate, GOOD]
            await asyncio.sleep(0.3)  # settings.breaker.open_s
        clients = [RawClient(app.port) for _ in range(8)]
        for client in clients:
            await client.__aenter__()
            client.send(ASK)
        await bad.request(3)
        assert await state() == "half-open"
        async with RawClient(app.port) as client:
            for _ in range(4):
                assert (await client.ask()).status == 200
        assert len(bad.requests) == 3  # one probe, whatever else is asked
        gate.set()
        for client in clients:
            assert (await client.response()).status == 200
            client.leave()
        assert await state() == "closed"
        async with RawClient(app.port) as client:
            for _ in range(4):
                assert (await client.ask()).status == 200
        assert len(bad.requests) == 5
        assert await in_flight(app) == 0


async def test_a_probe_whose_client_leaves_makes_room_for_the_next() -> None:
    settings = {
        "breaker": {"faults": 1, "open_s": 0.2},
        "metrics": {"interval_s": 60.0, "idle_interval_s": 60.0},
    }
    script = [reply(b"{}", 500)]
    async with (
        FakeUpstream(script) as bad,
        FakeUpstream([GOOD]) as good,
        serving(bad, good, **settings) as app,
    ):
        async with RawClient(app.port) as client:
            while not bad.requests:
                await client.ask()
        bad.script = [asyncio.Event()]
        await asyncio.sleep(0.2)  # settings.breaker.open_s
        for number in (2, 3):
            others = len(good.requests)
            clients = [RawClient(app.port) for _ in range(2)]
            for client in clients:
                await client.__aenter__()
                client.send(ASK)
            probe, _ = await asyncio.gather(bad.request(number), good.request(others + 1))
            for client in clients:
                client.leave()
            await asyncio.wait_for(probe.gone.wait(), 5)
        bad.script = [GOOD]
        async with RawClient(app.port) as client:
            while len(bad.requests) < 4:
                assert (await client.ask()).status == 200
        assert (await endpoints(app))[bad.name]["breaker"] == "closed"


async def test_when_every_breaker_is_open_an_endpoint_is_tried_all_the_same() -> None:
    settings = {
        "breaker": {"faults": 1, "open_s": 60},
        "metrics": {"interval_s": 60.0, "idle_interval_s": 60.0},
    }
    async with (
        FakeUpstream([End.RESET]) as engine,
        serving(engine, **settings) as app,
        RawClient(app.port) as client,
    ):
        assert (await client.ask()).status == 502
        assert (await endpoints(app))[engine.name]["breaker"] == "open"
        engine.script = [GOOD]
        assert (await client.ask()).status == 200
        assert (await endpoints(app))[engine.name]["breaker"] == "closed"


# -- nobody there


async def test_an_endpoint_behind_an_open_breaker_is_tried_before_a_request_fails() -> None:
    healed = asyncio.Event()

    def flaky(request: Received) -> Iterable[Step]:
        return [GOOD] if healed.is_set() else [End.RESET]

    async with (
        FakeUpstream(flaky) as a,
        FakeUpstream() as b,
        serving(a, b, metrics=SELDOM, breaker={"faults": 1, "open_s": 60.0}) as app,
        RawClient(app.port) as client,
    ):
        for _ in range(2):
            assert (await client.ask()).status == 200
        assert (await endpoints(app))[a.name]["breaker"] == "open"
        healed.set()
        b.script = [reply(b"busy", 503)]
        assert (await client.ask()).body == b'{"good": true}'
        assert (await endpoints(app))[a.name]["breaker"] == "closed"


async def test_an_endpoint_that_is_down_at_the_start_is_used_when_it_comes_up() -> None:
    late = FakeUpstream()
    await late.start()
    await late.stop()
    async with serving(late) as app, RawClient(app.port) as client:
        answer = await client.ask()
        assert (answer.status, answer.error()["code"]) == (502, "upstream_failed")
        assert (await admin(app, "/readyz")).status == 503
        assert (await admin(app, "/healthz")).status == 200
        await late.start()
        assert (await client.ask()).status == 200
        assert (await admin(app, "/readyz")).status == 200
        await late.stop()


async def test_an_empty_pool_is_503_in_the_shape_of_the_api_that_was_called() -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        await admin(app, f"/endpoints/{engine.name}", "DELETE")
        answer = await client.ask()
        assert (answer.status, answer.error()["code"], answer.headers["retry-after"]) == (
            503,
            "no_endpoints",
            "1",
        )
        answer = await client.ask(
            message("POST", "/v1/messages", {"model": "m", "max_tokens": 1, "messages": []})
        )
        assert json.loads(answer.body)["type"] == "error"
        assert answer.error()["type"] == "overloaded_error"
