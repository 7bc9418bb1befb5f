"""Gateways that share what engines tell of their caches, in a real Redis: who does not hear an engine itself
knows what it holds all the same.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pointsman.errors import SettingsError
from pointsman.proxy.application import Application
from pointsman.sim.fleet import running_fleet
from pointsman.sim.spec import EngineSpec, KvEvents
from pointsman.testing.client import RawClient, message
from pointsman.testing.serving import admin, serving, settings, until

SERVER = shutil.which("redis-server") or shutil.which("valkey-server")
needs_server = pytest.mark.skipif(not SERVER, reason="needs redis-server or valkey-server on the path")
SPEED = 50
EVENTS = KvEvents(endpoint="tcp://*:0", replay_endpoint="tcp://*:0", delay_s=0)
SYSTEM = " ".join(f"rule {i}: be brief and say {i * 7}." for i in range(120))
PATIENT: dict[str, dict[str, Any]] = {"tokens": {"budget_s": 5}, "scheduling": {"preset": "least-cost"}}


class Redis:
    """A server on a unix socket of its own."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "s"
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None

    @property
    def shared_index(self) -> dict[str, Any]:
        return {"redis": f"unix://{self.socket}"}

    async def start(self) -> None:
        assert SERVER
        self._process = process = await asyncio.create_subprocess_exec(
            *(SERVER, "--port", "0", "--unixsocket", str(self.socket)),
            *("--save", "", "--dir", str(self._folder)),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout
        while b"accept connections" not in await process.stdout.readline():
            pass

    async def stop(self) -> None:
        if self._process:
            self._process.kill()
            await self._process.communicate()
            self._process = None


@asynccontextmanager
async def redis_server(folder: Path) -> AsyncIterator[Redis]:
    server = Redis(folder)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def ask(app: Application, **body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of its decision, and the answer's usage."""
    async with RawClient(app.port) as client:
        whole = {"model": app.pool.models()[0], "max_tokens": 2, **body}
        answer = await client.ask(message("POST", "/v1/completions", whole, "connection: close"))
    assert answer.status == 200, answer.body
    [record] = json.loads((await admin(app, "/decisions?limit=1")).body)["decisions"]
    return record, json.loads(answer.body)["usage"]


async def counted(app: Application, family: str) -> dict[str, float]:
    """By label, what the metrics page counts."""
    lines = (await admin(app, "/metrics")).body.decode().splitlines()
    found = [line.rpartition(" ") for line in lines if line.startswith(f"{family}{{")]
    return {labels.partition('"')[2].rstrip('"}'): float(value) for labels, _, value in found}


async def written(app: Application, least: int = 1) -> None:
    """Everything that this gateway was told is in the server."""

    async def quiet() -> bool:
        before = await counted(app, "pointsman_shared_index_events_total")
        for _ in range(20):
            await admin(app, "/healthz")
        after = await counted(app, "pointsman_shared_index_events_total")
        page = (await admin(app, "/metrics")).body.decode()
        idle = "pointsman_shared_index_waiting_events 0.0" in page
        return idle and before == after and after["written"] >= least

    await until(quiet)


@needs_server
async def test_who_hears_no_events_knows_what_another_gateway_was_told(tmp_path: Path) -> None:
    async with (
        redis_server(tmp_path) as redis,
        running_fleet([EngineSpec(kv_events=EVENTS)] * 2, speed=SPEED) as engines,
        serving(
            *(e.url for e in engines), kv_events={"mode": "auto"}, shared_index=redis.shared_index, **PATIENT
        ) as hears,
        serving(*(e.url for e in engines), shared_index=redis.shared_index, **PATIENT) as deaf,
    ):
        first, _ = await ask(hears, prompt=SYSTEM)
        await written(hears)
        record, usage = await ask(deaf, prompt=SYSTEM)
        assert deaf.core.kv_events.sources() == []
        assert (record["chosen"], record["matched_by"]) == (first["chosen"], "events")
        assert "untokenized" not in record
        assert record["matched_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] > 500
        assert await counted(deaf, "pointsman_shared_index_reads_total") == {"read": 1.0}
        assert "written" not in {
            result
            for result, count in (await counted(deaf, "pointsman_shared_index_events_total")).items()
            if count
        }
        # Who hears an engine itself need not ask for it.
        app = hears
        before = await counted(app, "pointsman_shared_index_reads_total")
        for engine in engines:
            if engine.url.removeprefix("http://") != first["chosen"]:
                app.pool.drain(engine.url.removeprefix("http://"))
        record, usage = await ask(app, prompt=SYSTEM)
        assert record["matched_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] > 500
        assert await counted(app, "pointsman_shared_index_reads_total") == before


@needs_server
async def test_two_that_hear_the_same_engine_do_each_other_no_harm(tmp_path: Path) -> None:
    async with (
        redis_server(tmp_path) as redis,
        running_fleet([EngineSpec(kv_events=EVENTS)], speed=SPEED) as (engine,),
        serving(engine.url, kv_events={"mode": "auto"}, shared_index=redis.shared_index, **PATIENT) as one,
        serving(engine.url, kv_events={"mode": "auto"}, shared_index=redis.shared_index, **PATIENT) as two,
        serving(engine.url, shared_index=redis.shared_index, **PATIENT) as deaf,
    ):
        await ask(one, prompt=SYSTEM)
        await ask(two, prompt=SYSTEM + " And then?")
        await written(one)
        await written(two)
        record, usage = await ask(deaf, prompt=SYSTEM)
        assert record["matched_by"] == "events"
        assert record["matched_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] > 500


@needs_server
async def test_a_gateway_that_is_started_anew_finds_what_it_wrote(tmp_path: Path) -> None:
    """Also where the engine cannot send again what it has told: then the index knows more than the events."""
    forgetful = KvEvents(endpoint="tcp://*:0", delay_s=0)
    async with (
        redis_server(tmp_path) as redis,
        running_fleet([EngineSpec(kv_events=forgetful)], speed=SPEED) as (engine,),
    ):
        hearing = {"kv_events": {"mode": "auto"}, "shared_index": redis.shared_index, **PATIENT}
        async with serving(engine.url, **hearing) as app:
            await ask(app, prompt="first " * 100)
            await ask(app, prompt=SYSTEM)
            await written(app)
        async with serving(engine.url, **hearing) as app:
            await ask(app, prompt="something new " * 100)
            await written(app)
            assert app.core.precise.partial == {0}
            record, usage = await ask(app, prompt=SYSTEM)
            assert record["matched_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] > 500


@needs_server
async def test_while_the_server_is_away_what_was_heard_here_counts_and_it_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pointsman.prefix.shared.RETRY_S", 0.05)
    monkeypatch.setattr("pointsman.prefix.shared_reading.RETRY_S", 0.05)
    async with (
        redis_server(tmp_path) as redis,
        running_fleet([EngineSpec(kv_events=EVENTS)], speed=SPEED) as (engine,),
        serving(engine.url, kv_events={"mode": "auto"}, shared_index=redis.shared_index, **PATIENT) as hears,
        serving(engine.url, shared_index=redis.shared_index, **PATIENT) as deaf,
    ):
        await ask(hears, prompt="warm " * 100)
        await written(hears)
        await redis.stop()
        for _ in range(3):
            record, _ = await ask(deaf, prompt=SYSTEM)
        assert (record["matched_by"], record["untokenized"]) == ("sent", "index_away")
        assert record["matched_tokens"] > 500

        async def heard() -> bool:
            record, usage = await ask(hears, prompt=SYSTEM)
            return bool(
                record["matched_by"] == "events"
                and record["matched_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] > 500
            )

        await until(heard)
        assert (await counted(hears, "pointsman_shared_index_failures_total"))["write"] >= 1
        await redis.start()
        await written(hears, least=2)

        async def back() -> bool:
            record, _ = await ask(deaf, prompt=SYSTEM)
            return bool(record["matched_by"] == "events")

        await until(back)
        said = [r.getMessage() for r in caplog.records if r.name == "pointsman.prefix.shared"]
        assert sum("cannot be read" in text for text in said) == 1
        assert sum("cannot be written" in text for text in said) == 1


async def test_a_server_that_is_slower_than_the_budget_costs_no_more_than_that(tmp_path: Path) -> None:
    """It hangs: connections are taken and nothing is said."""
    path = tmp_path / "s"
    hung: list[asyncio.StreamWriter] = []

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hung.append(writer)
        await reader.read()

    server = await asyncio.start_unix_server(hang, path)
    hurried = PATIENT | {"tokens": {"budget_s": 0.2}, "shared_index": {"redis": f"unix://{path}"}}
    async with running_fleet([EngineSpec()], speed=SPEED) as (engine,), serving(engine.url, **hurried) as app:
        # Given as ids, so that the time goes to the index alone.
        records = [(await ask(app, prompt=list(range(5000, 5600))))[0] for _ in range(3)]
    for writer in hung:
        writer.close()
    server.close()
    assert len(hung) == 1, "while one is late nobody else asks"
    assert [record["untokenized"] for record in records] == ["index_late"] * 3
    assert [record["matched_by"] for record in records] == ["sent"] * 3


def test_settings_that_cannot_work_stop_the_start() -> None:
    for fields, why in (
        ({"redis": "http://a"}, "shared_index.redis: is no address"),
        ({"redis": "redis://a", "password_env": "POINTSMAN_NOT_SET"}, "POINTSMAN_NOT_SET is not set"),
    ):
        with pytest.raises(SettingsError, match=why):
            Application(settings("http://127.0.0.1:1", shared_index=fields))
