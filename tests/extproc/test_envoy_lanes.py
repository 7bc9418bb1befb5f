"""A real Envoy before fake engines: what a client meets, in either lane."""

from __future__ import annotations

import asyncio
import json

import pytest

from pointsman.testing.client import ASK, ASK_STREAM, message
from pointsman.testing.envoy import Gateway, behind_envoy
from pointsman.testing.upstream import LAST_CHUNK, SSE_HEAD, FakeUpstream, event, reply

LANES = pytest.mark.parametrize("fast", [False, True], ids=["ext_proc", "fast-lane"])


def ask(model: str = "m", *lines: str) -> bytes:
    return message("POST", "/v1/completions", {"model": model, "prompt": "Hello"}, *lines)


async def over(gateway: Gateway, count: int) -> None:
    """Envoy has told of so many ends, and nothing is in flight."""
    await gateway.until(lambda: len(gateway.ended) >= count)
    assert gateway.in_flight == 0


@LANES
async def test_requests_go_where_the_picker_says_and_their_ends_come_back(fast: bool) -> None:
    async with FakeUpstream() as a, FakeUpstream() as b, behind_envoy(a, b, fast_lane=fast) as gateway:
        async with gateway.client() as client:
            for n in range(6):
                response = await client.ask(ask("m", f"x-request-id: id-{n}"))
                assert response.status == 200
                assert response.headers["x-request-id"] == f"id-{n}"
        assert (len(a.requests), len(b.requests)) == (3, 3)  # round-robin, as the settings say
        await over(gateway, 6)
        names = {d["request_id"]: d["chosen"] for d in gateway.ended}
        seen = {r.headers["x-request-id"]: e.name for e in (a, b) for r in e.requests}
        assert names == seen
        outcomes = [d["outcome"] for d in gateway.ended]
        assert {(o["ending"], o["status"]) for o in outcomes} == {("ok", 200)}
        assert all(0 < o["duration_s"] < 5 for o in outcomes)


@LANES
async def test_a_body_reaches_the_endpoint_whole_with_its_length(fast: bool) -> None:
    async with FakeUpstream() as engine, behind_envoy(engine, fast_lane=fast) as gateway:
        body = json.dumps({"model": "m", "prompt": "x" * (8 << 20)}).encode()
        async with gateway.client() as client:
            assert (await client.ask(message("POST", "/v1/completions", body))).status == 200
            pieces = [body[i : i + 100_000] for i in range(0, len(body), 100_000)]
            chunked = message("POST", "/v1/completions", chunks=pieces)
            assert (await client.ask(chunked)).status == 200
        for request in engine.requests:
            assert request.headers["content-length"] == str(len(body))
            assert request.body == body
        assert len(engine.requests) == 2
        await over(gateway, 2)


@LANES
async def test_a_body_over_the_limit_is_413(fast: bool) -> None:
    async with (
        FakeUpstream() as engine,
        behind_envoy(engine, fast_lane=fast, server={"body_bytes": 100_000}) as gateway,
        gateway.client() as client,
    ):
        body = {"model": "m", "prompt": "x" * 200_000}
        assert (await client.ask(message("POST", "/v1/completions", body))).status == 413
        assert engine.requests == []


@LANES
async def test_a_stream_comes_as_it_is_written(fast: bool) -> None:
    gate = asyncio.Event()
    script = [SSE_HEAD, event("one"), gate, event("two"), LAST_CHUNK]
    async with (
        FakeUpstream(script) as engine,
        behind_envoy(engine, fast_lane=fast) as gateway,
        gateway.client() as client,
    ):
        client.send(ASK_STREAM)
        await client.head()
        assert await client.line(event("one")) == event("one")
        assert gateway.in_flight > 0
        gate.set()
        assert (await client.line(LAST_CHUNK)).endswith(event("two") + LAST_CHUNK)
        await over(gateway, 1)


@LANES
async def test_a_client_that_leaves_is_gone_for_engine_and_picker(fast: bool) -> None:
    async with (
        FakeUpstream([SSE_HEAD, event("one"), asyncio.Event()]) as engine,
        behind_envoy(engine, fast_lane=fast) as gateway,
    ):
        async with gateway.client() as client:
            client.send(ASK_STREAM)
            await client.head()
            await client.line(event("one"))
        await asyncio.wait_for(engine.requests[0].gone.wait(), 5)
        await over(gateway, 1)
        assert [d["outcome"]["ending"] for d in gateway.ended] == ["cancelled"]


