"""What was learned survives a restart of the gateway; and what happens when the file is not as it should."""

from __future__ import annotations

import asyncio
import io
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pointsman.errors import SettingsError
from pointsman.predictor.state import decode
from pointsman.prefix import snapshot as prefixes
from pointsman.proxy.application import Application
from pointsman.proxy.learned_file import SUFFIX
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
    assert sorted(os.listdir(tmp_path)) == [path.name, path.name + SUFFIX]
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in os.scandir(tmp_path)} == {0o600}
    for name, knew in before.items():
        assert knew["evidence_s"] > 1
        for key in ("prefill_tok_s", "step_rest_s", "step_sequence_s", "evidence_s"):
            # It goes on learning between our question and its end.
            assert after[name][key] == pytest.approx(knew[key], rel=0.25), (name, key)
        assert after[name]["siblings"] == knew["siblings"]
        assert cold[name]["evidence_s"] < 0.5 * knew["evidence_s"]
    assert (
        len({e["step_rest_s"] for e in cold.values()}) == 1 < len({e["step_rest_s"] for e in after.values()})
    )
    state = decode(path.read_bytes())
    assert state.kept.lengths.pool, "of answers, too"


PROMPTS = [f"{number} " + "in a hole in the ground there lived " * 150 for number in range(8)]


async def place(app: Application) -> None:
    """The prompts at once, so that no engine gets all of them."""
    await asyncio.gather(*(ask(app, prompt) for prompt in PROMPTS))


async def test_a_prompt_goes_where_it_is_cached_after_a_restart_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pointsman.proxy.learned_file")
    learned = {"path": str(tmp_path / "learned.json")}
    async with running_fleet(2, speed=20) as engines:
        urls = [engine.url for engine in engines]
        async with serving(*urls, scheduling=LEAST_COST, learned=learned) as app:
            await place(app)
        placed = [engine.state.served for engine in engines]
        assert min(placed) > 0, "both must have some, or this says nothing"
        assert not any(engine.state.cached_tokens for engine in engines)
        async with serving(*urls, scheduling=LEAST_COST, learned=learned) as app:
            for prompt in PROMPTS:
                await ask(app, prompt)
        assert [engine.state.served for engine in engines] == [2 * count for count in placed]
        for engine, count in zip(engines, placed, strict=True):
            assert all(r.cached_tokens > 0.9 * r.prompt_tokens for r in list(engine.log)[count:])
    assert "known from before what 2 of 2 caches hold" in caplog.messages


async def test_the_cache_of_an_engine_that_restarted_meanwhile_is_forgotten(tmp_path: Path) -> None:
    learned = {"path": str(tmp_path / "learned.json")}
    async with running_fleet(2, speed=20) as engines:
        urls = [engine.url for engine in engines]
        async with serving(*urls, scheduling=LEAST_COST, learned=learned) as app:
            await place(app)
            held = [app.index.blocks(app.pool.members[url[7:]].endpoint.slot) for url in urls]
        engines[1].fault("restart")
        async with serving(*urls, scheduling=LEAST_COST, learned=learned) as app:
            again = [app.index.blocks(app.pool.members[url[7:]].endpoint.slot) for url in urls]
    assert min(held) > 0
    assert again == [held[0], 0]


async def test_an_engine_that_does_not_answer_is_not_taken_to_have_its_cache(tmp_path: Path) -> None:
    learned = {"path": str(tmp_path / "learned.json")}
    async with running_fleet(2, speed=20) as engines:
        urls = [engine.url for engine in engines]
        async with serving(*urls, scheduling=LEAST_COST, learned=learned) as app:
            await place(app)
        engines[1].fault("refuse")
        async with serving(*urls, scheduling=LEAST_COST, learned=learned) as app:
            again = [app.index.blocks(app.pool.members[url[7:]].endpoint.slot) for url in urls]
    assert again[0] > 0
    assert again[1] == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda whole: whole[:-1], "is damaged"),
        (lambda whole: whole[:100], "is damaged"),
        (lambda whole: b"", "is not a file of prefixes"),
        (lambda whole: b"{}\n" + whole, "is not a file of prefixes"),
    ],
)
async def test_prefixes_that_cannot_be_taken_up_are_named_and_the_rest_is_known(
    change: Callable[[bytes], bytes], why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "learned.json"
    file = tmp_path / (path.name + SUFFIX)
    async with running_fleet(1, speed=20) as (engine,):
        async with serving(engine.url, scheduling=LEAST_COST, learned={"path": str(path)}) as app:
            await ask(app, PROMPTS[0])
            assert app.index.used_bytes > 0
        file.write_bytes(change(file.read_bytes()))
        caplog.clear()
        async with serving(engine.url, scheduling=LEAST_COST, learned={"path": str(path)}) as app:
            assert app.index.used_bytes == 0
            (said,) = [r.getMessage() for r in caplog.records if r.name == "pointsman.proxy.learned_file"]
            assert said == f"what was learned before is lost: {file}: {why}"
            await ask(app, PROMPTS[0])
    assert prefixes.decode(file.read_bytes()).holders, "and in the end it is a good one"


async def test_another_block_size_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learned = {"path": str(tmp_path / "learned.json")}
    async with running_fleet(1, speed=20) as (engine,):
        async with serving(engine.url, scheduling=LEAST_COST, learned=learned) as app:
            await ask(app, PROMPTS[0])
        async with serving(
            engine.url, scheduling=LEAST_COST, learned=learned, prefix={"block_tokens": 128}
        ) as app:
            assert app.index.used_bytes == 0
    assert "is for blocks of 64 tokens, not 128" in caplog.text


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
        await ask(app, PROMPTS[0])
        file = tmp_path / (path.name + SUFFIX)

        async def held() -> bool:
            await endpoints(app)
            return file.exists() and prefixes.decode(file.read_bytes()).holders != []

        await until(held)


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
                await ask(app, PROMPTS[0])
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
