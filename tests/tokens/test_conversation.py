"""Messages and tools as a chat template is given them."""

from __future__ import annotations

import pytest

from pointsman.tokens.conversation import NotText, conversation, has_media, tools

TEXT = {"type": "text", "text": "one"}
MORE = {"type": "input_text", "text": "two"}
IMAGE = {"type": "image_url", "image_url": {"url": "http://h/a.png"}}


def told(*messages, parts=False, developer=True):
    return list(conversation(messages, parts=parts, developer=developer))


def test_a_template_that_takes_no_parts_is_given_one_text():
    assert told({"role": "user", "content": [TEXT, MORE, "three"], "id": 7}) == [
        {"role": "user", "content": "one\ntwo\nthree"}
    ]
    assert told({"role": "assistant", "content": None}) == [{"role": "assistant", "content": ""}]


def test_a_template_that_takes_parts_is_given_parts():
    assert told({"role": "user", "content": [TEXT, MORE]}, {"role": "user", "content": "x"}, parts=True) == [
        {"role": "user", "content": [TEXT, {"type": "text", "text": "two"}]},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
    ]


def test_results_of_tools_are_one_text_anyway():
    message = {"role": "tool", "tool_call_id": "c1", "content": [TEXT, MORE]}
    assert told(message, parts=True) == [{"role": "tool", "content": "one\ntwo", "tool_call_id": "c1"}]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ('{"city": "Bern", "n": [1]}', {"city": "Bern", "n": [1]}),
        ({"city": "Bern"}, {"city": "Bern"}),
        ("", {}),
        (None, {}),
        ("{broken", {}),
        ("[1]", {}),
    ],
)
def test_arguments_of_tool_calls_are_objects(arguments, given):
    call = {"type": "function", "id": "c1", "index": 0, "function": {"name": "f", "arguments": arguments}}
    (message,) = told({"role": "assistant", "content": None, "tool_calls": [call]})
    (found,) = message["tool_calls"]
    assert found == {"id": "c1", "function": {"arguments": given, "name": "f"}, "type": "function"}
    assert list(found) == ["id", "function", "type"]


def test_no_tool_calls_are_left_out():
    assert told({"role": "assistant", "content": "x", "tool_calls": []}) == [
        {"role": "assistant", "content": "x"}
    ]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_given_under_both_names(name):
    (message,) = told({"role": "assistant", "content": "x", name: "because"})
    assert message == {
        "role": "assistant",
        "content": "x",
        "reasoning": "because",
        "reasoning_content": "because",
    }


def test_the_billing_line_of_a_system_prompt_is_dropped():
    line = "x-anthropic-billing-header: cch=1"
    assert told({"role": "system", "content": f"{line}\nBe brief."})[0]["content"] == "Be brief."
    assert told({"role": "system", "content": [{"type": "text", "text": line}, TEXT]})[0]["content"] == "one"
    assert told({"role": "user", "content": line})[0]["content"] == line


def test_a_developer_is_the_system_where_the_template_does_not_know_the_role():
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "developer", "content": "c"},
    ]
    assert told(*messages, developer=False) == [
        {"role": "system", "content": "a\n\nc"},
        {"role": "user", "content": "b"},
    ]
    assert told(*messages)[2] == {"role": "developer", "content": "c", "tools": None}
    assert told(messages[2], developer=False) == [{"role": "system", "content": "c"}]


@pytest.mark.parametrize("content", [[TEXT, IMAGE], [{"type": "audio_url"}]])
def test_media_cannot_be_made_text(content):
    with pytest.raises(NotText) as raised:
        told({"role": "user", "content": content})
    assert raised.value.reason == "media"
    assert has_media([{"role": "user", "content": content}])
    assert not has_media([{"role": "user", "content": [TEXT]}, {"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "message",
    [
        {"content": "x"},
        {"role": "user", "content": 7},
        {"role": "user", "content": [7]},
        {"role": "user", "content": [{"text": "x"}]},
        {"role": "user", "content": [{"type": "text", "text": 7}]},
        {"role": "assistant", "tool_calls": [{"id": "c1"}]},
    ],
)
def test_what_is_no_message(message):
    with pytest.raises(NotText) as raised:
        told(message)
    assert raised.value.reason == "malformed"


def test_tools_have_nulls_for_what_was_not_given():
    given = {"type": "function", "function": {"parameters": {"type": "object"}, "name": "f", "other": 1}}
    (tool,) = tools([given])
    assert tool == {
        "type": "function",
        "function": {"name": "f", "description": None, "parameters": {"type": "object"}},
    }
    assert list(tool["function"]) == ["name", "description", "parameters"]
    (strict,) = tools([{"type": "function", "function": {"name": "f", "strict": True}}])
    assert strict["function"]["strict"] is True


def test_what_is_no_tool():
    with pytest.raises(NotText):
        tools([{"type": "function"}])