@LANES
async def test_refusals_of_the_picker_reach_the_client(fast: bool) -> None:
    async with (
        FakeUpstream() as engine,
        behind_envoy(engine, fast_lane=fast) as gateway,
    ):
        async with gateway.client() as client:
            bad = await client.ask(message("POST", "/v1/completions", b"{not json"))
        assert bad.status == 400
        gateway.core.pool.drain(engine.name)
        async with gateway.client() as client:
            full = await client.ask(ask())
        assert full.status == (429 if fast else 503)
        assert full.headers["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
        assert engine.requests == []
        assert gateway.in_flight == 0


@LANES
async def test_a_client_cannot_name_the_endpoint(fast: bool) -> None:
    async with (
        FakeUpstream() as engine,
        FakeUpstream() as other,
        FakeUpstream() as outside,
        behind_envoy(engine, other, fast_lane=fast) as gateway,
        gateway.client() as client,
    ):
        gateway.core.pool.drain(other.name)
        for target in (other, outside):
            steering = f"x-gateway-destination-endpoint: {target.name}"
            for _ in range(3):
                assert (await client.ask(ask("m", steering))).status == 200
        assert (len(engine.requests), len(other.requests), len(outside.requests)) == (6, 0, 0)
        await gateway.stop_picker()  # and also without the picker's word
        assert (await client.ask(ask("m", f"x-gateway-destination-endpoint: {outside.name}"))).status == 200
        assert outside.requests == []


@LANES
async def test_what_is_not_inference_is_404_and_health_is_told(fast: bool) -> None:
    async with (
        FakeUpstream() as engine,
        behind_envoy(engine, fast_lane=fast, server={"allow_paths": ("/sleep", "/x/*")}) as gateway,
    ):

        async def status(path: str, method: str = "POST") -> int:
            async with gateway.client() as client:
                return (await client.ask(message(method, path, {"model": "m"}))).status

        for path in (
            "/metrics",
            "/v1/load_lora_adapter",
            "/v1//load_lora_adapter",
            "/v1/a%2Fb",
            "/decide/v1/x",
        ):
            assert await status(path) in (400, 404), path
        assert engine.requests == []
        for path in ("/sleep", "/x/y", "/v1/completions", "/rerank/"):
            assert await status(path) == 200, path
        assert len(engine.requests) == 4
        assert await status("/health", "GET") == 200


@LANES
async def test_a_dead_endpoint_costs_a_retry_and_is_left_alone(fast: bool) -> None:
    async with (
        FakeUpstream() as engine,
        FakeUpstream() as dying,
        behind_envoy(engine, dying, fast_lane=fast, metrics={"idle_interval_s": 60.0}) as gateway,
        gateway.client() as client,
    ):
        await dying.stop()
        for _ in range(8):
            assert (await client.ask(ask())).status == 200
        await over(gateway, 8)
        assert len(engine.requests) == 8
        assert await gateway.stat("cluster.endpoints.upstream_rq_retry_success") >= 1


@LANES
async def test_an_answer_that_says_busy_tries_another(fast: bool) -> None:
    async with (
        FakeUpstream([reply(b"busy", 503)]) as busy,
        FakeUpstream() as engine,
        behind_envoy(busy, engine, fast_lane=fast) as gateway,
        gateway.client() as client,
    ):
        for _ in range(4):
            assert (await client.ask(ask())).status == 200
        assert len(engine.requests) == 4
        assert busy.requests
        await over(gateway, 4)


@LANES
async def test_the_list_of_endpoints_follows_the_pool(fast: bool) -> None:
    async with (
        FakeUpstream() as a,
        FakeUpstream() as b,
        behind_envoy(a, {"url": b.url, "weight": 2.5}, fast_lane=fast) as gateway,
        gateway.client() as client,
    ):
        assert await gateway.endpoint(a.name, "health_flags") == "healthy"
        assert (await gateway.endpoint(a.name, "weight"), await gateway.endpoint(b.name, "weight")) == (
            "100",
            "250",
        )
        pool = gateway.core.pool
        pool.drain(a.name)

        async def draining() -> bool:
            return await gateway.endpoint(a.name, "health_flags") != "healthy"

        await gateway.until(draining)
        pool.remove(b.name)

        async def gone() -> bool:
            return await gateway.endpoint(b.name, "weight") == ""

        await gateway.until(gone)
        pool.drain(a.name, False)
        assert (await client.ask(ask())).status == 200
        assert await gateway.stat("cluster.endpoints.update_rejected") == 0


@LANES
@pytest.mark.parametrize("down", ["open", "closed"])
async def test_without_the_picker_requests_go_on_or_fail_as_set(fast: bool, down: str) -> None:
    async with (
        FakeUpstream() as a,
        FakeUpstream() as b,
        behind_envoy(a, b, fast_lane=fast, envoy={"picker_down": down}) as gateway,
        gateway.client() as client,
    ):
        assert (await client.ask(ASK)).status == 200
        await gateway.stop_picker()
        for _ in range(3):
            assert (await client.ask(ASK)).status == (200 if down == "open" else 503)
        assert len(a.requests) + len(b.requests) == (4 if down == "open" else 1)
        await gateway.start_picker()

        async def asked() -> bool:
            assert (await client.ask(ASK)).status in (200, 503)
            return bool(gateway.ended)

        await gateway.until(asked)
        assert (await client.ask(ASK)).status == 200


@LANES
async def test_an_endpoint_gets_its_own_headers_and_the_client_s_else(fast: bool) -> None:
    async with FakeUpstream() as keyed, FakeUpstream() as bare:
        endpoint = {"url": keyed.url, "api_key": "secret", "headers": {"X-Team": "a b"}}
        async with (
            behind_envoy(endpoint, bare, fast_lane=fast) as gateway,
            gateway.client() as client,
        ):
            objective = "x-llm-d-inference-objective: o"
            for _ in range(4):
                assert (await client.ask(ask("m", "authorization: Bearer mine", objective))).status == 200
            for engine, key in ((keyed, "Bearer secret"), (bare, "Bearer mine")):
                assert [r.headers["authorization"] for r in engine.requests] == [key] * 2
                assert not any("x-llm-d-inference-objective" in r.headers for r in engine.requests)
            assert keyed.requests[0].headers["x-team"] == "a b"
            assert "x-team" not in bare.requests[0].headers
            assert keyed.requests[0].headers["host"] == "127.0.0.1"
