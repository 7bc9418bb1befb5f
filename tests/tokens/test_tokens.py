"""Where a request's token ids come from, and what becomes of it when they do not come."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library

from pointsman import api
from pointsman.api.token_ids import pack
from pointsman.config import Endpoint as EndpointSettings
from pointsman.config import Tokens as Settings
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.target import targets_of
from pointsman.errors import SettingsError
from pointsman.testing.upstream import FakeUpstream, Received, Step, reply
from pointsman.tokens.found import Found
from pointsman.tokens.tokens import MOST_JOBS, Answer, Tokens
from pointsman.types import Endpoint, InferenceRequest, Tokenized

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
HELLO_TEXT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
IMAGE = {"type": "image_url", "image_url": {"url": "http://h/a.png"}}


def request_for(path: str, **fields: object) -> InferenceRequest:
    body = json.dumps({"model": "m", **fields}).encode()
    return api.find(path).parse("r1", path, {}, body)


def long_chat(turns: int) -> list[dict[str, Any]]:
    return [
        {"role": "user" if i % 2 == 0 else "assistant", "content": f"turn {i} " + "goes on and on " * 60}
        for i in range(turns)
    ]


class World:
    """A pool of upstreams, and what finds token ids for requests to it."""

    def __init__(self, upstreams: Sequence[FakeUpstream], **fields: Any) -> None:
        self.pool = Pool(time.monotonic)
        for upstream in upstreams:
            self.pool.apply(upstream.name, targets_of(EndpointSettings(url=upstream.url, api_key="secret")))
        self.tokens = Tokens(Settings(**{"budget_s": 5.0} | fields), self.pool)

    @property
    def endpoints(self) -> list[Endpoint]:
        return [member.endpoint for member in self.pool.members.values()]

    def ask(self, request: InferenceRequest) -> Answer:
        return self.tokens.ask(request, self.endpoints)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Give what goes on in the background its turns."""
        async with asyncio.timeout(10):
            while not holds():  # noqa: ASYNC110 - nothing tells of its end
                await asyncio.sleep(0)

    async def found(self, request: InferenceRequest) -> Found:
        answer = self.ask(request)
        return answer if isinstance(answer, Found) else await answer


@asynccontextmanager
async def world(*upstreams: FakeUpstream, **fields: Any) -> AsyncIterator[World]:
    made = World(upstreams, **fields)
    try:
        yield made
    finally:
        made.tokens.close()
        await asyncio.sleep(0)  # cancelled tasks end


def engine(*, render: object = None, tokenize: object = None) -> FakeUpstream:
    """Answers renders and tokenizations with these; without an answer as vLLM does that has no such path."""

    def script(request: Received) -> Iterable[Step]:
        if request.target.endswith("/render"):
            return [reply(b"{}", 403) if render is None else reply(json.dumps(render).encode())]
        return [reply(b"{}", 404) if tokenize is None else reply(json.dumps(tokenize).encode())]

    return FakeUpstream(script)


def targets(upstream: FakeUpstream) -> list[str]:
    return [request.target for request in upstream.requests]


@pytest.fixture
def models(folder: Path) -> dict[str, str]:
    return {"m": str(folder)}


# -- given


@pytest.mark.parametrize(
    ("path", "fields", "prompts"),
    [
        (TEXT, {"prompt": [1, 2]}, [[1, 2]]),
        (TEXT, {"prompt": [[1, 2], [3]]}, [[1, 2], [3]]),
        (CHAT, {"messages": HELLO, "tokens": {"token_ids": [4, 5]}}, [[4, 5]]),
        ("/inference/v1/generate", {"token_ids": [6]}, [[6]]),
        ("/generate", {"input_ids": [7, 8]}, [[7, 8]]),
        ("/generate", {"input_ids": [[7], [8]]}, [[7], [8]]),
    ],
)
async def test_ids_that_the_client_gives_are_known_at_once(
    path: str, fields: dict[str, Any], prompts: list[list[int]]
) -> None:
    async with engine() as upstream, world(upstream) as w:
        found = w.ask(request_for(path, **fields))
        assert found == Found(tuple(Tokenized(pack(ids)) for ids in prompts), "given")
        assert upstream.requests == []
        assert w.tokens.found == {"given": 1}


