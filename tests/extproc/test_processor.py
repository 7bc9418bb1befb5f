"""The request phase of the endpoint picker protocol, message by message."""

from __future__ import annotations

import json

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from pointsman.extproc.headers import DESTINATION
from pointsman.extproc.messages import BUFFERED, FULL_DUPLEX, NONE, STREAMED
from pointsman.extproc.processor import AUTO, UNSEEN
from pointsman.testing.picking import HOSTS, Stage, bodies, destination, headers_set
from pointsman.types import Ending

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello"}]}).encode()


def kinds(answers: list[pb.ProcessingResponse]) -> list[str | None]:
    return [answer.WhichOneof("response") for answer in answers]


def refusal(answers: list[pb.ProcessingResponse]) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers of the one answer."""
    (answer,) = answers
    assert kinds(answers) == ["immediate_response"]
    immediate = answer.immediate_response
    return immediate.status.code, immediate.body.decode(), headers_set(answer)


def test_nothing_is_said_before_the_body_is_whole_and_then_headers_come_first() -> None:
    call = Stage().call()
    assert call.head() == []
    assert call.body(BODY[:20], end=False) == []
    answers = call.body(BODY[20:])
    assert kinds(answers) == ["request_headers", "request_body"]
    assert destination(answers[0]) in HOSTS
    assert answers[0].request_headers.response.clear_route_cache
    assert headers_set(answers[0])["content-length"] == str(len(BODY))
    assert bodies(answers) == [(BODY, True)]
    assert call.finished is None


def test_the_endpoint_with_the_shorter_queue_and_the_emptier_cache_is_chosen() -> None:
    stage = Stage()
    for host, queue, kv in zip(HOSTS, (7.0, 0.0, 9.0), (0.7, 0.1, 0.9), strict=True):
        stage.page(host, waiting=queue, running=queue, kv_usage=kv)
    stage.now_s += 1
    call = stage.call()
    call.head()
    assert destination(call.body(BODY)[0]) == HOSTS[1]
    assert stage.load(HOSTS[1]).requests == 1


def test_a_body_in_odd_pieces_is_decided_as_the_whole_one() -> None:
    stage = Stage()
    whole, split = stage.call(), stage.call()
    whole.head()
    first = destination(whole.body(BODY * 1)[0])
    split.head()
    pieces = [BODY[i : i + 7] for i in range(0, len(BODY), 7)]
    for piece in pieces[:-1]:
        assert split.body(piece, end=False) == []
    answers = split.body(pieces[-1])
    assert destination(answers[0]) in HOSTS
    assert first in HOSTS
    assert b"".join(data for data, _ in bodies(answers)) == BODY


def test_an_empty_last_piece_ends_the_body() -> None:
    call = Stage().call()
    call.head()
    call.body(BODY, end=False)
    assert bodies(call.body(b"")) == [(BODY, True)]


def test_a_body_without_any_byte_is_decided_on_as_one_nobody_can_read() -> None:
    call = Stage().call()
    call.head("/v1/whatever")
    answers = call.body(b"")
    assert destination(answers[0]) in HOSTS
    assert "content-length" not in headers_set(answers[0])
    assert bodies(answers) == [(b"", True)]


@pytest.mark.parametrize("size", [62_000, 62_001, 124_000, 200_001])
def test_pieces_are_at_most_62000_bytes_and_only_the_last_says_so(size: int) -> None:
    filler = "x" * (size - len(BODY) + len("Hello"))
    body = BODY.replace(b"Hello", filler.encode())
    assert len(body) == size
    call = Stage().call()
    call.head()
    found = bodies(call.body(body))
    assert b"".join(data for data, _ in found) == body
    assert [end for _, end in found] == [False] * (len(found) - 1) + [True]
    assert len(found) == -(-size // 62_000)
    assert max(len(data) for data, _ in found) <= 62_000


def test_trailers_end_a_body_and_are_answered_after_it() -> None:
    call = Stage().call()
    call.head()
    assert call.body(BODY, end=False) == []
    answers = call.trailers()
    assert kinds(answers) == ["request_headers", "request_body", "request_trailers"]
    assert bodies(answers) == [(BODY, False)]


def test_a_request_without_a_body_goes_anywhere_at_once() -> None:
    stage = Stage()
    seen = set()
    for _ in range(60):
        call = stage.call()
        (answer,) = call.head("/v1/models", method="GET", end=True)
        assert answer.WhichOneof("response") == "request_headers"
        seen.add(destination(answer))
    assert seen == set(HOSTS)
    assert stage.in_flight() == 0


def test_without_endpoints_a_request_without_a_body_is_500_and_one_with_a_body_503() -> None:
    stage = Stage(hosts=())
    code, text, headers = refusal(stage.call().head(end=True))
    assert (code, text) == (500, "inference error: Internal - no pods available in datastore")
    assert headers == {}
    call = stage.call()
    call.head()
    code, text, headers = refusal(call.body(BODY))
    assert code == 503
    assert text.startswith("inference error: ServiceUnavailable - ")
    assert headers == {"x-llm-d-request-dropped-reason": "rejected-no-endpoints"}
    assert call.finished == 0


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"model": "m", "messages": [', "Invalid JSON"),
        (b'{"messages": []}', "model not found in request body"),
        (b'{"model": 7, "messages": []}', "model not found in request body"),
    ],
)
def test_a_body_that_cannot_be_read_is_400(body: bytes, says: str) -> None:
    stage = Stage()
    call = stage.call()
    call.head(x_request_id="a")
    code, text, _ = refusal(call.body(body))
    assert code == 400
    assert text.startswith(f"inference error: BadRequest - {says}")
    assert call.finished == 0
    assert [(o.ending, o.status, o.reason) for o in stage.ended] == [(Ending.REFUSED, 400, "bad_request")]
    assert stage.in_flight() == 0


def test_a_body_larger_than_allowed_is_413_before_it_is_whole() -> None:
    call = Stage(max_body_bytes=1000).call()
    call.head()
    assert call.body(b"x" * 1000, end=False) == []
    code, _, _ = refusal(call.body(b"x", end=False))
    assert code == 413
    assert call.body(b"x") == []


def test_a_model_that_no_endpoint_lists_is_routed() -> None:
    stage = Stage()
    for host in HOSTS:
        stage.pool.learn_models(host, [{"id": "other"}])
    call = stage.call()
    call.head()
    assert destination(call.body(BODY)[0]) in HOSTS


def test_a_model_that_one_endpoint_lists_goes_there() -> None:
    stage = Stage()
    for host in HOSTS:
        stage.pool.learn_models(host, [{"id": "m" if host == HOSTS[2] else "other"}])
    for _ in range(5):
        call = stage.call()
        call.head()
        assert destination(call.body(BODY)[0]) == HOSTS[2]


# -- subsets


def test_only_the_addresses_of_a_subset_hint_are_chosen_and_ports_do_not_matter() -> None:
    stage = Stage()
    stage.page(HOSTS[1], waiting=50.0, kv_usage=0.9)
    stage.now_s += 1
    for subset in ([HOSTS[1]], ["10.0.0.2:1"], [HOSTS[1], "10.9.9.9:80"], [HOSTS[1], 7]):
        call = stage.call()
        call.head(subset=subset)
        assert destination(call.body(BODY)[0]) == HOSTS[1]
    (answer,) = stage.call().head(end=True, subset=[HOSTS[1]])
    assert destination(answer) == HOSTS[1]


@pytest.mark.parametrize("subset", [[], ["10.9.9.9:8000"], [7]])
def test_a_subset_without_a_match_is_503(subset: list[object]) -> None:
    call = Stage().call()
    call.head(subset=subset)
    code, _, headers = refusal(call.body(BODY))
    assert code == 503
    assert headers == {"x-llm-d-request-dropped-reason": "rejected-no-endpoints"}


def test_a_subset_that_is_no_list_or_switched_off_is_none() -> None:
    call = Stage().call()
    call.head(subset="10.9.9.9:8000")
    assert destination(call.body(BODY)[0]) in HOSTS
    call = Stage(subsets=False).call()
    call.head(subset=["10.9.9.9:8000"])
    assert destination(call.body(BODY)[0]) in HOSTS


# -- headers


def test_steering_headers_under_either_name_are_removed_and_a_client_s_destination_is_replaced() -> None:
    given = {
        "x_llm_d_inference_objective": "a",
        "x_gateway_inference_objective": "a",
        "x_llm_d_inference_fairness_id": "a",
        "x_gateway_inference_fairness_id": "a",
        "x_llm_d_slo_ttft_ms": "1000",
        "x_slo_tpot_ms": "100",
        "x_llm_d_video_fps": "1",
        "x_gateway_destination_endpoint_subset": "10.9.9.9:1",
        "x_gateway_destination_endpoint_served": "10.9.9.9:1",
        "x_llm_d_request_dropped_reason": "no",
    }
    call = Stage().call()
    call.head(**given, x_gateway_destination_endpoint="10.9.9.9:1", x_mine="1")
    (answer, *_) = call.body(BODY)
    mutation = answer.request_headers.response.header_mutation
    assert set(mutation.remove_headers) == {name.replace("_", "-") for name in given}
    assert destination(answer) in HOSTS
    (option,) = [h for h in mutation.set_headers if h.header.key == DESTINATION]
    assert option.append_action == option.OVERWRITE_IF_EXISTS_OR_ADD


def test_a_request_id_is_made_where_there_is_none() -> None:
    stage = Stage()
    call = stage.call()
    call.head()
    made = headers_set(call.body(BODY)[0])["x-request-id"]
    assert len(made) == 36
    call = stage.call()
    call.head(x_request_id="mine")
    assert "x-request-id" not in headers_set(call.body(BODY)[0])


@pytest.mark.parametrize(
    "headers",
    [
        {":path": "/v1/chat/completions?a=b"},
        {":path": "", "x-original-path": "/v1/chat/completions"},
        {":path": "", "x-forwarded-path": "/openai/v1/chat/completions"},
        {":path": ""},
    ],
)
def test_how_a_body_is_read_follows_the_path_wherever_it_is_told(headers: dict[str, str]) -> None:
    call = Stage().call()
    call.head(headers[":path"], **{k.replace("-", "_"): v for k, v in headers.items() if k != ":path"})
    code, _, _ = refusal(call.body(b'{"messages": []}'))  # a format that needs a model reads it
    assert code == 400


def test_a_rewrite_header_of_either_name_changes_the_model_that_the_endpoint_sees() -> None:
    for name in ("x_llm_d_model_name_rewrite", "x_gateway_model_name_rewrite"):
        call = Stage().call()
        call.head(**{name: "target"})
        answers = call.body(BODY)
        (piece,) = bodies(answers)
        assert json.loads(piece[0]) == {**json.loads(BODY), "model": "target"}
        assert headers_set(answers[0])["content-length"] == str(len(piece[0]))
        assert name.replace("_", "-") in answers[0].request_headers.response.header_mutation.remove_headers


# -- several endpoints, scores

PICKER = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: queue-scorer
- type: max-score-picker
  parameters: {maxNumOfEndpoints: 2}
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: max-score-picker}
"""


