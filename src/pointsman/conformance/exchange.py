"""One Process stream, over grpc.aio: what Envoy's filter sends for one HTTP request, and what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import msgspec

from pointsman.conformance import wire
from pointsman.conformance.checks import equal, fail
from pointsman.conformance.wire import Headers, Modes, Reply

DESTINATION = "x-gateway-destination-endpoint"
SUBSET = {"envoy.lb.subset_hint": "x-gateway-destination-endpoint-subset"}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the picker made of the request phase: ``replies`` as they came, ``headers`` as forwarded."""

    replies: tuple[Reply, ...]
    headers: Mapping[str, list[bytes]] = {}
    body: bytes = b""

    @property
    def immediate(self) -> Reply | None:
        return next((reply for reply in self.replies if reply.kind == "immediate_response"), None)

    def header(self, name: str) -> str:
        """The forwarded header; "" without one, and ``Failed`` when there are several."""
        values = self.headers.get(name, [])
        if len(values) > 1:
            fail(f"{name} is forwarded {len(values)} times: {b', '.join(values)!r}")
        return values[0].decode("latin-1") if values else ""

    @property
    def destination(self) -> str:
        """``ip:port`` as the header says; ``Failed`` for a request that was refused or left without one."""
        refused = self.immediate
        if refused is not None:
            fail(f"refused with {refused.status}: {(refused.body or b'')[:100]!r}")
        return self.header(DESTINATION) or fail(f"no {DESTINATION} header")

    def routed(self) -> None:
        """``Failed`` unless the request goes somewhere."""
        if not self.destination:
            fail("not routed")

    def refusal(self, status: int) -> Reply:
        """The immediate answer, which must have this status."""
        refused = self.immediate
        if refused is None:
            fail(f"not refused, but sent to {self.header(DESTINATION) or 'nowhere'}")
        equal("the immediate answer's status", refused.status, status)
        return refused


class Exchange:
    """A stream. Each ``Failed`` it raises is the picker's fault."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        modes: Modes | None,
        hint: Mapping[str, object] | None,
        patience_s: float,
    ) -> None:
        self._call = channel.stream_stream(wire.PROCESS)()
        self._patience_s = patience_s
        self._modes = modes
        self._hint = hint
        self._first = True
        self._replies: asyncio.Queue[Reply | None] = asyncio.Queue()
        """None ends it."""
        self._reading = asyncio.create_task(self._read())
        self._wrong: ValueError | None = None

    async def _read(self) -> None:
        # A read that is cancelled cancels the call, so time-outs wait for the queue instead.
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._replies.put_nowait(wire.read(message))
        except ValueError as exc:
            self._wrong = exc
        except grpc.aio.AioRpcError:
            pass  # ``ended`` tells
        finally:
            self._replies.put_nowait(None)

    async def leave(self) -> None:
        """Reset the stream, as Envoy does when a client goes away."""
        self._call.cancel()
        await asyncio.wait([self._reading])

    # -- sending

    async def send(self, message: bytes) -> None:
        if self._first:
            self._first = False
            message = wire.first(message, self._modes, self._hint)
        await self.raw(message)

    async def raw(self, message: bytes) -> None:
        """Send these bytes as they are."""
        try:
            async with asyncio.timeout(self._patience_s):
                await self._call.write(message)
        except TimeoutError:
            fail("the picker does not read what is sent")
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            code, details = await self.ended()
            fail(f"the stream has ended with {code} {details}".rstrip())

    async def half_close(self) -> None:
        """Say that nothing more comes, as Envoy does when it is done with the picker."""
        await self._call.done_writing()

    # -- receiving

    async def receive(self) -> Reply:
        """The next answer."""
        try:
            async with asyncio.timeout(self._patience_s):
                reply = await self._replies.get()
        except TimeoutError:
            fail(f"no answer within {self._patience_s:g} s")
        if reply is not None:
            return reply
        self._replies.put_nowait(None)
        code, details = await self.ended()
        fail(f"the stream ended with {code} {details} instead of an answer")

    async def expect(self, kind: str) -> Reply:
        """The next answer, which must be of this kind."""
        reply = await self.receive()
        equal("the next answer", reply.kind, kind)
        return reply

    def come(self) -> list[str]:
        """Kinds of the answers that have come and were not received yet."""
        found = []
        while not self._replies.empty():
            reply = self._replies.get_nowait()
            found.append("the end of the stream" if reply is None else reply.kind)
        return found

    async def ended(self) -> tuple[str, str]:
        """Status and message with which the picker ends the stream."""
        if self._wrong is not None:
            fail(f"an answer is {self._wrong}")
        try:
            async with asyncio.timeout(self._patience_s):
                await asyncio.wait([self._reading])
        except TimeoutError:
            fail(f"the picker does not end the stream within {self._patience_s:g} s")
        code = await self._call.code()
        return code.name, await self._call.details() or ""

    # -- phases

    async def request(
        self, headers: Headers, chunks: Sequence[bytes], trailers: Headers | None = None
    ) -> Answer:
        """Send a whole request and collect the answers. Without chunks it has no body."""
        await self.send(wire.headers("request", headers, end=not chunks))
        for i, chunk in enumerate(chunks):
            end = trailers is None and i == len(chunks) - 1
            await self.send(wire.body("request", chunk, end))
        if trailers is not None:
            await self.send(wire.trailers("request", trailers))
        last = "request_headers" if not chunks else "request_body" if trailers is None else "request_trailers"
        return await self.answer(headers, last)

    async def answer(self, headers: Headers, last: str = "request_body") -> Answer:
        """The answers of the request phase up to its end: the last one of kind ``last``."""
        replies = [await self.receive()]
        while not _ends(replies[-1], last):
            replies.append(await self.receive())
        forwarded = next((r for r in replies if r.kind == "request_headers"), None)
        return Answer(
            replies=tuple(replies),
            headers=wire.applied(headers, forwarded) if forwarded else {},
            body=b"".join(r.body or b"" for r in replies if r.kind == "request_body"),
        )

    async def response_headers(self, headers: Headers, served: str = "", end: bool = False) -> Reply:
        """Send them, with the endpoint that was served if any, and receive the answer."""
        metadata = {"envoy.lb": {f"{DESTINATION}-served": served}} if served else None
        await self.send(wire.headers("response", headers, end, metadata))
        return await self.expect("response_headers")

    async def response_body(self, *chunks: bytes) -> bytes:
        """Send a whole body, the last chunk with the end mark, and receive all of it."""
        for i, chunk in enumerate(chunks):
            await self.send(wire.body("response", chunk, end=i == len(chunks) - 1))
        return b"".join([reply.body or b"" for reply in await self.whole_body()])

    async def whole_body(self) -> list[Reply]:
        """Body answers of the response up to the one with the end mark."""
        replies = [await self.expect("response_body")]
        while not replies[-1].end:
            replies.append(await self.expect("response_body"))
        return replies


def _ends(reply: Reply, last: str) -> bool:
    if reply.kind == "immediate_response":
        return True
    return reply.kind == last and (reply.end or last != "request_body")


@asynccontextmanager
async def exchange(
    channel: grpc.aio.Channel,
    modes: Modes | None,
    hint: Mapping[str, object] | None,
    patience_s: float,
) -> AsyncIterator[Exchange]:
    """A stream that is reset at the end if it is still open."""
    found = Exchange(channel, modes, hint, patience_s)
    try:
        yield found
    finally:
        await found.leave()
