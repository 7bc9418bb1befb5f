"""vLLM's gRPC calls through the picker: decided on by their prompt, counted, ended by their trailers."""

from __future__ import annotations

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from pointsman.api.vllm_grpc import EMBED, GENERATE, SERVICE
from pointsman.extproc.messages import NONE
from pointsman.testing.picking import HOSTS, Gateway, Stage, bodies, destination
from pointsman.testing.vllm_grpc import framed, message
from pointsman.types import Ending, Usage

GRPC = {"content_type": "application/grpc", "te": "trailers"}


def generate(ids: range, *, stream: bool = True) -> bytes:
    return framed(message("GenerateRequest", tokenized={"input_ids": ids}, stream=stream))


def chunk(token: int) -> bytes:
    counts = {"prompt_tokens": 100, "completion_tokens": 1, "cached_tokens": 96}
    return framed(message("GenerateResponse", chunk={"token_ids": [token], **counts}))


COMPLETE = framed(message("GenerateResponse", complete={"prompt_tokens": 100, "completion_tokens": 2}))


def sent(stage: Stage, body: bytes, path: str = GENERATE) -> tuple[Gateway, str]:
    """A request that has been decided on, and where it goes."""
    call = stage.call()
    assert call.head(path, **GRPC) == []
    assert call.body(body[:7], end=False) == []
    answers = call.body(body[7:])
    assert bodies(answers) == [(body, True)]
    return call, destination(answers[0])


def test_a_prompt_goes_where_it_has_been_before() -> None:
    stage = Stage()
    first, where = sent(stage, generate(range(5_000)))
    first.response(**GRPC)
    first.response_trailers(grpc_status="0")
    others = [sent(stage, generate(range(n, n + 5_000)))[1] for n in range(100_000, 160_000, 10_000)]
    assert set(others) == set(HOSTS)
    for _ in range(3):
        call, again = sent(stage, generate(range(5_100)))
        assert again == where
        call.process.cancelled()


def test_a_stream_passes_message_by_message_and_its_trailers_end_it() -> None:
    stage = Stage()
    call, where = sent(stage, generate(range(100)))
    assert stage.load(where).tokens == 100
    call.response(**GRPC)
    stage.now_s += 1
    for piece in (chunk(5), chunk(6), COMPLETE[:9], COMPLETE[9:]):
        assert bodies(call.reply(piece, end=False), "response_body") == [(piece, False)]
    assert stage.in_flight() == 1
    (trailers,) = call.response_trailers(grpc_status="0", grpc_message="")
    assert trailers.WhichOneof("response") == "response_trailers"
    (outcome,) = stage.ended
    assert (outcome.ending, outcome.status, outcome.ttft_s) == (Ending.OK, 200, 1.0)
    assert outcome.usage == Usage(100, 2, 96)
    assert stage.in_flight() == 0


@pytest.mark.parametrize("path", [GENERATE, EMBED])
def test_a_whole_answer_is_kept_together_and_ends_with_its_trailers_only(path: str) -> None:
    stage = Stage()
    if path == GENERATE:
        body, answer = generate(range(100), stream=False), COMPLETE
    else:
        body = framed(message("EmbedRequest", tokenized={"input_ids": range(100)}))
        answer = framed(message("EmbedResponse", embedding=[0.5] * 99, prompt_tokens=100))
    call, _ = sent(stage, body, path)
    call.response(**GRPC)
    assert call.reply(answer[:20], end=False) == call.reply(answer[20:], end=False) == []
    answers = call.response_trailers(grpc_status="0")
    assert bodies(answers, "response_body") == [(answer, False)]
    assert answers[-1].WhichOneof("response") == "response_trailers"
    (outcome,) = stage.ended
    assert (outcome.ending, outcome.usage.prompt_tokens) == (Ending.OK, 100)
    assert outcome.usage.output_tokens == (2 if path == GENERATE else None)


@pytest.mark.parametrize(
    ("code", "status", "faults"),
    [(2, 500, 1), (3, 400, 0), (4, 408, 0), (8, 429, 0), (13, 500, 1), (14, 503, 0), (99, 500, 1)],
)
@pytest.mark.parametrize("alone", [False, True], ids=["in trailers", "in headers, alone"])
def test_the_grpc_status_is_how_it_ended(code: int, status: int, faults: int, alone: bool) -> None:
    stage = Stage()
    call, where = sent(stage, generate(range(100)))
    if alone:
        call.response(**GRPC, grpc_status=str(code), end=True)
    else:
        call.response(**GRPC)
        call.reply(chunk(5), end=False)
        call.response_trailers(grpc_status=str(code))
    (outcome,) = stage.ended
    assert (outcome.ending, outcome.status, outcome.reason) == (Ending.ERROR, status, f"status_{status}")
    assert stage.in_flight() == 0
    breaker = stage.pool.members[where].breaker
    for _ in range(10):
        breaker.fault(stage.now_s) if faults and breaker.passes else None
    assert breaker.passes != bool(faults)


def refusal(answers: list[pb.ProcessingResponse]) -> tuple[int, int, str]:
    (answer,) = answers
    said = answer.immediate_response
    return said.status.code, said.grpc_status.status, said.body.decode()


def test_refusals_have_grpc_s_own_code() -> None:
    stage = Stage()
    call = stage.call()
    call.head(GENERATE, **GRPC)
    status, code, text = refusal(call.body(b"\0\0\0\0\x09short"))
    assert (status, code) == (400, 3)
    assert "Invalid gRPC message" in text
    call = Stage(hosts=()).call()
    call.head(GENERATE, **GRPC)
    assert refusal(call.body(generate(range(9))))[:2] == (503, 14)
    call = stage.call()
    call.head()
    (answer,) = call.body(b"{")
    assert not answer.immediate_response.HasField("grpc_status")


def test_calls_about_the_engine_and_compressed_ones_go_anywhere() -> None:
    stage = Stage()
    assert sent(stage, framed(message("HealthCheckRequest")) + b"\0\0\0\0\0", SERVICE + "HealthCheck")[1]
    assert sent(stage, b"\x01\0\0\0\x05abcde")[1] in HOSTS


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_not_seen_to_its_trailers_is_open_until_somebody_tells(stream: bool) -> None:
    stage = Stage()
    call = stage.call()
    call.head(GENERATE, **GRPC, modes=(4, NONE))
    call.body(generate(range(100), stream=stream))
    call.response(**GRPC)
    stage.now_s += 5
    call.process.half_closed()
    assert stage.ended == []
    assert len(stage.completions) == 1


def test_without_response_bodies_trailers_still_tell() -> None:
    stage = Stage()
    call = stage.call()
    call.head(GENERATE, **GRPC, modes=(4, NONE))
    call.body(generate(range(100)))
    call.response(**GRPC)
    call.response_trailers(grpc_status="13")
    assert [(o.ending, o.status) for o in stage.ended] == [(Ending.ERROR, 500)]
