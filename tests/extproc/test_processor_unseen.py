"""Requests whose responses pass the picker by: in flight until log, engine or time say otherwise."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pointsman.endpoints.unseen import asked
from pointsman.extproc.access_log import Completion
from pointsman.extproc.completions import ARRIVAL_S, LOG_DELAY_S, NO_LOG
from pointsman.extproc.headers import FLIGHT
from pointsman.extproc.processor import UNSEEN
from pointsman.testing.picking import HOSTS, Stage, destination
from pointsman.types import Ending, Metrics

BODY = json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}).encode()


def sent(stage: Stage, request_id: str = "r") -> tuple[str, str]:
    """A request on its way: our name for it, and where it went."""
    call = stage.call()
    call.head(x_request_id=request_id)
    answer = call.body(BODY)[0]
    assert call.finished == 0
    return str(answer.dynamic_metadata["envoy.lb"][FLIGHT]), destination(answer)


def line(**told: Any) -> Completion:
    return Completion(**{"request_id": "r", "status": 200, "duration_s": 1.5, **told})


def one(hosts: int = 1, **more: Any) -> Stage:
    return Stage(HOSTS[:hosts], responses=UNSEEN, **more)


def logless(hosts: int = 1, **more: Any) -> Stage:
    """One that has found out that there is no log."""
    stage = one(hosts, **more)
    for _ in range(NO_LOG):
        sent(stage)
    stage.now_s += ARRIVAL_S
    for host in HOSTS[:hosts]:
        stage.page(host)
    stage.completions.sweep()
    assert stage.in_flight() > 0  # it could still come
    stage.now_s += LOG_DELAY_S
    stage.completions.sweep()
    assert stage.in_flight() == 0
    stage.ended.clear()
    return stage


def test_a_line_of_the_log_ends_the_request_it_names() -> None:
    stage = one()
    first, host = sent(stage)
    second, _ = sent(stage)
    assert first != second
    stage.completions.completed(line(flight=second, upstream=host, response_bytes=100))
    assert stage.load(host).requests == 1
    assert [(o.ending, o.status, o.duration_s, o.endpoint) for o in stage.ended] == [
        (Ending.OK, 200, 1.5, host)
    ]
    stage.completions.completed(line(flight=second, upstream=host))
    assert len(stage.ended) == 1
    stage.completions.completed(line(flight=first, upstream=host))
    assert stage.in_flight() == 0
    assert len(stage.ended) == 2


def test_without_our_name_the_oldest_request_with_that_id_is_meant() -> None:
    stage = one(hosts=3)
    names = [sent(stage, "same")[0] for _ in range(3)]
    stage.completions.completed(line(request_id="same"))
    assert len(stage.completions) == 2
    stage.completions.completed(line(request_id="same", flight=names[0]))  # it is over
    assert len(stage.completions) == 2
    stage.completions.completed(line(request_id="other", flight=names[1]))  # of a picker before this one
    stage.completions.completed(line(request_id="never heard of"))
    assert len(stage.completions) == 2


@pytest.mark.parametrize(
    ("told", "ending", "reason"),
    [
        ({"status": 503, "fault": "upstream_remote_reset"}, Ending.FAILED, "upstream_remote_reset"),
        ({"status": 0, "client_left": True}, Ending.CANCELLED, "client_left"),
        ({"status": 429}, Ending.ERROR, "status_429"),
    ],
)
def test_what_the_log_says_went_wrong_is_how_it_ended(
    told: dict[str, Any], ending: Ending, reason: str
) -> None:
    stage = one()
    name, host = sent(stage)
    stage.completions.completed(line(flight=name, upstream=host, **told))
    assert [(o.ending, o.reason) for o in stage.ended] == [(ending, reason)]
    assert stage.in_flight() == 0


def test_faults_in_the_log_open_the_breaker_and_answers_close_it() -> None:
    stage = one()
    for _ in range(3):
        name, host = sent(stage)
        stage.completions.completed(
            line(flight=name, upstream=host, status=503, fault="upstream_remote_reset")
        )
    member = stage.pool.members[HOSTS[0]]
    assert not member.breaker.passes
    stage.now_s += 60
    name, host = sent(stage)
    stage.completions.completed(line(flight=name, upstream=host))
    assert member.breaker.passes


def test_the_endpoint_that_answered_is_the_one_that_counts() -> None:
    stage = one(hosts=2)
    name, host = sent(stage)
    other = next(h for h in HOSTS[:2] if h != host)
    stage.completions.completed(line(flight=name, upstream=other, tries=2))
    assert [o.endpoint for o in stage.ended] == [other]
    assert stage.in_flight() == 0


# -- without a log


def test_an_engine_that_has_fewer_than_we_count_is_believed() -> None:
    stage = logless()
    for _ in range(5):
        sent(stage)
        stage.now_s += 0.1
    stage.now_s += ARRIVAL_S
    stage.page(HOSTS[0], running=2.0, waiting=1.0)
    stage.completions.sweep()
    assert stage.load(HOSTS[0]).requests == 3
    assert [(o.ending, o.status, o.reason) for o in stage.ended] == [(Ending.OK, 0, "unseen")] * 2
    stage.page(HOSTS[0], running=30.0)
    stage.completions.sweep()
    assert stage.load(HOSTS[0]).requests == 3
    stage.page(HOSTS[0])
    stage.completions.sweep()
    assert stage.in_flight() == 0


def test_a_request_that_may_not_be_there_yet_is_not_missed() -> None:
    stage = logless()
    sent(stage)
    stage.now_s += ARRIVAL_S / 2
    stage.page(HOSTS[0])
    stage.completions.sweep()
    assert stage.load(HOSTS[0]).requests == 1
    stage.now_s += 60  # the page is as old as before
    stage.completions.sweep()
    assert stage.load(HOSTS[0]).requests == 1


def test_an_engine_without_a_page_is_bounded_by_time() -> None:
    stage = one(timeout_s=600.0)
    sent(stage)
    stage.now_s += 599
    stage.completions.sweep()
    assert stage.load(HOSTS[0]).requests == 1
    stage.now_s += 2
    stage.completions.sweep()
    assert stage.in_flight() == 0
    assert [o.reason for o in stage.ended] == ["unseen_timeout"]


def test_an_engine_that_starts_anew_or_is_gone_has_nothing_of_ours() -> None:
    stage = one(hosts=2)
    stage.page(HOSTS[0])
    by_host = {}
    for _ in range(8):
        by_host[sent(stage)[1]] = True
    assert len(by_host) == 2
    stage.pool.unreachable(HOSTS[0])
    assert {o.ending for o in stage.ended} == {Ending.FAILED}
    assert stage.load(HOSTS[0]).requests == 0
    left = stage.load(HOSTS[1])
    assert left.requests > 0
    stage.pool.remove(HOSTS[1])
    for _ in range(2):  # the log may still have something to say
        stage.now_s += LOG_DELAY_S
        stage.completions.sweep()
    assert left.requests == 0
    assert len(stage.completions) == 0


# -- with a log that loses lines


def test_while_a_log_comes_the_engine_is_believed_only_after_the_log_has_had_its_time() -> None:
    stage = one()
    name, host = sent(stage)
    stage.completions.completed(line(flight=name, upstream=host))
    lost, _ = sent(stage, "lost")
    stage.now_s += 1
    stage.page(HOSTS[0])
    stage.completions.sweep()
    assert stage.load(HOSTS[0]).requests == 1
    later, _ = sent(stage, "later")
    stage.now_s += LOG_DELAY_S
    stage.page(HOSTS[0], running=1.0)
    stage.completions.sweep()
    assert stage.load(HOSTS[0]).requests == 1  # the lost one is over; what came after the page is not
    assert [o.reason for o in stage.ended] == ["", "unseen"]
    assert stage.completions.completed(line(request_id="lost", flight=lost)) is None
    assert stage.load(HOSTS[0]).requests == 1
    stage.completions.completed(line(request_id="later", flight=later, upstream=host))
    assert stage.in_flight() == 0


def test_requests_whose_lines_are_late_are_not_taken_for_lost_however_many_they_are() -> None:
    stage = one()
    under_way: list[tuple[float, str]] = []
    long_one, host = sent(stage, "long")
    for step in range(200):
        stage.now_s += 0.1
        under_way.append((stage.now_s, sent(stage, f"r{step}")[0]))
        stage.page(HOSTS[0], running=1.0)  # the long one; the others are over in no time
        while under_way and stage.now_s - under_way[0][0] >= 1.0:  # and in the log a second later
            _, name = under_way.pop(0)
            index = len(stage.ended)
            stage.completions.completed(line(request_id=f"r{index}", flight=name, upstream=host))
        stage.completions.sweep()
    assert {o.reason for o in stage.ended} == {""}
    stage.completions.completed(line(request_id="long", flight=long_one, upstream=host))
    assert stage.load(HOSTS[0]).requests == len(under_way)


def test_a_line_brings_the_log_back() -> None:
    stage = logless()
    name, host = sent(stage)
    stage.completions.completed(line(flight=name, upstream=host))
    sent(stage)
    stage.now_s += 1
    stage.page(HOSTS[0])
    stage.completions.sweep()
    assert stage.load(HOSTS[0]).requests == 1


def test_when_the_picker_stops_nothing_is_left_open() -> None:
    stage = one()
    for _ in range(3):
        sent(stage)
    stage.completions.close()
    assert stage.in_flight() == 0
    assert len(stage.ended) == 3


def test_after_a_restart_the_engine_s_counters_tell_of_what_the_picker_before_sent() -> None:
    stage = one(hosts=2)
    stage.page(HOSTS[0])
    member = stage.pool.members[HOSTS[0]]
    metrics = Metrics(at_s=stage.now_s, running=7.0, waiting=2.0)
    stage.pool.learn_metrics(HOSTS[0], "vllm", metrics, False, asked(member.endpoint.load))
    assert stage.load(HOSTS[0]).others == 9.0


def test_a_probe_of_a_half_open_endpoint_is_not_waited_for_where_nobody_tells() -> None:
    stage = logless()
    stage.pool.unreachable(HOSTS[0])
    stage.page(HOSTS[0])  # it is back
    stage.now_s += 60
    assert sent(stage)[1] == HOSTS[0]
    assert stage.pool.members[HOSTS[0]].breaker.passes


@pytest.mark.parametrize("why", ["responses pass us by", "the stream is cut by a gateway of no modes"])
def test_a_probe_that_nobody_tells_of_is_waited_for_a_moment_only(why: str) -> None:
    stage = one() if why == "responses pass us by" else Stage(HOSTS[:1])
    stage.pool.unreachable(HOSTS[0])
    stage.page(HOSTS[0])  # it is back
    stage.now_s += 60
    breaker = stage.pool.members[HOSTS[0]].breaker
    assert breaker.passes
    call = stage.call()
    call.head(modes=None)
    call.body(BODY)
    call.process.cancelled()
    assert not breaker.passes
    stage.now_s += LOG_DELAY_S - 0.1
    stage.completions.sweep()
    assert not breaker.passes
    stage.now_s += 0.1
    stage.completions.sweep()
    assert breaker.passes
    assert len(stage.completions) == 1  # it may still be there


def test_a_request_that_nobody_tells_of_keeps_its_size_but_not_its_body() -> None:
    stage = one()
    call = stage.call()
    call.head()
    call.body(BODY)
    ((_, unseen),) = stage.completions._flying.items()
    assert unseen.flight.request.body == b""
    stage.completions.close()
    assert [outcome.request_bytes for outcome in stage.ended] == [len(BODY)]


def test_a_large_request_ends_in_the_same_few_bytes_as_the_stream() -> None:
    """Else an endpoint may answer in between, and what the gateway then sends us of it is lost."""
    stage = one()
    call = stage.call()
    call.head()
    body = json.dumps({"model": "m", "prompt": "x" * 5000}).encode()
    answers = [answer.request_body.response.body_mutation.streamed_response for answer in call.body(body)[1:]]
    assert b"".join(answer.body for answer in answers) == body
    assert [(len(answer.body), answer.end_of_stream) for answer in answers] == [(len(body), False), (0, True)]
    assert call.finished == 0
