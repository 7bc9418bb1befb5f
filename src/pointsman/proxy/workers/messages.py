"""What a worker and the scheduler tell each other: each message is all that one turn of the event loop
brought.

Lists of one kind are handled in the order of the fields, whatever their order in time was: load is given
back before the next decision.
"""

from __future__ import annotations

from typing import Any, cast

import msgspec
from msgspec import field
from msgspec.structs import astuple

from pointsman import errors
from pointsman.config import Settings
from pointsman.endpoints.target import Target
from pointsman.errors import PointsmanError
from pointsman.types import InferenceRequest, Outcome, Prompt, Tokenized

MAX_HEADS = 1000
"""So many headers the scheduler remembers for each worker at least."""


class Part(msgspec.Struct, array_like=True, gc=False):
    """A prompt: its beginning, and the hashes of its blocks."""

    data: bytes
    tokens: int
    digests: bytes
    size_bytes: int

    def prompt(self, known: bool) -> Prompt:
        """``known``: the hashes are of the blocks that the index has now."""
        return Prompt(self.data, self.tokens, self.digests if known else b"", self.size_bytes)


class Asked(msgspec.Struct, array_like=True, gc=False):
    """A request to be decided on: all that the scheduler may read of it. ``number`` is its worker's."""

    number: int
    id: str
    path: str
    format: str
    model: str
    stream: bool
    root: bytes
    prompts: list[Part]
    prompt_tokens: int
    max_tokens: int | None
    head: int
    """Number of its headers, see ``Up.heads``."""
    n: int = 1
    priority: int = 0
    cache_salt: str = ""
    state_id: str = ""
    media: tuple[tuple[str, int], ...] = ()
    tokenized: tuple[Tokenized, ...] = ()
    body: bytes = b""
    """Where the scheduler has asked for bodies."""
    eligible: frozenset[str] | None = None
    """Names of the endpoints that may get it; None: any."""

    def request(self, headers: dict[str, str], known: bool) -> InferenceRequest:
        """As the scheduler sees it; ``known`` as in ``Part.prompt``."""
        return InferenceRequest(
            id=self.id,
            path=self.path,
            format=self.format,
            body=self.body,
            model=self.model,
            stream=self.stream,
            prompts=tuple([part.prompt(known) for part in self.prompts]),
            root=self.root,
            tokenized=self.tokenized,
            cache_salt=self.cache_salt,
            prompt_tokens=self.prompt_tokens,
            max_tokens=self.max_tokens,
            n=self.n,
            media=self.media,
            state_id=self.state_id,
            headers=headers,
            priority=self.priority,
        )


class Told(Outcome, frozen=True, array_like=True):
    """An ``Outcome`` on its way."""


def on_its_way(outcome: Outcome) -> Told:
    """What is written as ``outcome`` is as ``Told``: its fields alone will do, and cost a tenth."""
    return cast(Told, astuple(outcome))


class Closed(msgspec.Struct, array_like=True, gc=False):
    """A decided request is over."""

    number: int
    outcome: Told


class Refused(msgspec.Struct, array_like=True, gc=False):
    """A request that was refused, or left, before it was decided on."""

    id: str
    path: str
    model: str
    outcome: Told


class Up(msgspec.Struct, array_like=True, gc=False):
    """From a worker."""

    ends: int = 0
    """Which of the told block ends its hashes are of."""
    listening: int = 0
    """The worker serves, on this port."""
    failed: str = ""
    """It cannot: why."""
    settled: int = 0
    """So many questions of the scheduler whether all has been told: now it has."""
    refreshes: int = 0
    """So often it wants the endpoints asked for their models."""
    heads: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Headers by number, which only grows: many requests have the same."""
    health: list[tuple[str, str]] = field(default_factory=list)
    """What was seen of an endpoint: what the pool is to be told, and its name."""
    first: list[tuple[int, float]] = field(default_factory=list)
    """First outputs and when they came."""
    received: list[tuple[int, int]] = field(default_factory=list)
    """Response bytes."""
    released: list[int] = field(default_factory=list)
    made: list[tuple[int, str]] = field(default_factory=list)
    """States that the endpoints of requests hold now."""
    closed: list[Closed] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    again: list[int] = field(default_factory=list)
    """They failed, and are to go elsewhere."""
    asked: list[Asked] = field(default_factory=list)


class Placed(msgspec.Struct, array_like=True, frozen=True):
    """An endpoint, as far as a worker must know it."""

    slot: int
    target: Target
    models: frozenset[str] | None
    models_detail: tuple[dict[str, Any], ...]


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
