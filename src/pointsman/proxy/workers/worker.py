"""A worker's process: the data port of ``serve`` on a scheduler that is elsewhere.

``python -m pointsman.proxy.workers.worker FD``, started by ``fleet``; FD is its end of the socket.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
import time

import uvloop

from pointsman.errors import SettingsError
from pointsman.proxy.gateway import Gateway
from pointsman.proxy.plane import Plane
from pointsman.proxy.workers.link import Link


async def serve(sock: socket.socket) -> None:
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
    plane = Plane(settings, link.pool, link, link, time.monotonic)
    gateway = Gateway(plane, link.refresh_models)
    link.settle = gateway.settle
    try:
        link.up.listening = await gateway.start()
    except SettingsError as error:
        link.up.failed = error.message
        link.stop.set()
    link.flush()
    gc.collect()
    gc.freeze()  # as in ``serve``: what start-up made stays for good
    gc.set_threshold(50_000, 20, 50)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(gateway.run())
        await link.stop.wait()
        await gateway.drain()
        running.cancel()
    gateway.close()
    link.flush()
    transport.close()
    await link.lost.wait()


def main() -> None:
    """The whole process."""
    with (
        socket.socket(fileno=int(sys.argv[1])) as sock,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(serve(sock))


if __name__ == "__main__":
    main()
