"""Everything that can be made to go wrong at a simulated engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pointsman.errors import SettingsError
from pointsman.sim.connection import GARBAGE
from pointsman.sim.fleet import running_fleet
from pointsman.sim.spec import EngineSpec

Ask = Callable[..., Awaitable[Any]]
Connect = Callable[[str], Awaitable[Any]]
SPEED = 50
PATH = "/v1/completions"
BODY = {"prompt": "x" * 400, "max_tokens": 10}
STREAM = BODY | {"stream": True}
LONG = BODY | {"max_tokens": 100_000}


async def test_a_status_is_answered_as_often_as_asked_with_its_retry_after(ask: Ask) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        engine.fault("status", status=429, retry_after=7, count=2)
        answers = [await ask(engine.url, PATH, BODY) for _ in range(3)]
        assert (engine.state.refused, engine.state.served) == (2, 1)
    assert [a.status for a in answers] == [429, 429, 200]
    assert [a.headers.get("retry-after") for a in answers] == ["7", "7", None]
    assert answers[0].json()["error"]["code"] == 429


async def test_a_fault_hits_each_so_manieth_request_of_the_paths_named(ask: Ask) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        engine.fault("status", status=500, every=3)
        engine.fault("status", status=503, paths=["/health"])
        statuses = [(await ask(engine.url, PATH, BODY)).status for _ in range(6)]
        pages = [(await ask(engine.url, page)).status for page in ("/health", "/v1/models", "/metrics")]
    assert statuses == [200, 200, 500, 200, 200, 500]
    assert pages == [503, 200, 200]


async def test_a_hung_request_goes_on_when_the_fault_is_cleared(ask: Ask, connect: Connect) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        engine.fault("hang", count=2)
        hung, left = await connect(engine.url), await connect(engine.url)
        for wire in (hung, left):
            wire.send(PATH, BODY, head="connection: close\r\n")
        await engine.until(lambda state: state.held == 2)
        assert (await ask(engine.url, PATH, BODY)).status == 200
        left.close()
        await engine.until(lambda state: state.held == 1)
        assert engine.state.served == 1
        engine.clear_faults()
        assert (await hung.rest()).startswith(b"HTTP/1.1 200 OK")
        assert (engine.state.served, engine.state.held) == (2, 0)


async def test_a_stalled_stream_says_nothing_after_its_chunks_and_resumes_whole(
    ask: Ask, connect: Connect
) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        plain = await ask(engine.url, PATH, STREAM)
        engine.fault("stall", after_chunks=3, count=1)
        wire = await connect(engine.url)
        wire.send(PATH, STREAM, head="connection: close\r\n")
        await engine.until(lambda state: state.served == 2)
        got = await wire.until(b"\r\n\r\n")
        for _ in range(3):
            got += await wire.until(b"\n\n\r\n")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wire.reader.read(1), 0.05)
        engine.clear_faults()
        rest = await wire.rest()
    assert (got + rest).partition(b"\r\n\r\n")[2].count(b"data: ") == plain.body.count(b"data: ")
    assert rest.endswith(b"0\r\n\r\n")


async def test_a_plain_answer_stalls_in_its_body(connect: Connect) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        engine.fault("stall", after_chunks=0)
        wire = await connect(engine.url)
        wire.send(PATH, BODY, head="connection: close\r\n")
        head = await wire.until(b"\r\n\r\n")
        await engine.until(lambda state: state.served == 1)
        engine.clear_faults()
        body = await wire.rest()
    assert f"content-length: {len(body)}\r\n".encode() in head


async def test_a_stall_without_chunks_is_a_hang(connect: Connect) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        engine.fault("stall")
        (await connect(engine.url)).send(PATH, STREAM)
        await engine.until(lambda state: state.held == 1)


async def test_a_stream_can_end_in_the_middle_of_a_chunk(ask: Ask) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        engine.fault("close", after_chunks=2)
        answer = await ask(engine.url, PATH, STREAM)
        await engine.until(lambda state: not state.connections)
        assert engine.state.running == 0
    assert answer.status == 200
    assert len(answer.chunks) == 2
    assert not answer.complete
    assert answer.body.count(b"data: ") == 3


async def test_a_connection_can_close_without_an_answer(connect: Connect) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        engine.fault("close")
        wire = await connect(engine.url)
        wire.send(PATH, BODY)
        assert await wire.rest() == b""
        assert engine.state.log_length == 0


@pytest.mark.parametrize("more", [{}, {"after_chunks": 0}, {"after_chunks": 2}])
async def test_a_connection_can_be_reset(connect: Connect, more: dict[str, int]) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        engine.fault("reset", **more)
        wire = await connect(engine.url)
        wire.send(PATH, STREAM)
        with pytest.raises(ConnectionResetError):
            await wire.rest()


@pytest.mark.parametrize(("more", "before"), [({}, b""), ({"after_chunks": 1}, b"HTTP/1.1 200 OK")])
async def test_garbage_can_be_sent(connect: Connect, more: dict[str, int], before: bytes) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        engine.fault("garbage", **more)
        wire = await connect(engine.url)
        wire.send(PATH, STREAM)
        answer = await wire.rest()
    assert answer.startswith(before)
    assert answer.endswith(GARBAGE)
    assert bool(before) == (answer != GARBAGE)


async def test_slow_steps_take_so_many_times_as_long(ask: Ask) -> None:
    async with running_fleet(speed=200) as (engine,):
        await ask(engine.url, PATH, BODY)
        await ask(engine.url, PATH, BODY)
        engine.fault("slow", factor=4)
        await ask(engine.url, PATH, BODY)
        engine.clear_faults()
        await ask(engine.url, PATH, BODY)
        _, quick, slowed, again = engine.log
    assert slowed.duration_s == pytest.approx(4 * quick.duration_s, rel=1e-6)
    assert again.duration_s == pytest.approx(quick.duration_s, rel=1e-6)


async def test_a_frozen_engine_still_shows_its_metrics_and_thaws_where_it_was(
    ask: Ask, connect: Connect
) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        wire = await connect(engine.url)
        wire.send(PATH, STREAM | {"max_tokens": 200}, head="connection: close\r\n")
        await wire.until(b"\n\n\r\n")
        engine.fault("freeze", for_s=0.2)
        at_s = engine.state.engine_s
        page = await ask(engine.url, "/metrics")
        assert engine.state.engine_s == at_s
        assert b'vllm:num_requests_running{engine="0",model_name="granite-4.1-8b"} 1.0' in page.body
        assert (await wire.rest()).endswith(b"0\r\n\r\n")
        assert engine.log[-1].duration_s == pytest.approx(200 * 7.9e-3, rel=0.05)


def started(page: bytes) -> float:
    return next(
        float(line.split()[1]) for line in page.split(b"\n") if line.startswith(b"process_start_time")
    )


async def test_a_crash_resets_every_connection_and_loses_cache_and_requests(
    ask: Ask, connect: Connect
) -> None:
    async with running_fleet() as (engine,):
        await ask(engine.url, PATH, BODY | {"max_tokens": 1})
        before = await ask(engine.url, "/metrics")
        running, idle = await connect(engine.url), await connect(engine.url)
        running.send(PATH, LONG)
        await engine.until(lambda state: state.running + state.waiting == 1 and state.connections == 2)
        assert engine.state.cached_blocks == 6
        engine.fault("crash")
        for wire in (running, idle):
            with pytest.raises(ConnectionResetError):
                await wire.rest()
        with pytest.raises(ConnectionRefusedError):
            await connect(engine.url)
        state = engine.state
        assert (state.up, state.lost, state.running, state.cached_blocks) == (False, 1, 0, 0)
        engine.clear_faults()
        await engine.until(lambda state: state.up)
        answer = await ask(engine.url, PATH, BODY | {"max_tokens": 1})
        after = await ask(engine.url, "/metrics")
        assert (engine.state.restarts, engine.log[-2].ending) == (1, "lost")
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert started(before.body) < started(after.body)
    assert b'vllm:prefix_cache_queries_total{engine="0",model_name="granite-4.1-8b"} 100.0' in after.body


async def test_a_crashed_engine_comes_back_by_itself_on_its_port(ask: Ask) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        url = engine.url
        engine.fault("crash", for_s=0.05)
        assert not engine.up
        await engine.until(lambda state: state.up)
        assert engine.url == url
        assert (await ask(url, PATH, BODY)).status == 200


async def test_restarts_in_quick_succession_leave_it_up(ask: Ask) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        for _ in range(5):
            engine.fault("restart")
            await asyncio.sleep(0)
        await engine.until(lambda state: state.up)
        assert (await ask(engine.url, PATH, BODY)).status == 200
        assert engine.state.restarts == 5


async def test_refusing_keeps_open_connections(connect: Connect) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        wire = await connect(engine.url)
        await engine.until(lambda state: state.connections == 1)
        engine.fault("refuse", for_s=0.1)
        wire.send("/health", method="GET")
        assert (await wire.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        with pytest.raises(ConnectionRefusedError):
            await connect(engine.url)
        await engine.until(lambda state: state.up)
        await connect(engine.url)


async def test_faults_are_set_listed_and_cleared_over_http_also_at_a_sibling(ask: Ask) -> None:
    async with running_fleet([EngineSpec(name="a"), EngineSpec(name="b")], speed=SPEED) as (a, b):
        made = await ask(a.url, "/sim/fault", {"kind": "status", "status": 500, "count": 1})
        listed = (await ask(b.url, "/sim/fault/a")).json()
        broken = await ask(a.url, PATH, BODY)
        cleared = (await ask(a.url, "/sim/fault", method="DELETE")).json()
        crash = await ask(b.url, "/sim/fault/a", {"kind": "crash"})
        assert not a.up
        back = await ask(b.url, "/sim/fault/a", {"kind": "restart"})
        await a.until(lambda state: state.up)
        own = await ask(b.url, "/sim/fault", {"kind": "restart"})
        await b.until(lambda state: state.up)
    assert [x.status for x in (made, broken, crash, back, own)] == [200, 500, 200, 200, 200]
    assert [(f["kind"], f["status"]) for f in listed] == [("status", 500)]
    assert cleared == []


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "explode"}, "explode"),
        ({"kind": "stall", "after_chunk": 1}, "after_chunk"),
        ({"kind": "status", "status": 200}, "status"),
        ({"kind": "slow", "factor": 0}, "factor"),
    ],
)
async def test_a_mistake_in_a_fault_is_named(ask: Ask, fields: dict[str, Any], named: str) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        answer = await ask(engine.url, "/sim/fault", fields)
        with pytest.raises(SettingsError, match=named):
            engine.fault(**fields)
        assert not engine.state.faults
    assert answer.status == 400
    assert named in answer.json()["error"]["message"]
