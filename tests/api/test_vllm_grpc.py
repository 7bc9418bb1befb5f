"""vLLM's gRPC messages, written by protobuf's own classes: what is read of requests and of responses."""

from __future__ import annotations

from array import array
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman import api
from pointsman.api import vllm_grpc
from pointsman.api.vllm_grpc import EMBED, GENERATE, SERVICE
from pointsman.errors import BadRequest
from pointsman.testing.vllm_grpc import framed, message
from pointsman.tokens.asked import Texts, asked
from pointsman.tokens.conversation import NotText
from pointsman.types import InferenceRequest, Tokenized, Usage

IDS = [1, 127, 128, 300, 151_643, 2**32 - 1]
UINT32 = st.integers(0, 2**32 - 1)


def read(path: str, body: bytes, headers: dict[str, str] | None = None) -> InferenceRequest:
    return api.find(path).parse("r", path, headers or {}, body)


def generate(**values: object) -> bytes:
    return framed(message("GenerateRequest", request_id="theirs", **values))


def unpack(ids: Tokenized) -> list[int]:
    return list(array("I", ids.ids))


def test_generation_from_token_ids() -> None:
    body = generate(
        tokenized={"original_text": "Hello", "input_ids": IDS},
        sampling_params={"temperature": 0.5, "max_tokens": 64, "n": 2},
        stream=True,
    )
    request = read(GENERATE, body)
    assert (request.format, request.model, request.id, request.body) == ("vllmgrpc", "", "r", body)
    assert (request.stream, request.max_tokens, request.n) == (True, 64, 2)
    assert request.prompt_tokens == len(IDS)
    assert [p.tokens for p in request.prompts] == [len(IDS)]
    (tokens,) = asked(request)
    assert unpack(tokens) == IDS


def test_generation_from_text_is_estimated_and_can_be_tokenised() -> None:
    request = read(GENERATE, generate(text="Hello, world"))
    assert (request.stream, request.max_tokens, request.n, request.prompt_tokens) == (False, None, 1, 3)
    assert bytes(request.prompts[0].data) == b"Hello, world"
    assert asked(request) == Texts(("Hello, world",))


def test_embeddings() -> None:
    request = read(EMBED, framed(message("EmbedRequest", tokenized={"input_ids": IDS})))
    assert (request.format, request.prompt_tokens, request.max_tokens) == ("vllmgrpc", len(IDS), None)
    (tokens,) = asked(request)
    assert unpack(tokens) == IDS


def test_media_are_told_apart_and_placed() -> None:
    def seen(first: str, second: str) -> InferenceRequest:
        image = {"mm_hashes": [first], "mm_placeholders": [{"offset": 9, "length": 4}]}
        video = {"mm_hashes": [second], "mm_placeholders": [{"offset": 2, "length": 3}]}
        tokenized = {"input_ids": range(20)}
        return read(GENERATE, generate(tokenized=tokenized, mm_inputs=image, extra_mm_inputs=[video]))

    request = seen("cat", "film")
    assert request.root != seen("dog", "film").root != seen("dog", "song").root
    (tokens,) = asked(request)
    assert tokens.media == (("film", 2, 3), ("cat", 9, 4))


def test_media_that_the_engine_fetches_leave_the_ids_unknown() -> None:
    def seen(url: str) -> InferenceRequest:
        return read(GENERATE, generate(tokenized={"input_ids": IDS}, media_refs={"items": [{"url": url}]}))

    assert seen("http://a").root != seen("http://b").root
    with pytest.raises(NotText):
        asked(seen("http://a"))


@pytest.mark.parametrize("call", ["HealthCheck", "Abort", "GetModelInfo", "GetServerInfo"])
def test_calls_about_the_engine_go_anywhere(call: str) -> None:
    request = read(SERVICE + call, framed(message("HealthCheckRequest")))
    assert (request.format, request.prompts, request.prompt_tokens) == ("passthrough", (), 0)


@pytest.mark.parametrize("path", [GENERATE, EMBED])
def test_compressed_messages_pass_unread(path: str) -> None:
    body = b"\x01\0\0\0\x03zip"
    request = read(path, body)
    assert (request.format, request.body, request.prompts) == ("passthrough", body, ())


