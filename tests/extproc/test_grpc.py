"""What gRPC says of its bytes, and what a call may rely on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import pytest

from pointsman.extproc.grpc import GrpcServer, RpcError, Service, Stream, parse_timeout
from pointsman.extproc.h2_frames import DATA, END_STREAM, HEADERS, RST_STREAM, Code
from pointsman.extproc.hpack import Decoder
from pointsman.testing.http2 import ECHO, Calls, Echo, Peer, data, frame, headers, message, request


@asynccontextmanager
async def serving(service: Service | type[Echo]) -> AsyncIterator[Peer]:
    server = GrpcServer({ECHO: service})
    async with Peer(await server.start()) as peer:
        yield peer
    server.close()


async def last(peer: Peer, stream: int = 1) -> dict[str, str]:
    """The fields that end an answer."""
    block = (await peer.until(HEADERS, stream, END_STREAM)).payload
    return {name.decode(): value.decode() for name, value in Decoder(1 << 16).decode(block)}


def without(name: bytes) -> bytes:
    return headers(1, [field for field in request() if field[0] != name])


def changed(name: bytes, value: bytes) -> bytes:
    return headers(1, [(n, value if n == name else v) for n, v in request()])


async def test_an_answer_has_headers_messages_and_trailers() -> None:
    async with serving(Echo) as peer:
        peer.send(headers(1), data(1, message(b"abc"), END_STREAM))
        begun = await peer.until(HEADERS, 1)
        assert Decoder(1 << 16).decode(begun.payload) == [
            (b":status", b"200"),
            (b"content-type", b"application/grpc"),
        ]
        assert (await peer.until(DATA)).payload == message(b"abc")
        assert await last(peer) == {"grpc-status": "0"}


async def test_an_answer_without_messages_is_trailers_only() -> None:
    async with serving(Echo) as peer:
        peer.send(headers(1, flags=END_STREAM))
        assert await last(peer) == {
            ":status": "200",
            "content-type": "application/grpc",
            "grpc-status": "0",
        }


async def test_a_message_is_percent_encoded() -> None:
    def service(stream: Stream, fields: Mapping[str, str]) -> Echo:
        raise RpcError(5, "100 % naïve\n~")

    async with serving(service) as peer:
        peer.send(headers(1))
        trailers = await last(peer)
        assert trailers["grpc-status"] == "5"
        assert trailers["grpc-message"] == "100 %25 na%C3%AFve%0A~"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (changed(b":method", b"GET"), "12"),
        (changed(b":path", b"/test.Echo/Missing"), "12"),
        (headers(1) + data(1, b"\1\0\0\0\1x"), "12"),
        (headers(1) + data(1, b"\2\0\0\0\1x"), "13"),
        (headers(1) + data(1, b"\0\0\0\0\2x", END_STREAM), "13"),
        (headers(1) + data(1, b"\0\0\0", END_STREAM), "13"),
        (headers(1) + data(1, b"\0\xff\xff\xff\xff"), "8"),
        (headers(1, request(ECHO, (b"grpc-timeout", b"1x"))), "13"),
        (headers(1, request(ECHO, (b"grpc-timeout", b"0n"))), "4"),
        (headers(1, request(ECHO, (b"grpc-timeout", b"5m"))), "4"),
    ],
    ids=[
        "GET",
        "unknown path",
        "compressed",
        "unknown flag",
        "a message cut off",
        "a prefix cut off",
        "4 GB announced",
        "timeout malformed",
        "timeout zero",
        "timeout over",
    ],
)
async def test_refuses(sent: bytes, status: str) -> None:
    async with serving(Echo) as peer:
        peer.send(sent)
        assert (await last(peer))["grpc-status"] == status


async def test_what_can_be_sent_is_told_to_those_who_compress() -> None:
    async with serving(Echo) as peer:
        peer.send(headers(1), data(1, b"\1\0\0\0\1x"))
        assert (await last(peer))["grpc-accept-encoding"] == "identity"


@pytest.mark.parametrize("sent", [changed(b"content-type", b"application/json"), without(b"content-type")])
async def test_other_content_is_415(sent: bytes) -> None:
    async with serving(Echo) as peer:
        peer.send(sent)
        assert await last(peer) == {":status": "415"}


@pytest.mark.parametrize(
    "sent", [changed(b"content-type", b"application/grpc+proto"), without(b"te")], ids=["+proto", "no te"]
)
async def test_takes(sent: bytes) -> None:
    async with serving(Echo) as peer:
        peer.send(sent, data(1, message(b"x"), END_STREAM))
        assert await peer.body(1, 6) == message(b"x")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1H", 3600),
        ("2M", 120),
        ("3S", 3),
        ("4m", 0.004),
        ("5u", 5e-6),
        ("6n", 6e-9),
        ("99999999S", 99999999),
    ],
)
def test_timeouts_have_units(text: str, seconds: float) -> None:
    assert parse_timeout(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "1", "S", "-1S", "1.5S", "1 S", "123456789S", "1s", "\u0661S", "1S\n"])
def test_malformed_timeouts_are_none(text: str) -> None:
    assert parse_timeout(text) is None


async def test_many_messages_in_one_frame_and_one_in_many_frames() -> None:
    calls = Calls()
    async with serving(calls) as peer:
        sent = message(b"a") + message(b"") + message(b"bcd" * 100)
        peer.send(headers(1), data(1, sent[:13]), data(1, sent[13:14]), data(1, sent[14:], END_STREAM))
        assert await peer.body(1, len(sent)) == sent
    assert calls[0].got == [b"a", b"", b"bcd" * 100]


# -- what a call may rely on


def breaks(*_: object) -> None:
    raise ValueError("a bug")


@pytest.mark.parametrize("where", ["message", "half_closed"])
async def test_a_bug_ends_the_call_with_internal_and_tells_it(where: str) -> None:
    calls = Calls(type("Buggy", (Echo,), {where: breaks}))
    async with serving(calls) as peer:
        peer.send(headers(1), data(1, message(b"x"), END_STREAM))
        assert (await last(peer))["grpc-status"] == "13"
    assert calls[0].told[-1] == "cancelled"
    assert calls[0].told.count("cancelled") == 1


async def test_a_bug_in_making_a_call_is_internal() -> None:
    async with serving(breaks) as peer:  # type: ignore[arg-type]
        peer.send(headers(1), data(1, message(b"x"), END_STREAM))
        assert (await last(peer))["grpc-status"] == "13"


async def test_a_bug_at_a_calls_end_harms_no_other() -> None:
    calls = Calls(type("Buggy", (Echo,), {"cancelled": breaks}))
    async with serving(calls) as peer:
        peer.send(headers(1), headers(3), frame(RST_STREAM, 0, 1, bytes(4)), data(3, message(b"x")))
        assert await peer.body(3, 6) == message(b"x")


async def test_a_bug_in_resumed_ends_the_call() -> None:
    class Buggy(Echo):
        def message(self, data: bytes) -> None:
            self.stream.send(bytes(1 << 20))
            assert self.stream.paused

        def resumed(self) -> None:
            breaks()

    calls = Calls(Buggy)
    async with serving(calls) as peer:
        peer.send(frame(8, 0, 0, (1 << 30).to_bytes(4, "big")), headers(1), data(1, message(b"x")))
        peer.send(frame(8, 0, 1, (1 << 30).to_bytes(4, "big")))
        assert (await last(peer))["grpc-status"] == "13"
    assert calls[0].told == ["cancelled"]


async def test_nothing_is_told_after_finish() -> None:
    class Done(Echo):
        def message(self, data: bytes) -> None:
            self.told.append("message")
            self.stream.finish(9, "no")
            self.stream.finish()
            self.stream.send(b"more")

    calls = Calls(Done)
    async with serving(calls) as peer:
        peer.send(headers(1), data(1, message(b"x") + message(b"y")))
        assert (await last(peer))["grpc-status"] == "9"
        assert await peer.reset(1) is Code.NO_ERROR  # the rest need not be sent
        peer.send(data(1, message(b"z"), END_STREAM), headers(3), frame(RST_STREAM, 0, 3, bytes(4)))
        peer.send(frame(6, 0, 0, bytes(8)))
        await peer.until(6)
    assert [call.told for call in calls] == [["message"], ["cancelled"]]


async def test_a_finish_in_the_making_of_a_call_is_its_end() -> None:
    def service(stream: Stream, fields: Mapping[str, str]) -> Echo:
        stream.send(b"at once")
        stream.finish()
        return Echo(stream, fields)

    async with serving(service) as peer:
        peer.send(headers(1), data(1, message(b"x"), END_STREAM))
        assert await peer.body(1, 12) == message(b"at once")
        assert await last(peer) == {"grpc-status": "0"}


async def test_a_deadline_of_a_peer_that_takes_nothing_is_a_reset() -> None:
    """Trailers would wait behind what it does not take."""
    calls = Calls(type("Big", (Echo,), {"message": lambda self, _: self.stream.send(bytes(1 << 20))}))
    async with serving(calls) as peer:
        peer.send(headers(1, request(ECHO, (b"grpc-timeout", b"50m"))), data(1, message(b"x")))
        assert await peer.reset(1) is Code.CANCEL
    assert calls[0].told == ["cancelled"]


async def test_a_finished_answer_reaches_a_slow_peer_whole() -> None:
    def big(stream: Stream, fields: Mapping[str, str]) -> Echo:
        stream.send(bytes(200_000))
        stream.finish(3, "at the end")
        return Echo(stream, fields)

    async with serving(big) as peer:
        peer.send(headers(1))
        left = 200_005
        while left:
            size = len((await peer.until(DATA)).payload)
            left -= size
            more = size.to_bytes(4, "big")
            peer.send(frame(8, 0, 0, more), frame(8, 0, 1, more))
        assert (await last(peer))["grpc-status"] == "3"


async def test_answers_may_come_from_tasks_at_any_time() -> None:
    tasks: set[asyncio.Task[None]] = set()

    async def answer(finish: Callable[[], None], send: Callable[[bytes], None]) -> None:
        for i in range(3):
            await asyncio.sleep(0)
            send(b"%d" % i)
        finish()

    class Later(Echo):
        def half_closed(self) -> None:
            tasks.add(asyncio.create_task(answer(self.stream.finish, self.stream.send)))

    async with serving(Later) as peer:
        peer.send(headers(1, flags=END_STREAM))
        assert await peer.body(1, 18) == message(b"0") + message(b"1") + message(b"2")
        assert await last(peer) == {"grpc-status": "0"}
