"""What a peer can make the server keep: windows that stay shut, answers that nobody reads, messages in
part.
"""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

from pointsman.extproc.grpc import GrpcServer, Stream
from pointsman.extproc.h2_frames import ACK, DATA, END_STREAM, HEADERS, PING, PREFACE, RST_STREAM, Code
from pointsman.extproc.h2_limits import Limits
from pointsman.testing.http2 import (
    ECHO,
    Calls,
    Echo,
    Peer,
    data,
    frame,
    headers,
    message,
    settings,
    window,
)

MIB = 1 << 20


class Source(Echo):
    """Sends pieces of 64 KB while the peer takes them, up to ``pieces``."""

    pieces = 1000

    def __init__(self, stream: Stream, fields: Mapping[str, str]) -> None:
        super().__init__(stream, fields)
        self.sent = 0
        self.resumed()

    def resumed(self) -> None:
        while not self.stream.paused and self.sent < self.pieces:
            self.stream.send(bytes(65_536))
            self.sent += 1
        if self.sent == self.pieces:
            self.stream.finish()


class Greedy(Echo):
    """Sends a megabyte for each message, whatever ``paused`` says."""

    def message(self, data: bytes) -> None:
        self.stream.send(bytes(MIB))


@asynccontextmanager
async def serving(
    calls: Calls, limits: Limits | None = None, **more: int
) -> AsyncIterator[tuple[GrpcServer, int]]:
    server = GrpcServer({ECHO: calls}, limits, **more)
    try:
        yield server, await server.start()
    finally:
        server.close()


