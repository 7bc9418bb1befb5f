"""The server's side of HTTP/2 with the ``h2`` library as its peer, and the life of connections."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest

from pointsman.errors import SettingsError
from pointsman.extproc.grpc import GrpcServer, Stream
from pointsman.extproc.h2_frames import ACK, DATA, END_STREAM, GOAWAY, HEADERS, PING, Code
from pointsman.extproc.h2_limits import Limits
from pointsman.testing.http2 import ECHO, Calls, Echo, Frame, Peer, data, frame, headers, message, request

REQUEST = [(name.decode(), value.decode()) for name, value in request()]


class Client:
    """A client by the ``h2`` library, which raises when the server breaks a rule."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.http.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self._writer.write(self.http.data_to_send())

    async def events(self) -> AsyncIterator[h2.events.Event]:
        while found := await self._reader.read(65_536):
            for event in self.http.receive_data(found):
                if isinstance(event, h2.events.DataReceived):
                    self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                yield event
            self.flush()

    async def send(self, stream: int, body: bytes) -> bytes:
        """A whole request's body; returns the answer's, of the same length."""
        answer, ended = b"", False
        events = self.events()
        while True:
            while body and (room := self.http.local_flow_control_window(stream)):
                size = min(room, self.http.max_outbound_frame_size, len(body))
                self.http.send_data(stream, body[:size], end_stream=size == len(body))
                body = body[size:]
            self.flush()
            if ended:
                return answer
            event = await anext(events)
            if isinstance(event, h2.events.DataReceived):
                answer += event.data
            ended = isinstance(event, h2.events.TrailersReceived)


@asynccontextmanager
async def client(port: int) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


@asynccontextmanager
async def serving(
    calls: Calls | None = None, limits: Limits | None = None
) -> AsyncIterator[tuple[GrpcServer, int]]:
    server = GrpcServer({ECHO: calls if calls is not None else Calls()}, limits)
    try:
        yield server, await server.start()
    finally:
        server.close()


@pytest.mark.parametrize("size", [0, 1000, 100_000, 5_000_000])
async def test_a_strict_peer_has_nothing_to_complain_of(size: int) -> None:
    """Five megabytes need both sides' windows opened many times."""
    async with serving() as (_, port), client(port) as peer:
        for stream in (1, 3):
            peer.http.send_headers(stream, REQUEST)
            sent = message(b"x" * size)
            assert await peer.send(stream, sent) == sent