async def test_the_request_carries_what_was_found() -> None:
    request = request_for(TEXT, prompt="Hello there, you")
    prompts = (Tokenized(pack([1, 2, 3])), Tokenized(pack([4])))
    carrying = Found(prompts, "here").added_to(request)
    assert (carrying.tokenized, carrying.prompt_tokens) == (prompts, 4)
    assert Found(reason="late").added_to(request) is request


# -- made here


async def test_a_short_prompt_is_tokenised_at_once(models: dict[str, str], qwen: Library) -> None:
    async with world(models=models) as w:
        for request, text, special in [
            (request_for(CHAT, messages=HELLO), HELLO_TEXT, False),
            (request_for(CHAT, messages=HELLO, add_special_tokens=True), HELLO_TEXT, True),
            (
                request_for(CHAT, messages=HELLO, add_generation_prompt=False),
                HELLO_TEXT.removesuffix("<|im_start|>assistant\n"),
                False,
            ),
            (request_for(TEXT, prompt="Hello"), "Hello", True),
            (request_for(TEXT, prompt="Hello", add_special_tokens=False), "Hello", False),
            (request_for("/generate", text="Hello"), "Hello", True),
        ]:
            ids = qwen.encode(text, add_special_tokens=special).ids
            assert w.ask(request) == Found((Tokenized(pack(ids)),), "here")


async def test_a_batch_of_texts(models: dict[str, str], qwen: Library) -> None:
    async with world(models=models) as w:
        found = w.ask(request_for(TEXT, prompt=["one", "two"]))
        expected = tuple(Tokenized(pack(qwen.encode(text).ids)) for text in ("one", "two"))
        assert found == Found(expected, "here")


async def test_a_long_chat_is_tokenised_beside_the_event_loop(models: dict[str, str], qwen: Library) -> None:
    async with world(models=models) as w:
        messages = long_chat(9)
        answer = w.ask(request_for(CHAT, messages=messages))
        assert isinstance(answer, asyncio.Future)
        found = await answer
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        expected = qwen.encode(text + "<|im_start|>assistant\n", add_special_tokens=False).ids
        assert found == Found((Tokenized(pack(expected)),), "here")
        assert w.tokens.seconds["here"] > 0


async def test_what_is_remembered_is_known_at_once(models: dict[str, str]) -> None:
    async with world(models=models) as w:
        messages = [{"role": "user", "content": "to be or not to be that is the question " * 60}]
        first = w.ask(request_for(CHAT, messages=messages))
        assert isinstance(first, asyncio.Future)
        await first
        longer = [*messages, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
        assert isinstance(w.ask(request_for(CHAT, messages=longer)), Found)


async def test_an_adapter_has_the_tokenizer_of_its_model(models: dict[str, str]) -> None:
    async with engine() as upstream, world(upstream, models=models) as w:
        w.pool.learn_models(upstream.name, [{"id": "m"}, {"id": "adapter", "parent": "m"}, {"id": "other"}])
        adapter, other = (
            msgspec_model(request_for(TEXT, prompt="Hello"), name) for name in ("adapter", "other")
        )
        assert (await w.found(adapter)).source == "here"
        assert (await w.found(other)).reason == "nobody"


def msgspec_model(request: InferenceRequest, model: str) -> InferenceRequest:
    body = json.dumps(json.loads(request.body) | {"model": model}).encode()
    return api.find(request.path).parse("r1", request.path, {}, body)


async def test_a_tokenizer_for_any_model(folder: Path) -> None:
    async with world(models={"*": str(folder)}) as w:
        assert (await w.found(request_for(TEXT, prompt="Hello"))).source == "here"


def test_a_tokenizer_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"tokens\.models\.m: .*tokenizer\.json is missing"):
        World([], models={"m": str(tmp_path)})


