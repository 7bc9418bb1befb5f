"""The response phase: passed on, renamed, counted, and over exactly once."""

from __future__ import annotations

import json

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from pointsman.extproc.messages import BUFFERED, FULL_DUPLEX, NONE, STREAMED
from pointsman.extproc.processor import AT_ONCE_S, SEEN
from pointsman.testing.picking import HOSTS, Gateway, Stage, bodies, destination, headers_set
from pointsman.types import Ending

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello"}]}).encode()
STREAM = json.dumps({**json.loads(BODY), "stream": True}).encode()
USAGE = {"prompt_tokens": 7, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 4}}
SSE = {"content_type": "text/event-stream; charset=utf-8"}


def sent(stage: Stage, body: bytes = BODY, modes: tuple[int, int] | None = (4, 4), **headers: str) -> Gateway:
    """A request that has been decided on."""
    call = stage.call()
    call.head(modes=modes, **headers)
    call.body(body)
    assert stage.in_flight() > 0
    return call


def test_a_whole_response_is_passed_on_in_one_piece_and_its_usage_is_known() -> None:
    stage = Stage()
    call = sent(stage)
    answer = json.dumps({"choices": [], "usage": USAGE}).encode()
    (head,) = call.response()
    assert headers_set(head) == {"x-went-into-resp-headers": "true"}
    stage.now_s += 2
    assert call.reply(answer[:9], end=False) == []
    assert call.reply(answer[9:], end=False) == []
    assert bodies(call.reply(b""), "response_body") == [(answer, True)]
    assert stage.in_flight() == 0
    (outcome,) = stage.ended
    assert (outcome.ending, outcome.status, outcome.endpoint in HOSTS) == (Ending.OK, 200, True)
    assert (outcome.response_bytes, outcome.duration_s) == (len(answer), 2.0)
    usage = outcome.usage
    assert (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens) == (7, 10, 4)
    call.process.half_closed()
    assert call.finished == 0
    assert len(stage.ended) == 1


def test_a_response_that_is_no_json_is_passed_on_as_it_is() -> None:
    call = sent(Stage())
    call.response()
    assert bodies(call.reply(b"\xff{not json"), "response_body") == [(b"\xff{not json", True)]


@pytest.mark.parametrize("told_by", ["content type", "request"])
def test_events_are_passed_on_one_by_one_at_once(told_by: str) -> None:
    stage = Stage()
    call = sent(stage, STREAM if told_by == "request" else BODY)
    stage.now_s += 1
    call.response(**(SSE if told_by == "content type" else {}))
    stage.now_s += 1
    load = next(stage.load(host) for host in HOSTS if stage.load(host).requests)
    assert load.tokens > 0
    last = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n"
    for piece in (b"data: {}\n\n", b"data: {}\n\n", last):
        assert bodies(call.reply(piece, end=False), "response_body") == [(piece, False)]
        assert load.tokens == 0
        assert load.requests == 1
        stage.now_s += 1
    assert bodies(call.reply(b"data: [DONE]\n\n"), "response_body") == [(b"data: [DONE]\n\n", True)]
    (outcome,) = stage.ended
    assert (outcome.ttft_s, outcome.duration_s, outcome.chunks) == (2.0, 5.0, 4)
    assert (outcome.usage.prompt_tokens, outcome.usage.output_tokens) == (7, 10)
    assert stage.in_flight() == 0


def test_a_large_response_is_passed_on_in_pieces_of_62000_bytes() -> None:
    call = sent(Stage())
    call.response()
    body = bytes(range(256)) * 500
    pieces = bodies(call.reply(body), "response_body")
    assert [len(data) for data, _ in pieces] == [62_000, 62_000, 4_000]
    assert b"".join(data for data, _ in pieces) == body
    assert [end for _, end in pieces] == [False, False, True]


def test_a_response_that_is_too_large_to_hold_goes_on_as_it_comes() -> None:
    call = sent(Stage())
    call.response()
    piece, came = b"x" * 60_000, []
    for _ in range(30):
        came += bodies(call.reply(piece, end=False), "response_body")
    assert sum(len(data) for data, _ in came) == 30 * 60_000
    came += bodies(call.reply(b"y"), "response_body")
    assert came[-1] == (b"y", True)


