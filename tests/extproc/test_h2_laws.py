"""However the bytes of a connection are cut on their way, the same comes of them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.extproc import h2
from pointsman.extproc.grpc import GrpcServer
from pointsman.extproc.h2_frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
)
from pointsman.extproc.hpack import encode
from pointsman.testing import http2
from pointsman.testing.http2 import ECHO, Calls, Frame, frame, message, request, window

Streams = dict[int, list[tuple[int, int, bytes]]]


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        """As they were written."""

    @property
    def written(self) -> bytes:
        return b"".join(self.pieces)

    def write(self, data: bytes) -> None:
        self.pieces.append(data)

    def get_extra_info(self, name: str) -> None: ...

    def is_reading(self) -> bool:
        return True

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None: ...

    abort = close


def frames(data: bytes) -> Iterator[Frame]:
    while data:
        size = int.from_bytes(data[:3], "big")
        yield Frame(data[3], data[4], int.from_bytes(data[5:9], "big"), data[9 : 9 + size])
        data = data[9 + size :]


def by_stream(data: bytes) -> Streams:
    """What was sent on each stream; how DATA was cut into frames does not matter."""
    found: Streams = defaultdict(list)
    for each in frames(data):
        sent = found[each.stream]
        if each.kind == DATA and sent and sent[-1][0] == DATA:
            sent[-1] = (DATA, 0, sent[-1][2] + each.payload)
        else:
            sent.append((each.kind, each.flags, each.payload))
    return found


async def serve(parts: list[bytes]) -> tuple[Streams, list[tuple[list[bytes], list[str]]]]:
    """What a server sends, and what its calls are told, when a connection's bytes come in these parts."""
    calls, wire = Calls(), Wire()
    connection = h2.Connection(GrpcServer({ECHO: calls}))
    connection.connection_made(cast(asyncio.Transport, wire))
    for part in parts:
        connection.data_received(part)
        await asyncio.sleep(0)
    connection.connection_lost(None)
    return by_stream(wire.written), [(call.got, call.told) for call in calls]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(edges)]


texts = st.binary(max_size=40)
between = st.one_of(
    st.builds(lambda p: frame(PING, 0, 0, p), st.binary(min_size=8, max_size=8)),
    st.builds(window, st.just(0), st.integers(1, 5000)),
    st.builds(lambda n: http2.settings(initial_window=n), st.integers(0, 100)),
    st.just(frame(77, 1, 1, b"unknown")),
)
"""What may stand between any two frames of streams."""


class Rpc(NamedTuple):
    """A client's side of one stream: its messages, and the frames they came in."""

    messages: list[bytes]
    frames: list[bytes]
    ended: bool


@st.composite
def rpcs(draw: st.DrawFn, stream: int) -> Rpc:
    block = encode(request(ECHO, (b"x-number", b"%d" % stream)))
    at = draw(st.integers(0, len(block)))
    found = [frame(HEADERS, 0, stream, block[:at]) + frame(CONTINUATION, END_HEADERS, stream, block[at:])]
    messages = draw(st.lists(texts, max_size=5))
    for piece in cut(b"".join(map(message, messages)), draw(st.lists(st.integers(0, 1 << 16), max_size=5))):
        padding = draw(st.integers(-1, 3))
        if padding < 0:
            found.append(frame(DATA, 0, stream, piece))
        else:
            found.append(frame(DATA, PADDED, stream, bytes((padding,)) + piece + bytes(padding)))
    ended = draw(st.booleans())
    if ended:
        found.append(draw(st.sampled_from([http2.data(stream, b"", END_STREAM), trailers(stream)])))
    return Rpc(messages, found, ended)


def trailers(stream: int) -> bytes:
    return http2.headers(stream, [(b"x-last", b"1")], END_STREAM)


@st.composite
def connections(draw: st.DrawFn) -> tuple[list[Rpc], list[bytes]]:
    """RPCs, and their frames mixed with one another's and with others: each in order."""
    found = [draw(rpcs(2 * i + 1)) for i in range(draw(st.integers(1, 4)))]
    waiting = [list(rpc.frames) for rpc in found]
    mixed = [frames.pop(0) for frames in waiting]
    while any(waiting):
        mixed.append(draw(st.sampled_from([frames for frames in waiting if frames])).pop(0))
        mixed += draw(st.lists(between, max_size=1))
    return found, mixed


OPENING = PREFACE + frame(SETTINGS, 0, 0)
OPEN_WINDOWS = http2.settings(initial_window=1 << 20) + window(0, 1 << 20)
places = st.lists(st.integers(0, 1 << 16), max_size=12)