# -- asked of engines


async def test_an_engine_tokenises_a_text() -> None:
    async with engine(tokenize={"count": 2, "tokens": [5, 6]}) as upstream, world(upstream) as w:
        found = await w.found(request_for(TEXT, prompt="Hello", add_special_tokens=False))
        assert found == Found((Tokenized(pack([5, 6])),), "tokenize")
        (render, asked) = upstream.requests
        assert (render.target, asked.target) == ("/v1/completions/render", "/tokenize")
        assert asked.headers["authorization"] == "Bearer secret"
        assert json.loads(asked.body) == {"model": "m", "prompt": "Hello", "add_special_tokens": False}


async def test_an_engine_tokenises_a_chat_with_all_that_changes_it() -> None:
    tools = [{"type": "function", "function": {"name": "f", "extra": 1}}]
    async with engine(tokenize={"tokens": [5]}) as upstream, world(upstream) as w:
        await w.found(
            request_for(
                CHAT,
                messages=[*HELLO, {"role": "assistant", "content": "x", "reasoning_content": "y"}],
                tools=tools,
                chat_template="{{ x }}",
                chat_template_kwargs={"enable_thinking": False},
                documents=[{"text": "d"}],
                reasoning_effort="low",
                add_generation_prompt=False,
                continue_final_message=True,
                add_special_tokens=True,
                temperature=0.5,
            )
        )
        asked = json.loads(upstream.requests[-1].body)
        assert asked.pop("messages")[1]["reasoning"] == "y"
        assert asked == {
            "model": "m",
            "tools": tools,
            "chat_template": "{{ x }}",
            "chat_template_kwargs": {
                "enable_thinking": False,
                "documents": [{"text": "d"}],
                "reasoning_effort": "low",
            },
            "add_generation_prompt": False,
            "continue_final_message": True,
            "add_special_tokens": True,
        }


async def test_every_text_of_a_batch_is_asked_for() -> None:
    def script(request: Received) -> Iterable[Step]:
        if request.target != "/tokenize":
            return [reply(b"{}", 403)]
        size = len(json.loads(request.body)["prompt"])
        return [reply(json.dumps({"tokens": [size]}).encode())]

    async with FakeUpstream(script) as upstream, world(upstream) as w:
        found = await w.found(request_for(TEXT, prompt=["a", "bb"]))
        assert found.prompts == (Tokenized(pack([1])), Tokenized(pack([2])))
        assert (await w.found(request_for(TEXT, prompt=["a"] * 9))).reason == "nobody"


async def test_a_render_is_preferred_and_tells_of_media() -> None:
    features = {"mm_hashes": {"image": ["h"]}, "mm_placeholders": {"image": [{"offset": 1, "length": 2}]}}
    rendered = {"token_ids": [1, 9, 9, 2], "features": features}
    async with engine(render=rendered, tokenize={"tokens": [1]}) as upstream, world(upstream) as w:
        request = request_for(CHAT, messages=[{"role": "user", "content": [IMAGE]}])
        found = await w.found(request)
        assert found == Found((Tokenized(pack([1, 9, 9, 2]), (("h", 1, 2),)),), "render")
        assert targets(upstream) == ["/v1/chat/completions/render"]
        assert upstream.requests[0].body == request.body


async def test_a_render_of_several_prompts() -> None:
    async with engine(render=[{"token_ids": [1]}, {"token_ids": [2, 3]}]) as upstream, world(upstream) as w:
        found = await w.found(request_for(TEXT, prompt=["a", "b"]))
        assert found.prompts == (Tokenized(pack([1])), Tokenized(pack([2, 3])))


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
async def test_formats_that_only_a_render_can_read(path: str) -> None:
    request = request_for(path, messages=HELLO, input="Hello", max_tokens=1)
    async with engine(render={"token_ids": [1, 2]}) as upstream, world(upstream) as w:
        assert (await w.found(request)).prompts == (Tokenized(pack([1, 2])),)
        assert targets(upstream) == [path + "/render"]
    async with engine(tokenize={"tokens": [1]}) as upstream, world(upstream) as w:
        assert (await w.found(request)).reason == "format"


