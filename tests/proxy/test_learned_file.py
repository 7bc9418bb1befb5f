"""What was learned survives a restart of the gateway; and what happens when the file is not as it should."""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pointsman.errors import SettingsError
from pointsman.predictor.state import decode
from pointsman.proxy.application import Application
from pointsman.sim.fleet import running_fleet
from pointsman.sim.spec import FleetItem
from pointsman.testing.client import RawClient, message
from pointsman.testing.serving import endpoints, serving, settings, until

LEAST_COST = {"preset": "least-cost"}
ENGINES = (FleetItem(accelerator="mi325x", count=2), FleetItem(accelerator="gaudi3"))


SPEED = 5.0
"""Seconds of the engines and of the gateway in one of ours."""


@asynccontextmanager
async def fast(urls: Sequence[str], **sections: Mapping[str, object]) -> AsyncIterator[Application]:
    """A gateway whose clocks run as fast as the engines."""
    app = Application(
        settings(*urls, scheduling=LEAST_COST, **sections),
        clock=lambda: SPEED * time.monotonic(),
        wall=lambda: SPEED * time.time(),
        out=io.StringIO(),
    )
    async with app.running():
        yield app


async def ask(app: Application, text: str, tokens: int = 20) -> None:
    body = {"model": app.pool.models()[0], "prompt": text, "max_tokens": tokens, "stream": True}
    async with RawClient(app.port) as client:
        answer = await client.ask(message("POST", "/v1/completions", body))
    assert answer.status == 200
    assert b"[DONE]" in answer.body


async def learn(app: Application) -> None:
    """Streams of many lengths, their prompts long enough to say something of prefill."""

    async def client(number: int) -> None:
        for i in range(6):
            await ask(app, f"{number} {i} " + "once upon a time " * 400, 40 + 15 * number)

    await asyncio.gather(*(client(number) for number in range(12)))


async def test_a_restarted_gateway_knows_what_it_knew(tmp_path: Path) -> None:
    path = tmp_path / "learned.json"
    learned = {"path": str(path)}
    async with running_fleet(ENGINES, speed=SPEED) as engines:
        urls = [engine.url for engine in engines]
        async with fast(urls, learned=learned) as app:
            await learn(app)
            before = {name: e["learned"] for name, e in (await endpoints(app)).items()}
        async with fast(urls, learned=learned) as app:
            await ask(app, "hello")
            after = {name: e["learned"] for name, e in (await endpoints(app)).items()}
        async with fast(urls) as app:
            await ask(app, "hello")
            cold = {name: e["learned"] for name, e in (await endpoints(app)).items()}
    assert os.listdir(tmp_path) == [path.name]
    for name, knew in before.items():
        assert knew["evidence_s"] > 1
        for key in ("prefill_tok_s", "step_rest_s", "step_sequence_s", "evidence_s"):
            assert after[name][key] == pytest.approx(knew[key], rel=0.1), (name, key)
        assert after[name]["siblings"] == knew["siblings"]
        assert cold[name]["evidence_s"] < 0.5 * knew["evidence_s"]
    assert (
        len({e["step_rest_s"] for e in cold.values()}) == 1 < len({e["step_rest_s"] for e in after.values()})
    )
    state = decode(path.read_bytes())
    assert state.kept.lengths.pool, "of answers, too"


async def test_it_is_written_while_the_gateway_runs(tmp_path: Path) -> None:
    path = tmp_path / "learned.json"
    async with (
        running_fleet(1, speed=20) as (engine,),
        serving(engine.url, scheduling=LEAST_COST, learned={"path": str(path), "every_s": 0.01}) as app,
    ):
        await ask(app, "hello")

        async def written() -> bool:
            await endpoints(app)
            return path.exists() and decode(path.read_bytes()).kept.speeds.endpoints != ()

        await until(written)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (b'{"endpoints": []}', "is not a file of what was learned"),
        (b'{"format": "pointsman learned", "version": 2, "xxh3": ""}\n{}\n', "is of version 2"),
        (b'{"format": "pointsman learned", "version": 1, "xxh3": "00"}\n{}\n', "is damaged"),
        (None, "Is a directory"),
    ],
)
async def test_a_file_that_cannot_be_taken_up_is_named_and_nothing_else_happens(
    found: bytes | None, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "learned.json"
    if found is None:
        path.mkdir()
    else:
        path.write_bytes(found)
    async with running_fleet(1, speed=20) as (engine,):
        async with serving(engine.url, scheduling=LEAST_COST, learned={"path": str(path)}) as app:
            await ask(app, "hello")
            (said,) = [r.getMessage() for r in caplog.records if r.name == "pointsman.proxy.learned_file"]
        assert str(path) in said
        assert why in said
    if found is not None:
        assert decode(path.read_bytes()).kept.speeds.endpoints, "and in the end it is a good one"


async def test_a_place_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "gone"
    place.mkdir()
    async with running_fleet(1, speed=20) as (engine,):
        learned = {"path": str(place / "learned.json"), "every_s": 0.005}
        async with serving(engine.url, scheduling=LEAST_COST, learned=learned) as app:
            place.rmdir()
            for _ in range(20):
                await ask(app, "hello")
    said = [r.getMessage() for r in caplog.records if r.name == "pointsman.proxy.learned_file"]
    assert said == [f"what was learned cannot be kept: {place}/learned.json: No such file or directory"]


async def test_a_policy_that_learns_nothing_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "learned.json"
    async with (
        running_fleet(1, speed=20) as (engine,),
        serving(engine.url, learned={"path": str(path)}) as app,
    ):
        await ask(app, "hello")
    assert not path.exists()


def test_a_directory_that_is_not_there_stops_start_up(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"learned\.path: there is no directory"):
        Application(settings("http://127.0.0.1:1", learned={"path": str(tmp_path / "no" / "learned.json")}))
