"""A prompt that goes on keeps its bytes: what was sent is a prefix of what is sent next."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from pointsman import api

words = st.text(max_size=40)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": words},
    optional={"name": words, "tool_calls": st.lists(st.fixed_dictionaries({"id": words}), max_size=2)},
)
conversations = st.lists(turn, min_size=1, max_size=6).flatmap(
    lambda turns: st.tuples(st.just(turns), st.lists(turn, min_size=1, max_size=3))
)
styles = st.sampled_from([{}, {"separators": (",", ":")}, {"indent": 2}, {"ensure_ascii": False}])
images = st.sampled_from(["http://host/cat.png", "data:image/png;base64," + "iVBO" * 40, "data:,"])


def prompt(path, fields, style):
    body = json.dumps({"model": "m"} | fields, **style).encode()
    (one,) = api.find(path).parse("r1", path, {}, body).prompts
    return bytes(one.data)


@given(conversations, styles)
def test_chat(conversation, style):
    before, added = conversation
    first = prompt("/v1/chat/completions", {"messages": before}, style)
    second = prompt("/v1/chat/completions", {"messages": before + added}, style)
    assert second.startswith(first)
    assert len(second) > len(first)


@given(conversations, styles, words)
def test_responses(conversation, style, instructions):
    before, added = conversation
    first = prompt("/v1/responses", {"input": before, "instructions": instructions}, style)
    second = prompt("/v1/responses", {"input": before + added, "instructions": instructions}, style)
    assert second.startswith(first)
    assert len(second) > len(first)


@given(conversations, styles, st.one_of(words, st.lists(st.fixed_dictionaries({"text": words}), max_size=3)))
def test_anthropic(conversation, style, system):
    before, added = conversation
    first = prompt("/v1/messages", {"messages": before, "system": system}, style)
    second = prompt("/v1/messages", {"messages": before + added, "system": system}, style)
    assert second.startswith(first)
    assert len(second) > len(first)


@given(words, words, styles)
def test_text(before, added, style):
    first = prompt("/v1/completions", {"prompt": before}, style)
    assert prompt("/v1/completions", {"prompt": before + added}, style).startswith(first)


@given(st.lists(st.integers(0, 200_000), min_size=1), st.lists(st.integers(0, 200_000)), styles)
def test_token_ids(before, added, style):
    first = prompt("/v1/completions", {"prompt": before}, style)
    assert prompt("/v1/completions", {"prompt": before + added}, style).startswith(first)


@given(conversations, images, styles)
def test_an_image_keeps_what_precedes_it_and_what_follows(conversation, url, style):
    """Text before the first image is the same bytes as without it: turning multimodal costs no cache hit."""
    before, added = conversation
    part = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    plain = prompt("/v1/chat/completions", {"messages": before}, style)
    pictured = prompt("/v1/chat/completions", {"messages": [*before, part]}, style)
    longer = prompt("/v1/chat/completions", {"messages": [*before, part, *added]}, style)
    assert pictured.startswith(plain)
    assert longer.startswith(pictured)


def test_a_mark_that_moves_along_changes_nothing():
    """Anthropic clients mark the newest block for caching, and take the mark from where it was."""

    def block(text, **more):
        return {"role": "user", "content": [{"type": "text", "text": text} | more]}

    mark = {"cache_control": {"type": "ephemeral"}}
    first = prompt("/v1/messages", {"messages": [block("one"), block("two", **mark)]}, {})
    second = prompt("/v1/messages", {"messages": [block("one"), block("two"), block("three", **mark)]}, {})
    assert second.startswith(first)
    assert b"cache_control" not in second
    assert b"three" in second
