"""The simulated engines of a soak, in a process of their own, and what is done to them there."""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from .asks import BLOCK_TOKENS, MODEL
from .chaos import Event, Record
from .client import call
from .process import Process, running

ACCELERATORS = ("h100-nvl", "mi325x", "gaudi3")
KV_TOKENS = 65_536
"""Of each engine: small enough for its cache, and the router's picture of it, to be full soon."""
SPEED = 3.0
"""Simulated seconds in one of ours: a whole answer, also of a slowed engine, is well within the time-outs."""
DOOR = "door"
"""An engine that nobody routes to: its port takes commands for the others, also when theirs are closed."""


@dataclass
class Fleet:
    """Engines by their address, which is also their name at the router."""

    process: Process
    addresses: dict[str, str]
    door: int
    record: Record

    @property
    def urls(self) -> list[str]:
        return [f"http://{address}" for address in self.addresses]

    async def inflict(self, event: Event) -> None:
        address, name = list(self.addresses.items())[event.engine]
        asked_s = time.monotonic()
        await call(self.door, "POST", f"/sim/fault/{name}", event.fault)
        self.record.add(address, event, asked_s, time.monotonic())

    async def play(self, events: list[Event]) -> None:
        """Inflict each event at its time from now."""
        start_s = time.monotonic()
        for event in events:
            await asyncio.sleep(max(0.0, start_s + event.at_s - time.monotonic()))
            await self.inflict(event)

    async def heal(self) -> None:
        """End every fault."""
        for name in self.addresses.values():
            await call(self.door, "DELETE", f"/sim/fault/{name}")
        self.record.end_all(time.monotonic())

    async def states(self) -> dict[str, dict[str, Any]]:
        """What each engine says of itself, by address."""
        return {
            address: msgspec.json.decode(await call(self.door, "GET", f"/sim/state/{name}"))
            for address, name in self.addresses.items()
        }


@contextlib.asynccontextmanager
async def fleet(engines: int, out: Path) -> AsyncIterator[Fleet]:
    """``engines`` engines of mixed speed, and their files in ``out``."""
    common = {"model": MODEL, "block_tokens": BLOCK_TOKENS, "kv_tokens": KV_TOKENS}
    listed = [
        {**common, "name": f"engine-{i}", "accelerator": ACCELERATORS[i % len(ACCELERATORS)]}
        for i in range(engines)
    ]
    file = out / "fleet.yaml"
    file.write_text(yaml.safe_dump({"engines": [*listed, {**common, "name": DOOR}]}))
    args = ["engine", "--fleet", str(file), "--speed", f"{SPEED:g}"]
    async with running("engines", args, out / "engines.log") as process:
        text = await process.says("route to them")
        found = dict(re.findall(r"^  (\S+) +http://(\S+) ", text, re.MULTILINE))
        door = int(found.pop(DOOR).rpartition(":")[2])
        yield Fleet(process, {address: name for name, address in found.items()}, door, Record())