@settings(max_examples=200, deadline=None)
@given(connections(), places)
def test_messages_arrive_whole_and_once_however_they_were_cut(
    sent: tuple[list[Rpc], list[bytes]], places: list[int]
) -> None:
    rpcs, mixed = sent
    streams, told = asyncio.run(serve(cut(b"".join((OPENING, *mixed, OPEN_WINDOWS)), places)))
    assert told == [(rpc.messages, ["half closed" if rpc.ended else "cancelled"]) for rpc in rpcs]
    for number, rpc in enumerate(rpcs):
        answer = streams[2 * number + 1]
        assert b"".join(payload for kind, _, payload in answer if kind == DATA) == b"".join(
            map(message, rpc.messages)
        )
        assert bool(answer and answer[-1][1] & END_STREAM) is rpc.ended


@settings(max_examples=200, deadline=None)
@given(
    connections(),
    st.one_of(
        st.binary(max_size=30),
        st.builds(frame, st.integers(0, 12), st.integers(0, 255), st.integers(0, 9), texts),
    ),
    places,
)
def test_what_breaks_the_rules_is_judged_alike_however_it_was_cut(
    sent: tuple[list[Rpc], list[bytes]], wrong: bytes, places: list[int]
) -> None:
    data = b"".join((OPENING, *sent[1], OPEN_WINDOWS, frame(PING, 0, 0, b"so far, "), wrong))
    whole, told = asyncio.run(serve([data]))
    cut_up, told_then = asyncio.run(serve(cut(data, places)))
    assert told_then == told
    assert cut_up[0] == whole[0]
    reset = {stream for stream, sent in whole.items() if any(kind == RST_STREAM for kind, *_ in sent)}
    assert reset == {s for s, sent in cut_up.items() if any(kind == RST_STREAM for kind, *_ in sent)}


def test_one_byte_at_a_time_is_enough() -> None:
    data = b"".join(
        (
            OPENING,
            http2.headers(1),
            http2.data(1, message(b"one") + message(b"two")[:6]),
            http2.data(1, message(b"two")[6:], END_STREAM),
        )
    )
    streams, told = asyncio.run(serve([data[i : i + 1] for i in range(len(data))]))
    assert told == [([b"one", b"two"], ["half closed"])]
    assert streams == asyncio.run(serve([data]))[0]
    assert streams[1][1][2] == message(b"one") + message(b"two")


async def test_what_one_read_brings_is_answered_by_one_write() -> None:
    wire = Wire()
    connection = h2.Connection(GrpcServer({ECHO: Calls()}))
    connection.connection_made(cast(asyncio.Transport, wire))
    connection.data_received(OPENING)
    before = len(wire.pieces)
    sent = message(b"a") + message(b"b")
    connection.data_received(http2.headers(1) + http2.data(1, sent, END_STREAM) + http2.headers(3))
    await asyncio.sleep(0)
    assert len(wire.pieces) == before + 1
    assert by_stream(wire.written)[1][1] == (DATA, 0, sent)
    connection.connection_lost(None)


async def test_the_end_of_an_answer_is_written_with_its_last_bytes_in_pieces_that_a_socket_takes_whole() -> (
    None
):
    wire = Wire()
    connection = h2.Connection(GrpcServer({ECHO: Calls()}))
    connection.connection_made(cast(asyncio.Transport, wire))
    connection.data_received(OPENING + http2.settings(initial_window=1 << 20) + window(0, 1 << 24))
    before = len(wire.pieces)
    sent = message(b"x" * 33_000)
    cuts = [sent[i : i + 16_384] for i in range(0, len(sent), 16_384)]
    asked = b"".join(
        http2.headers(stream)
        + b"".join(http2.data(stream, cut, END_STREAM if cut is cuts[-1] else 0) for cut in cuts)
        for stream in range(1, 41, 2)
    )
    connection.data_received(asked)
    written = wire.pieces[before:]
    assert len(written) > 5
    assert max(map(len, written)) <= 106_432
    ended = []
    for piece in written:
        found = list(frames(piece))
        ended += [each.stream for each in found if each.kind == HEADERS and each.flags & END_STREAM]
        assert found[-1].kind == HEADERS
        assert found[-1].flags & END_STREAM
    assert ended == list(range(1, 41, 2))
    assert {len(by_stream(wire.written)[stream][1][2]) for stream in ended} == {len(sent)}
    connection.connection_lost(None)


async def test_data_waits_for_a_window_that_is_below_zero() -> None:
    wire = Wire()
    connection = h2.Connection(GrpcServer({ECHO: Calls()}))
    connection.connection_made(cast(asyncio.Transport, wire))
    connection.data_received(OPENING + http2.headers(1) + http2.data(1, message(b"one")))
    connection.data_received(http2.data(1, message(b"two")) + http2.settings(initial_window=0))
    assert by_stream(wire.written)[1][-1] == (DATA, 0, message(b"one"))
    connection.data_received(http2.settings(initial_window=100))
    assert by_stream(wire.written)[1][-1] == (DATA, 0, message(b"one") + message(b"two"))
    connection.connection_lost(None)
