"""A real Envoy in front of whatever a test wants, and the picker it asks, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pointsman.config import Settings
from pointsman.extproc.envoy_process import EnvoyProcess
from pointsman.extproc.standalone import Sockets, picker
from pointsman.proxy.core import Core
from pointsman.testing.client import RawClient
from pointsman.testing.serving import settings as settings_for
from pointsman.testing.upstream import FakeUpstream

PATIENCE_S = 10.0


class Gateway:
    """Envoy, and a picker that can go away and come back."""

    core: Core

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self._sockets = Sockets(folder)
        self.envoy = EnvoyProcess(settings, self._sockets.picker, folder)
        self._stack: AsyncExitStack | None = None

    @property
    def port(self) -> int:
        return self.envoy.port

    def client(self) -> RawClient:
        return RawClient(self.port)

    async def start_picker(self) -> None:
        """A new one, which knows nothing of the one before."""
        assert self._stack is None
        self._stack = AsyncExitStack()
        self.core, front = picker(self.settings, self._sockets)
        await self._stack.enter_async_context(self.core.running(front))

    async def stop_picker(self) -> None:
        """It ends as after SIGTERM."""
        stack, self._stack = self._stack, None
        if stack:
            await stack.aclose()

    async def stat(self, name: str) -> int:
        """One of Envoy's numbers; 0 while there is none."""
        _, body = await self.envoy.admin("GET", f"/stats?filter=^{name}$")
        return int(body.rpartition(b":")[2] or 0)

    async def endpoint(self, address: str, what: str) -> str:
        """What Envoy says of an endpoint, as ``health_flags`` or ``weight``; empty when it has none such."""
        _, body = await self.envoy.admin("GET", "/clusters")
        lead = f"endpoints::{address}::{what}::"
        return next(
            (line.removeprefix(lead) for line in body.decode().split("\n") if line.startswith(lead)), ""
        )

    async def until(self, holds: Callable[[], Any]) -> None:
        """Wait for something that comes by itself; ``holds`` may be a coroutine function."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = holds()
                if asyncio.iscoroutine(found):
                    found = await found
                if found:
                    return
                await asyncio.sleep(0.01)

    @property
    def ended(self) -> list[dict[str, Any]]:
        """Decisions whose requests are over, the newest first, as the admin page tells of them."""
        return self.core.decisions.recent(1000)

    @property
    def in_flight(self) -> int:
        """Requests and uncached prompt tokens that the picker believes to be at endpoints."""
        loads = [m.endpoint.load for m in self.core.pool.members.values()]
        assert all(load.requests >= 0 and load.tokens >= 0 for load in loads)
        return sum(load.requests + load.tokens for load in loads)


@asynccontextmanager
async def behind_envoy(
    *endpoints: FakeUpstream | str | Mapping[str, Any],
    fast_lane: bool = False,
    starts_picker: bool = True,
    **sections: Mapping[str, Any],
) -> AsyncIterator[Gateway]:
    """Envoy with its picker in front of ``endpoints`` until the block ends; ``sections`` as in a settings
    file.
    """
    envoy = {"admin_port": 0, "threads": 1, "fast_lane": fast_lane, **sections.pop("envoy", {})}
    log = {"requests": False, **sections.pop("log", {})}
    settings = settings_for(*endpoints, envoy=envoy, log=log, **sections)
    with TemporaryDirectory(prefix="pointsman-") as folder:
        gateway = Gateway(settings, Path(folder))
        try:
            if starts_picker:
                await gateway.start_picker()
            await gateway.envoy.start()
            yield gateway
        finally:
            await gateway.envoy.stop()
            await gateway.stop_picker()
