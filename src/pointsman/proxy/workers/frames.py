"""Whole messages over a stream socket: four bytes of length before each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

LENGTH_BYTES = 4
HIGH_BYTES = 8 * 1024 * 1024
"""More than this waiting to be sent means that the other end is stuck, or much too slow."""


class Frames(asyncio.Protocol):
    """One end of the socket. ``message`` gets each message, ``lost`` is called once at the end."""

    transport: asyncio.Transport

    def __init__(self, message: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        self._message = message
        self._lost = lost
        self._partial = bytearray()
        self._missing = 0
        self.stuck = False
        """The other end does not read what is sent."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so
        self.transport.set_write_buffer_limits(high=HIGH_BYTES)

    def send(self, message: bytes) -> None:
        self.transport.write(len(message).to_bytes(LENGTH_BYTES) + message)

    def data_received(self, data: bytes) -> None:
        partial = self._partial
        if partial:
            partial += data
            if len(partial) < self._missing:
                return
            data = bytes(partial)
            partial.clear()
        at, size = 0, len(data)
        while size - at >= LENGTH_BYTES:
            begin = at + LENGTH_BYTES
            end = begin + int.from_bytes(data[at:begin])
            if end > size:
                self._missing = end - at
                break
            self._message(data[begin:end])
            at = end
        else:
            self._missing = LENGTH_BYTES
        if at < size:
            partial += data[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost()

    def pause_writing(self) -> None:
        self.stuck = True

    def resume_writing(self) -> None:
        self.stuck = False