def test_fallbacks_follow_behind_a_comma_in_their_order() -> None:
    stage = Stage(picker_config=PICKER)
    for host, queue in zip(HOSTS, (5.0, 0.0, 9.0), strict=True):
        stage.page(host, waiting=queue)
    stage.now_s += 1
    call = stage.call()
    call.head()
    assert destination(call.body(BODY)[0]) == f"{HOSTS[1]},{HOSTS[0]}"
    assert stage.load(HOSTS[1]).requests == 1


def test_scores_are_told_when_wanted_only() -> None:
    for wanted in (False, True):
        stage = Stage(picker_config=PICKER, emits_scores=wanted)
        for host, queue in zip(HOSTS, (5.0, 0.0, 10.0), strict=True):
            stage.page(host, waiting=queue)
        stage.now_s += 1
        call = stage.call()
        call.head()
        space = call.body(BODY)[0].dynamic_metadata["envoy.lb"]
        if wanted:
            assert dict(space[f"{DESTINATION}-scores"]) == {HOSTS[0]: 1.0, HOSTS[1]: 2.0, HOSTS[2]: 0.0}
        else:
            assert f"{DESTINATION}-scores" not in space


# -- other body modes


def test_buffered_bodies_are_decided_on_in_the_answer_to_the_body() -> None:
    call = Stage().call()
    (seen,) = call.head(modes=(BUFFERED, FULL_DUPLEX))
    assert seen == pb.ProcessingResponse(request_headers=pb.HeadersResponse())
    (answer,) = call.body(BODY)
    assert answer.WhichOneof("response") == "request_body"
    assert destination(answer) in HOSTS
    assert answer.request_body.response.clear_route_cache
    assert not answer.request_body.response.HasField("body_mutation")