@contextmanager
def at_most(limit_bytes: int) -> Iterator[None]:
    """Fails when more memory than this is taken at any time, as Python counts it."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit_bytes, f"{peak} bytes at the peak"


async def answered(peer: Peer) -> None:
    """The server has handled everything that was sent to it."""
    peer.send(frame(PING, 0, 0, b"done yet"))
    await peer.until(PING)


async def test_a_window_that_never_opens_pauses_its_call() -> None:
    calls = Calls(Source)
    async with serving(calls) as (_, port), Peer(port, opening=PREFACE + settings(initial_window=0)) as peer:
        peer.send(headers(1))
        await answered(peer)
        assert calls[0].sent == 1
        assert calls[0].stream.paused


async def test_a_call_goes_on_when_the_window_opens() -> None:
    calls = Calls(Source)
    calls.kind.pieces = 20
    async with serving(calls) as (_, port), Peer(port, opening=PREFACE + settings(initial_window=0)) as peer:
        peer.send(headers(1))
        await answered(peer)
        peer.send(window(1, 1 << 30), window(0, 1 << 30))
        assert len(await peer.body(1, 20 * (65_536 + 5))) == 20 * (65_536 + 5)
        await peer.until(HEADERS, 1, END_STREAM)


async def test_a_window_of_a_few_bytes_is_used_to_the_byte() -> None:
    calls = Calls()
    async with serving(calls) as (_, port), Peer(port, opening=PREFACE + settings(initial_window=7)) as peer:
        sent = message(b"0123456789") + message(b"")
        peer.send(headers(1), data(1, sent, END_STREAM))
        found = (await peer.until(DATA)).payload
        assert found == sent[:7]
        peer.send(window(1, 1))
        found += (await peer.until(DATA)).payload
        assert found == sent[:8]
        peer.send(settings(initial_window=2))  # takes five back: the window is below zero
        await answered(peer)
        peer.send(window(1, 5))
        await answered(peer)
        peer.send(window(1, 1000))
        found += await peer.body(1, len(sent) - 8)
        assert found == sent
        await peer.until(HEADERS, 1, END_STREAM)


async def test_a_connections_window_is_shared_by_its_streams() -> None:
    """One long answer must not keep the others waiting for all of it."""
    calls = Calls()
    big, small = message(bytes(4 * MIB)), message(bytes(1000))
    async with (
        serving(calls) as (_, port),
        Peer(port, opening=PREFACE + settings(initial_window=1 << 30)) as peer,
    ):
        peer.send(headers(1))
        for i in range(0, len(big), 16_384):
            peer.send(data(1, big[i : i + 16_384]))
        await answered(peer)  # the connection's window of 64 KB is used up
        peer.send(headers(3), data(3, small))
        peer.send(window(0, 1 << 18))
        seen: list[int] = []
        while 3 not in seen:
            seen.append((await peer.until(DATA)).stream)
        assert len(seen) < 16


async def test_what_waits_for_closed_windows_is_bounded() -> None:
    calls = Calls(Greedy)
    limits = Limits(unsent_bytes=8 * MIB)
    async with (
        serving(calls, limits) as (_, port),
        Peer(port, opening=PREFACE + settings(initial_window=0)) as peer,
    ):
        with at_most(12 * MIB):
            for i in range(1, 101, 2):
                peer.send(headers(i), data(i, message(b"more")))
            assert await peer.reset(99) is Code.ENHANCE_YOUR_CALM
            await answered(peer)
        told = [call.told for call in calls]
        assert told == [[]] * 7 + [["cancelled"]] * 43
        peer.send(frame(RST_STREAM, 0, 1, bytes(4)), headers(101), data(101, message(b"more")))
        await answered(peer)
        assert calls[-1].told == []  # there is room again


async def test_a_peer_that_does_not_read_is_not_read_from() -> None:
    """Each PING wants an answer: those of a peer that takes none must not pile up."""
    flood = frame(PING, 0, 0, bytes(8)) * 4000
    async with (
        serving(Calls(), Limits(idle_frames_per_s=10**9)) as (server, port),
        Peer(port) as peer,
    ):
        await answered(peer)
        peer.reads(False)
        connection = next(iter(server.connections))
        floods = 0
        async with asyncio.timeout(30):
            while connection.transport.is_reading():
                peer.send(flood)
                floods += 1
                await asyncio.sleep(0)
        assert connection.out._bytes + connection.transport.get_write_buffer_size() < 2 * MIB
        peer.reads(True)
        assert await peer.take(len(flood) * floods) == frame(PING, ACK, 0, bytes(8)) * 4000 * floods
        assert connection.transport.is_reading()


async def test_messages_that_arrive_only_in_part_are_bounded() -> None:
    calls = Calls()
    async with serving(calls, max_partial_bytes=4 * MIB) as (server, port), Peer(port) as peer:
        begun = message(bytes(MIB))[:-1]
        with at_most(12 * MIB):
            for i in range(1, 41, 2):
                parts = (data(i, begun[j : j + 16_384]) for j in range(0, len(begun), 16_384))
                peer.send(headers(i), *parts)
                await peer.flush()
                await answered(peer)
        assert [call.told for call in calls] == [[]] * 3 + [["cancelled"]] * 17
        peer.send(*(frame(RST_STREAM, 0, i, bytes(4)) for i in (1, 3, 5)))
        await answered(peer)
        assert server.partial_bytes == 0


async def test_messages_in_pieces_of_one_byte_count_what_they_cost() -> None:
    calls = Calls()
    async with serving(calls, max_partial_bytes=MIB) as (_, port), Peer(port) as peer:
        with at_most(8 * MIB):
            peer.send(headers(1), data(1, message(bytes(MIB))[:5]))
            for _ in range(100):
                peer.send(data(1, b"x") * 200)
                await peer.flush()
            await answered(peer)
        assert calls[0].told == ["cancelled"]


async def test_many_streams_cost_little_each() -> None:
    calls = Calls()
    async with serving(calls) as (server, port), Peer(port) as peer:
        with at_most(30 * MIB):
            for i in range(1, 10_001, 2):
                peer.send(headers(i))
                if i % 1000 == 999:
                    await peer.flush()
            await answered(peer)
        assert len(next(iter(server.connections)).streams) == len(calls) == 5000
