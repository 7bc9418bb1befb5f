"""What is read from Envoy's access log entries."""

from __future__ import annotations

import logging
from typing import Any

import pytest

pytest.importorskip("envoy.service.accesslog.v3.als_pb2")

from envoy.data.accesslog.v3.accesslog_pb2 import HTTPAccessLogEntry
from envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsMessage

from pointsman.extproc.access_log import ALS, FAULTS, AccessLogIntake, Completion, completion


class FakeStream:
    paused = False

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.finished: int | None = None

    def send(self, message: bytes) -> None:
        self.sent.append(message)

    def finish(self, status: int = 0, message: str = "") -> None:
        self.finished = status


def entry(request_id: str = "r", host: str = "10.0.0.1", flags: tuple[str, ...] = ()) -> Any:
    made = HTTPAccessLogEntry()
    common = made.common_properties
    common.upstream_remote_address.socket_address.address = host
    common.upstream_remote_address.socket_address.port_value = 8000 if host else 0
    common.duration.FromMilliseconds(1500)
    common.time_to_first_upstream_rx_byte.FromMilliseconds(250)
    common.upstream_request_attempt_count = 2
    for flag in flags:
        setattr(common.response_flags, flag, True)
    made.request.request_id = request_id
    made.request.request_body_bytes = 11
    made.response.response_body_bytes = 22
    made.response.response_code.value = 200
    return made


def test_an_entry_says_how_a_request_ended() -> None:
    made = entry()
    space = made.common_properties.metadata.filter_metadata["envoy.filters.http.ext_authz"]
    space["x-pointsman-flight"] = "2a"
    assert completion(made) == Completion(
        request_id="r",
        flight="2a",
        status=200,
        upstream="10.0.0.1:8000",
        tries=2,
        first_byte_s=0.25,
        duration_s=1.5,
        request_bytes=11,
        response_bytes=22,
    )


def test_a_bare_entry_is_read_as_one_that_reached_nobody() -> None:
    assert completion(HTTPAccessLogEntry()) == Completion(request_id="")


def test_the_flight_may_be_named_in_ext_proc_s_metadata() -> None:
    made = entry()
    made.common_properties.metadata.filter_metadata["envoy.lb"]["x-pointsman-flight"] = "7"
    assert completion(made).flight == "7"


@pytest.mark.parametrize("flag", FAULTS)
def test_an_endpoint_s_fault_is_told(flag: str) -> None:
    assert completion(entry(flags=(flag,))).fault == flag


def test_who_left_is_told_apart_from_who_failed() -> None:
    for flag in ("downstream_connection_termination", "downstream_remote_reset"):
        found = completion(entry(flags=(flag,)))
        assert (found.client_left, found.fault) == (True, "")
    assert completion(entry(host="fd00::1")).upstream == "[fd00::1]:8000"


def test_every_entry_is_handed_on_whatever_one_of_them_does(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def completed(told: Completion) -> None:
        seen.append(told.request_id)
        if told.request_id == "bad":
            raise ValueError("a bug")

    stream = FakeStream()
    call = AccessLogIntake(completed).services[ALS](stream, {})
    message = StreamAccessLogsMessage()
    early = entry("early")
    early.common_properties.intermediate_log_entry = True
    message.http_logs.log_entry.extend([entry("a"), entry("bad"), early, entry("b")])
    with caplog.at_level(logging.ERROR):
        call.message(message.SerializeToString())
    assert seen == ["a", "bad", "b"]
    assert "a bug" in caplog.text
    assert stream.finished is None
    call.half_closed()
    assert stream.finished == 0
    broken = FakeStream()
    AccessLogIntake(completed).services[ALS](broken, {}).message(b"\xff")
    assert broken.finished == 3


def test_a_drain_ends_every_stream_that_is_left() -> None:
    intake = AccessLogIntake(lambda told: None)
    streams = [FakeStream() for _ in range(3)]
    calls = [intake.services[ALS](stream, {}) for stream in streams]
    calls[0].cancelled()
    calls[1].half_closed()
    intake.drain()
    assert [s.finished for s in streams] == [None, 0, 0]
    assert [len(s.sent) for s in streams] == [0, 1, 1]
