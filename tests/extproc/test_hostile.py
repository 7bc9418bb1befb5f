"""Peers that break the rules of HTTP/2: each is refused with the right code, and nobody else notices.

Frames are written out by hand and sent through a socket. Section numbers are those of RFC 9113.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pointsman.extproc.grpc import GrpcServer
from pointsman.extproc.h2_frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITISED,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Code,
)
from pointsman.extproc.h2_limits import Limits
from pointsman.extproc.hpack import encode
from pointsman.testing.http2 import (
    Calls,
    Echo,
    Peer,
    data,
    frame,
    headers,
    message,
    pieces,
    request,
    resized,
    settings,
    window,
)

LIMITS = Limits(streams=50, resets_per_s=100, idle_frames_per_s=100)
BLOCK = encode(request())
OPEN = headers(1)
ENDED = headers(1, flags=END_STREAM)


@pytest.fixture
async def calls() -> Calls:
    return Calls()


@pytest.fixture
async def port(calls: Calls) -> AsyncIterator[int]:
    """Of a server that has another client, who must not notice anything."""
    server = GrpcServer({"/test.Echo/Echo": calls, "/test.Echo/Bystander": Calls()}, LIMITS)
    port = await server.start()
    async with Peer(port) as bystander:
        bystander.send(headers(1, request("/test.Echo/Bystander")), data(1, message(b"before")))
        assert await bystander.body(1, 11) == message(b"before")
        yield port
        bystander.send(data(1, message(b"after"), END_STREAM))
        assert await bystander.body(1, 10) == message(b"after")
        await bystander.until(HEADERS, 1, END_STREAM)
    server.close()


CONNECTION_ERRORS = {
    "DATA on stream 0 (6.1)": (data(0, b"x"), Code.PROTOCOL_ERROR),
    "DATA on an idle stream (5.1)": (data(1, b"x"), Code.PROTOCOL_ERROR),
    "DATA on a stream of ours (5.1.1)": (data(2, b"x"), Code.PROTOCOL_ERROR),
    "DATA with more padding than frame (6.1)": (
        OPEN + frame(DATA, PADDED, 1, b"\x05abcd"),
        Code.PROTOCOL_ERROR,
    ),
    "DATA padded by nothing (6.1)": (OPEN + frame(DATA, PADDED, 1), Code.FRAME_SIZE_ERROR),
    "HEADERS on stream 0 (6.2)": (headers(0), Code.PROTOCOL_ERROR),
    "HEADERS on an even stream (5.1.1)": (headers(2), Code.PROTOCOL_ERROR),
    "HEADERS on a lower stream (5.1.1)": (headers(5) + headers(3), Code.PROTOCOL_ERROR),
    "HEADERS on a stream that the peer has reset (5.1)": (
        OPEN + frame(RST_STREAM, 0, 1, bytes(4)) + OPEN,
        Code.STREAM_CLOSED,
    ),
    "HEADERS with more padding than frame (6.2)": (
        frame(HEADERS, PADDED | END_HEADERS, 1, b"\xff" + BLOCK),
        Code.PROTOCOL_ERROR,
    ),
    "HEADERS shorter than their priority (6.2)": (
        frame(HEADERS, PRIORITISED | END_HEADERS, 1, b"\0\0\0"),
        Code.FRAME_SIZE_ERROR,
    ),
    "HEADERS that depend on themselves (RFC 7540, 5.3.1)": (
        frame(HEADERS, PRIORITISED | END_HEADERS, 1, b"\0\0\0\x01\0" + BLOCK),
        Code.PROTOCOL_ERROR,
    ),
    "PRIORITY on stream 0 (6.3)": (frame(PRIORITY, 0, 0, bytes(5)), Code.PROTOCOL_ERROR),
    "RST_STREAM on stream 0 (6.4)": (frame(RST_STREAM, 0, 0, bytes(4)), Code.PROTOCOL_ERROR),
    "RST_STREAM on an idle stream (6.4)": (frame(RST_STREAM, 0, 1, bytes(4)), Code.PROTOCOL_ERROR),
    "RST_STREAM of 3 bytes (6.4)": (OPEN + frame(RST_STREAM, 0, 1, bytes(3)), Code.FRAME_SIZE_ERROR),
    "SETTINGS on a stream (6.5)": (frame(SETTINGS, 0, 1), Code.PROTOCOL_ERROR),
    "SETTINGS of 5 bytes (6.5)": (frame(SETTINGS, 0, 0, bytes(5)), Code.FRAME_SIZE_ERROR),
    "SETTINGS acknowledged with content (6.5)": (frame(SETTINGS, ACK, 0, bytes(6)), Code.FRAME_SIZE_ERROR),
    "ENABLE_PUSH of 2 (6.5.2)": (settings(push=2), Code.PROTOCOL_ERROR),
    "INITIAL_WINDOW_SIZE of 2^31 (6.5.2)": (settings(initial_window=1 << 31), Code.FLOW_CONTROL_ERROR),
    "MAX_FRAME_SIZE of 16383 (6.5.2)": (settings(max_frame=16_383), Code.PROTOCOL_ERROR),
    "MAX_FRAME_SIZE of 2^24 (6.5.2)": (settings(max_frame=1 << 24), Code.PROTOCOL_ERROR),
    "INITIAL_WINDOW_SIZE that overflows a window (6.9.2)": (
        OPEN + window(1, (1 << 31) - 1 - 65_535) + settings(initial_window=65_536),
        Code.FLOW_CONTROL_ERROR,
    ),
    "PUSH_PROMISE (8.4)": (OPEN + frame(PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\2"), Code.PROTOCOL_ERROR),
    "PING on a stream (6.7)": (frame(PING, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "PING of 7 bytes (6.7)": (frame(PING, 0, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
    "GOAWAY on a stream (6.8)": (frame(GOAWAY, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "GOAWAY of 7 bytes (6.8)": (frame(GOAWAY, 0, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE of 0 (6.9)": (window(0, 0), Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE of 3 bytes (6.9)": (frame(WINDOW_UPDATE, 0, 0, bytes(3)), Code.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE on an idle stream (5.1)": (window(1, 1), Code.PROTOCOL_ERROR),
    "a window over 2^31-1 (6.9.1)": (window(0, (1 << 31) - 1), Code.FLOW_CONTROL_ERROR),
    "CONTINUATION of nothing (6.10)": (OPEN + frame(CONTINUATION, END_HEADERS, 1), Code.PROTOCOL_ERROR),
    "CONTINUATION on another stream (6.10)": (
        frame(HEADERS, 0, 1, BLOCK) + frame(CONTINUATION, END_HEADERS, 3),
        Code.PROTOCOL_ERROR,
    ),
    "another frame inside a block (6.10)": (
        frame(HEADERS, 0, 1, BLOCK) + frame(PING, 0, 0, bytes(8)),
        Code.PROTOCOL_ERROR,
    ),
    "an unknown frame inside a block (5.5)": (
        frame(HEADERS, 0, 1, BLOCK) + frame(77, 0, 1),
        Code.PROTOCOL_ERROR,
    ),
    "a frame over 16384 bytes (4.2)": (OPEN + data(1, bytes(16_385)), Code.FRAME_SIZE_ERROR),
    "the length of a frame that never comes (4.2)": (b"\xff\xff\xff\0\0\0\0\0\1", Code.FRAME_SIZE_ERROR),
    "field 0 (RFC 7541, 6.1)": (frame(HEADERS, END_HEADERS, 1, b"\x80"), Code.COMPRESSION_ERROR),
    "a field that there is not (RFC 7541, 2.3.3)": (
        frame(HEADERS, END_HEADERS, 1, b"\xbe"),
        Code.COMPRESSION_ERROR,
    ),
    "a block that ends within a field": (
        frame(HEADERS, END_HEADERS, 1, BLOCK[:-1]),
        Code.COMPRESSION_ERROR,
    ),
    "a block that ends within an integer": (
        frame(HEADERS, END_HEADERS, 1, b"\x00\x7f\xff"),
        Code.COMPRESSION_ERROR,
    ),
    "an integer without end (RFC 7541, 5.1)": (
        frame(HEADERS, END_HEADERS, 1, b"\x00\x7f" + b"\xff" * 100),
        Code.COMPRESSION_ERROR,
    ),
    "a table over 4096 bytes (RFC 7541, 4.2)": (
        frame(HEADERS, END_HEADERS, 1, b"\x3f\xe2\x1f" + BLOCK),
        Code.COMPRESSION_ERROR,
    ),
    "a table size after a field (RFC 7541, 4.2)": (
        frame(HEADERS, END_HEADERS, 1, BLOCK + b"\x20"),
        Code.COMPRESSION_ERROR,
    ),
    "a table that does not shrink when it must (RFC 7541, 4.2)": (
        frame(SETTINGS, ACK, 0) + frame(HEADERS, END_HEADERS, 1, BLOCK),
        Code.COMPRESSION_ERROR,
    ),
    "a string that is not of the Huffman code (RFC 7541, 5.2)": (
        frame(HEADERS, END_HEADERS, 1, b"\x00\x84\xff\xff\xff\xff\x01x"),
        Code.COMPRESSION_ERROR,
    ),
    "trailers that cannot be decoded": (
        OPEN + frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x80"),
        Code.COMPRESSION_ERROR,
    ),
}


@pytest.mark.parametrize("name", CONNECTION_ERRORS)
async def test_ends_the_connection(name: str, port: int) -> None:
    sent, code = CONNECTION_ERRORS[name]
    async with Peer(port) as peer:
        peer.send(sent)
        assert await peer.failure() is code


@pytest.mark.parametrize(
    "opening",
    [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", PREFACE + frame(PING, 0, 0, bytes(8)), PREFACE + OPEN],
    ids=["HTTP/1.1", "PING first", "HEADERS first"],
)
async def test_what_does_not_begin_as_http2_does_is_refused(opening: bytes, port: int) -> None:
    async with Peer(port, opening=opening) as peer:
        assert await peer.failure() is Code.PROTOCOL_ERROR


async def test_a_connection_that_never_says_what_it_speaks_is_cut() -> None:
    server = GrpcServer({}, Limits(preface_s=0.05))
    async with Peer(await server.start(), opening=PREFACE[:10]) as peer:
        assert await peer.read() is not None  # our settings
        while await peer.read():
            pass
    server.close()


def without(name: bytes) -> bytes:
    return headers(1, [field for field in request() if field[0] != name])


def having(*fields: tuple[bytes, bytes]) -> bytes:
    return headers(1, request("/test.Echo/Echo", *fields))


STREAM_ERRORS = {
    "an upper-case name (8.2.1)": (having((b"X-Up", b"1")), Code.PROTOCOL_ERROR),
    "an empty name (8.2.1)": (having((b"", b"1")), Code.PROTOCOL_ERROR),
    "a value of two lines (8.2.1)": (having((b"x-two", b"1\r\n2")), Code.PROTOCOL_ERROR),
    "a NUL in a value (8.2.1)": (having((b"x-nul", b"\0")), Code.PROTOCOL_ERROR),
    "no method (8.3.1)": (without(b":method"), Code.PROTOCOL_ERROR),
    "no path (8.3.1)": (without(b":path"), Code.PROTOCOL_ERROR),
    "no scheme (8.3.1)": (without(b":scheme"), Code.PROTOCOL_ERROR),
    "an empty path (8.3.1)": (headers(1, request("")), Code.PROTOCOL_ERROR),
    "a pseudo header twice (8.3.1)": (headers(1, [(b":path", b"/"), *request()]), Code.PROTOCOL_ERROR),
    "a pseudo header after others (8.3)": (having((b":authority", b"x")), Code.PROTOCOL_ERROR),
    "a pseudo header of answers (8.3)": (headers(1, [(b":status", b"200"), *request()]), Code.PROTOCOL_ERROR),
    "an unknown pseudo header (8.3)": (headers(1, [(b":who", b"me"), *request()]), Code.PROTOCOL_ERROR),
    "connection (8.2.2)": (having((b"connection", b"close")), Code.PROTOCOL_ERROR),
    "transfer-encoding (8.2.2)": (having((b"transfer-encoding", b"chunked")), Code.PROTOCOL_ERROR),
    "te other than trailers (8.2.2)": (
        headers(1, [(n, b"gzip" if n == b"te" else v) for n, v in request()]),
        Code.PROTOCOL_ERROR,
    ),
    "trailers that do not end (8.1)": (OPEN + headers(1, [(b"x", b"y")]), Code.PROTOCOL_ERROR),
    "a pseudo header in trailers (8.1)": (
        OPEN + headers(1, [(b":path", b"/")], END_STREAM),
        Code.PROTOCOL_ERROR,
    ),
    "a content-length that is none (8.1.1)": (having((b"content-length", b"-1")), Code.PROTOCOL_ERROR),
    "less data than content-length (8.1.1)": (
        having((b"content-length", b"6")) + data(1, message(b""), END_STREAM),
        Code.PROTOCOL_ERROR,
    ),
    "more data than content-length (8.1.1)": (
        having((b"content-length", b"4")) + data(1, message(b"")),
        Code.PROTOCOL_ERROR,
    ),
    "no data, against content-length (8.1.1)": (
        headers(1, request("/test.Echo/Echo", (b"content-length", b"1")), END_STREAM),
        Code.PROTOCOL_ERROR,
    ),
    "less data than content-length, and trailers (8.1.1)": (
        having((b"content-length", b"1")) + headers(1, [(b"x", b"y")], END_STREAM),
        Code.PROTOCOL_ERROR,
    ),
    "DATA after the peer's reset (5.1)": (
        OPEN + frame(RST_STREAM, 0, 1, bytes(4)) + data(1, b"x"),
        Code.STREAM_CLOSED,
    ),
    "a WINDOW_UPDATE of 0 (6.9)": (OPEN + window(1, 0), Code.PROTOCOL_ERROR),
    "a window over 2^31-1 (6.9.1)": (OPEN + window(1, (1 << 31) - 1), Code.FLOW_CONTROL_ERROR),
    "PRIORITY of 4 bytes (6.3)": (OPEN + frame(PRIORITY, 0, 1, bytes(4)), Code.FRAME_SIZE_ERROR),
    "PRIORITY that depends on itself (RFC 7540, 5.3.1)": (
        OPEN + frame(PRIORITY, 0, 1, b"\0\0\0\1\0"),
        Code.PROTOCOL_ERROR,
    ),
}


@pytest.mark.parametrize("name", STREAM_ERRORS)
async def test_ends_the_stream_and_no_other(name: str, port: int, calls: Calls) -> None:
    sent, code = STREAM_ERRORS[name]
    async with Peer(port) as peer:
        peer.send(sent)
        assert await peer.reset(1) is code
        peer.send(headers(3), data(3, message(b"still here")))
        assert await peer.body(3, 15) == message(b"still here")
    assert [call.told for call in calls[:-1]] == [["cancelled"]] * (len(calls) - 1)


class Silent(Echo):
    """Does not end when the peer ends."""

    def half_closed(self) -> None:
        self.told.append("half closed")


@pytest.mark.parametrize(
    "late", [data(1, b"x"), headers(1, [(b"x", b"y")], END_STREAM)], ids=["DATA", "HEADERS"]
)
async def test_frames_after_the_peers_own_end_end_the_stream(late: bytes) -> None:
    calls = Calls(Silent)
    server = GrpcServer({"/test.Echo/Echo": calls})
    async with Peer(await server.start()) as peer:
        peer.send(ENDED, late)
        assert await peer.reset(1) is Code.STREAM_CLOSED
        assert calls[0].told == ["half closed", "cancelled"]
    server.close()


async def test_late_frames_of_a_stream_that_we_ended_are_ignored(port: int) -> None:
    async with Peer(port) as peer:
        peer.send(headers(1, request("/test.Echo/Missing")))
        assert await peer.reset(1) is Code.NO_ERROR
        peer.send(data(1, bytes(9)), window(1, 9), headers(1, [(b"x", b"y")], END_STREAM))
        peer.send(frame(RST_STREAM, 0, 1, bytes(4)), headers(3), data(3, message(b"on")))
        assert await peer.body(3, 7) == message(b"on")


async def test_more_streams_than_allowed_are_refused(port: int, calls: Calls) -> None:
    async with Peer(port) as peer:
        ids = range(1, 2 * LIMITS.streams + 2, 2)
        peer.send(*map(headers, ids))
        assert await peer.reset(ids[-1]) is Code.REFUSED_STREAM
        assert len(calls) == LIMITS.streams
        peer.send(data(1, message(b"x")))
        assert await peer.body(1, 6) == message(b"x")


# -- floods

FLOODS = {
    "PING": frame(PING, 0, 0, bytes(8)),
    "PING acknowledged": frame(PING, ACK, 0, bytes(8)),
    "SETTINGS": settings(),
    "windows that change": settings(initial_window=1) + settings(initial_window=2),
    "PRIORITY": frame(PRIORITY, 0, 1, bytes(4) + b"\1"),
    "empty DATA": data(1, b""),
    "padding without data": frame(DATA, PADDED, 1, b"\x03\0\0\0"),
    "unknown frames": frame(99, 0, 0, b"x"),
    "DATA on an ended stream": data(3, b"x"),
    "RST_STREAM on an ended stream": frame(RST_STREAM, 0, 3, bytes(4)),
}


@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_of_frames_that_bring_nothing_ends_the_connection(name: str, port: int) -> None:
    async with Peer(port) as peer:
        peer.send(OPEN, headers(3), frame(RST_STREAM, 0, 3, bytes(4)), FLOODS[name] * 300)
        assert await peer.failure() is Code.ENHANCE_YOUR_CALM


async def test_rapid_reset_ends_the_connection(port: int, calls: Calls) -> None:
    async with Peer(port) as peer:
        peer.send(*(headers(i) + frame(RST_STREAM, 0, i, bytes(4)) for i in range(1, 1001, 2)))
        assert await peer.failure() is Code.ENHANCE_YOUR_CALM
    assert len(calls) == LIMITS.resets_per_s + 1
    assert all(call.told == ["cancelled"] for call in calls)


async def test_requests_that_are_none_end_the_connection_when_they_are_many(port: int) -> None:
    async with Peer(port) as peer:
        peer.send(*(headers(i, []) for i in range(1, 1001, 2)))
        assert await peer.failure() is Code.ENHANCE_YOUR_CALM


async def test_answered_streams_may_be_taken_back_as_fast_as_one_likes(port: int, calls: Calls) -> None:
    async with Peer(port) as peer:
        for i in range(1, 801, 2):
            peer.send(headers(i), data(i, message(b"x")), frame(RST_STREAM, 0, i, bytes(4)))
        peer.send(headers(801), data(801, message(b"on")))
        assert await peer.body(801, 7) == message(b"on")
    assert len(calls) == 401


@pytest.mark.parametrize("size", [0, 16_384], ids=["empty", "full"])
async def test_a_continuation_flood_ends_the_connection(size: int, port: int) -> None:
    async with Peer(port) as peer:
        peer.send(frame(HEADERS, 0, 1, BLOCK), frame(CONTINUATION, 0, 1, bytes(size)) * 40)
        assert await peer.failure() is Code.ENHANCE_YOUR_CALM


# -- headers

LONG = [(b"x-long", b"v" * 40_000)]
MANY = [(b"x-%d" % i, b"v") for i in range(1500)]


@pytest.mark.parametrize("more", [LONG, MANY], ids=["one long field", "many fields"])
async def test_too_many_headers_cost_their_stream_only(more: list[tuple[bytes, bytes]], port: int) -> None:
    async with Peer(port) as peer:
        peer.send(pieces(1, encode(request("/test.Echo/Echo", *more)), 16_384))
        assert b"\x0bgrpc-status\x018" in (await peer.until(HEADERS, 1, END_STREAM)).payload
        peer.send(headers(3), data(3, message(b"on")))
        assert await peer.body(3, 7) == message(b"on")


async def test_a_header_bomb_is_not_unpacked(port: int, calls: Calls) -> None:
    """4 KB in the table, named 10,000 times by one byte each, would be 40 MB."""
    entry = b"\x40\x01x\x7f\xa1\x1e" + b"v" * 4000  # 4000 = 127 + 0x21 + (0x1e << 7)
    async with Peer(port) as peer:
        peer.send(frame(HEADERS, END_HEADERS, 1, BLOCK + entry))
        peer.send(frame(HEADERS, END_HEADERS, 3, BLOCK + b"\xbe" * 10_000))
        assert b"\x0bgrpc-status\x018" in (await peer.until(HEADERS, 3, END_STREAM)).payload
        peer.send(frame(HEADERS, END_HEADERS, 5, BLOCK + b"\xbe"), data(5, message(b"on")))
        assert await peer.body(5, 7) == message(b"on")
    assert [call.headers["x"] for call in calls] == ["v" * 4000] * 2


async def test_equal_blocks_are_equal_requests_whoever_sends_them(port: int, calls: Calls) -> None:
    """What is remembered of a block must not depend on a table."""
    block = encode(request("/test.Echo/Echo", (b"x-who", b"me")))
    for _ in range(2):
        async with Peer(port) as peer:
            await peer.acknowledge()
            peer.send(frame(HEADERS, END_HEADERS, 1, resized(block)), frame(HEADERS, END_HEADERS, 3, block))
            peer.send(data(3, message(b"x")))
            assert await peer.body(3, 6) == message(b"x")
    assert [call.headers["x-who"] for call in calls] == ["me"] * 4
