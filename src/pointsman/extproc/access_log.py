"""Envoy's access log service (ALS): how each request ended, told by Envoy, about 50 ms later and without a
promise that nothing is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import msgspec
from envoy.data.accesslog.v3.accesslog_pb2 import HTTPAccessLogEntry
from envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsMessage, StreamAccessLogsResponse
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError

from pointsman.extproc.envoy_clusters import LB_METADATA
from pointsman.extproc.grpc import Service, Stream
from pointsman.extproc.grpc_status import http_status
from pointsman.extproc.headers import FLIGHT

log = logging.getLogger(__name__)

ALS = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"
INVALID_ARGUMENT = 3

FLIGHT_KEYS = (("envoy.filters.http.ext_authz", FLIGHT), (LB_METADATA, FLIGHT))
"""Where in a request's metadata the picker's own name for it may be."""

FAULTS = (
    "upstream_connection_failure",
    "upstream_connection_termination",
    "upstream_remote_reset",
    "upstream_request_timeout",
    "upstream_protocol_error",
    "stream_idle_timeout",
)
LEFT = ("downstream_connection_termination", "downstream_remote_reset")


class Completion(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What Envoy says of a request that is over. Times are seconds from its arrival at Envoy."""

    request_id: str
    flight: str = ""
    """The picker's own name for it; empty where it gave none."""
    status: int = 0
    """0: the client had left before any. Of a gRPC answer, what its trailers say, where they are logged."""
    upstream: str = ""
    """``address:port`` of the endpoint that answered, or was tried last; empty without any."""
    tries: int = 0
    fault: str = ""
    """Envoy's word for what the endpoint did wrong; empty when it did nothing."""
    client_left: bool = False
    first_byte_s: float | None = None
    """First byte of the endpoint's response, its head included."""
    duration_s: float = 0.0
    request_bytes: int = 0
    response_bytes: int = 0


class AccessLogIntake:
    """Hands each entry of every Envoy that logs here to ``completed``."""

    def __init__(self, completed: Callable[[Completion], None]) -> None:
        self._completed = completed
        self._logs: set[_Log] = set()

    @property
    def services(self) -> Mapping[str, Service]:
        """By path, for a ``GrpcServer``."""
        return {ALS: lambda stream, headers: _Log(self._completed, self._logs, stream)}

    def drain(self) -> None:
        """End the streams, which would never end by themselves."""
        for log_stream in list(self._logs):
            log_stream.half_closed()


class _Log:
    """One Envoy worker's stream of entries (``grpc.Call``)."""

    def __init__(self, completed: Callable[[Completion], None], logs: set[_Log], stream: Stream) -> None:
        self._completed = completed
        self._logs = logs
        self._stream = stream
        logs.add(self)

    def message(self, data: bytes) -> None:
        message = StreamAccessLogsMessage()
        try:
            message.ParseFromString(data)
        except DecodeError:
            self._logs.discard(self)
            self._stream.finish(INVALID_ARGUMENT, "not a StreamAccessLogsMessage")
            return
        for entry in message.http_logs.log_entry:
            if entry.common_properties.intermediate_log_entry:
                continue
            try:
                self._completed(completion(entry))
            except Exception:  # one entry must not cost the others of its batch
                log.exception("an entry of Envoy's access log could not be told")

    def half_closed(self) -> None:
        self._logs.discard(self)
        self._stream.send(StreamAccessLogsResponse().SerializeToString())
        self._stream.finish()

    def cancelled(self) -> None:
        """Envoy is away; what it had not sent is lost, and time-outs will tell."""
        self._logs.discard(self)

    def resumed(self) -> None:
        """Nothing is ever sent."""


def completion(entry: HTTPAccessLogEntry) -> Completion:
    """What the entry says."""
    common, request, response = entry.common_properties, entry.request, entry.response
    flags = common.response_flags
    upstream = common.upstream_remote_address.socket_address
    host = f"[{upstream.address}]" if ":" in upstream.address else upstream.address
    has_first = common.HasField("time_to_first_upstream_rx_byte")
    return Completion(
        request_id=request.request_id,
        flight=_flight(common.metadata.filter_metadata) if common.HasField("metadata") else "",
        status=http_status(
            http_status(response.response_code.value, response.response_headers), response.response_trailers
        ),
        upstream=f"{host}:{upstream.port_value}" if host else "",
        tries=common.upstream_request_attempt_count,
        fault=next((name for name in FAULTS if getattr(flags, name)), ""),
        client_left=any(getattr(flags, name) for name in LEFT),
        first_byte_s=_seconds(common.time_to_first_upstream_rx_byte) if has_first else None,
        duration_s=_seconds(common.duration),
        request_bytes=request.request_body_bytes,
        response_bytes=response.response_body_bytes,
    )


def _flight(metadata: Mapping[str, Mapping[str, object]]) -> str:
    for space, key in FLIGHT_KEYS:
        if space in metadata and key in metadata[space]:
            return str(metadata[space][key])
    return ""


def _seconds(duration: Duration) -> float:
    return float(duration.seconds) + float(duration.nanos) / 1e9