async def test_media_without_a_render_have_no_ids(models: dict[str, str]) -> None:
    request = request_for(CHAT, messages=[{"role": "user", "content": [IMAGE]}])
    for fields in ({}, {"models": models}):
        async with engine(tokenize={"tokens": [1]}) as upstream, world(upstream, **fields) as w:
            assert not (await w.found(request)).prompts
            assert "/tokenize" not in targets(upstream)


async def test_a_path_that_an_engine_lacks_is_not_tried_again_until_it_restarts() -> None:
    async with engine(tokenize={"tokens": [1]}) as upstream, world(upstream) as w:
        for _ in range(3):
            assert (await w.found(request_for(TEXT, prompt="a"))).source == "tokenize"
        assert targets(upstream) == ["/v1/completions/render", "/tokenize", "/tokenize", "/tokenize"]
        assert upstream.connections == 1
        w.pool.unreachable(upstream.name)  # it was never reached: no restart
        w.pool.reached(upstream.name)
        w.pool.unreachable(upstream.name)
        await w.found(request_for(TEXT, prompt="a"))
        assert targets(upstream)[-2:] == ["/v1/completions/render", "/tokenize"]


async def test_questions_are_spread_over_the_endpoints() -> None:
    async with engine(tokenize={"tokens": [1]}) as a, engine(tokenize={"tokens": [1]}) as b, world(a, b) as w:
        for _ in range(6):
            await w.found(request_for(TEXT, prompt="a"))
        assert [targets(upstream).count("/tokenize") for upstream in (a, b)] == [3, 3]


async def test_an_endpoint_that_fails_is_replaced_by_another() -> None:
    async with engine(tokenize={"tokens": [1]}) as good, engine() as bad, world(good, bad) as w:
        await bad.stop()
        for _ in range(2):
            assert (await w.found(request_for(TEXT, prompt="a"))).source == "tokenize"


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([reply(b"{}", 400)], "refused"),
        ([reply(b"{}", 500)], "failed"),
        ([reply(b"not JSON")], "failed"),
        ([reply(b'{"token_ids": [-1], "tokens": ["x"]}')], "failed"),
        ([reply(b"{}", 404)], "nobody"),
    ],
)
async def test_an_engine_that_has_no_answer(steps: list[Step], reason: str) -> None:
    async with FakeUpstream(steps) as upstream, world(upstream) as w:
        assert await w.found(request_for(TEXT, prompt="a")) == Found(reason=reason)
        assert w.tokens.missing == {reason: 1}


async def test_a_server_in_the_engines_place() -> None:
    async with (
        engine(render={"token_ids": [3]}) as renderer,
        engine() as upstream,
        world(upstream, url=renderer.url) as w,
    ):
        assert (await w.found(request_for(CHAT, messages=HELLO))).prompts == (Tokenized(pack([3])),)
        assert upstream.requests == []


def test_a_server_that_is_none_stops_the_start() -> None:
    with pytest.raises(SettingsError, match=r"tokens\.url"):
        World([], url="localhost:8000")


# -- too late, too many, too odd


async def test_what_comes_late_is_done_without() -> None:
    gate = asyncio.Event()
    script = [gate, reply(b'{"token_ids": [1]}')]
    async with FakeUpstream(script) as upstream, world(upstream, budget_s=0.02) as w:
        assert await w.found(request_for(CHAT, messages=HELLO)) == Found(reason="late")
        assert w.tokens.missing == {"late": 1}
        gate.set()


async def test_what_comes_late_is_remembered(models: dict[str, str]) -> None:
    async with world(models=models, budget_s=0.0) as w:
        request = request_for(CHAT, messages=long_chat(3))
        answer = w.ask(request)
        assert isinstance(answer, asyncio.Future)
        assert (await answer).reason == "late"
        while isinstance(answer, asyncio.Future):  # each ask is a turn of the event loop
            answer = w.ask(request)
            await asyncio.sleep(0)
        assert answer.source == "here"


