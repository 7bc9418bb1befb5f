"""Anthropic's Messages API."""

from __future__ import annotations

import json

from pointsman import api

MESSAGES = [
    {"role": "user", "content": "Which way?"},
    {"role": "assistant", "content": [{"type": "text", "text": "Left."}]},
    {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
]
BODY = {"model": "claude", "max_tokens": 64, "messages": MESSAGES, "stream": True}


def parse(fields, path="/v1/messages"):
    return api.find(path).parse("r1", path, {}, json.dumps(fields).encode())


def data(request):
    (prompt,) = request.prompts
    return bytes(prompt.data)


def test_messages():
    request = parse(BODY)
    assert (request.model, request.format, request.max_tokens, request.stream) == (
        "claude",
        "anthropic",
        64,
        True,
    )
    assert data(request) == json.dumps(MESSAGES).encode()[:-1]
    assert request.prompt_tokens == -(-len(data(request)) // 4)
    assert request.root == b""


def test_counting_tokens_reads_the_same():
    assert data(parse(BODY, "/v1/messages/count_tokens")) == data(parse(BODY))


def test_the_system_prompt_comes_first():
    assert data(parse(BODY | {"system": "Be brief."})) == b'"Be brief."' + data(parse(BODY))
    blocks = [{"type": "text", "text": "Be brief."}]
    assert data(parse(BODY | {"system": blocks})) == json.dumps(blocks).encode() + data(parse(BODY))


def test_a_changed_end_of_the_system_prompt_keeps_its_beginning():
    one, two = (data(parse(BODY | {"system": "Be brief. " * 50 + day})) for day in ("Monday", "Friday"))
    assert one[:500] == two[:500]
    assert one != two


def test_tools_are_the_root():
    tools = [{"name": "f", "input_schema": {}}]
    assert json.dumps(tools).encode() in parse(BODY | {"tools": tools}).root


def test_the_billing_line_that_changes_with_every_call_is_left_out():
    """Claude Code sends it; vLLM drops it before it builds the prompt."""

    def with_line(hash_):
        line = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={hash_};"}
        return data(parse(BODY | {"system": [line, {"type": "text", "text": "You are Claude Code."}]}))

    assert with_line("aaaa") == with_line("bbbb")
    assert b"You are Claude Code." in with_line("aaaa")


def test_cache_marks_of_any_shape():
    def marked(mark, **first):
        block = first | {"type": "text", "text": "hi"} | mark
        return data(parse(BODY | {"messages": [{"role": "user", "content": [block]}]}))

    plain = marked({})
    assert marked({"cache_control": {"type": "ephemeral"}}) == plain
    assert marked({"cache_control": {"type": "ephemeral", "ttl": "1h"}}) == plain
    assert b'"cache_control": null' in marked({"cache_control": None})
    assert b'"cache_control"' in marked({}, cache_control={"type": "ephemeral"})  # no comma before it: kept


def test_text_that_speaks_of_cache_marks_is_kept():
    text = '", "cache_control": {"type": "ephemeral"}, "'
    request = parse(BODY | {"messages": [{"role": "user", "content": text}]})
    assert json.dumps(text).encode() in data(request)


def test_images_also_inside_tool_results():
    def image(payload):
        return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": payload}}

    result = {
        "type": "tool_result",
        "tool_use_id": "t",
        "content": [image("BBBB"), {"type": "text", "text": "x"}],
    }
    link = {"type": "image", "source": {"type": "url", "url": "https://host/c.png"}}
    request = parse(BODY | {"messages": [{"role": "user", "content": [image("AAAA"), result, link]}]})
    assert [tokens for _, tokens in request.media] == [225, 225, 225]
    assert len({digest for digest, _ in request.media}) == 3
    for payload in (b"AAAA", b"BBBB", b"https://host/c.png"):
        assert payload not in data(request)


def test_documents_in_plain_text_and_search_results_are_text():
    plain = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "long text"}}
    found = {"type": "search_result", "source": "https://host/", "content": [{"type": "text", "text": "x"}]}
    request = parse(BODY | {"messages": [{"role": "user", "content": [plain, found]}]})
    assert request.media == ()
    assert b"long text" in data(request)
    assert b"https://host/" in data(request)
