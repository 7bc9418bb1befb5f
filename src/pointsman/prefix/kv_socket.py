"""ZeroMQ sockets on the event loop: messages as they come, a bounded amount in one turn of the loop.

This is the only module that needs pyzmq. libzmq's own threads do the I/O and reconnect; here its sockets
are only emptied, without waiting. What they may hold is bounded: ``HWM`` messages a connection of at most
``MAX_FRAME_BYTES`` a part. An engine whose messages are not taken fast enough keeps them in its own queue.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

import zmq
from zmq.utils.monitor import parse_monitor_message

from pointsman.errors import SettingsError
from pointsman.prefix.kv_feed import Closable, Take
from pointsman.prefix.kv_source import SEQ_BYTES

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 4 * 1024 * 1024
"""The blocks of a million tokens. ZeroMQ drops a connection that sends more in one part."""
HWM = 128
TURN_BYTES = 64 * 1024
"""Read of one socket before others have their turn: about a millisecond of decoding and indexing."""
MESSAGE_BYTES = 256
"""What a message counts for besides its own."""
MAX_SOCKETS = 65536
AGAIN_S = 2.0
UP = zmq.EVENT_HANDSHAKE_SUCCEEDED
DOWN = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
OPTIONS = {
    zmq.LINGER: 0,
    zmq.IPV6: 1,
    zmq.RCVHWM: HWM,
    zmq.MAXMSGSIZE: MAX_FRAME_BYTES,
    zmq.RECONNECT_IVL: 100,  # milliseconds, these and the following
    zmq.RECONNECT_IVL_MAX: 5_000,
    zmq.HEARTBEAT_IVL: 10_000,  # an engine whose machine is gone is noticed, though it says nothing
    zmq.HEARTBEAT_TIMEOUT: 30_000,
}


class Inbox:
    """Reads a socket and owns it: each message goes to ``take``, in order, until ``close``."""

    def __init__(self, socket: zmq.Socket[bytes], take: Take) -> None:
        self._socket = socket
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._fd: int = socket.fileno()
        self._closed = False
        self._loop.add_reader(self._fd, self._read)
        self._loop.call_soon(self._read)  # the descriptor only tells of changes

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=0)

    def _read(self) -> None:
        taken = 0
        while not self._closed and taken < TURN_BYTES:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            taken += sum(map(len, parts)) + MESSAGE_BYTES
            try:
                self._take(parts)
            except Exception:  # the next message is another one
                log.exception("a message of KV events could not be taken")
        if not self._closed:
            self._loop.call_soon(self._read)


class Subscription:
    """Messages of one publisher; ``connection`` hears of each connection to it and of its end.

    libzmq connects again after a connection that broke, but not after one that it ended itself, as it does
    when a message is too large or the other side does not speak ZeroMQ. Then it is told to.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], address: str, take: Take, connection: Callable[[bool], None]
    ) -> None:
        self._socket = socket
        self._address = address
        self._connection = connection
        self._again: asyncio.TimerHandle | None = None
        self._monitor = Inbox(socket.get_monitor_socket(UP | DOWN), self._heard)
        self._inbox = Inbox(socket, take)
        socket.connect(address)

    def close(self) -> None:
        if self._again:
            self._again.cancel()
        self._socket.disable_monitor()
        self._monitor.close()
        self._inbox.close()

    def _heard(self, parts: list[bytes]) -> None:
        up = parse_monitor_message(parts)["event"] == UP
        if self._again:
            self._again.cancel()
        self._again = None if up else asyncio.get_running_loop().call_later(AGAIN_S, self._connect)
        self._connection(up)

    def _connect(self) -> None:
        with suppress(zmq.ZMQError):  # libzmq has given it up, or is at it
            self._socket.disconnect(self._address)
        self._socket.connect(self._address)


class ZmqSockets:
    """Makes sockets; ``close`` ends what they share, and any that are left."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None

    def subscribe(self, address: str, topic: str, take: Take, connection: Callable[[bool], None]) -> Closable:
        """Messages of the publisher at ``address`` whose topic begins with ``topic``."""
        socket = self._socket(zmq.SUB)
        socket.subscribe(topic)
        try:
            return Subscription(socket, address, take, connection)
        except zmq.ZMQError as exc:
            log.warning("no KV events from %s: %s", address, exc)
            return Inbox(socket, take)

    def listen(self, addresses: Sequence[str], topic: str, take: Take) -> Closable:
        """Messages of every publisher that connects to one of ``addresses``, which this process binds."""
        socket = self._socket(zmq.SUB)
        socket.subscribe(topic)
        for address in addresses:
            try:
                socket.bind(address)
            except zmq.ZMQError as exc:
                socket.close(linger=0)
                raise SettingsError(f"kv_events.bind: cannot listen at {address}: {exc}") from exc
        return Inbox(socket, take)

    def ask(self, address: str, start: int, take: Take) -> Closable:
        """The answer to a request for all messages from number ``start`` on (facts 3)."""
        socket = self._socket(zmq.DEALER)
        try:
            socket.connect(address)
            socket.send_multipart([b"", start.to_bytes(SEQ_BYTES, "big")], zmq.NOBLOCK)
        except zmq.ZMQError as exc:
            log.warning("no KV events can be had again from %s: %s", address, exc)
        return Inbox(socket, take)

    def close(self) -> None:
        if self._context:
            self._context.destroy(linger=0)

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        if self._context is None:
            self._context = zmq.Context()
            self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        socket = self._context.socket(kind)
        for option, value in OPTIONS.items():
            socket.setsockopt(option, value)
        return socket
