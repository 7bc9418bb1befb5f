"""Token counts out of the end of responses, as engines send them and as the wire cuts them."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman import api
from pointsman.types import Usage

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


def sse(*events, named=False):
    out = []
    for event in events:
        text = event if isinstance(event, str) else json.dumps(event)
        out.append((f"event: {event['type']}\n" if named else "") + f"data: {text}\n\n")
    return "".join(out).encode()


def chunked(body, cuts):
    """HTTP/1.1 chunks with the given ends, and the last chunk."""
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    pieces = [body[a:b] for a, b in itertools.pairwise(edges) if b > a]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


# vLLM 0.32.0: usage of a non-streamed completion, and of a stream with include_usage
VLLM_USAGE = {
    "prompt_tokens": 254,
    "total_tokens": 262,
    "completion_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 224, "created_cache_tokens": None, "multimodal_tokens": None},
    "completion_tokens_details": None,
}
COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "choices": [{"index": 0, "text": ' said "usage": {"prompt_tokens": 7}', "finish_reason": "length"}],
    "usage": VLLM_USAGE,
    "kv_transfer_params": None,
}
DELTA = {
    "id": "c",
    "object": "chat.completion.chunk",
    "choices": [{"delta": {"content": "word"}}],
    "usage": None,
}
LAST = DELTA | {
    "choices": [],
    "usage": {
        "prompt_tokens": 40,
        "total_tokens": 60,
        "completion_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 0},
    },
}
STREAM = sse(*[DELTA] * 20, LAST, "[DONE]")
COMPLETED = sse(
    {"type": "response.output_text.delta", "delta": "hi"},
    {
        "type": "response.completed",
        "response": {
            "id": "resp_1",
            "output": [],
            "usage": {
                "input_tokens": 30,
                "input_tokens_details": {"cached_tokens": 16},
                "output_tokens": 5,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": 35,
            },
            "user": None,
            "metadata": {},
        },
    },
    named=True,
)
ANTHROPIC = sse(
    {
        "type": "message_start",
        "message": {
            "id": "msg_1",
            "usage": {
                "input_tokens": 10,
                "cache_read_input_tokens": 64,
                "cache_creation_input_tokens": 6,
                "output_tokens": 1,
            },
        },
    },
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello"}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 15}},
    {"type": "message_stop"},
    named=True,
)
SGLANG = json.dumps(
    {
        "text": "hi",
        "meta_info": {
            "id": "x",
            "finish_reason": {"type": "length", "length": 8},
            "prompt_tokens": 12,
            "output_token_logprobs": [[-0.1, 5, None]] * 300,
            "completion_tokens": 8,
            "cached_tokens": 4,
        },
    }
).encode()

CASES = [
    (CHAT, json.dumps(COMPLETION).encode(), Usage(254, 8, 224)),
    (CHAT, json.dumps(COMPLETION, indent=2).encode(), Usage(254, 8, 224)),
    (CHAT, STREAM, Usage(40, 20, 0)),
    ("/v1/completions", STREAM, Usage(40, 20, 0)),
    (RESPONSES, COMPLETED, Usage(30, 5, 16)),
    (MESSAGES, ANTHROPIC, Usage(80, 15, 64)),
    (MESSAGES, b'{"content":[],"usage":{"input_tokens":25,"output_tokens":15}}', Usage(25, 15, None)),
    ("/v1/embeddings", b'{"data":[],"usage":{"prompt_tokens":8,"total_tokens":8}}', Usage(8, None, None)),
    ("/rerank", b'{"id":"r","usage":{"total_tokens":56},"results":[]}', Usage(56, None, None)),
    ("/generate", SGLANG, Usage(12, 8, 4)),
    ("/generate", b"data: " + SGLANG + b"\n\ndata: [DONE]\n\n", Usage(12, 8, 4)),
]


@pytest.mark.parametrize(("path", "body", "usage"), CASES)
def test_usage(path, body, usage):
    assert api.find(path).usage(body[-16384:]) == usage


@given(st.sampled_from(CASES), st.lists(st.integers(0, 20_000), max_size=30))
def test_chunk_framing_anywhere_changes_nothing(case, cuts):
    path, body, usage = case
    assert api.find(path).usage(chunked(body, cuts)) == usage


@given(st.sampled_from(CASES))
def test_a_chunk_for_each_byte_changes_nothing(case):
    path, body, usage = case
    assert api.find(path).usage(chunked(body, range(len(body)))) == usage


def test_a_chunk_for_each_event():
    ends = [at + 2 for at in range(len(STREAM)) if STREAM.startswith(b"\n\n", at)]
    assert api.find(CHAT).usage(chunked(STREAM, ends)) == Usage(40, 20, 0)


@given(st.integers(0, len(STREAM)))
def test_a_tail_cut_anywhere_gives_the_usage_or_nothing(start):
    assert api.find(CHAT).usage(STREAM[start:]) in (Usage(40, 20, 0), Usage())


def test_a_tail_that_has_the_last_event_has_the_usage():
    assert api.find(CHAT).usage(STREAM[STREAM.rindex(b'data: {"id"') + 1 :]) == Usage(40, 20, 0)


def test_a_long_stream_that_lost_its_beginning_knows_its_output():
    long = ANTHROPIC.replace(b"hello", b"hello" * 5000)[-16384:]
    assert api.find(MESSAGES).usage(long) == Usage(None, 15, None)


def test_usage_far_from_the_end_of_a_json_body():
    body = json.dumps({"usage": VLLM_USAGE, "prompt_token_ids": list(range(2000))}).encode()
    assert api.find(CHAT).usage(body[-16384:]) == Usage(254, 8, 224)


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b'"usage"',
        b'"usage":',
        b'"usage":{',
        b'"usage":{"prompt_tokens":"many"}',
        b'"usage":{"prompt_tokens":1e999}',
        b'"usage":{"prompt_tokens_details":5}',
        b'"usage":' + b'{"a":' * 5000,
        b'"usage":null' * 1000,
        b'{"text":"said \\"usage\\": {}"}',
        sse(*[DELTA] * 300, "[DONE]")[-16384:],
        b'data: {"text": "",  "meta_info": {"prompt_tokens": -',
    ],
)
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES, "/generate", "/v1/models"])
def test_where_there_is_none_nothing_is_known(path, tail):
    assert api.find(path).usage(tail) == Usage()


pieces = st.sampled_from([b'"usage":', b"{", b"}", b"\r\n1\r\n", b'"prompt_tokens":1', b"\ndata:"])


@given(st.binary() | st.text().map(str.encode) | st.lists(pieces).map(b"".join))
def test_no_bytes_make_it_raise(tail):
    for known in (*api.formats(), api.PASSTHROUGH):
        assert isinstance(known.usage(tail), Usage)
