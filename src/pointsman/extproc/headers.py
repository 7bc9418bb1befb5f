"""The headers and metadata keys of the endpoint picker protocol (llm-d's names)."""

from __future__ import annotations

from collections.abc import Mapping

from pointsman.proxy.head import STEERING

DESTINATION = "x-gateway-destination-endpoint"
SUBSET = "x-gateway-destination-endpoint-subset"
SERVED = "x-gateway-destination-endpoint-served"
DROPPED = "x-llm-d-request-dropped-reason"
FLIGHT = "x-pointsman-flight"
"""Metadata key of our own name for a request, which Envoy's access log gives back."""
SEEN = ("x-went-into-resp-headers", "true")
"""Set on every response that has come through the picker."""

DEFAULT_PATH = "/v1/completions"
_PATHS = ("x-original-path", "x-forwarded-path")
_STRIPPED = tuple(sorted(name for name in map(bytes.decode, STEERING) if name != DESTINATION))
"""Never forwarded; the destination is overwritten by ours."""
_STEERING = frozenset(_STRIPPED)


def path_of(headers: Mapping[str, str]) -> str:
    """The path that tells how a body is to be read, without its query."""
    path = headers.get(":path") or next(filter(None, map(headers.get, _PATHS)), DEFAULT_PATH)
    return path.partition("?")[0]


def stripped(headers: Mapping[str, str]) -> tuple[str, ...]:
    """Those of the request's headers that the endpoint must not see."""
    if _STEERING.isdisjoint(headers):
        return ()
    return tuple(name for name in _STRIPPED if name in headers)


def host_of(address: str) -> str:
    """``ip`` of ``ip:port``, which is all that counts in a subset."""
    return address.rpartition(":")[0] or address
