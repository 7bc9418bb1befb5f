"""A worker's process, and what it is for ``serve``: the data port on a scheduler that is elsewhere.

``python -m pointsman.proxy.workers.worker FD DOORWAY``, started by ``fleet``: its end of the scheduler's
socket, and where connections come from that the scheduler accepts (here none do).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Protocol

import uvloop

from pointsman.config import Settings
from pointsman.errors import SettingsError
from pointsman.proxy.gateway import Gateway
from pointsman.proxy.plane import Plane
from pointsman.proxy.workers.link import Link


class Serving(Protocol):
    """What a worker answers with."""

    async def start(self) -> object:
        """Serve; ``SettingsError`` when that cannot be."""

    async def run(self) -> None:
        """What is to be done besides answering, until cancelled."""

    async def drain(self) -> None:
        """Take nothing new and let what runs end, within its time."""

    def settle(self) -> None:
        """Tell the scheduler of everything that is over."""

    def close(self) -> None:
        """Cut whatever is left."""


Make = Callable[[Settings, Link, socket.socket], Serving]


async def _serve(make: Make, sock: socket.socket, doorway: socket.socket) -> None:
    """Serve until the scheduler says to stop, or is gone, and requests under way have ended."""
    link = Link()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, link.stop.set)
    transport, _ = await loop.create_unix_connection(lambda: link.frames, sock=sock)
    settings = (await link.hello).settings
    logging.basicConfig(
        level=settings.log.level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    serving = make(settings, link, doorway)
    link.settle = serving.settle
    try:
        await serving.start()
        link.up.listening = True
    except SettingsError as error:
        link.up.failed = error.message
        link.stop.set()
    link.flush()
    gc.collect()
    gc.freeze()  # as in ``serve``: what start-up made stays for good
    gc.set_threshold(50_000, 20, 50)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(serving.run())
        await link.stop.wait()
        await serving.drain()
        running.cancel()
    serving.close()
    link.flush()
    transport.close()
    await link.lost.wait()


def run(make: Make) -> None:
    """The whole process."""
    sock, doorway = (socket.socket(fileno=int(fd)) for fd in sys.argv[1:3])
    with sock, doorway, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(make, sock, doorway))


def gateway(settings: Settings, link: Link, doorway: socket.socket) -> Serving:
    """The data port."""
    return Gateway(Plane(settings, link.pool, link, link, time.monotonic), link.refresh_models)


if __name__ == "__main__":
    run(gateway)