def test_trailers_end_a_response_after_what_was_held() -> None:
    stage = Stage()
    call = sent(stage)
    call.response()
    assert call.reply(b"{}", end=False) == []
    answers = call.response_trailers()
    assert bodies(answers, "response_body") == [(b"{}", False)]
    assert answers[-1].WhichOneof("response") == "response_trailers"
    assert [o.ending for o in stage.ended] == [Ending.OK]
    assert stage.in_flight() == 0


def test_a_response_of_headers_alone_is_over_with_them() -> None:
    stage = Stage()
    call = sent(stage)
    call.response(204, end=True)
    assert [(o.ending, o.status) for o in stage.ended] == [(Ending.OK, 204)]


@pytest.mark.parametrize(("status", "faults"), [(400, 0), (429, 0), (503, 0), (500, 1), (502, 1)])
def test_statuses_are_counted_and_only_real_faults_held_against_the_endpoint(
    status: int, faults: int
) -> None:
    stage = Stage(hosts=HOSTS[:1])
    for _ in range(3):
        call = sent(stage)
        call.response(status)
        call.reply(b'{"error": {}}')
    assert {(o.ending, o.status, o.reason) for o in stage.ended} == {
        (Ending.ERROR, status, f"status_{status}")
    }
    assert stage.pool.members[HOSTS[0]].breaker.passes == (not faults)


def test_the_model_s_name_is_the_client_s_again_whole_or_in_pieces() -> None:
    renamed = {"x_llm_d_model_name_rewrite": "target"}
    for gap in ("", " "):
        call = sent(Stage(), **renamed)
        call.response()
        said = b'{"id":"1","model":%s"target","x":"target"}' % gap.encode()
        (piece,) = bodies(call.reply(said), "response_body")
        assert piece == (said.replace(b'"target",', b'"m",', 1), True)
        call = sent(Stage(), STREAM, **renamed)
        call.response(**SSE)
        (piece,) = bodies(call.reply(b"data: " + said + b"\n\n", end=False), "response_body")
        assert piece == (b"data: " + said.replace(b'"target",', b'"m",', 1) + b"\n\n", False)
        assert bodies(call.reply(b"data: [DONE]\n\n"), "response_body") == [(b"data: [DONE]\n\n", True)]


SESSIONS = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: session-affinity-filter
- type: random-picker
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: session-affinity-filter}
  - {pluginRef: random-picker}
