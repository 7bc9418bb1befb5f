"""The two ZMQ sockets of one engine process: PUB for its events, ROUTER for who asks to hear some again.

Only here is pyzmq imported, and only where events are asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from pointsman.errors import SettingsError
from pointsman.sim.kv_messages import Parts

if TYPE_CHECKING:
    import zmq

HWM = 100_000
"""Messages that wait for a subscriber before more are dropped, as in vLLM's settings."""


def is_bound(endpoint: str) -> bool:
    """Whether it is bound, by vLLM's rule; and port 0, to which nothing can connect. Else it is connected
    to.
    """
    return "*" in endpoint or "::" in endpoint or endpoint.startswith("ipc://") or endpoint.endswith(":0")


def beside(endpoint: str, place: int) -> str:
    """The endpoint so many ports further; others than TCP's, and free ports, stay."""
    address, _, port = endpoint.rpartition(":")
    return f"{address}:{int(port) + place}" if endpoint.startswith("tcp://") and int(port) else endpoint


class Sockets:
    """Open from the beginning; ``close`` frees all. ``SettingsError`` when an endpoint cannot be had.

    ``bind`` says whether ``endpoint`` is bound; ``replay_endpoint`` always is, or empty. ``replay`` gives the
    answers to whoever asks to hear again from a number on.
    """

    def __init__(
        self, endpoint: str, bind: bool, replay_endpoint: str, replay: Callable[[int], Iterable[Parts]]
    ) -> None:
        try:
            import zmq
        except ImportError as exc:
            raise SettingsError("kv_events: needs pyzmq; pip install 'pointsman[kv-events]'") from exc
        self._again = zmq.Again
        self._nowait = zmq.NOBLOCK
        self._replay = replay
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._router: zmq.Socket[bytes] | None = None
        self.endpoint = endpoint
        """With the port that was found."""
        self.replay_endpoint = replay_endpoint
        try:
            self._pub = self._context.socket(zmq.PUB)
            self._pub.set_hwm(HWM)
            if bind:
                self.endpoint = _bind(self._pub, endpoint)
            else:
                self._pub.connect(endpoint)
            if replay_endpoint:
                self._router = self._context.socket(zmq.ROUTER)
                self._router.set_hwm(0)  # a replay is many messages at once
                self.replay_endpoint = _bind(self._router, replay_endpoint)
        except zmq.ZMQError as exc:
            self._context.destroy(linger=0)
            raise SettingsError(
                f"kv_events: cannot use {endpoint} {replay_endpoint}: {exc}; choose other ports"
            ) from exc
        if self._router is not None:
            self._loop.add_reader(self._router.fileno(), self._answer)

    def send(self, parts: Parts) -> None:
        """To whoever listens now; it never waits."""
        self._pub.send_multipart(parts, self._nowait)

    def close(self) -> None:
        """Ports are free when it returns."""
        if self._router is not None:
            self._loop.remove_reader(self._router.fileno())
        self._context.destroy(linger=0)

    def _answer(self) -> None:
        """Answer all who ask: the descriptor tells only once that somebody does."""
        router = self._router
        assert router is not None
        while True:
            try:
                asked = router.recv_multipart(self._nowait)
            except self._again:
                return
            if len(asked) == 3:  # as vLLM, which logs others
                client, _, start = asked
                for parts in self._replay(int.from_bytes(start, "big")):
                    router.send_multipart((client, b"", *parts))


def _bind(socket: zmq.Socket[bytes], endpoint: str) -> str:
    import zmq

    if "[" in endpoint:
        socket.ipv6 = True
    socket.bind(endpoint)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)
