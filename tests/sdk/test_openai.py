"""The real OpenAI SDK, the gateway, simulated engines: what users of the SDK see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import openai
import pytest

from pointsman.proxy.application import Application
from pointsman.sim.fleet import running_fleet
from pointsman.sim.server import SimulatedEngine
from pointsman.sim.spec import EngineSpec
from pointsman.testing.serving import endings, in_flight, serving
from pointsman.testing.upstream import SSE_HEAD, End, FakeUpstream, event, reply

MODEL = "granite-4.1-8b"
HELLO = [{"role": "user", "content": "Hello there, how are you? " * 30}]


def sdk(app: Application, retries: int = 0) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{app.port}/v1", api_key="any", max_retries=retries, timeout=20
    )


@asynccontextmanager
async def before(
    engines: int = 2, speed: float = 50, **sections: dict[str, object]
) -> AsyncIterator[tuple[Application, openai.AsyncOpenAI, list[SimulatedEngine]]]:
    """The gateway in front of a simulated fleet, and a client of it."""
    async with (
        running_fleet(engines, speed=speed) as fleet,
        serving(*(e.url for e in fleet), **sections) as app,
        sdk(app) as client,
    ):
        yield app, client, fleet


async def test_chat_plain_and_streamed_with_usage() -> None:
    async with before() as (app, client, fleet):
        plain = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12)
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 12
        assert plain.usage is not None
        assert plain.usage.completion_tokens == 12
        assert sum(e.state.served for e in fleet) == 2
        assert await endings(app) == {"ok": 2}
        assert await in_flight(app) == 0


async def test_repeated_prompts_go_where_they_are_cached() -> None:
    async with before(3, scheduling={"preset": "llm-d-affinity"}) as (_, client, fleet):
        for turn in range(6):
            answer = await client.chat.completions.create(model=MODEL, messages=HELLO * 4, max_tokens=2)
            assert answer.usage is not None
            details = answer.usage.prompt_tokens_details
            cached = details.cached_tokens if details and details.cached_tokens else 0
            assert (cached > 0.8 * answer.usage.prompt_tokens) == (turn > 0)
        assert sorted(e.state.served for e in fleet) == [0, 0, 6]


async def test_completions_embeddings_and_models() -> None:
    async with before() as (app, client, _):
        text = await client.completions.create(model=MODEL, prompt="once upon", max_tokens=3)
        assert text.choices[0].text
        stream = await client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=3, stream=True)
        assert {c.choices[0].index async for c in stream if c.choices} == {0, 1}
        vectors = await client.embeddings.create(model=MODEL, input=["one", "two"])
        assert len(vectors.data) == 2
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        assert await endings(app) == {"ok": 3}


async def test_responses_are_continued_and_fetched_where_they_are() -> None:
    async with before(3) as (_, client, fleet):
        for _ in range(4):
            first = await client.responses.create(model=MODEL, input="begin " * 30)
            asked = sum(e.state.served for e in fleet)
            second = await client.responses.create(model=MODEL, input="on", previous_response_id=first.id)
            assert second.status == "completed"
            assert await client.responses.retrieve(second.id) == second
            assert sum(e.state.served for e in fleet) == asked + 1
        stream = await client.responses.create(
            model=MODEL, input="x", previous_response_id=first.id, max_output_tokens=4, stream=True
        )
        events = [found async for found in stream]
        assert [e.type for e in events].count("response.output_text.delta") == 4
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)


async def test_a_gateway_that_has_restarted_finds_responses_again() -> None:
    async with running_fleet(3, speed=50) as fleet:
        urls = [e.url for e in fleet]
        async with serving(*urls) as app, sdk(app) as client:
            made = [(await client.responses.create(model=MODEL, input="x")).id for _ in range(3)]
        async with serving(*urls) as app, sdk(app) as client:
            for name in made:
                assert (await client.responses.retrieve(name)).id == name
                assert await client.responses.create(model=MODEL, input="y", previous_response_id=name)


# -- errors


async def test_our_errors_are_the_sdks_own() -> None:
    async with before() as (app, client, _):
        with pytest.raises(openai.NotFoundError, match="does not exist") as unknown:
            await client.chat.completions.create(model="nope", messages=HELLO)
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError, match="model"):
            await client.chat.completions.create(model="", messages=HELLO)
        with pytest.raises(openai.BadRequestError, match="max_model_len"):
            await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=10**6)
        assert await endings(app) == {"refused": 2, "error": 1}


async def test_a_request_larger_than_allowed_is_an_api_error() -> None:
    async with before(server={"body_bytes": 10_000}) as (_, client, _):
        with pytest.raises(openai.APIStatusError) as large:
            await client.completions.create(model=MODEL, prompt="x" * 3_000_000)
        assert (large.value.status_code, large.value.code) == (413, "body_too_large")


async def test_an_engine_that_is_busy_is_not_noticed_while_another_is_free() -> None:
    async with before() as (app, client, (a, b)):
        a.fault("status", status=429, retry_after=1)
        for _ in range(4):
            await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
        assert b.state.served == 4
        b.fault("status", status=429, retry_after=7)
        with pytest.raises(openai.RateLimitError) as busy:
            await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
        assert busy.value.response.headers["retry-after"] in ("1", "7")
        assert await endings(app) == {"ok": 4, "error": 1}


@pytest.mark.parametrize("kind", ["reset", "close", "garbage"])
async def test_an_engine_that_breaks_before_its_answer_is_not_noticed(kind: str) -> None:
    async with before() as (app, client, (a, _)):
        a.fault(kind)
        for _ in range(4):
            await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
        assert await endings(app) == {"ok": 4}


async def test_an_engine_that_crashes_and_returns_loses_no_request() -> None:
    async with before(speed=200) as (app, client, (a, _)):

        async def ask(n: int) -> None:
            await client.completions.create(model=MODEL, prompt=f"{n} " * 50, max_tokens=2)

        async def crash() -> None:
            for _ in range(3):
                await asyncio.sleep(0.05)
                a.fault("crash", for_s=0.05)

        await asyncio.gather(crash(), *(ask(n) for n in range(120)))
        assert await in_flight(app) == 0
        assert await endings(app) == {"ok": 120}


async def chat(client: openai.AsyncOpenAI) -> list[object]:
    stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    return [found async for found in stream]


async def completion(client: openai.AsyncOpenAI) -> list[object]:
    stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
    return [found async for found in stream]


@pytest.mark.parametrize("call", [chat, completion])
async def test_a_stream_that_breaks_raises_in_the_sdk(
    call: Callable[[openai.AsyncOpenAI], Awaitable[list[object]]],
) -> None:
    script = [SSE_HEAD, event({"id": "x", "choices": []}), End.RESET]
    async with FakeUpstream(script, models=[MODEL]) as engine, serving(engine) as app, sdk(app) as client:
        with pytest.raises(openai.APIError, match="broke off"):
            await call(client)
        assert await endings(app) == {"failed": 1}


async def test_a_stream_of_a_response_that_breaks_ends_with_that_apis_error_event() -> None:
    created = {"type": "response.created", "sequence_number": 0, "response": {"id": "resp_1"}}
    script = [SSE_HEAD, event(created), End.RESET]
    async with FakeUpstream(script, models=[MODEL]) as engine, serving(engine) as app, sdk(app) as client:
        stream = await client.responses.create(model=MODEL, input="x", stream=True)
        events = [found async for found in stream]
        assert [found.type for found in events] == ["response.created", "error"]
        assert "broke off" in events[-1].message
        assert await endings(app) == {"failed": 1}


@pytest.mark.parametrize("kind", ["reset", "close", "stall"])
async def test_a_simulated_engine_that_breaks_in_mid_stream_is_an_error(kind: str) -> None:
    async with before(upstream={"between_bytes_timeout_s": 0.5}) as (app, client, fleet):
        for engine in fleet:
            engine.fault(kind, after_chunks=3)
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=50, stream=True)
        with pytest.raises(openai.APIError):
            _ = [found async for found in stream]
        assert await in_flight(app) == 0
        assert await endings(app) == {"failed": 1}


async def test_an_error_after_comments_raises_in_the_sdk() -> None:
    gate = asyncio.Event()
    body = b'{"error": {"message": "out of memory", "type": "server_error", "code": 500}}'
    async with (
        FakeUpstream([gate, reply(body, 500)], models=[MODEL]) as engine,
        serving(engine, upstream={"sse_comment_s": 0.1}) as app,
        sdk(app) as client,
    ):
        asyncio.get_running_loop().call_later(0.6, gate.set)
        with pytest.raises(openai.APIError, match="out of memory"):
            await chat(client)


# -- leaving


@pytest.mark.parametrize("when", ["in mid-stream", "before the first byte", "without streaming"])
async def test_a_caller_that_gives_up_frees_the_engine(when: str) -> None:
    async with before(1, speed=1) as (app, client, (engine,)):
        asked = client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=50_000, stream=when != "without streaming"
        )
        if when == "in mid-stream":
            stream = await asked
            async for _ in stream:
                break
            await stream.close()
        else:
            task = asyncio.ensure_future(asked)
            await engine.until(lambda state: state.running + state.waiting == 1)
            task.cancel()
        await asyncio.wait_for(engine.until(lambda state: state.aborted == 1), 5)
        assert engine.state.running == 0
        assert await in_flight(app) == 0
        assert await endings(app) == {"cancelled": 1}


async def test_many_callers_at_once_all_get_their_own_answer() -> None:
    async with (
        running_fleet([EngineSpec(), EngineSpec(accelerator="mi325x")], speed=100) as fleet,
        serving(*(e.url for e in fleet)) as app,
        sdk(app) as client,
    ):

        async def ask(n: int) -> tuple[int, int]:
            answer = await client.completions.create(model=MODEL, prompt=f"{n} " * n, max_tokens=n)
            assert answer.usage is not None
            return n, answer.usage.completion_tokens

        answers = await asyncio.gather(*(ask(n) for n in range(1, 60)))
        assert all(n == tokens for n, tokens in answers)
        assert await in_flight(app) == 0