def test_a_buffered_body_is_replaced_when_the_model_is() -> None:
    call = Stage().call()
    call.head(modes=(BUFFERED, FULL_DUPLEX), x_llm_d_model_name_rewrite="target")
    (answer,) = call.body(BODY)
    body = answer.request_body.response.body_mutation.body
    assert json.loads(body)["model"] == "target"
    assert headers_set(answer)["content-length"] == str(len(body))


@pytest.mark.parametrize("mode", [STREAMED, NONE])
def test_where_headers_must_be_answered_before_the_body_load_alone_decides(mode: int) -> None:
    stage = Stage()
    for host, queue in zip(HOSTS, (5.0, 0.0, 9.0), strict=True):
        stage.page(host, waiting=queue, running=queue)
    stage.now_s += 1
    call = stage.call()
    (answer,) = call.head(modes=(mode, FULL_DUPLEX))
    assert destination(answer) == HOSTS[1]
    assert stage.load(HOSTS[1]).requests == 1
    if mode == STREAMED:
        (seen,) = call.body(BODY)
        assert seen == pb.ProcessingResponse(request_body=pb.BodyResponse())


def test_a_gateway_that_declares_no_mode_sends_bodies_full_duplex() -> None:
    call = Stage().call()
    assert call.head(modes=None) == []
    assert kinds(call.body(BODY)) == ["request_headers", "request_body"]


