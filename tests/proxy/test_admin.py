"""The admin port: health, endpoints, decisions, metrics, settings."""

from __future__ import annotations

import asyncio
import io
import json
import re

import pytest

from pointsman.testing.client import ASK, ASK_STREAM, RawClient, message
from pointsman.testing.serving import admin, endpoints, serving
from pointsman.testing.upstream import FakeUpstream, reply


async def test_ready_means_an_endpoint_can_answer_and_healthy_means_the_process() -> None:
    async with FakeUpstream() as engine, serving(engine) as app:
        assert (await admin(app, "/readyz")).status == 200
        await admin(app, f"/endpoints/{engine.name}/drain", "POST")
        assert (await admin(app, "/readyz")).status == 503
        assert (await admin(app, "/healthz")).status == 200
        await admin(app, f"/endpoints/{engine.name}/resume", "POST")
        assert (await admin(app, "/readyz")).status == 200


async def test_an_endpoint_can_be_added_and_is_learned() -> None:
    async with FakeUpstream() as a, FakeUpstream(models=["n"]) as b, serving(a) as app:
        answer = await admin(app, "/endpoints", "POST", {"url": b.url, "labels": {"gpu": "x"}})
        assert (answer.status, json.loads(answer.body)["name"]) == (201, b.name)
        async with RawClient(app.port) as client:
            assert (await client.ask(message(body={"model": "n", "prompt": "x"}))).status == 200
        described = (await endpoints(app))[b.name]
        assert (described["models"], described["labels"], described["source"]) == (
            ["n"],
            {"gpu": "x"},
            "admin",
        )
        assert (await admin(app, "/endpoints", "POST", {"url": b.url})).status == 409


@pytest.mark.parametrize("body", [b"{", b"[]", {"url": "ftp://x"}, {"uri": "http://x"}, {}])
async def test_an_endpoint_that_cannot_be_is_400(body: object) -> None:
    async with FakeUpstream() as engine, serving(engine) as app:
        answer = await admin(app, "/endpoints", "POST", body)
        assert answer.status == 400
        assert answer.error()["message"]
        assert list(await endpoints(app)) == [engine.name]


async def test_a_draining_endpoint_finishes_what_it_has_and_gets_nothing_new() -> None:
    gate = asyncio.Event()
    async with (
        FakeUpstream([gate, reply(b"[1]")]) as a,
        serving(a) as app,
        RawClient(app.port) as client,
        FakeUpstream() as b,
    ):
        client.send(ASK)
        await a.request()
        await admin(app, "/endpoints", "POST", {"url": b.url})
        await admin(app, f"/endpoints/{a.name}/drain", "POST")
        async with RawClient(app.port) as other:
            for _ in range(4):
                assert (await other.ask()).status == 200
        assert (len(a.requests), len(b.requests)) == (1, 4)
        gate.set()
        assert (await client.response()).body == b"[1]"


async def test_a_removed_endpoint_finishes_what_it_has() -> None:
    gate = asyncio.Event()
    async with (
        FakeUpstream([gate, reply(b"[1]")]) as engine,
        serving(engine) as app,
        RawClient(app.port) as client,
    ):
        client.send(ASK)
        await engine.request()
        assert (await admin(app, f"/endpoints/{engine.name}", "DELETE")).status == 200
        assert await endpoints(app) == {}
        gate.set()
        assert (await client.response()).body == b"[1]"
        assert (await client.ask()).status == 503


async def test_unknown_names_paths_and_methods_are_errors() -> None:
    async with FakeUpstream() as engine, serving(engine) as app:
        assert (await admin(app, "/endpoints/nobody")).status == 404
        assert (await admin(app, "/endpoints/nobody", "DELETE")).status == 404
        assert (await admin(app, "/endpoints/nobody/drain", "POST")).status == 404
        assert (await admin(app, "/elsewhere")).status == 404
        assert (await admin(app, "/healthz", "POST")).status == 405
        assert (await admin(app, "/decisions?limit=0")).status == 400
        assert (await admin(app, "/decisions?limit=x")).status == 400