async def test_header_tables_of_a_peer_are_followed() -> None:
    """Before it knows our settings, a peer may use a table; afterwards not; both ways it is understood."""
    calls = Calls()
    async with serving(calls) as (_, port), client(port) as peer:
        for i in range(6):
            fields = [*REQUEST, ("x-same", "value"), ("x-number", str(i // 2))]
            peer.http.send_headers(2 * i + 1, fields)
            await peer.send(2 * i + 1, message(b"x"))
    assert [(call.headers["x-same"], call.headers["x-number"]) for call in calls] == [
        ("value", str(i // 2)) for i in range(6)
    ]


async def test_a_ping_is_answered_with_its_content() -> None:
    async with serving() as (_, port), Peer(port) as peer:
        peer.send(frame(PING, 0, 0, b"12345678"))
        assert await peer.until(PING) == Frame(PING, ACK, 0, b"12345678")


# -- the end of a connection


async def test_a_drain_lets_calls_end_and_takes_no_new_ones() -> None:
    calls = Calls()
    async with serving(calls) as (server, port), Peer(port) as peer:
        peer.send(headers(1))
        await calls.begun.wait()
        drained = asyncio.create_task(server.drain(10))
        assert (await peer.until(GOAWAY)).payload == ((1 << 31) - 1).to_bytes(4, "big") + bytes(4)
        peer.send(headers(3))  # crossed the first GOAWAY: still taken
        ping = await peer.until(PING)
        peer.send(frame(PING, ACK, 0, ping.payload))
        assert (await peer.until(GOAWAY)).payload == (3).to_bytes(4, "big") + bytes(4)
        peer.send(headers(5))
        assert await peer.reset(5) is Code.REFUSED_STREAM
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        assert not drained.done()
        for stream in (1, 3):
            peer.send(data(stream, message(b"bye"), END_STREAM))
            assert await peer.body(stream, 8) == message(b"bye")
        await peer.until(HEADERS, 3, END_STREAM)
        assert await peer.read() is None
        await drained
    assert [call.told for call in calls] == [["half closed"]] * 2


async def test_a_drain_ends_at_its_time_with_calls_unfinished() -> None:
    calls = Calls()
    async with serving(calls) as (server, port), Peer(port) as peer:
        peer.send(headers(1))
        await calls.begun.wait()
        await server.drain(0.05)
        assert calls[0].told == []
        server.close()
        await calls[0].over.wait()


async def test_an_idle_connection_is_drained_at_once() -> None:
    async with serving() as (server, port), Peer(port) as peer:
        await peer.acknowledge()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.drain(10))
            ping = await peer.until(PING)
            peer.send(frame(PING, ACK, 0, ping.payload))
            assert await peer.failure() is Code.NO_ERROR


async def test_a_peer_that_leaves_lets_its_calls_end() -> None:
    calls = Calls()
    async with serving(calls) as (_, port), Peer(port) as peer:
        peer.send(headers(1), frame(GOAWAY, 0, 0, bytes(8)), data(1, message(b"x"), END_STREAM))
        assert await peer.body(1, 6) == message(b"x")
        await peer.until(HEADERS, 1, END_STREAM)
        assert await peer.read() is None
    assert calls[0].told == ["half closed"]


async def test_a_lost_connection_cancels_its_calls_once() -> None:
    calls = Calls()
    async with serving(calls) as (server, port):
        async with Peer(port) as peer:
            peer.send(headers(1), headers(3), data(3, message(b"x"), END_STREAM), headers(5))
            await peer.until(HEADERS, 3, END_STREAM)
        await calls[0].over.wait()
        assert not server.connections
    assert [call.told for call in calls] == [["cancelled"], ["half closed"], ["cancelled"]]


async def test_a_silent_peer_is_asked_and_then_cut() -> None:
    async with serving(limits=Limits(keepalive_s=0.05)) as (_, port), Peer(port) as peer:
        for _ in range(3):
            ping = await peer.until(PING)
            peer.send(frame(PING, ACK, 0, ping.payload))
        await peer.until(PING)
        assert await peer.read() is None


# -- where it listens


class Late(Echo):
    """Answers in a later turn of the event loop."""

    def __init__(self, stream: Stream, fields: Mapping[str, str]) -> None:
        super().__init__(stream, fields)
        asyncio.get_running_loop().call_soon(stream.send, b"late")


async def test_answers_between_reads_are_sent() -> None:
    async with serving(Calls(Late)) as (_, port), Peer(port) as peer:
        peer.send(headers(1))
        assert await peer.body(1, 9) == message(b"late")


async def test_two_servers_share_a_port_when_both_say_so() -> None:
    one, other = GrpcServer({}), GrpcServer({})
    port = await one.start(reuse_port=True)
    assert await other.start(port=port, reuse_port=True) == port
    one.close()
    other.close()


async def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"^picker\.port: 127\.0\.0\.1:{port} is in use"):
            await GrpcServer({}).start(port=port)


async def test_a_unix_socket_replaces_a_stale_one_and_goes_with_its_server(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    server = GrpcServer({})
    assert await server.start(path=str(path)) == 0
    reader, writer = await asyncio.open_unix_connection(str(path))
    assert await reader.readexactly(9)
    writer.transport.abort()
    server.close()
    assert not path.exists()


async def test_a_unix_socket_does_not_replace_a_file(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(SettingsError, match="is no socket"):
        await GrpcServer({}).start(path=str(path))
    assert path.read_text() == "data"


async def test_data_is_sent_in_frames_that_the_peer_allows() -> None:
    async with serving() as (_, port), Peer(port) as peer:
        sent = message(bytes(40_000))
        peer.send(headers(1), *(data(1, sent[i : i + 16_384]) for i in range(0, len(sent), 16_384)))
        sizes = []
        while sum(sizes) < len(sent):
            sizes.append(len((await peer.until(DATA)).payload))
        assert max(sizes) <= 16_384
