"""Calls that only some engines have: vLLM's and SGLang's generate, rerank and score, tokenize."""

from __future__ import annotations

import json

import pytest

from pointsman import api


def parse(path, fields):
    return api.find(path).parse("r1", path, {}, json.dumps(fields).encode())


def data(request):
    return [bytes(prompt.data) for prompt in request.prompts]


def test_vllm_generate():
    request = parse(
        "/inference/v1/generate",
        {
            "request_id": "x",
            "token_ids": [1, 2, 3],
            "sampling_params": {"max_tokens": 16, "n": 2, "temperature": 0},
            "model": "m",
            "stream": True,
            "cache_salt": "s",
            "features": None,
        },
    )
    assert (request.format, request.model, request.stream) == ("vllm", "m", True)
    assert (data(request), request.prompt_tokens) == ([b"[1, 2, 3"], 3)
    assert (request.max_tokens, request.n, request.root) == (16, 2, b'"s"\0')


def test_vllm_generate_with_other_media_is_another_prompt():
    def root(name):
        features = {
            "mm_hashes": {"image": [name]},
            "mm_placeholders": {"image": [{"offset": 0, "length": 2}]},
        }
        return parse("/inference/v1/generate", {"token_ids": [1, 1, 2], "features": features}).root

    assert root("a") == root("a") != root("b")


@pytest.mark.parametrize("path", ["/inference/v1/generate", "/generate", "/score", "/pooling", "/tokenize"])
def test_engines_own_calls_need_no_model(path):
    assert parse(path, {}).model == ""


def test_tokenize_goes_by_model_only():
    request = parse("/tokenize", {"model": "m", "prompt": "hello"})
    assert (request.model, request.prompts) == ("m", ())


def test_sglang_generate_of_text():
    request = parse(
        "/generate", {"text": "abcdefgh", "sampling_params": {"max_new_tokens": 32, "n": 2}, "stream": True}
    )
    assert (request.format, request.model, request.stream) == ("sglang", "", True)
    assert (data(request), request.prompt_tokens) == ([b"abcdefgh"], 2)
    assert (request.max_tokens, request.n, request.root) == (32, 2, b"")


def test_sglang_generate_of_batches():
    request = parse("/generate", {"input_ids": [[1, 2], [3]], "sampling_params": [{"max_new_tokens": 4}, {}]})
    assert [prompt.tokens for prompt in request.prompts] == [2, 1]
    assert (request.prompt_tokens, request.max_tokens) == (3, 4)
    assert data(parse("/generate", {"text": ["one", "two"]})) == [b"one", b"two"]
    assert parse("/generate", {"text": "x", "sampling_params": []}).max_tokens is None


def test_sglang_media_and_lora_are_the_root():
    plain = parse("/generate", {"text": "<image> what?"})
    pictured = parse(
        "/generate", {"text": "<image> what?", "image_data": ["http://h/a.png", "http://h/b.png"]}
    )
    nested = parse("/generate", {"text": ["a", "b"], "image_data": [["http://h/a.png"], ["http://h/b.png"]]})
    single = parse("/generate", {"text": "<image> what?", "image_data": "http://h/a.png"})
    assert pictured.media == nested.media
    assert pictured.media[:1] == single.media
    assert len({plain.root, pictured.root, single.root}) == 3
    assert pictured.prompt_tokens == plain.prompt_tokens + 450
    assert parse("/generate", {"text": "x", "lora_path": "sql"}).root != plain.root


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_reads_the_query_with_every_document(path):
    request = parse(path, {"model": "r", "query": "12345678", "documents": ["1234", "123456"], "top_n": 1})
    assert (request.format, request.model, request.prompts) == ("rerank", "r", ())
    assert request.prompt_tokens == 2 * 2 + 1 + 2


@pytest.mark.parametrize(
    ("left", "right"),
    [("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items")],
)
def test_score_in_all_its_spellings(left, right):
    assert parse("/score", {"model": "s", left: "1234", right: ["1234", "1234"]}).prompt_tokens == 4
    assert parse("/score", {"model": "s", left: ["1234", "1234"], right: ["1234", "1234"]}).prompt_tokens == 4


def test_documents_as_objects_are_left_to_the_engine():
    assert parse("/rerank", {"model": "r", "query": "1234", "documents": [{"text": "x"}]}).prompt_tokens == 0
