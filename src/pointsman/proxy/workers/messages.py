"""What a worker and the scheduler tell each other: each message is all that one turn of the event loop
brought.

Lists of one kind are handled in the order of the fields, whatever their order in time was: load is given
back before the next decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import msgspec
from msgspec import field
from msgspec.structs import astuple

from pointsman import errors
from pointsman.config import Settings
from pointsman.endpoints.target import Target
from pointsman.errors import PointsmanError
from pointsman.types import InferenceRequest, Outcome, Prompt

MAX_HEADS = 1000
"""So many headers the scheduler remembers for each worker at least."""


class Part(Prompt, array_like=True, frozen=True, gc=False):
    """A prompt on its way: as far as the scheduler wants it, and the hashes of its blocks."""

    data: bytes


class Asked(InferenceRequest, array_like=True, frozen=True, kw_only=True):
    """A request on its way, to be decided on."""

    prompts: tuple[Part, ...] = ()
    number: int = 0
    """Its worker's."""
    head: int = 0
    """Number of its headers, see ``Up.heads``; it comes without."""
    eligible: frozenset[str] | None = None
    """Names of the endpoints that may get it; None: any."""


assert Asked.__struct_fields__ == (*InferenceRequest.__struct_fields__, "number", "head", "eligible")
_BODY, _PROMPTS, _HEADERS = map(Asked.__struct_fields__.index, ("body", "prompts", "headers"))


def asking(
    request: InferenceRequest,
    number: int,
    head: int,
    parts: Sequence[tuple[bytes, int, bytes, int]],
    eligible: frozenset[str] | None,
    *,
    body: bool,
) -> Asked:
    """What is written as an ``Asked`` is: its fields alone will do, and cost a tenth. ``parts`` are those of
    a ``Part`` each; ``body``: it goes along.
    """
    fields = list(astuple(request))
    fields[_PROMPTS], fields[_HEADERS] = parts, NO_HEADERS
    if not body:
        fields[_BODY] = b""
    fields += (number, head, eligible)
    return cast(Asked, fields)


NO_HEADERS: dict[str, str] = {}


class Told(Outcome, frozen=True, array_like=True):
    """An ``Outcome`` on its way."""


def on_its_way(outcome: Outcome) -> Told:
    """What is written as a ``Told`` is."""
    return cast(Told, astuple(outcome))


class Up(msgspec.Struct, array_like=True, gc=False):
    """From a worker."""

    ends: int = 0
    """Which of the told block ends its hashes are of."""
    listening: bool = False
    """The worker serves."""
    failed: str = ""
    """It cannot: why."""
    connections: int = 0
    """That it has, of those that were passed on to it."""
    settled: int = 0
    """So many questions of the scheduler whether all has been told: now it has."""
    refreshes: int = 0
    """So often it wants the endpoints asked for their models."""
    heads: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Headers by number, which only grows: many requests have the same."""
    health: list[tuple[str, str]] = field(default_factory=list)
    """What was seen of an endpoint: what the pool is to be told, and its name."""
    progress: list[tuple[int, float, int, bool]] = field(default_factory=list)
    """Of requests: when their first output came, or 0.0, how many bytes did, and whether they have left their
    endpoint.
    """
    moved: list[tuple[int, str]] = field(default_factory=list)
    """They were sent to these endpoints instead of ours."""
    made: list[tuple[int, str]] = field(default_factory=list)
    """States that the endpoints of requests hold now."""
    closed: list[tuple[int, Told]] = field(default_factory=list)
    """Decided ones that are over."""
    handed: list[tuple[int, str, float]] = field(default_factory=list)
    """Of these the worker sees no more: their names elsewhere, and when they came."""
    lines: list[list[Any]] = field(default_factory=list)
    """Lines of gateways' access logs."""
    refused: list[tuple[str, str, str, Told]] = field(default_factory=list)
    """Ids, paths and models of requests that were refused, or left, before they were decided on."""
    again: list[int] = field(default_factory=list)
    """They failed, and are to go elsewhere."""
    asked: list[Asked] = field(default_factory=list)


class Placed(msgspec.Struct, array_like=True, frozen=True):
    """An endpoint, as far as a worker must know it."""

    slot: int
    target: Target
    models: frozenset[str] | None
    models_detail: tuple[dict[str, Any], ...]
    draining: bool
    usable: bool


class State(msgspec.Struct, array_like=True, frozen=True):
    """What workers must know besides decisions; sent when it changes."""

    ready: bool
    endpoints: tuple[Placed, ...]
    ends: int
    block_ends: tuple[int, ...]
    bodies: bool
    """Bodies are wanted: token ids are made of them."""
    prompts: bool
    """First prompts are wanted whole: a trace compares them."""


class Decided(msgspec.Struct, array_like=True, gc=False):
    """Where a request goes, at first or after a failure."""

    number: int
    endpoint: str
    at_s: float
    guess: bool = False
    response_headers: tuple[tuple[str, str], ...] = ()
    fallbacks: tuple[str, ...] = ()
    scores: dict[str, float] | None = None
    """In all, by endpoint, where the settings want them told."""
    request_headers: tuple[tuple[str, str], ...] = ()


class Unserved(msgspec.Struct, array_like=True, gc=False):
    """What the client is to be told instead of a decision."""

    number: int
    reason: str
    message: str
    param: str | None

    def error(self) -> PointsmanError:
        """As it was raised."""
        cls = _ERRORS.get(self.reason, PointsmanError)
        error = cls.__new__(cls)
        PointsmanError.__init__(error, self.message, param=self.param)
        return error


_ERRORS: dict[str, type[PointsmanError]] = {
    found.reason: found
    for found in vars(errors).values()
    if isinstance(found, type) and issubclass(found, PointsmanError)
}


class Down(msgspec.Struct, array_like=True, gc=False):
    """To a worker."""

    state: State | None = None
    troubled: list[int] = field(default_factory=list)
    """As in the pool; always told."""
    settle: int = 0
    """So often the scheduler waits for all to be told that is over."""
    refreshed: int = 0
    drain: bool = False
    unserved: list[Unserved] = field(default_factory=list)
    nowhere: list[int] = field(default_factory=list)
    """No other endpoint is left for these."""
    decided: list[Decided] = field(default_factory=list)


class Hello(msgspec.Struct, array_like=True):
    """The first thing a worker is told."""

    settings: Settings
    parsers: frozenset[str] | None


encode = msgspec.msgpack.Encoder().encode
read_up = msgspec.msgpack.Decoder(Up).decode
read_down = msgspec.msgpack.Decoder(Down).decode
read_hello = msgspec.msgpack.Decoder(Hello).decode