# -- the end of the request phase


@pytest.mark.parametrize("mode", [FULL_DUPLEX, BUFFERED, STREAMED, NONE])
def test_where_responses_are_not_seen_the_stream_is_closed_after_the_request(mode: int) -> None:
    stage = Stage(responses=UNSEEN)
    call = stage.call()
    call.head(modes=(mode, FULL_DUPLEX))
    if mode != NONE:
        assert call.finished is None
        call.body(BODY)
    assert call.finished == 0
    assert len(stage.completions) == 1
    assert stage.in_flight() > 0
    get = stage.call()
    get.head(end=True)
    assert get.finished == 0


def test_auto_keeps_the_stream_where_the_response_must_be_changed_or_read() -> None:
    for path, more in (
        (CHAT := "/v1/chat/completions", {"x_llm_d_model_name_rewrite": "t"}),
        ("/v1/responses", {}),
    ):
        call = Stage(responses=AUTO).call()
        call.head(path, **more)
        call.body(BODY if path == CHAT else b'{"model": "m", "input": "Hello"}')
        assert call.finished is None
    plain = Stage(responses=AUTO).call()
    plain.head()
    plain.body(BODY)
    assert plain.finished == 0


def test_a_message_that_is_none_and_a_second_request_end_the_stream() -> None:
    stage = Stage()
    call = stage.call()
    call.process.message(b"\xff\xff\xff")
    assert call.finished == 3
    call = stage.call()
    call.head()
    call.body(BODY)
    call.head()
    assert call.finished == 3
    assert stage.in_flight() == 0


class Faulty:
    def __call__(self, *args: object) -> None:
        raise RuntimeError("a bug")


def test_a_plugin_s_bug_is_a_500_and_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    stage.router._scheduler._dispatch = [type("Bug", (), {"on_dispatch": Faulty()})()]
    call = stage.call()
    call.head()
    code, text, _ = refusal(call.body(BODY))
    assert (code, text) == (500, "inference error: Internal - internal error; see the log")
    assert stage.in_flight() == 0
    assert "could not be decided" in caplog.text


# -- decisions that take a moment


def test_a_decision_that_comes_later_is_answered_then() -> None:
    stage = Stage()
    stage.opening.waiting = []
    call = stage.call()
    call.head()
    call.body(BODY[:9], end=False)
    assert call.body(BODY[9:]) == []
    (decide,) = stage.opening.waiting
    decide()
    answers = call.taken()
    assert destination(answers[0]) in HOSTS
    assert bodies(answers) == [(BODY, True)]


def test_trailers_wait_for_the_decision_as_well() -> None:
    stage = Stage()
    stage.opening.waiting = []
    call = stage.call()
    call.head()
    call.body(BODY, end=False)
    assert call.trailers() == []
    stage.opening.waiting[0]()
    assert kinds(call.taken()) == ["request_headers", "request_body", "request_trailers"]


@pytest.mark.parametrize("body", [BODY, b'{"model": "m"}'])
def test_who_has_left_before_the_decision_gets_no_answer_and_leaves_no_load(body: bytes) -> None:
    stage = Stage()
    stage.opening.waiting = []
    call = stage.call()
    call.head()
    call.body(body)
    call.process.cancelled()
    stage.opening.waiting[0]()
    assert call.taken() == []
    assert stage.in_flight() == 0
    assert [(o.ending, o.reason) for o in stage.ended] == [(Ending.CANCELLED, "client_left")]


def test_a_refusal_that_comes_later_is_said_then() -> None:
    stage = Stage()
    stage.opening.waiting = []
    call = stage.call()
    call.head(subset=[])
    call.body(BODY)
    stage.opening.waiting[0]()
    assert refusal(call.taken())[0] == 503
    assert call.finished == 0
