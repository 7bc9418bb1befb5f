"""The gRPC health service (grpc.health.v1), so that gateways and probes can ask.

Its two messages have one field each and are written and read here: ``string service = 1`` and
``ServingStatus status = 1``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pointsman.extproc.grpc import INVALID_ARGUMENT, NOT_FOUND, RpcError, Service, Stream, unary

_SERVING = b"\x08\x01"
_NOT_SERVING = b"\x08\x02"
_SERVICE_UNKNOWN = b"\x08\x03"


class Health:
    """Who serves, by service name; a server as a whole is the name ""."""

    def __init__(self, names: Iterable[str] = ("",), *, serving: bool = False) -> None:
        self._serving = dict.fromkeys(names, serving)
        self._watches: set[_Watch] = set()

    def set(self, name: str, serving: bool) -> None:
        """Say from now on, and to those that watch, that ``name`` serves or does not."""
        if self._serving.get(name) is not serving:
            self._serving[name] = serving
            for watch in list(self._watches):
                if watch.name == name:
                    watch.tell(self._status(name))

    def services(self) -> Mapping[str, Service]:
        """What to give the server."""
        return {
            "/grpc.health.v1.Health/Check": unary(self._check),
            "/grpc.health.v1.Health/Watch": lambda stream, headers: _Watch(self, stream),
        }

    def _status(self, name: str) -> bytes:
        serving = self._serving.get(name)
        if serving is None:
            return _SERVICE_UNKNOWN
        return _SERVING if serving else _NOT_SERVING

    def _check(self, request: bytes) -> bytes:
        name = _service_of(request)
        if name not in self._serving:
            raise RpcError(NOT_FOUND, f"unknown service {name!r}")
        return self._status(name)

    def begin(self, watch: _Watch) -> None:
        self._watches.add(watch)
        watch.tell(self._status(watch.name or ""))

    def end(self, watch: _Watch) -> None:
        self._watches.discard(watch)


class _Watch:
    """One who is told of each change until he leaves."""

    __slots__ = ("_health", "_stream", "_waits", "name")

    def __init__(self, health: Health, stream: Stream) -> None:
        self._health = health
        self._stream = stream
        self._waits: bytes | None = None
        self.name: str | None = None

    def tell(self, status: bytes) -> None:
        if self._stream.paused:
            self._waits = status  # only the last one counts
        else:
            self._stream.send(status)

    def message(self, data: bytes) -> None:
        if self.name is not None:
            raise RpcError(INVALID_ARGUMENT, "one request is expected")
        self.name = _service_of(data)
        self._health.begin(self)

    def half_closed(self) -> None:
        """The request is complete; the answers go on."""
        if self.name is None:
            raise RpcError(INVALID_ARGUMENT, "a request is expected")

    def cancelled(self) -> None:
        self._health.end(self)

    def resumed(self) -> None:
        if self._waits is not None:
            status, self._waits = self._waits, None
            self.tell(status)


def _service_of(request: bytes) -> str:
    """Field 1 of a ``HealthCheckRequest``: a name of at most 127 bytes, as all of ours are."""
    if not request:
        return ""
    if len(request) < 2 or request[0] != 0x0A or request[1] != len(request) - 2:
        raise RpcError(INVALID_ARGUMENT, "not a HealthCheckRequest of a short service name")
    try:
        return request[2:].decode()
    except UnicodeDecodeError as exc:
        raise RpcError(INVALID_ARGUMENT, "the service name is not UTF-8") from exc
