"""The admin API where it has to say no, and what it must not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pointsman.testing.client import RawClient, message
from pointsman.testing.serving import admin, endpoints, serving, until
from pointsman.testing.upstream import FakeUpstream, reply


async def test_a_name_with_slashes_is_written_with_percent_signs() -> None:
    async with FakeUpstream() as engine, serving(f"{engine.url}/team/a") as app:
        name = f"{engine.name}/team/a"
        assert list(await endpoints(app)) == [name]
        quoted = name.replace("/", "%2F")
        assert json.loads((await admin(app, f"/endpoints/{quoted}/drain", "POST")).body)["draining"] is True
        assert (await admin(app, f"/endpoints/{name}/drain", "POST")).status == 405
        assert json.loads((await admin(app, f"/endpoints/{quoted}", "DELETE")).body) == {"removed": name}


async def test_an_endpoint_of_the_file_is_taken_out_there(tmp_path: Path) -> None:
    async with FakeUpstream() as engine:
        path = tmp_path / "endpoints.yaml"
        path.write_text(
            json.dumps({"endpoints": [{"address": "127.0.0.1", "port": engine.port, "name": "x"}]})
        )
        async with serving(discovery={"file": str(path), "file_interval_s": 0.01}) as app:
            refused = await admin(app, "/endpoints/x", "DELETE")
            assert refused.status == 409
            assert "take it out there" in str(refused.error()["message"])
            path.write_text("endpoints: []")

            async def gone() -> bool:
                return not await endpoints(app)

            await until(gone)
            async with RawClient(app.port) as client:
                assert (await client.ask()).status == 503
            assert (await admin(app, "/readyz")).status == 503


async def test_a_web_page_of_somebody_elses_changes_nothing() -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.admin_port) as client:
        ask = message("POST", "/endpoints", {"url": "http://evil.example"}, "origin: http://evil.example")
        assert (await client.ask(ask)).status == 403
        assert list(await endpoints(app)) == [engine.name]
        assert (await client.ask(message("GET", "/healthz", None, "origin: http://x.example"))).status == 200


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "%C2%B2", ""])
async def test_a_limit_that_is_none_is_400(limit: str) -> None:
    async with FakeUpstream() as engine, serving(engine) as app:
        assert (await admin(app, f"/decisions?limit={limit}&x=1")).status == (400 if limit else 200)


@pytest.mark.parametrize(
    "body",
    [
        {"url": "http://a", "headers": {"x": "a\r\nb: c"}},
        {"url": "http://a", "api_key_env": "NOT_SET_ANYWHERE"},
        {"url": "https://a", "tls_ca": "/no/such/file.pem"},
        {"url": "http://a", "weight": 0},
    ],
)
async def test_an_endpoint_that_could_not_be_talked_to_is_refused(body: object) -> None:
    async with FakeUpstream() as engine, serving(engine) as app:
        assert (await admin(app, "/endpoints", "POST", body)).status == 400
        assert list(await endpoints(app)) == [engine.name]
        assert (await admin(app, "/healthz")).status == 200


async def test_secrets_are_nowhere_in_what_it_says() -> None:
    secret = "hunter2"
    async with FakeUpstream() as engine:
        listed = {"url": engine.url, "api_key": secret, "headers": {"x-key": secret}}
        async with serving(listed) as app, RawClient(app.port) as client:
            assert (await client.ask()).status == 200
            for path in ("/settings", "/endpoints", "/decisions", "/metrics"):
                answer = await admin(app, path)
                assert answer.status == 200
                assert secret.encode() not in answer.body
            assert json.loads((await admin(app, "/settings")).body)["endpoints"][0]["api_key"] == "***"
        assert engine.requests[0].headers["authorization"] == f"Bearer {secret}"


async def test_every_endpoint_and_model_of_the_page_is_one_we_know() -> None:
    async with FakeUpstream() as a, FakeUpstream(models=["n"]) as b, serving(a, b) as app:
        async with RawClient(app.port) as client:
            assert (await client.ask()).status == 200
            for i in range(20):
                unknown = message(body={"model": f"invented-{i}", "prompt": "x"})
                assert (await client.ask(unknown)).status == 404
            a.script = [reply(b"{}", 500)]
            await client.ask()
        page = (await admin(app, "/metrics")).body.decode()
        samples = [s for family in text_string_to_metric_families(page) for s in family.samples]
        assert {s.labels["model"] for s in samples if "model" in s.labels} == {"", "m"}
        assert {s.labels["endpoint"] for s in samples if "endpoint" in s.labels} == {"", a.name, b.name}
        assert len(samples) < 200


async def test_what_an_engine_tells_is_described() -> None:
    async with FakeUpstream() as engine:
        engine.page = (
            b"# a page\nvllm:num_requests_running 1\nvllm:num_requests_waiting 2\n"
            b'vllm:cache_config_info{block_size="16",enable_prefix_caching="True",num_gpu_blocks="100"} 1\n'
        )
        async with serving(engine) as app:
            told = json.loads((await admin(app, f"/endpoints/{engine.name}")).body)
            assert (told["engine"], told["models"], told["breaker"]) == ("vllm", ["m"], "closed")
            metrics = told["metrics"]
            assert (metrics["running"], metrics["waiting"]) == (1.0, 2.0)
            assert (metrics["block_tokens"], metrics["kv_tokens"]) == (16, 1600)
            assert metrics["prefix_caching"] is True
            assert 0 <= metrics["age_s"] < 10