"""


def test_a_session_s_token_is_told_and_leads_back_to_the_same_endpoint() -> None:
    stage = Stage(picker_config=SESSIONS, responses=SEEN)
    first = stage.call()
    first.head()
    chosen = destination(first.body(BODY)[0])
    token = headers_set(first.response()[0])["x-session-token"]
    for _ in range(10):
        call = stage.call()
        call.head(x_session_token=token)
        assert destination(call.body(BODY)[0]) == chosen


def test_where_another_endpoint_served_the_load_is_there() -> None:
    stage = Stage()
    call = sent(stage)
    (chosen,) = [host for host in HOSTS if stage.load(host).requests]
    other = next(host for host in HOSTS if host != chosen)
    call.response(served=other, **SSE)
    assert (stage.load(chosen).requests, stage.load(other).requests) == (0, 1)
    call.reply(b"data: [DONE]\n\n")
    (outcome,) = stage.ended
    assert (outcome.endpoint, outcome.tries) == (other, 2)
    assert stage.in_flight() == 0


def test_an_unknown_server_changes_nothing() -> None:
    stage = Stage()
    call = sent(stage)
    call.response(served="10.9.9.9:1")
    call.reply(b"{}")
    assert [(o.ending, o.tries) for o in stage.ended] == [(Ending.OK, 1)]


# -- other body modes


def test_streamed_pieces_are_answered_one_to_one() -> None:
    stage = Stage()
    call = sent(stage, modes=(FULL_DUPLEX, STREAMED))
    call.response()
    for end in (False, False, True):
        assert call.reply(b"{}", end=end) == [pb.ProcessingResponse(response_body=pb.BodyResponse())]
    assert [o.ending for o in stage.ended] == [Ending.OK]


@pytest.mark.parametrize("mode", [STREAMED, BUFFERED])
def test_pieces_that_change_are_replaced(mode: int) -> None:
    call = sent(Stage(), modes=(FULL_DUPLEX, mode), x_llm_d_model_name_rewrite="target")
    (head,) = call.response(content_length="18")
    assert list(head.response_headers.response.header_mutation.remove_headers) == ["content-length"]
    (answer,) = call.reply(b'{"model":"target"}')
    assert answer.response_body.response.body_mutation.body == b'{"model":"m"}'


def end(call: Gateway, how: str) -> None:
    """The gateway ends the stream, as Envoy does either way."""
    if how == "reset":
        call.process.cancelled()
    else:
        call.process.half_closed()


HOW = pytest.mark.parametrize("how", ["reset", "half-closed"])


@HOW
def test_without_response_bodies_the_end_of_the_stream_is_the_end_of_the_request(how: str) -> None:
    stage = Stage()
    call = sent(stage, STREAM, modes=(FULL_DUPLEX, NONE))
    call.response(**SSE)
    assert stage.in_flight() > 0
    stage.now_s += 1
    end(call, how)
    assert [(o.ending, o.status, o.duration_s) for o in stage.ended] == [(Ending.OK, 200, 1.0)]
    assert stage.in_flight() == 0


@HOW
def test_an_answer_that_is_no_token_stream_is_over_as_soon_as_its_stream(how: str) -> None:
    stage = Stage()
    call = sent(stage, modes=(FULL_DUPLEX, NONE))
    call.response()
    end(call, how)
    assert [(o.ending, o.status) for o in stage.ended] == [(Ending.OK, 200)]


@HOW
def test_a_token_stream_that_is_closed_with_its_headers_goes_on_unseen(how: str) -> None:
    stage = Stage()
    call = sent(stage, STREAM, modes=(FULL_DUPLEX, NONE))
    call.response(**SSE)
    stage.now_s += AT_ONCE_S / 2
    end(call, how)
    assert stage.ended == []
    assert len(stage.completions) == 1
    assert stage.in_flight() > 0


@HOW
def test_a_gateway_that_never_shows_responses_leaves_the_request_unseen(how: str) -> None:
    for modes in ((FULL_DUPLEX, NONE), None):
        stage = Stage()
        call = sent(stage, modes=modes)
        end(call, how)
        assert len(stage.completions) == 1
        assert stage.ended == []


# -- clients that leave


@pytest.mark.parametrize("when", ["before the response", "after its headers", "in mid-stream"])
@HOW
def test_a_client_that_leaves_frees_its_place_once(when: str, how: str) -> None:
    stage = Stage()
    call = sent(stage, STREAM)
    if when != "before the response":
        call.response(**SSE)
    if when == "in mid-stream":
        call.reply(b"data: {}\n\n", end=False)
    end(call, how)
    assert stage.in_flight() == 0
    assert [(o.ending, o.reason) for o in stage.ended] == [(Ending.CANCELLED, "client_left")]
    assert call.reply(b"late") == []
    assert len(stage.ended) == 1


def test_a_client_that_leaves_before_its_body_is_whole_was_never_there() -> None:
    stage = Stage()
    call = stage.call()
    call.head()
    call.body(BODY[:5], end=False)
    call.process.cancelled()
    assert stage.in_flight() == 0
    assert stage.ended == []
    assert call.sent == []


def test_a_reset_after_the_end_changes_nothing() -> None:
    stage = Stage()
    call = sent(stage)
    call.response()
    call.reply(b"{}")
    call.process.cancelled()
    assert [o.ending for o in stage.ended] == [Ending.OK]
    assert stage.in_flight() == 0


def test_the_response_to_a_request_without_a_body_passes() -> None:
    stage = Stage()
    call = stage.call()
    call.head("/v1/models", method="GET", end=True)
    call.response()
    assert bodies(call.reply(b"{}"), "response_body") == [(b"{}", True)]
    call.process.half_closed()
    assert call.finished == 0


def test_the_maker_of_a_stored_response_gets_the_requests_that_build_on_it() -> None:
    stage = Stage()
    call = stage.call()
    call.head("/v1/responses")
    chosen = destination(call.body(b'{"model": "m", "input": "Hello"}')[0])
    call.response()
    call.reply(b'{"id": "resp_1", "output": []}')
    for _ in range(10):
        again = stage.call()
        again.head("/v1/responses")
        asked = {"model": "m", "input": "More", "previous_response_id": "resp_1"}
        assert destination(again.body(json.dumps(asked).encode())[0]) == chosen
