"""Which format reads which path."""

from __future__ import annotations

import time

import pytest

from pointsman import api


@pytest.mark.parametrize(
    ("path", "family"),
    [
        ("/v1/completions", "openai"),
        ("/v1/completions/render", "openai"),
        ("/v1/chat/completions", "openai"),
        ("/v1/chat/completions/render", "openai"),
        ("/v1/responses", "openai"),
        ("/v1/embeddings", "openai"),
        ("/v1/images/generations", "openai"),
        ("/v1/audio/transcriptions", "openai"),
        ("/v1/audio/translations", "openai"),
        ("/v1/messages", "anthropic"),
        ("/v1/messages/count_tokens", "anthropic"),
        ("/rerank", "rerank"),
        ("/v1/rerank", "rerank"),
        ("/v2/rerank", "rerank"),
        ("/score", "vllm"),
        ("/v1/score", "vllm"),
        ("/classify", "vllm"),
        ("/pooling", "vllm"),
        ("/tokenize", "vllm"),
        ("/inference/v1/generate", "vllm"),
        ("/generate", "sglang"),
        ("/v1/conversations", "openai"),
        ("/v1/files", "openai"),
        ("/v1/batches", "openai"),
    ],
)
def test_a_path_is_read_by_its_family(path, family):
    assert api.find(path).name == family


@pytest.mark.parametrize(
    "path", ["/x/v1/completions", "/completions", "/v1/completions?api-version=1", "/v1/completions/"]
)
def test_prefix_query_and_trailing_slash_do_not_matter(path):
    assert api.find(path) is api.find("/v1/completions")


def test_the_longest_suffix_wins():
    assert api.find("/x/v1/chat/completions") is api.find("/v1/chat/completions")
    assert api.find("/x/v1/chat/completions") is not api.find("/v1/completions")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/",
        "",
        "/api/generate",  # Ollama's, not SGLang's
        "/v1/generate",
        "/v1/threads/t1/messages",  # OpenAI's assistants, not Anthropic
        "/mycompletions",
        "/v1/chat/completions/chatcmpl-1",
    ],
)
def test_other_paths_pass_through(path):
    assert api.find(path) is api.PASSTHROUGH


@pytest.mark.parametrize(
    ("path", "state"),
    [
        ("/v1/responses/resp_1", "resp_1"),
        ("/v1/responses/resp_1/cancel", "resp_1"),
        ("/v1/responses/resp_1?include=x", "resp_1"),
        ("/v1/responses/resp_1/input_items", "resp_1"),
        ("/v1/conversations/conv_1/items", "conv_1"),
        ("/v1/files/file-1/content", "file-1"),
        ("/v1/batches/batch_1", "batch_1"),
        ("/v1/batches", ""),
        ("/v1/files", ""),
    ],
)
def test_a_call_on_a_stored_object_names_its_state(path, state):
    request = api.find(path).parse("r1", path, {}, b"")
    assert (request.state_id, request.model, request.format) == (state, "", "openai")


@pytest.mark.parametrize(
    "path", ["/v1/responses/render", "/v1/responses/input_tokens", "/v1/responses/compact"]
)
def test_calls_beside_stored_responses_are_not_taken_for_ids(path):
    request = api.find(path).parse("r1", path, {}, b'{"model": "m", "input": "hi"}')
    assert (request.model, request.state_id) == ("m", "")


def test_a_batch_belongs_where_its_input_file_is():
    body = b'{"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"}'
    assert api.find("/v1/batches").parse("r1", "/v1/batches", {}, body).state_id == "file-1"


def test_a_path_of_64_kb_of_slashes_costs_nothing():
    started = time.perf_counter()
    assert api.find("/" * 65536 + "x") is api.PASSTHROUGH
    assert time.perf_counter() - started < 0.1


def test_one_path_has_one_format():
    with pytest.raises(AssertionError, match="two formats answer to /completions"):
        api.register(api.Format("again", ("/completions",), api.PASSTHROUGH.parse))
    assert not [known for known in api.formats() if known.name == "again"]


@pytest.mark.parametrize(
    ("path", "head", "created"),
    [
        ("/v1/responses", b'{"id": "resp_1", "object": "response", "output": [{"id": "msg_1"}]}', "resp_1"),
        (
            "/v1/responses",
            b'event: response.created\ndata: {"type":"response.created","response":{"id":"resp_2"}}\n\n',
            "resp_2",
        ),
        ("/v1/conversations", b'{"id":"conv_1","object":"conversation"}', "conv_1"),
        ("/v1/files?x=1", b'{"object":"file","id":"file-1"}', "file-1"),
        ("/x/v1/batches", b'{"id":"batch_1"}', "batch_1"),
        ("/v1/responses/resp_1/cancel", b'{"id":"resp_1"}', ""),
        ("/v1/chat/completions", b'{"id":"chatcmpl-1"}', ""),
        ("/v1/responses", b'{"error":{"message":"no"}}', ""),
        ("/v1/responses", b"", ""),
        ("/v1/responses", b'{"id": "\xff"}', "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_what_a_response_created(path, head, created):
    assert api.created_id(path, head) == created
