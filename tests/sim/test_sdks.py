"""The real SDKs take a simulated engine for the real thing."""

from __future__ import annotations

import anthropic
import openai
import pytest

from pointsman.sim.fleet import running_fleet
from pointsman.sim.server import SimulatedEngine

MODEL = "granite-4.1-8b"
HELLO = [{"role": "user", "content": "hello there, " * 40}]


def openai_client(engine: SimulatedEngine) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0)


def anthropic_client(engine: SimulatedEngine) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=engine.url, api_key="none", max_retries=0)


async def test_openai_chat_and_completions_plain_and_streamed() -> None:
    async with running_fleet(speed=50) as (engine,), openai_client(engine) as client:
        plain = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12)
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        text = await client.completions.create(model=MODEL, prompt="once upon", max_tokens=3)
        models = [model.id async for model in client.models.list()]
    assert plain.choices[0].finish_reason == "length"
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == plain.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 128
    assert len(text.choices[0].text) == 12
    assert models == [MODEL]


async def test_openai_embeddings_as_floats_and_packed() -> None:
    async with running_fleet(speed=50) as (engine,), openai_client(engine) as client:
        packed = await client.embeddings.create(model=MODEL, input=["one", "two"])
        floats = await client.embeddings.create(model=MODEL, input="one", encoding_format="float")
        short = await client.embeddings.create(model=MODEL, input="one", dimensions=8)
        state = engine.state
    assert packed.data[0].embedding == floats.data[0].embedding != packed.data[1].embedding
    assert len(short.data[0].embedding) == 8
    assert packed.usage.prompt_tokens == 2
    assert (state.served, state.output_tokens) == (3, 0)


async def test_openai_responses_build_on_one_another() -> None:
    async with running_fleet(2, speed=50) as (engine, other), openai_client(engine) as client:
        first = await client.responses.create(model=MODEL, input="begin " * 60, instructions="be brief")
        second = await client.responses.create(model=MODEL, input="go on", previous_response_id=first.id)
        found = await client.responses.retrieve(second.id)
        stream = await client.responses.create(model=MODEL, input="x", max_output_tokens=4, stream=True)
        events = [event async for event in stream]
        async with openai_client(other) as elsewhere:
            with pytest.raises(openai.NotFoundError):
                await elsewhere.responses.create(model=MODEL, input="x", previous_response_id=first.id)
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)
    assert first.status == "completed"
    assert found == second
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.total_tokens
    assert first.usage.total_tokens - 32 < second.usage.input_tokens_details.cached_tokens
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.incomplete"
    assert [event.type for event in events].count("response.output_text.delta") == 4
    assert events[-1].response.output_text == "".join(
        event.delta for event in events if event.type == "response.output_text.delta"
    )


async def test_openai_errors_are_the_sdks_own() -> None:
    async with running_fleet(speed=50) as (engine,), openai_client(engine) as client:
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.chat.completions.create(model="nope", messages=HELLO)
        with pytest.raises(openai.BadRequestError, match="max_model_len"):
            await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=10**6)
        engine.fault("status", status=429, retry_after=1)
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model=MODEL, messages=HELLO)


async def test_closing_an_openai_stream_aborts_the_request() -> None:
    async with running_fleet() as (engine,), openai_client(engine) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=50_000, stream=True
        )
        async for _ in stream:
            break
        await stream.close()
        await engine.until(lambda state: state.aborted == 1)
        assert engine.state.running == 0


async def test_anthropic_messages_plain_and_streamed() -> None:
    async with running_fleet(speed=50) as (engine,), anthropic_client(engine) as client:
        counted = await client.messages.count_tokens(model=MODEL, messages=HELLO, system="be kind")
        plain = await client.messages.create(model=MODEL, messages=HELLO, max_tokens=6, system="be kind")
        async with client.messages.stream(
            model=MODEL, messages=HELLO, max_tokens=6, system="be kind"
        ) as stream:
            text = [piece async for piece in stream.text_stream]
            final = await stream.get_final_message()
        with pytest.raises(anthropic.NotFoundError, match="does not exist"):
            await client.messages.create(model="nope", messages=HELLO, max_tokens=6)
    assert plain.stop_reason == final.stop_reason == "max_tokens"
    assert "".join(text) == plain.content[0].text
    assert len(text) == 6
    assert plain.usage.input_tokens == counted.input_tokens
    assert final.usage.cache_read_input_tokens == (counted.input_tokens - 1) // 16 * 16
    assert final.usage.input_tokens == counted.input_tokens - (final.usage.cache_read_input_tokens or 0)
    assert final.usage.output_tokens == 6