async def test_a_decision_tells_who_could_who_did_and_what_became_of_it() -> None:
    out = io.StringIO()
    async with FakeUpstream() as a, FakeUpstream() as b, serving(a, b, out=out) as app:
        async with RawClient(app.port) as client:
            for n in range(3):
                await client.ask(
                    message(
                        "POST", "/v1/completions", {"model": "m", "prompt": "x" * 400}, f"x-request-id: r{n}"
                    )
                )
        recent = json.loads((await admin(app, "/decisions?limit=2")).body)["decisions"]
        assert [decision["request_id"] for decision in recent] == ["r2", "r1"]
        found = json.loads((await admin(app, "/decisions?request_id=r0")).body)["decisions"]
        assert len(found) == 1
        decision = found[0]
        assert sorted(decision["candidates"]) == sorted([a.name, b.name])
        assert decision["chosen"] in decision["candidates"]
        assert decision["prompt_tokens"] > 90
        outcome = decision["outcome"]
        assert (outcome["ending"], outcome["status"], outcome["tries"]) == ("ok", 200, 1)
        assert outcome["usage"] == {"prompt_tokens": 8, "output_tokens": 1, "cached_tokens": None}
        assert 0 < outcome["ttft_s"] <= outcome["duration_s"]
        assert outcome["request_bytes"] == len(a.requests[0].body if a.requests else b.requests[0].body)
    assert out.getvalue().count(" ending=ok ") == 3


async def test_what_the_policy_has_learned_is_told_with_the_endpoint() -> None:
    async with (
        FakeUpstream() as engine,
        serving(engine, scheduling={"preset": "least-cost"}) as app,
        RawClient(app.port) as client,
    ):
        assert (await endpoints(app))[engine.name]["learned"] is None
        await client.ask(ASK_STREAM)
        learned = (await endpoints(app))[engine.name]["learned"]
        assert learned["step_s"] >= learned["step_rest_s"] > 0
        assert (learned["siblings"], learned["factor"], learned["kv_room_tokens"]) == (0, 1.0, None)
        one = json.loads((await admin(app, f"/endpoints/{engine.name}")).body)
        assert one["learned"]["prefill_tok_s"] == learned["prefill_tok_s"]
        page = (await admin(app, "/metrics")).body.decode()
        assert f'pointsman_ttft_to_predicted_count{{endpoint="{engine.name}",model="m"}} 1.0' in page
    async with FakeUpstream() as engine, serving(engine, scheduling={"preset": "round-robin"}) as app:
        async with RawClient(app.port) as client:
            await client.ask()
        assert (await endpoints(app))[engine.name]["learned"] is None


async def test_metrics_count_requests_tokens_and_load() -> None:
    gate = asyncio.Event()
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        await client.ask()
        engine.script = [gate, reply(b"{}")]
        client.send(ASK)
        await engine.request(2)
        page = (await admin(app, "/metrics")).body.decode()
        labels = f'endpoint="{engine.name}"'
        assert f"pointsman_inflight_requests{{{labels}}} 1.0" in page
        assert f'pointsman_tokens_total{{{labels},kind="prompt"}} 8.0' in page
        assert f'pointsman_endpoint_up{{breaker="closed",{labels}}} 1.0' in page
        assert f'pointsman_ttft_seconds_count{{{labels},model="m"}} 1.0' in page
        gate.set()
        assert (await client.response()).status == 200
        assert f"pointsman_inflight_requests{{{labels}}} 0.0" in (await admin(app, "/metrics")).body.decode()


async def test_head_and_keep_alive_work_on_the_admin_port() -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.admin_port) as client:
        client.send(message("HEAD", "/endpoints"))
        assert (await client.response(bodyless=True)).status in (200, 405)
        assert (await client.ask(message("GET", "/healthz"))).status == 200


async def test_what_an_endpoint_costs_is_told_with_our_tokens_for_it() -> None:
    async with FakeUpstream() as priced, FakeUpstream() as free, serving(priced, free) as app:
        described = await endpoints(app)
        assert (described[priced.name]["cost"], described[free.name]["cost"]) == (None, None)
        page = (await admin(app, "/metrics")).body.decode()
        assert "pointsman_endpoint_cost_total{" not in page
        await admin(app, f"/endpoints/{priced.name}", "DELETE")
        await admin(app, f"/endpoints/{free.name}", "DELETE")
        await admin(app, "/endpoints", "POST", {"url": priced.url, "price_per_hour": 3600.0, "watts": 500.0})
        async with RawClient(app.port) as client:
            assert (await client.ask(ASK)).status == 200
        cost = (await endpoints(app))[priced.name]["cost"]
        assert (cost["price_per_hour"], cost["watts"]) == (3600.0, 500.0)
        assert cost["output_tokens"] > 0
        assert cost["output_tokens_per_unit"] == pytest.approx(
            cost["output_tokens"] / cost["spent"], rel=0.01
        )
        assert cost["output_tokens_per_kwh"] == pytest.approx(cost["output_tokens"] / cost["kwh"], rel=0.01)
        page = (await admin(app, "/metrics")).body.decode()
        assert f'pointsman_endpoint_watts{{endpoint="{priced.name}"}} 500.0' in page
        (spent,) = re.findall(r"pointsman_endpoint_cost_total\{.*\} (\S+)", page)
        assert float(spent) >= cost["spent"] * 0.99
