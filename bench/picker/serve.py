"""A picker on a unix socket, on our gRPC server or on grpc.aio: ``serve.py ours|grpc.aio SOCKET RESPONSES
URL...``.
"""

import asyncio
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

from pointsman.cli.serve import tune_gc
from pointsman.config import load
from pointsman.extproc.picker import PROCESS, Picker
from pointsman.testing import aio_peer


async def serve(server: str, socket: Path, responses: str, urls: list[str]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    told = [f"picker.responses={responses}", "admin.port=0", "log.requests=false", "kv_events.mode=none"]
    own = socket if server == "ours" else socket.with_suffix(".unused")
    picker = Picker(load(overrides=told, endpoints=urls), sockets=(own,))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(picker.running())
        if server != "ours":
            services = {PROCESS: picker.front.processor}
            await stack.enter_async_context(aio_peer.serving(services, f"unix:{socket}"))
        tune_gc()
        print("ready", flush=True)
        await stop.wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4:]))