BROKEN = {
    "empty": b"",
    "no head": b"\0\0\0",
    "cut": b"\0\0\0\0\x05abc",
    "a field beyond": b"\0\0\0\0\x02\x0a\x09",
    "a group": b"\0\0\0\0\x01\x0b",
    "json": b"{}",
    "a number without end": b"\0\0\0\0\x0b" + b"\xff" * 11,
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest, match=r"^Invalid gRPC message: "):
        read(GENERATE, body)


@given(st.lists(UINT32), st.lists(UINT32))
def test_longer_prompts_begin_with_the_bytes_of_shorter_ones(ids: list[int], more: list[int]) -> None:
    short, long = (read(GENERATE, generate(tokenized={"input_ids": i})) for i in (ids, ids + more))
    assert (short.prompt_tokens, long.prompt_tokens) == (len(ids), len(ids) + len(more))
    if ids:
        assert bytes(long.prompts[0].data).startswith(bytes(short.prompts[0].data))
        (tokens,) = asked(short)
        assert unpack(tokens) == ids


@given(st.binary())
def test_any_message_is_read_or_refused(data: bytes) -> None:
    body = b"\0" + len(data).to_bytes(4, "big") + data
    try:
        request = read(GENERATE, body)
    except BadRequest:
        return
    assert request.prompt_tokens >= 0
    assert vllm_grpc.tokenized(body) is None or request.body == body


# -- responses


def usage(path: str, *pieces: bytes) -> Usage:
    counting = api.find(path).counting
    assert counting is not None
    counted = counting()
    for piece in pieces:
        counted.feed(piece)
    return counted.usage()


def chunk(ids: list[int], **counts: int) -> dict[str, object]:
    return {"chunk": {"token_ids": ids, **counts}}


def responses(*values: dict[str, object]) -> bytes:
    return framed(*(message("GenerateResponse", **value) for value in values))


ONE = {"output_ids": [5] * 300, "prompt_tokens": 70, "completion_tokens": 300, "cached_tokens": 64}
STREAM = responses(
    *(chunk([700 + i], prompt_tokens=70, completion_tokens=1, cached_tokens=64) for i in range(3)),
    {"complete": {"finish_reason": "stop", "prompt_tokens": 70, "completion_tokens": 1, "cached_tokens": 64}},
)


def test_a_whole_answer_is_counted() -> None:
    assert usage(GENERATE, responses({"complete": ONE})) == Usage(70, 300, 64)


@pytest.mark.parametrize("last", [0, 1, 3], ids=["not at all", "what is new", "all"])
def test_a_stream_is_counted_whatever_its_last_message_counts(last: int) -> None:
    chunks = [chunk([9], prompt_tokens=70, completion_tokens=1) for _ in range(3)]
    end = {"complete": {"finish_reason": "stop", "prompt_tokens": 70, "completion_tokens": last}}
    assert usage(GENERATE, responses(*chunks, end)) == Usage(70, 3, 0)


def test_choices_add_up() -> None:
    answers = ({"complete": {"index": i, "prompt_tokens": 7, "completion_tokens": 10 + i}} for i in range(3))
    assert usage(GENERATE, responses(*answers)) == Usage(7, 33, 0)


def test_embeddings_count_their_prompt() -> None:
    answer = message("EmbedResponse", embedding=[0.5] * 1024, prompt_tokens=12)
    assert usage(EMBED, framed(answer)) == Usage(12, None, None)


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_where_the_bytes_are_cut_changes_nothing(cuts: list[int]) -> None:
    at = [0, *sorted(cuts), len(STREAM)]
    assert usage(GENERATE, *(STREAM[a:b] for a, b in pairwise(at))) == Usage(70, 3, 64)


@given(st.lists(st.binary()))
def test_no_bytes_make_counting_raise(pieces: list[bytes]) -> None:
    assert isinstance(usage(GENERATE, *pieces), Usage)
    assert isinstance(usage(EMBED, *pieces), Usage)


def test_compressed_and_huge_messages_are_stepped_over() -> None:
    huge = bytes(vllm_grpc.MAX_MESSAGE_BYTES)
    body = b"\0" + len(huge).to_bytes(4, "big") + huge + b"\x01\0\0\0\x03zip" + STREAM
    pieces = [body[i : i + 16_384] for i in range(0, len(body), 16_384)]
    assert usage(GENERATE, *pieces) == Usage(70, 3, 64)
    assert usage(GENERATE, b"\x01\0\0\0\x03zip") == Usage()
