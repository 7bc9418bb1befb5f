"""The picker under test, as a case meets it: its streams, and the endpoints it chooses from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import grpc.aio
import msgspec

from pointsman.conformance.checks import Skipped, fail
from pointsman.conformance.engine import MODELS, Engine, Load
from pointsman.conformance.exchange import SUBSET, Answer, Exchange, exchange
from pointsman.conformance.wire import Headers, Modes

FULL_DUPLEX = Modes()
PATIENCE_S = 5.0
"""An answer that takes longer does not come. No picker needs a tenth of it."""
PATH = "/v1/completions"
_numbers = itertools.count(1)


class Place(msgspec.Struct, frozen=True):
    """Where a picker listens."""

    address: str
    """``host:port`` of ext_proc."""
    tls: bool = False
    health_address: str = ""
    """Empty where it is not known."""
    metrics_url: str = ""


class Subject:
    """A picker that runs on one group's configuration."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        engines: Mapping[str, Engine],
        folder: Path,
        place: Place,
        health: grpc.aio.Channel | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.channel = channel
        self.engines = engines
        self.folder = folder
        """Of the configuration, see ``groups``."""
        self.patience_s = patience_s
        self._health = health
        self.place = place

    # -- endpoints

    async def show(self, **loads: Load) -> None:
        """Let the endpoints of these names have these loads, the others none, and wait until the picker has
        read it.
        """
        changed = []
        for name, engine in self.engines.items():
            load = loads.get(name, Load())
            if load != engine.load:
                await engine.show(load)
                changed.append(engine)
        for engine in changed:
            if not await engine.seen():
                fail(f"the picker does not read the metrics page of {engine.address}")

    def address(self, name: str) -> str:
        return self.engines[name].address

    def name(self, address: str) -> str:
        """Name of the endpoint there; ``Failed`` when there is none."""
        names = [name for name, engine in self.engines.items() if engine.address == address]
        return names[0] if names else fail(f"{address!r} is no endpoint of the pool")

    def chosen(self, answer: Answer) -> str:
        """Name of the endpoint the request goes to."""
        return self.name(answer.destination)

    # -- streams

    def exchange(
        self, modes: Modes | None = FULL_DUPLEX, subset: object = None
    ) -> AbstractAsyncContextManager[Exchange]:
        """A stream; ``subset`` is what the gateway hints at, None for nothing."""
        [(namespace, key)] = SUBSET.items()
        hint = None if subset is None else {namespace: {key: subset}}
        return exchange(self.channel, modes, hint, self.patience_s)

    async def ask(
        self,
        body: bytes | None = None,
        *,
        headers: Headers | None = None,
        extra: Sequence[tuple[str, str]] = (),
        subset: object = None,
        **fields: object,
    ) -> Answer:
        """The request phase of a stream of its own: ``body``, or one with these JSON fields."""
        data = completion(**fields) if body is None else body
        pairs = post(data, extra=extra) if headers is None else headers
        async with self.exchange(subset=subset) as stream:
            return await stream.request(pairs, [data])

    # -- its other ports

    @property
    def health(self) -> grpc.aio.Channel:
        if self._health is None:
            raise Skipped("where its health service listens is not known: --health-address HOST:PORT")
        return self._health

    @property
    def metrics_url(self) -> str:
        if not self.place.metrics_url:
            raise Skipped("where its metrics are is not known: --metrics-url URL")
        return self.place.metrics_url


def completion(**fields: object) -> bytes:
    """A completion request of the base model."""
    return json.dumps(
        {"model": MODELS[0], "prompt": "To be, or not to be", "max_tokens": 16} | fields
    ).encode()


def post(
    body: bytes,
    path: str = PATH,
    extra: Sequence[tuple[str, str]] = (),
    content_type: str = "application/json",
) -> list[tuple[str, bytes]]:
    """Headers of a request as Envoy passes them on."""
    pairs = [
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "models.test"),
        (":path", path),
        ("content-type", content_type),
        ("content-length", str(len(body))),
        ("user-agent", "conformance"),
        ("x-request-id", f"conformance-{next(_numbers)}"),
        *extra,
    ]
    return [(name, value.encode()) for name, value in pairs]


def get(path: str = "/v1/models", extra: Sequence[tuple[str, str]] = ()) -> list[tuple[str, bytes]]:
    pairs = [(":method", "GET"), (":scheme", "http"), (":authority", "models.test"), (":path", path), *extra]
    return [(name, value.encode()) for name, value in pairs]


OK: Headers = ((":status", b"200"), ("content-type", b"application/json"))
SSE: Headers = ((":status", b"200"), ("content-type", b"text/event-stream"))
"""Headers of responses."""
