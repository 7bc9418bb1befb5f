"""Completions, chat completions, embeddings and images: exact fields from realistic bodies."""

from __future__ import annotations

import json

import pytest

from pointsman import api


def parse(path, fields, headers=None):
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return api.find(path).parse("r1", path, headers or {}, body)


def data(request):
    return [bytes(prompt.data) for prompt in request.prompts]


CHAT = {
    "model": "granite",
    "messages": [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    "temperature": 0.2,
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_completion_tokens": 300,
    "n": 2,
    "user": "u1",
}


def test_chat():
    headers = {"x-request-id": "abc"}
    body = json.dumps(CHAT).encode()
    request = api.find("/v1/chat/completions").parse("r7", "/v1/chat/completions", headers, body)
    messages = json.dumps(CHAT["messages"]).encode()
    assert request.id == "r7"
    assert request.path == "/v1/chat/completions"
    assert request.format == "openai"
    assert request.body is body
    assert request.headers is headers
    assert (request.model, request.stream, request.n, request.max_tokens) == ("granite", True, 2, 300)
    assert data(request) == [messages[:-1]]
    assert request.prompt_tokens == request.prompts[0].tokens == -(-(len(messages) - 1) // 4)
    assert (request.root, request.media, request.state_id) == (b"", (), "")


def test_chat_data_lies_in_the_body_itself():
    request = parse("/v1/chat/completions", CHAT)
    view = request.prompts[0].data
    assert isinstance(view, memoryview)
    assert view.readonly


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": 0}, 0),
        ({"max_tokens": None}, None),
        ({}, None),
    ],
)
def test_output_limit(fields, limit):
    assert parse("/v1/chat/completions", CHAT | {"max_completion_tokens": None} | fields).max_tokens == limit


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_salt": "tenant-one"},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"chat_template": "{{ messages }}"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"documents": [{"title": "t", "text": "x"}]},
        {"reasoning_effort": "high"},
    ],
)
def test_what_precedes_the_messages_is_the_root(fields):
    plain, changed = parse("/v1/chat/completions", CHAT), parse("/v1/chat/completions", CHAT | fields)
    assert plain.root == b""
    assert json.dumps(next(iter(fields.values()))).encode() in changed.root
    assert data(plain) == data(changed)


def test_roots_of_different_fields_differ():
    assert (
        parse("/v1/chat/completions", CHAT | {"cache_salt": "x"}).root
        != parse("/v1/chat/completions", CHAT | {"reasoning_effort": "x"}).root
    )


@pytest.mark.parametrize("messages", [None, "hello", {}, 5])
def test_messages_that_are_none_are_left_to_the_engine(messages):
    request = parse("/v1/chat/completions", CHAT | {"messages": messages})
    assert (request.prompts, request.prompt_tokens) == ((), 0)


def test_completion_of_text():
    request = parse("/v1/completions", {"model": "m", "prompt": 'Say "hi"\n', "max_tokens": 7, "n": 3})
    assert data(request) == [rb"Say \"hi\"\n"]
    assert (request.prompt_tokens, request.max_tokens, request.n, request.stream) == (3, 7, 3, False)


def test_completion_of_token_ids():
    request = parse("/v1/completions", {"model": "m", "prompt": [1, 22, 333]})
    assert data(request) == [b"[1, 22, 333"]
    assert request.prompt_tokens == request.prompts[0].tokens == 3


def test_batched_completions():
    request = parse("/v1/completions", {"model": "m", "prompt": ["abcd", "", "abcdefgh"]})
    assert data(request) == [b"abcd", b"", b"abcdefgh"]
    assert [prompt.tokens for prompt in request.prompts] == [1, 0, 2]
    assert request.prompt_tokens == 3


def test_batched_token_ids():
    request = parse("/v1/completions", b'{"model":"m","prompt":[[1,2,3],[ 4, 5 ]]}')
    assert data(request) == [b"[1,2,3", b"[ 4, 5"]
    assert [prompt.tokens for prompt in request.prompts] == [3, 2]


@pytest.mark.parametrize(
    "prompt", [None, [], {}, 5, True, [None], [[]], [["a"]], [[[1]]], [{"prompt": "x"}], "absent"]
)
def test_prompts_no_engine_takes_are_left_to_the_engine(prompt):
    fields = {"model": "m"} if prompt == "absent" else {"model": "m", "prompt": prompt}
    request = parse("/v1/completions", fields)
    assert (request.prompts, request.prompt_tokens) == ((), 0)


def test_embeddings():
    request = parse("/v1/embeddings", {"model": "e", "input": ["one two", "three"], "cache_salt": "s"})
    assert data(request) == [b"one two", b"three"]
    assert (request.model, request.prompt_tokens, request.root, request.max_tokens) == ("e", 4, b'"s"', None)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/classify"])
def test_pooling_calls_take_a_chat_too(path):
    request = parse(path, {"model": "e", "messages": CHAT["messages"]})
    assert data(request) == [json.dumps(CHAT["messages"]).encode()[:-1]]


def test_images():
    request = parse("/v1/images/generations", {"model": "i", "prompt": "a red railway switch", "n": 4})
    assert (data(request), request.n, request.prompt_tokens) == ([b"a red railway switch"], 4, 5)


def test_lora_adapter_is_its_name():
    assert parse("/v1/completions", {"model": "sql-adapter", "prompt": "x"}).model == "sql-adapter"


@pytest.mark.parametrize("path", ["/v1/completions/render", "/v1/chat/completions/render"])
def test_rendering_is_read_as_what_it_renders(path):
    assert api.find(path) is api.find(path.removesuffix("/render"))


def test_a_compressed_body_is_not_read():
    request = parse("/v1/chat/completions", b"\x1f\x8b...", {"content-encoding": "gzip"})
    assert (request.format, request.model, request.prompts, request.body) == (
        "passthrough",
        "",
        (),
        b"\x1f\x8b...",
    )


def test_identity_is_no_compression():
    assert parse("/v1/chat/completions", CHAT, {"content-encoding": "identity"}).model == "granite"
