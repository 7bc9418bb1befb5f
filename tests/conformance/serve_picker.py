"""Serves the reference picker, or one that is broken for a case: ``serve_picker.py WHICH CONFIG PORT
[FLAG...]``.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import grpc.aio
from broken_pickers import BROKEN
from reference_picker import Picker


async def serve(which: str, config: Path, port: str, *flags: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    kind = Picker if which == "reference" else BROKEN[which][0]
    picker = kind(config.parent, flags)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((picker.handler(),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("ready", os.getpid(), flush=True)
    watching = asyncio.create_task(picker.watch())
    await stop.wait()
    watching.cancel()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
