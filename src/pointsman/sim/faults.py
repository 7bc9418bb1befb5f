"""What can be made to go wrong at a simulated engine, on command and always the same way."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pointsman.errors import SettingsError

Kind = Literal[
    "crash",
    "restart",
    "refuse",
    "freeze",
    "slow",
    "status",
    "hang",
    "stall",
    "close",
    "reset",
    "garbage",
    "lose-events",
    "late-events",
    "stop-events",
    "renumber-events",
]
ENGINE_KINDS = frozenset(("crash", "restart", "refuse", "freeze", "slow"))
"""These concern the whole engine."""
EVENT_KINDS = frozenset(("lose-events", "late-events", "stop-events", "renumber-events"))
"""These concern the messages of its KV events; all others the requests they are dealt out to."""


class Fault(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, eq=False):
    """One fault. Seconds are wall-clock seconds: a router's time-outs run on that clock too.

    crash: the port closes, every connection is reset, cache and requests are lost; back after ``for_s``, or
    with ``restart``. restart: the same, back at once. refuse: no new connections. freeze: steps stop, all
    else still answers. slow: steps take ``factor`` times as long. status: answer ``status``. hang: take the
    request and say nothing. stall: say nothing more. close: end the connection in the middle of a chunk.
    reset: end it with a TCP reset. garbage: bytes that are no HTTP.

    lose-events: messages of KV events are numbered and not sent; they can be had again. late-events: they
    come ``delay_s`` later. stop-events: what happens to the cache is not told, and takes no number.
    renumber-events: numbers begin at 0 again, and nothing before can be had again.

    stall, close, reset and garbage happen after ``after_chunks`` chunks of a stream (of a plain answer:
    inside its body); left out, before the first byte of the answer.
    """

    kind: Kind
    after_chunks: Annotated[int, Meta(ge=0)] | None = None
    status: Annotated[int, Meta(ge=400, le=599)] = 503
    retry_after: int | None = None
    factor: Annotated[float, Meta(gt=0)] = 2.0
    delay_s: Annotated[float, Meta(ge=0)] = 0.0
    count: Annotated[int, Meta(ge=1)] | None = None
    """Requests, or messages, it hits before it is over; none: all."""
    every: Annotated[int, Meta(ge=1)] = 1
    """Hit only each so-manieth of them."""
    for_s: Annotated[float, Meta(gt=0)] | None = None
    """Over after so long."""
    paths: tuple[str, ...] = ("/v1/",)
    """Hit requests to paths that begin so. ``/v1/models`` is hit only when named."""
    seen: int = 0
    """Requests, or messages, that it looked at so far."""
    hit: int = 0

    def hits(self) -> bool:
        """Whether the next one is hit."""
        self.seen += 1
        if self.seen % self.every or (self.count is not None and self.hit >= self.count):
            return False
        self.hit += 1
        return True


def parse(fields: object) -> Fault:
    """A fault from its JSON form; ``SettingsError`` naming what is wrong with it."""
    try:
        return msgspec.convert(fields, Fault)
    except msgspec.ValidationError as exc:
        raise SettingsError(f"fault: {exc}") from exc


class Faults:
    """The faults that are active at one engine."""

    def __init__(self) -> None:
        self.active: list[Fault] = []

    def for_request(self, path: str) -> Fault | None:
        """The fault that hits a request to ``path``, if one does."""
        for fault in self.active:
            if fault.kind in ENGINE_KINDS | EVENT_KINDS or not _meant(fault, path):
                continue
            if fault.hits():
                return fault
        return None

    def loses_events(self) -> bool:
        """Whether the next message of KV events is lost."""
        hits = [fault.hits() for fault in self.active if fault.kind == "lose-events"]  # each counts
        return any(hits)

    def events_delay_s(self) -> float:
        """How much later messages of KV events come."""
        return sum(fault.delay_s for fault in self.active if fault.kind == "late-events")

    def events_stopped(self) -> bool:
        """Whether KV events are kept back for good."""
        return any(fault.kind == "stop-events" for fault in self.active)


def _meant(fault: Fault, path: str) -> bool:
    if path == "/v1/models":
        return path in fault.paths
    return path.startswith(fault.paths)
