"""Starts child processes from a process that has threads."""

from __future__ import annotations

import asyncio
import gc
from asyncio.subprocess import Process
from typing import Any


async def spawn(*command: str, **options: Any) -> Process:
    """``asyncio.create_subprocess_exec`` without garbage collection.

    uvloop forks and runs some Python in the child before it becomes the other program. A collection in that
    moment may finalise an object that waits for its thread, and the child has no threads: it would wait for
    ever, and we for it.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return await asyncio.create_subprocess_exec(*command, **options)
    finally:
        if collecting:
            gc.enable()