async def test_an_answer_that_nobody_awaits_any_more() -> None:
    gate = asyncio.Event()
    async with FakeUpstream([gate, reply(b'{"token_ids": [1]}')]) as upstream, world(upstream) as w:
        answer = w.ask(request_for(CHAT, messages=HELLO))
        assert isinstance(answer, asyncio.Future)
        await upstream.request()
        answer.cancel()
        gate.set()
        assert (await w.found(request_for(CHAT, messages=HELLO))).source == "render"


async def test_no_more_wait_than_can_be_done_soon(models: dict[str, str]) -> None:
    async with world(models=models) as w:
        request = request_for(TEXT, prompt="to be or not " * 2000)
        answers = [w.ask(request) for _ in range(MOST_JOBS + 20)]
        await asyncio.gather(*(answer for answer in answers if isinstance(answer, asyncio.Future)))
        assert w.tokens.missing["busy"] > 0
        assert w.tokens.found["here"] >= MOST_JOBS


@pytest.mark.parametrize(
    ("path", "fields", "reason"),
    [
        (TEXT, {"prompt": 7}, "malformed"),
        (TEXT, {"prompt": []}, "malformed"),
        (TEXT, {"prompt": "a", "truncate_prompt_tokens": 4}, "truncated"),
        (CHAT, {"messages": []}, "malformed"),
        (CHAT, {"messages": "x"}, "malformed"),
        (CHAT, {"messages": [{"content": "no role"}]}, "malformed"),
        ("/inference/v1/generate", {"token_ids": "x"}, "malformed"),
        ("/generate", {"text": "a", "image_data": "x"}, "media"),
        ("/v1/embeddings", {"input": "a"}, "format"),
        (CHAT, {"messages": HELLO, "chat_template": "{{ x }}"}, "template"),
    ],
)
async def test_requests_without_ids(
    models: dict[str, str], path: str, fields: dict[str, Any], reason: str
) -> None:
    async with world(models=models) as w:
        assert await w.found(request_for(path, **fields)) == Found(reason=reason)


# -- whether what is made here is right


async def test_a_tokenizer_that_differs_from_the_engines_is_found_out(
    models: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    async with engine(tokenize={"tokens": [1, 2]}) as upstream, world(upstream, models=models) as w:
        with caplog.at_level(logging.WARNING):
            assert (await w.found(request_for(CHAT, messages=HELLO))).source == "here"
            await w.until(lambda: w.tokens.compared["differ"] == 1)
        assert "makes other tokens of a chat for m" in caplog.text
        assert "from token 0 on" in caplog.text
        assert await w.found(request_for(CHAT, messages=HELLO)) == Found(
            (Tokenized(pack([1, 2])),), "tokenize"
        )
        assert (await w.found(request_for(TEXT, prompt="Hello"))).source == "here"


async def test_a_tokenizer_that_is_the_engines_is_asked_about_once(
    models: dict[str, str], qwen: Library
) -> None:
    ids = qwen.encode(HELLO_TEXT, add_special_tokens=False).ids
    async with engine(tokenize={"tokens": ids}) as upstream, world(upstream, models=models) as w:
        for _ in range(3):
            assert (await w.found(request_for(CHAT, messages=HELLO))).source == "here"
        await w.until(lambda: w.tokens.compared["equal"] == 1)
        assert targets(upstream).count("/tokenize") == 1


async def test_the_metrics_page(models: dict[str, str]) -> None:
    async with world(models=models) as w:
        await w.found(request_for(CHAT, messages=HELLO))
        await w.found(request_for("/v1/embeddings", input="a"))
        samples = {(s.name, *s.labels.values()): s.value for m in w.tokens.metrics() for s in m.samples}
        assert samples["pointsman_token_ids_found_total", "here"] == 1
        assert samples["pointsman_token_ids_missing_total", "format"] == 1
        assert samples["pointsman_token_memory_bytes",] > 0
