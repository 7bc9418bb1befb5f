"""What session-affinity-filter and -scorer share: whose session a request is, and where it lives."""

from __future__ import annotations

import base64
import binascii
import logging
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from xxhash import xxh64_intdigest

from pointsman.errors import SettingsError
from pointsman.registry import Plugin
from pointsman.scheduling.cycle import Cycle, Services
from pointsman.types import Decision, Endpoint, InferenceRequest

log = logging.getLogger(__name__)

MAX_SESSIONS = 100_000
"""Bindings kept; the longest unused go first. About 20 MB."""
SESSION_ID = "SessionID"
"""The request attribute that session-id-producer publishes."""
DEFAULT_NAMESPACE = "default/"


def cookie(request: InferenceRequest, name: str) -> str:
    """Value of a cookie of the request, "" when it has none of that name."""
    for part in request.headers.get("cookie", "").split(";"):
        key, _, value = part.strip().partition("=")
        if key == name:
            return value
    return ""


class Source(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """Where a session id is read from: a request header, a cookie, or an attribute a producer publishes."""

    header: str = ""
    cookie: str = ""
    attribute: str = ""

    def __post_init__(self) -> None:
        if bool(self.header) + bool(self.cookie) + bool(self.attribute) != 1:
            raise ValueError("sources: each sets exactly one of header, cookie and attribute")

    def read(self, request: InferenceRequest, services: Services) -> str:
        if self.header:
            return request.headers.get(self.header.lower(), "")
        if self.cookie:
            return cookie(request, self.cookie)
        return services.attributes[self.attribute](request)


def session_id(sources: Sequence[Source], cycle: Cycle) -> str:
    """The first session id that any of ``sources`` finds, else ""."""
    for source in sources:
        found = source.read(cycle.request, cycle.services)
        if found:
            return found
    return ""


def check_attributes(sources: Sequence[Source], services: Services) -> None:
    """Make sure that every attribute read has a producer; the session id's is there without being asked
    for.
    """
    for source in sources:
        if source.attribute == SESSION_ID:
            services.attributes.setdefault(
                SESSION_ID, lambda request: request.headers.get("x-session-id", "")
            )
        elif source.attribute and source.attribute not in services.attributes:
            raise SettingsError(
                f"session affinity: no configured plugin publishes the attribute {source.attribute!r}"
            )


class Bindings:
    """Session to endpoint name; a binding ends ``ttl_s`` after its last use. Ids are kept as hashes: clients
    choose their length."""

    def __init__(self, ttl_s: float, sweep_s: float) -> None:
        self._ttl_s = ttl_s
        self._sweep_s = sweep_s
        self._sweep_at = 0.0
        self._bound: OrderedDict[int, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._bound)

    def get(self, session: str, now: float) -> str:
        """Where the session lives, "" when nowhere."""
        endpoint, used_s = self._bound.get(xxh64_intdigest(session.encode()), ("", 0.0))
        return endpoint if endpoint and now - used_s <= self._ttl_s else ""

    def bind(self, session: str, endpoint: str, now: float) -> None:
        """The session lives at ``endpoint`` and has just been used."""
        key = xxh64_intdigest(session.encode())
        self._bound[key] = (endpoint, now)
        self._bound.move_to_end(key)
        if len(self._bound) > MAX_SESSIONS:
            self._bound.popitem(last=False)
        if now >= self._sweep_at:
            self._sweep_at = now + self._sweep_s
            while now - next(iter(self._bound.values()))[1] > self._ttl_s:
                self._bound.popitem(last=False)


class EncodedEndpointHeaderConfig(msgspec.Struct, forbid_unknown_fields=True):
    header: str = "x-session-token"


class SessionIdConfig(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    sources: tuple[Source, ...] = (Source(header="x-session-id"),)
    eviction_ttl_seconds: Annotated[float, Meta(gt=0)] = 300.0
    eviction_sweep_seconds: Annotated[float, Meta(gt=0)] = 10.0


def token(endpoint: Endpoint) -> str:
    """llm-d's session token: base64 of namespace/name; a name without a namespace is in ``default``."""
    name = endpoint.name if "/" in endpoint.name else DEFAULT_NAMESPACE + endpoint.name
    return base64.b64encode(name.encode()).decode()


def token_names(text: str) -> Collection[str]:
    """Names of ours that a session token may mean; none when it is not a token."""
    try:
        name = base64.b64decode(text, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ()
    return (name, name.removeprefix(DEFAULT_NAMESPACE)) if name else ()


class SessionAffinity(Plugin):
    """Parameters of both plugins, and the endpoint a request's session is bound to.

    ``encoded_endpoint_header``: the client carries the endpoint, in a header that each response sets.
    ``session_id``: the client names its session and we remember where it went last.
    """

    strategy: Literal["encoded_endpoint_header", "session_id"] = "encoded_endpoint_header"
    profile_name: str = ""
    encoded_endpoint_header_config: EncodedEndpointHeaderConfig | None = None
    session_id_config: SessionIdConfig | None = None

    def __post_init__(self) -> None:
        by_id = self.strategy == "session_id"
        unused = "encodedEndpointHeaderConfig" if by_id else "sessionIdConfig"
        if (self.encoded_endpoint_header_config if by_id else self.session_id_config) is not None:
            log.warning("session affinity: %s has no effect with strategy %s", unused, self.strategy)
        self._header = (self.encoded_endpoint_header_config or EncodedEndpointHeaderConfig()).header.lower()
        config = self.session_id_config or SessionIdConfig()
        self._sources = config.sources if by_id else ()
        self._bindings = Bindings(config.eviction_ttl_seconds, config.eviction_sweep_seconds)

    def prepare(self, services: Services) -> None:
        check_attributes(self._sources, services)

    def bound(self, cycle: Cycle) -> Collection[str]:
        """Names the bound endpoint may go by; none when the request has no session or it is new."""
        if not self._sources:
            text = cycle.request.headers.get(self._header)
            return token_names(text) if text else ()
        session = session_id(self._sources, cycle)
        name = self._bindings.get(session, cycle.services.clock()) if session else ""
        return (name,) if name else ()

    def on_dispatch(self, cycle: Cycle, decision: Decision) -> None:
        if self.profile_name and decision.profile != self.profile_name:
            return
        if not self._sources:
            header = (self._header, token(decision.chosen))
            if header not in decision.response_headers:
                decision.response_headers += (header,)
            return
        session = session_id(self._sources, cycle)
        if session:
            self._bindings.bind(session, decision.chosen.name, cycle.services.clock())
