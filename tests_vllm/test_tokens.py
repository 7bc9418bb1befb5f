"""Token ids made here, and those asked for, are the ones that a real engine computes for the same request."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests_vllm.servers import HOME, MODEL, Engine

from pointsman import api
from pointsman.api.token_ids import pack
from pointsman.config import Endpoint as EndpointSettings
from pointsman.config import Tokens as Settings
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.target import targets_of
from pointsman.tokens.found import Found
from pointsman.tokens.tokens import Tokens
from pointsman.types import InferenceRequest

pytestmark = pytest.mark.timeout(600)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

PLAIN = (
    "<s>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EVERYTHING = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m | tojson }}{{ m.content }}<end>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ documents | tojson }}{{ reasoning_effort }}"
    "  {% if enable_thinking is defined %}\nthinks: {{ enable_thinking }}\n  {% endif %}\n"
    "{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}{{ extra }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part | tojson }}{% endfor %}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}{% generation %}<assistant>{% endgeneration %}{% endif %}"
)
DEVELOPER = PLAIN + "{% if messages[0].role == 'developer' %}{{ messages[0] | tojson }}{% endif %}"


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "time", "description": "The time, «now»", "strict": True}},
]
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Bern", "n": 1.5}'},
}
BROKEN = {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "{"}}
AGENT: list[dict[str, Any]] = [
    {"role": "system", "content": "x-anthropic-billing-header: cch=5\nBe brief & «polite»."},
    {"role": "user", "content": "What's the weather?\n\n  Now <end> please", "name": "Ann"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, BROKEN], "reasoning_content": "look it up"},
    {"role": "tool", "tool_call_id": "c1", "content": parts("sunny", "21°")},
    {"role": "user", "content": parts("and", "tomorrow? 明天")},
]
BEGUN = [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "It is  "}]
DEVELOPERS = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "developer", "content": [{"type": "text", "text": "And polite."}]},
]

CHATS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "plain": (PLAIN, {"messages": BEGUN[:1]}),
    "conversation": (PLAIN, {"messages": [*BEGUN, {"role": "user", "content": "more " * 900}]}),
    "agent": (EVERYTHING, {"messages": AGENT, "tools": TOOLS, "tool_choice": "none"}),
    "agent, parts": (PARTS, {"messages": AGENT}),
    "developer": (PLAIN, {"messages": DEVELOPERS}),
    "developer, parts": (PARTS, {"messages": DEVELOPERS}),
    "developer that is known": (DEVELOPER, {"messages": DEVELOPERS}),
    "variables": (
        EVERYTHING,
        {
            "messages": BEGUN,
            "documents": [{"title": "a", "text": "b"}],
            "reasoning_effort": "low",
            "chat_template_kwargs": {"extra": [1, None], "add_generation_prompt": True},
            "add_generation_prompt": False,
        },
    ),
    "no thinking": (
        EVERYTHING,
        {"messages": BEGUN, "reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "continued": (
        PLAIN,
        {"messages": BEGUN, "add_generation_prompt": False, "continue_final_message": True},
    ),
    "special tokens": (PLAIN, {"messages": BEGUN, "add_special_tokens": True}),
}
TEXTS: Mapping[str, Mapping[str, Any]] = {
    "text": {"prompt": "It's  <s> the\n\n first time, é 中文 " * 40},
    "batch": {"prompt": ["one", "Two <user>"]},
    "no special tokens": {"prompt": "one", "add_special_tokens": False},
    "ids": {"prompt": [5, 6, 7]},
}


@pytest.fixture(scope="module")
def engine(figures: list[str]) -> Iterator[Engine]:
    made = Engine("tokens", "--enable-scale-out", "--trust-request-chat-template")
    try:
        made.start()
        made.wait()
        yield made
    finally:
        made.stop()


def post(url: str, body: bytes) -> Any:
    asked = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as response:
        return json.load(response)


def truth(engine: Engine, request: InferenceRequest) -> list[list[int]]:
    """The ids that the engine computed the prompts as, in its answer to the request itself."""
    fields = json.loads(request.body) | {"max_tokens": 1, "return_token_ids": True}
    answer = post(engine.url + request.path, json.dumps(fields).encode())
    if request.path == CHAT:
        return [answer["prompt_token_ids"]]
    return [choice["prompt_token_ids"] for choice in answer["choices"]]


async def find(engine: Engine, request: InferenceRequest, **settings: Any) -> tuple[Found, Mapping[str, int]]:
    """What is found for it, and how it compared with the engine's."""

    pool = Pool(time.monotonic)
    pool.apply("test", targets_of(EndpointSettings(url=engine.url)))
    tokens = Tokens(Settings(budget_s=30.0, **settings), pool)
    try:
        answer = tokens.ask(request, [member.endpoint for member in pool.members.values()])
        found = answer if isinstance(answer, Found) else await answer
        while found.source == "here" and not tokens.compared:  # noqa: ASYNC110 - nothing tells of its end
            await asyncio.sleep(0.01)
        return found, tokens.compared
    finally:
        tokens.close()


def request_for(path: str, fields: Mapping[str, Any]) -> InferenceRequest:
    return api.find(path).parse("r1", path, {}, json.dumps({"model": MODEL, **fields}).encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HOME / MODEL, tmp_path / "model"))


@pytest.mark.parametrize("name", CHATS)
async def test_a_chat(engine: Engine, folder: Path, name: str) -> None:
    template, fields = CHATS[name]
    (folder / "chat_template.jinja").write_text(template)
    brought = request_for(CHAT, {**fields, "chat_template": template})
    expected = truth(engine, brought)
    here, _ = await find(engine, request_for(CHAT, fields), models={MODEL: str(folder)})
    assert [prompt.ids for prompt in here.prompts] == [pack(ids) for ids in expected]
    assert here.source == "here"
    asked, _ = await find(engine, brought)
    assert asked == Found(here.prompts, "render")


@pytest.mark.parametrize("name", TEXTS)
async def test_a_completion(engine: Engine, name: str) -> None:
    request = request_for(TEXT, TEXTS[name])
    expected = [pack(ids) for ids in truth(engine, request)]
    here, compared = await find(engine, request, models={MODEL: str(HOME / MODEL)})
    assert [prompt.ids for prompt in here.prompts] == expected
    assert here.source == ("given" if name == "ids" else "here")
    assert not compared or compared == {"equal": 1}
    asked, _ = await find(engine, request)
    assert [prompt.ids for prompt in asked.prompts] == expected


async def test_the_models_own_template(engine: Engine) -> None:
    request = request_for(CHAT, {"messages": BEGUN})
    here, compared = await find(engine, request, models={MODEL: str(HOME / MODEL)})
    assert [prompt.ids for prompt in here.prompts] == [pack(ids) for ids in truth(engine, request)]
    assert compared == {"equal": 1}


async def test_formats_that_only_the_engine_reads(engine: Engine) -> None:
    for path, fields in (
        ("/v1/messages", {"messages": BEGUN[:1], "max_tokens": 4}),
        ("/v1/responses", {"input": "Say it"}),
    ):
        found, _ = await find(engine, request_for(path, fields))
        assert found.source == "render", path
        assert found.prompts[0].count > 3


@pytest.mark.parametrize("name", CHATS)
async def test_a_chat_by_tokenize(engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template, fields = CHATS[name]
    brought = request_for(CHAT, {**fields, "chat_template": template})
    monkeypatch.setattr("pointsman.tokens.engines.RENDERED", ())
    found, _ = await find(engine, brought)
    assert [prompt.ids for prompt in found.prompts] == [pack(ids) for ids in truth(engine, brought)]
    assert found.source == "tokenize"
