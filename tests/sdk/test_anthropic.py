"""The real Anthropic SDK, the gateway, simulated engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anthropic
import pytest

from pointsman.proxy.application import Application
from pointsman.sim.fleet import running_fleet
from pointsman.sim.server import SimulatedEngine
from pointsman.testing.serving import endings, in_flight, serving
from pointsman.testing.upstream import SSE_HEAD, End, FakeUpstream, chunk, reply

MODEL = "granite-4.1-8b"
HELLO = [{"role": "user", "content": "Hello there, how are you? " * 30}]
STARTED = (
    b'event: message_start\ndata: {"type": "message_start", "message": {"id": "msg_1", "type": "message", '
    b'"role": "assistant", "content": [], "model": "x", "stop_reason": null, "stop_sequence": null, '
    b'"usage": {"input_tokens": 1, "output_tokens": 1}}}\n\n'
)


def sdk(app: Application) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(
        base_url=f"http://127.0.0.1:{app.port}", api_key="any", max_retries=0, timeout=20
    )


@asynccontextmanager
async def before(
    engines: int = 2, speed: float = 50
) -> AsyncIterator[tuple[Application, anthropic.AsyncAnthropic, list[SimulatedEngine]]]:
    """The gateway in front of a simulated fleet, and a client of it."""
    async with (
        running_fleet(engines, speed=speed) as fleet,
        serving(*(e.url for e in fleet)) as app,
        sdk(app) as client,
    ):
        yield app, client, fleet


async def test_messages_plain_streamed_and_counted() -> None:
    async with before() as (app, client, _):
        counted = await client.messages.count_tokens(model=MODEL, messages=HELLO, system="be kind")
        plain = await client.messages.create(model=MODEL, messages=HELLO, max_tokens=6, system="be kind")
        async with client.messages.stream(
            model=MODEL, messages=HELLO, max_tokens=6, system="be kind"
        ) as stream:
            text = [piece async for piece in stream.text_stream]
            final = await stream.get_final_message()
        assert counted.input_tokens > 100
        assert plain.usage.input_tokens + (plain.usage.cache_read_input_tokens or 0) == counted.input_tokens
        assert (plain.stop_reason, final.stop_reason) == ("max_tokens", "max_tokens")
        assert (len(text), final.usage.output_tokens) == (6, 6)
        assert await endings(app) == {"ok": 3}


async def test_our_errors_are_the_sdks_own() -> None:
    async with before() as (_, client, _):
        with pytest.raises(anthropic.NotFoundError, match="does not exist") as unknown:
            await client.messages.create(model="nope", messages=HELLO, max_tokens=6)
        assert unknown.value.body["error"]["type"] == "not_found_error"
        with pytest.raises(anthropic.BadRequestError):
            await client.messages.create(model="", messages=HELLO, max_tokens=6)


async def test_a_stream_that_breaks_raises_in_the_sdk() -> None:
    script = [SSE_HEAD, chunk(STARTED), End.RESET]
    async with FakeUpstream(script, models=[MODEL]) as engine, serving(engine) as app, sdk(app) as client:
        with pytest.raises(anthropic.APIError, match="broke off"):
            async with client.messages.stream(model=MODEL, messages=HELLO, max_tokens=6) as stream:
                await stream.get_final_message()
        assert await endings(app) == {"failed": 1}


async def test_an_error_after_comments_raises_in_the_sdk() -> None:
    gate = asyncio.Event()
    body = b'{"type": "error", "error": {"type": "api_error", "message": "out of memory"}}'
    async with (
        FakeUpstream([gate, reply(body, 500)], models=[MODEL]) as engine,
        serving(engine, upstream={"sse_comment_s": 0.1}) as app,
        sdk(app) as client,
    ):
        asyncio.get_running_loop().call_later(0.6, gate.set)
        with pytest.raises(anthropic.APIError, match="out of memory"):
            async with client.messages.stream(model=MODEL, messages=HELLO, max_tokens=6) as stream:
                await stream.get_final_message()


async def test_a_caller_that_gives_up_frees_the_engine() -> None:
    async with before(1, speed=1) as (app, client, (engine,)):
        async with client.messages.stream(model=MODEL, messages=HELLO, max_tokens=50_000) as stream:
            async for _ in stream.text_stream:
                break
        await asyncio.wait_for(engine.until(lambda state: state.aborted == 1), 5)
        assert await in_flight(app) == 0
        assert await endings(app) == {"cancelled": 1}
