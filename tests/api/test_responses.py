"""OpenAI's Responses API."""

from __future__ import annotations

import json

import pytest

from pointsman import api


def parse(fields):
    return api.find("/v1/responses").parse("r1", "/v1/responses", {}, json.dumps(fields).encode())


def data(request):
    return [bytes(prompt.data) for prompt in request.prompts]


def test_instructions_come_before_the_input():
    turns = [{"role": "user", "content": "hello"}]
    request = parse(
        {"model": "m", "instructions": "Be brief.", "input": turns, "max_output_tokens": 9, "stream": True}
    )
    assert data(request) == [b'"Be brief."' + json.dumps(turns).encode()[:-1]]
    assert (request.model, request.stream, request.max_tokens) == ("m", True, 9)
    assert (request.root, request.state_id) == (b"", "")
    assert request.prompt_tokens == -(-len(data(request)[0]) // 4)


def test_input_as_text():
    assert data(parse({"model": "m", "input": "hello"})) == [b"hello"]
    assert data(parse({"model": "m", "input": "hello", "instructions": None})) == [b"hello"]
    assert data(parse({"model": "m", "input": "hello", "instructions": "Be brief."})) == [b'"Be brief."hello']


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"previous_response_id": "resp_1"}, "resp_1"),
        ({"conversation": "conv_1"}, "conv_1"),
        ({"conversation": {"id": "conv_2"}}, "conv_2"),
        ({"previous_response_id": None, "conversation": None}, ""),
        ({"previous_response_id": 5}, ""),
        ({"conversation": {"id": 5}}, ""),
        ({"conversation": {}}, ""),
    ],
)
def test_earlier_state_is_named_and_makes_another_prompt(fields, state):
    plain = parse({"model": "m", "input": "go on"})
    request = parse({"model": "m", "input": "go on"} | fields)
    assert request.state_id == state
    assert (request.root == plain.root) == (state == "")


def test_no_input_is_left_to_the_engine():
    assert parse({"model": "m", "instructions": "Be brief."}).prompts == ()


def test_screenshots_are_media():
    shot = {"type": "computer_screenshot", "image_url": "data:image/png;base64,iVBORw0KGgo="}
    request = parse(
        {"model": "m", "input": [{"type": "computer_call_output", "call_id": "c", "output": shot}]}
    )
    assert len(request.media) == 1
    assert b"iVBORw0KGgo=" not in data(request)[0]


def test_tools_and_reasoning_are_the_root():
    request = parse({"model": "m", "input": "x", "tools": [{"type": "f"}], "reasoning": {"effort": "low"}})
    assert b'[{"type": "f"}]' in request.root
    assert b'{"effort": "low"}' in request.root
